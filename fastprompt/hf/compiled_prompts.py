"""Prompts of a model that trains them, compiled when they are asked for, and kept until a parameter changes."""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..methods import MultitaskPromptTuning, PrefixTuning, PTuning
from ..methods.cached import sample_of, values_of
from .arguments import Method, check_method
from .attachment import evaluation_mode
from .interventions import Interventions
from .mixed import Mixed
from .mixed_probe import mixed_model
from .prompt_state import Prompt, PromptState
from .shared_state import SharedState
from .snapshot import SWITCHES, is_switched, values_by_name


class CompiledPrompts:
    """What the prompts of one model leave in its frozen base model."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[tuple, PromptState]] = {}
        self._mixed: Mixed | None = None
        self._why_not: str | None = None
        self._interventions: Interventions | None = None

    def mixed(self, base: PreTrainedModel) -> Mixed:
        """The base model for mixed batches. Raises NotImplementedError with the reason why it is not one."""
        if self._of(base).are_others():
            self._mixed = self._why_not = None
            with self._of(base).being_asked():
                try:
                    self._mixed = mixed_model(base)
                except NotImplementedError as reason:
                    self._why_not = str(reason)
        if self._mixed is None:
            raise NotImplementedError(self._why_not)
        return self._mixed

    def watched(self, base: PreTrainedModel) -> AbstractContextManager[None]:
        """The block in which ``base`` is run behind prompts; see :meth:`Interventions.watched`."""
        return self._of(base).watched()

    def _of(self, base):
        if self._interventions is None:
            self._interventions = Interventions(base)
        return self._interventions

    def states(
        self,
        base: PreTrainedModel,
        keys: list[Any],
        encoder: Callable[[Any], nn.Module],
        prompt: Callable[[Any], Prompt],
        keep: bool = True,
    ) -> list[PromptState]:
        """What stands in front of each row, compiled where that is not known.

        Args:
            base: the frozen model; a change of its weights, hooks or adapters counts, too.
            keys: for each row which prompt it has.
            encoder: key -> the module whose parameters the prompt depends on.
            prompt: key -> the prompt.
            keep: may it be used again?
        """
        of_base = self._of(base).asked, *_what_it_computes_with(base)
        found, values = {}, {}
        for key in dict.fromkeys(keys):
            module = encoder(key)
            if module not in values:  # one module may give many prompts
                values[module] = values_of(list(module.parameters()))
            now = of_base, values[module]
            kept = self._kept.get(key)
            if kept is None or kept[0] != now:
                # Not inference tensors, which a later call outside of inference_mode could not take.
                with torch.inference_mode(False), torch.no_grad():
                    kept = now, prompt(key).state(base)
            if keep:
                self._kept[key] = kept
            found[key] = kept[1]
        return [found[key] for key in keys]

    def keep_only(self, wanted: Callable[[Any], bool]) -> None:
        """Forget the prompts whose key is not ``wanted``."""
        self._kept = {key: kept for key, kept in self._kept.items() if wanted(key)}

    def __deepcopy__(self, memo: dict) -> "CompiledPrompts":
        return CompiledPrompts()

    def __reduce__(self) -> tuple:
        return CompiledPrompts, ()


def _what_it_computes_with(base):
    """What of a model may change what a prompt leaves in it."""
    adapters = [values_by_name(x, (*SWITCHES, "scaling")) for x in base.modules() if is_switched(x)]
    return adapters, sample_of([*base.parameters(), *base.buffers()])


@torch.no_grad()
def prompt_of_method(base: PreTrainedModel, method: Method, index: int | None = None) -> Prompt:
    """One of the prompts of a method, in evaluation mode.

    Args:
        base: the model in front of whose text it stands.
        method: one of ours.
        index: which of its prompts or tasks; None: the only one.

    Raises:
        ValueError: no such prompt, or one that does not fit the model.
    """
    check_method(base, method)
    entry = checked_task(index, method.num_prompts, "the method")
    with evaluation_mode(method):
        if isinstance(method, PrefixTuning):
            prefix = method()[:, :, entry]
            shared = SharedState.of_tensor(prefix, base.config, method.layers)
            return Prompt("cartridge" if method.frozen_tokens else "prefix-tuning", shared=shared)
        if isinstance(method, MultitaskPromptTuning):
            rows = method(torch.tensor([entry], device=method.shared.device))
            return Prompt("multitask-prompt-tuning", rows=rows)
        rows = method().unflatten(0, (method.num_prompts, -1))[entry]
        return Prompt("p-tuning" if isinstance(method, PTuning) else "prompt-tuning", rows=rows)


def checked_task(task_id: Any, tasks: int, of: str) -> int:
    """Which of ``tasks`` prompts of ``of`` is meant; None: the only one. Raises ValueError if there is no such one."""
    if task_id is None and tasks == 1:
        return 0
    if isinstance(task_id, bool) or not isinstance(task_id, int) or not 0 <= task_id < tasks:
        expected = (
            f"one of the {tasks} prompts 0 to {tasks - 1} of {of}" if tasks > 1 else f"None, for {of} has one prompt"
        )
        raise ValueError(f"task_id must be {expected}, got {task_id!r}")
    return task_id
