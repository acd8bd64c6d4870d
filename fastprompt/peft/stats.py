"""stats(model): how the calls of a model were run; StatsCallback writes it into a training log."""

import copy
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..hf.stats import Stats
from .model import SoftPromptModel
from .state import engine_of


def stats(model: nn.Module) -> Stats:
    """Counts of a model's calls since it was accelerated (or made, a SoftPromptModel).

    Wrappers, as of DistributedDataParallel or torch.compile, are looked through.

    Raises:
        TypeError: the model is not accelerated.
    """
    for part in model.modules():
        engine = part._engine if isinstance(part, SoftPromptModel) else engine_of(part)
        if engine is not None:
            return copy.deepcopy(engine.stats)
    raise TypeError(f"model must be accelerated, or be a SoftPromptModel, got {type(model).__name__}")


class StatsCallback(TrainerCallback):
    """Adds the share of packed calls, ``packed``, to every line of a Trainer's log: ``callbacks=[StatsCallback()]``."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, model: Any = None, **others: Any
    ) -> None:
        """Called by the Trainer."""
        found = stats(model)
        if logs is not None and found.calls:
            logs["packed"] = found.packed / found.calls
            state.log_history[-1]["packed"] = logs["packed"]
