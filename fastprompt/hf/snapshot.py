"""A model as it is now, for logits that are computed with it later."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

# By which PEFT's layers know that none of their adapters runs, or else which.
_DISABLED = "_disable_adapters"
SWITCHES = (_DISABLED, "_active_adapter")


class Snapshot:
    """A model as it is now.

    Args:
        base: the model.
        sources: tensors that are read besides its weights.
        part: all of it that is run; None: the whole model.

    Attributes:
        trains: does a weight train?
    """

    def __init__(
        self, base: PreTrainedModel, sources: Sequence[torch.Tensor] = (), part: nn.Module | None = None
    ) -> None:
        modules: list[Any] = list((part or base).modules())
        parameters = [x for module in modules for x in module._parameters.values() if x is not None]
        self._base, self._head = base, base.get_output_embeddings()
        self._versions = [(x, _version(x)) for x in (*sources, *parameters)]
        self._flags = [(x, x.requires_grad) for x in parameters]
        self._switches = {x: values_by_name(x, SWITCHES) for x in modules if is_switched(x)}
        self.trains = any(trains for _, trains in self._flags)

    @contextmanager
    def again(self) -> Iterator[None]:
        """While the block runs, the adapters that ran then run, no others, and the weights that trained then train.

        Raises:
            RuntimeError: sources or weights were written to or taken away meanwhile.
        """
        self._check()
        before: list[tuple[Any, dict[str, Any]]] = []
        for module in filter(is_switched, list(self._base.modules())):
            wanted = self._switches.get(module, {_DISABLED: True})
            before.append((module, values_by_name(module, wanted)))
            vars(module).update(wanted)
        flags = [(x, then) for x, then in self._flags if x.requires_grad != then]
        try:
            for x, then in flags:
                x.requires_grad = then
            yield
        finally:
            for module, now in before:
                vars(module).update(now)
            for x, then in flags:
                x.requires_grad = not then

    def _check(self):
        left = {id(x) for x in self._base.parameters()}
        gone = [x for x, _ in self._flags if id(x) not in left]
        changed = gone + [x for x, version in self._versions if _version(x) != version]
        if changed:
            what = "head" if changed[0] is self._head.weight else "model"
            raise RuntimeError(f"the {what} has changed since the step whose logits are read; read them before")


def is_switched(module: nn.Module) -> bool:
    """Is it a layer of PEFT's, with adapters that may run or not?"""
    return _DISABLED in vars(module) or hasattr(type(module), _DISABLED)


def values_by_name(module: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """The attributes of a module that it has, by name; those that may be changed in place are copied."""
    found: dict[str, Any] = {name: getattr(module, name) for name in names if hasattr(module, name)}
    return {name: copy.copy(x) if isinstance(x, (dict, list)) else x for name, x in found.items()}


def _version(x):
    return None if x.is_inference() else x._version
