"""Modules that run a forward of ours in place of that of their class, and get theirs back."""

import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .structure import has_own_forward


@dataclass(frozen=True)
class ModulePatch:
    """A forward for modules of one kind.

    Attributes:
        modules: a model -> those of its modules that the forward understands.
        forward: of a module and its arguments. It runs the forward of the module's class itself where it does not apply
            (any more).
    """

    modules: Callable[[nn.Module], Iterable[nn.Module]]
    forward: Callable[..., Any]

    def __post_init__(self) -> None:
        # What pickle looks up in a module when it loads it: the forward of its class, so that it comes back unpatched.
        self.forward.__name__ = "forward"

    def apply(self, model: nn.Module) -> None:
        """Give the forward to the model's modules, but for those that have one of their own: what that computes is not
        known."""
        for module in self.modules(model):
            if not has_own_forward(module):
                module.forward = types.MethodType(self.forward, module)

    def undo(self, model: nn.Module) -> None:
        """Take it away from all of them."""
        for module in model.modules():
            if self.is_on(module):
                del module.forward

    def is_on(self, module: nn.Module) -> bool:
        """Has a module this forward?"""
        return getattr(vars(module).get("forward"), "__func__", None) is self.forward
