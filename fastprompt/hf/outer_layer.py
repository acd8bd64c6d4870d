"""The first and the last layer of a decoder: which of their rows need not run is another question than in between."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import nn

from .rotary import ROTARY
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
        parent, name: the module that holds the list of layers which it begins or ends, and what it is called there.
        layers: those layers, in order.
        layer: the decoder layer, which takes hidden states ``[1, R, D]`` first.
        attention: its attention, a direct child.
    """

    number: ClassVar[int]  # in the order of the calls
    parent: nn.Module
    name: str
    layers: tuple[nn.Module, ...]
    layer: nn.Module
    attention: nn.Module

    @classmethod
    def of(cls: type[Layer], backbone: nn.Module, calls: Sequence[ModuleCall]) -> Layer | None:
        """The layer at this end of a run of the backbone, if it has one attention and no state; else None."""
        called = [call.module for call in calls]
        lists = (
            (parent, name, tuple(child))
            for parent in backbone.modules()
            for name, child in parent.named_children()
            if isinstance(child, nn.ModuleList)
        )
        found = next((x for x in lists if any(layer in called for layer in x[2])), None)
        if found is None:
            return None
        parent, name, layers = found
        in_order = [module for module in called if module in layers]
        layer = in_order[cls.number]
        attentions = [x for x in layer.children() if hasattr(x, "layer_idx") and called.count(x) == 1]
        if len(attentions) != 1 or in_order.count(layer) != 1 or any(map(keeps_state, layer.modules())):
            return None
        return cls(parent, name, layers, layer, attentions[0])

    def is_plain(self, backbone: nn.Module) -> bool:
        """Is it still at this end, runs the forward of its class, and does nobody but itself run it a second time?"""
        if torch.compiler.is_compiling() or tuple(getattr(self.parent, self.name, ())) != self.layers:
            return False
        if not hasattr(self.layer, "gradient_checkpointing") and getattr(backbone, "gradient_checkpointing", False):
            return False
        return not any(has_own_forward(x) and not ROTARY.is_on(x) for x in (self.layer, self.attention))


@contextmanager
def forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While the block runs, a call of the module runs ``forward``, whatever ``compile`` made of its own."""
    attributes = vars(module)
    before: dict[str, Any] = {
        name: attributes.pop(name) for name in ("forward", "_compiled_call_impl") if name in attributes
    }
    attributes["forward"] = forward
    try:
        yield
    finally:
        del attributes["forward"]
        attributes.update(before)
