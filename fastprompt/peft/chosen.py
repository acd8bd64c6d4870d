"""Which prompt each row of a batch has: that of an adapter, and of one of its tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from peft import PeftModel, PeftType

from ..checks import INTS, check_tensor


@dataclass(frozen=True, eq=False)
class ChosenPrompts:
    """The adapters and tasks of the rows of a batch, as ids of prompts.

    Attributes:
        model: the model.
        adapters: those of the batch, each once.
        ids: ``[B]`` int64, an id for each row: of the adapter and, if there are any, the task; None: all rows have the
            one prompt of the active adapter.
        tasks: ``[B]`` int64, the task of each row; None: the rows have none.
        most: the largest number of tasks that one of the adapters has.
    """

    model: PeftModel
    adapters: Sequence[str]
    ids: torch.Tensor | None = None
    tasks: torch.Tensor | None = None
    most: int = 0

    @classmethod
    def of(
        cls, model: PeftModel, names: Sequence[str] | None, task_ids: Any, rows: int, device: torch.device
    ) -> "ChosenPrompts":
        """What a call says.

        Args:
            model: the model.
            names: ``adapter_names``, one for each row, or None.
            task_ids: one for each row, or one for all; None, or not looked at where the active adapter has no tasks.
            rows: B.
            device: of the batch.

        Raises:
            ValueError, TypeError: wrong names or ids. Whether there are such tasks, :meth:`parts` looks.
        """
        ids, adapters = None, [model.active_adapter]
        if names is not None:
            adapters = _adapters_of(model, names, rows)
            ids = torch.tensor([adapters.index(name) for name in names], dtype=torch.int64, device=device)
        if model.active_peft_config.peft_type != PeftType.MULTITASK_PROMPT_TUNING or task_ids is None:
            return cls(model, adapters, ids)
        tasks, most = _tasks_of(task_ids, rows, device), max((_count(model, name) for name in adapters), default=0)
        # Numbers 0 and most + 1 are those of tasks that do not exist, which is seen once ids are on the host.
        numbers = tasks.clamp(-1, most) + 1
        return cls(model, adapters, numbers if ids is None else ids * (most + 2) + numbers, tasks, most)

    def parts(self, prompts: Sequence[int]) -> list[tuple[str, torch.Tensor | None]]:
        """The adapters of the prompts that a batch has, in their order, each with its tasks ``[n]`` among them or None.

        Args:
            prompts: their ids, ascending: ``RowPlan.prompts``.

        Raises:
            ValueError: an adapter has no such task.
        """
        if self.tasks is None or not prompts:
            nothing = None if self.tasks is None else self.tasks[:0]
            return [(name, nothing) for name in self.adapters]
        found: list[tuple[str, torch.Tensor | None]] = []
        for adapter, group in groupby(prompts, lambda prompt: prompt // (self.most + 2)):
            name, tasks = self.adapters[adapter], [prompt % (self.most + 2) - 1 for prompt in group]
            count = _count(self.model, name)
            if tasks[0] < 0 or tasks[-1] >= count:
                low, high = (int(x) for x in self.tasks.aminmax())
                raise ValueError(f"task_ids must lie in [0, {count}), got values from {low} to {high}")
            encoder: Any = self.model.prompt_encoder[name]
            found.append((name, torch.tensor(tasks, device=encoder.embedding.weight.device)))
        return found


def _adapters_of(model, names, rows):
    if len(names) != rows:
        raise ValueError(f"adapter_names must have one entry for each of the {rows} rows, got {len(names)}")
    if unknown := sorted(set(names) - set(model.peft_config)):
        raise ValueError(f"adapter_names must be of {sorted(model.peft_config)}, got {unknown}")
    adapters = sorted(set(names))
    configs = [model.peft_config[name] for name in (model.active_adapter, *adapters)]
    if len({(x.peft_type, x.num_virtual_tokens) for x in configs}) > 1 or configs[0].peft_type == PeftType.CPT:
        raise ValueError(
            f"adapter_names must be adapters of the active one's method and length, not CPT, got {adapters} where "
            f"{model.active_adapter!r} is active"
        )
    return adapters


def _tasks_of(task_ids, rows, device):
    ids = torch.as_tensor(task_ids, device=device).reshape(-1)
    if len(ids) not in (1, rows):
        raise ValueError(f"task_ids must have one entry for each of the {rows} rows or one for all, got {len(ids)}")
    check_tensor("task_ids", ids, ["B"], dtypes=INTS)
    return ids.long().expand(rows)


def _count(model, name):
    """How many tasks an adapter has."""
    return len(model.prompt_encoder[name].prefix_task_cols)
