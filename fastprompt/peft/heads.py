"""Heads behind prompts, as people use them: targets count the text, and a class is read off a row's last real token.

PEFT hands targets on as they come. Behind virtual tokens, labels of the text's tokens do not fit then, and the
positions of an answer mean other tokens. A classifier on a decoder is told no token ids behind prompts, and reads the
last column, which is padding where rows are padded on the right.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, PeftModelForQuestionAnswering, PeftModelForTokenClassification
from torch import nn
from transformers import PreTrainedModel

from ..hf.request import tokens_of

_POSITIONS = ("start_positions", "end_positions")


def targets_of_text(
    model: PeftModel, num_virtual_tokens: int, given: dict[str, Any], tell: Callable[[str], None]
) -> tuple[dict[str, Any], bool]:
    """A call's arguments with targets as PEFT's forward takes them, and whether outputs are wanted of the text only.

    Args:
        model: the PEFT model.
        num_virtual_tokens: P at the input; 0 behind a prefix.
        given: the arguments by name; they are not changed.
        tell: is called with one sentence if the arguments are.
    """
    tokens = tokens_of(given)
    if not num_virtual_tokens or tokens is None:
        return given, False
    if isinstance(model, PeftModelForTokenClassification):
        labels = given.get("labels")
        if labels is None or labels.shape != tokens.shape[:2]:
            return given, False
        tell("fastprompt: labels [B, S] are those of the text, and logits come for the text; PEFT refuses them")
        return {**given, "labels": nn.functional.pad(labels, (num_virtual_tokens, 0), value=-100)}, True
    if isinstance(model, PeftModelForQuestionAnswering):
        positions = {name: given[name] for name in _POSITIONS if given.get(name) is not None}
        if not positions:
            return given, False
        tell("fastprompt: answers' positions count the text, and logits come for the text; PEFT counts virtual tokens")
        return {**given, **{name: x.clamp(min=0) + num_virtual_tokens for name, x in positions.items()}}, True
    return given, False


def outputs_of_text(output: Any, num_virtual_tokens: int) -> Any:
    """An output, a ModelOutput or tuple, with its logits ``[B, P + S, ...]`` cut to the text."""
    if isinstance(output, tuple):
        return tuple(x[:, num_virtual_tokens:] if isinstance(x, torch.Tensor) and x.dim() > 1 else x for x in output)
    for name in ("logits", "start_logits", "end_logits"):
        if output.get(name) is not None:
            output[name] = output[name][:, num_virtual_tokens:]
    return output


@contextmanager
def last_token_read(
    base: PreTrainedModel, given: dict[str, Any], by_id: bool, tell: Callable[[str], None]
) -> Iterator[None]:
    """While the block runs, a classifier on a decoder finds the last real token where it looks for it.

    Args:
        base: the classifier.
        given: the arguments of the PEFT model's forward.
        by_id: is the classifier given the token ids, by which it looks for the last one? Else it takes the last column.
        tell: is called with one sentence if a row has its last token elsewhere.
    """
    mask, ids = given.get("attention_mask"), given.get("input_ids")
    if mask is None or mask.dim() != 2:
        yield
        return
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask != 0, columns, -1).amax(1)  # -1: the last virtual token, or there is none
    padding = getattr(base.config, "pad_token_id", None)
    read = columns[-1:].expand(len(mask))
    if by_id and ids is not None and padding is not None:
        read = torch.where(ids.to(mask.device) != padding, columns, 0).amax(1)
    if torch.equal(read, last):
        yield
        return
    tell("fastprompt: a row's class is read off its last real token; PEFT reads padding where that stands last")

    def put(module, args, output):
        states = output.last_hidden_state.clone()
        front = states.shape[1] - mask.shape[1]
        row = torch.arange(len(mask), device=states.device)
        source, target = (front + last).clamp(min=0), front + read
        states[row, target.to(row.device)] = states[row, source.to(row.device)]
        output.last_hidden_state = states
        return output

    hook = base.base_model.register_forward_hook(put)
    try:
        yield
    finally:
        hook.remove()
