"""The first and the last layer of a decoder: which of their rows need not run is another question than in between."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import nn

from .rotary import is_patched
from .structure import has_own_forward, keeps_state


class ModuleCall(NamedTuple):
    """A module that was called, and the hidden states it was given; None: nothing of that name."""

    module: nn.Module
    states: Any


def calls_of(backbone: nn.Module, run: Callable[[], Any]) -> tuple[list[ModuleCall], Any]:
    """The calls of a backbone's modules in a run, in order, and what the run returns."""
    calls: list[ModuleCall] = []
    with ExitStack() as hooks:
        for module in backbone.modules():
            hook = module.register_forward_pre_hook(
                lambda module, args, kwargs: calls.append(ModuleCall(module, states_among(args, kwargs))),
                with_kwargs=True,
            )
            hooks.callback(hook.remove)
        output = run()
    return calls, output


def states_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden states among a module's arguments, or None."""
    return args[0] if args else kwargs.get("hidden_states")


Layer = TypeVar("Layer", bound="OuterLayer")


@dataclass(frozen=True, eq=False)
class OuterLayer:
    """A layer at an end of a backbone.

    Attributes:
        layers: the list that it begins or ends.
        layer: the decoder layer, which takes hidden states ``[1, R, D]`` first.
        attention: its attention, a direct child.
    """

    number: ClassVar[int]  # in the order of the calls
    layers: nn.ModuleList
    layer: nn.Module
    attention: nn.Module

    @classmethod
    def of(cls: type[Layer], backbone: nn.Module, calls: Sequence[ModuleCall]) -> Layer | None:
        """The layer at this end of a run of the backbone, if it has one attention and no state; else None."""
        called = [call.module for call in calls]
        lists = [x for x in backbone.modules() if isinstance(x, nn.ModuleList) and any(y in called for y in x)]
        if not lists:
            return None
        in_order = [module for module in called if any(module is layer for layer in lists[0])]
        layer = in_order[cls.number]
        attentions = [x for x in layer.children() if hasattr(x, "layer_idx") and called.count(x) == 1]
        if len(attentions) != 1 or in_order.count(layer) != 1 or any(map(keeps_state, layer.modules())):
            return None
        return cls(lists[0], layer, attentions[0])

    def is_plain(self, backbone: nn.Module) -> bool:
        """Does it still run the forward of its class, uncompiled, and nobody but itself runs it a second time?"""
        if torch.compiler.is_compiling() or not any(layer is self.layer for layer in self.layers):
            return False
        if not hasattr(self.layer, "gradient_checkpointing") and getattr(backbone, "gradient_checkpointing", False):
            return False
        return not any(
            (has_own_forward(module) and not is_patched(module))
            or getattr(module, "_compiled_call_impl", None) is not None
            for module in (self.layer, self.attention)
        )


@contextmanager
def forward_of(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """While the block runs, a module has another forward."""
    before = vars(module).pop("forward", None)
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
