"""Trainer's label smoothing behind prompts and prefixes.

Trainer takes the labels away from the model, and smooths by the logits. It asks a PEFT model for the name of what is
inside of its inside, which with prompt learning is no causal LM: so labels are not shifted, which is a wrong loss for
Prefix-Tuning; and behind prompts there are more logits than labels, which fails.
"""

import functools
import warnings
from typing import Any

import torch
from transformers.modeling_outputs import ModelOutput
from transformers.trainer_pt_utils import LabelSmoother

TEXT = (
    "fastprompt: with label smoothing every label is predicted by the token before it, as without; Trainer forgets it"
)


def smooth_by_text() -> None:
    """Let transformers' LabelSmoother know outputs behind prompts, and those that :func:`to_be_shifted` marks."""
    if not hasattr(LabelSmoother.__call__, "by_text"):
        setattr(LabelSmoother, "__call__", _by_text(LabelSmoother.__call__))  # noqa: B010


def _by_text(original):
    @functools.wraps(original)
    def smooth(self, model_output, labels, shift_labels=False, **kwargs):
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        front = logits.shape[1] - labels.shape[1] if logits.dim() == 3 and labels.dim() == 2 else 0
        if front > 0 or isinstance(model_output, _ToBeShifted):
            if not shift_labels:
                warnings.warn(TEXT, stacklevel=2)
            model_output, shift_labels = (logits[:, front:],), True
        return original(self, model_output, labels, shift_labels, **kwargs)

    smooth.by_text = True
    return smooth


@torch.compiler.disable
def to_be_shifted(output: Any) -> Any:
    """A causal LM's output, of a class of its own; all else about it stays."""
    if isinstance(output, ModelOutput):
        output.__class__ = _marked(type(output))
    return output


class _ToBeShifted:
    """The logits of an output are those of its text, whose labels are not shifted yet."""


@functools.cache
def _marked(kind):
    if issubclass(kind, _ToBeShifted):
        return kind
    plain = lambda self: (kind, tuple(self.get(name) for name in self.__dataclass_fields__))  # noqa: E731
    return type(kind.__name__, (_ToBeShifted, kind), {"__reduce__": plain, "__module__": kind.__module__})
