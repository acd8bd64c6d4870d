"""The first layer of a decoder, with gradients that go back to the rows of prompts alone.

What tokens bring to the first attention depends on nothing that trains: their embeddings are frozen, and no row has met
another yet. So the projections of queries, keys and values run on all rows, but in backward on those of prompts, which
a plan has in front; what they would give to tokens is thrown away further down. Behind learned keys and values alone
nothing trains in front of the first attention, and autograd runs no backward there by itself.

That rows have not met is what the probe asks: states that reach the attention at tokens are the same behind another
prompt. All else is looked at in every call.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from ..layout import RowPlan
from .checkpointing import others_checkpoint
from .outer_layer import ModuleCall, OuterLayer, forward_of, states_among
from .structure import is_compiled, is_plain_linear

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class FirstLayer(OuterLayer):
    """The first layer of a backbone."""

    number: ClassVar[int] = 0

    def states_of(self, calls: Sequence[ModuleCall]) -> Any:
        """The hidden states that its attention was given."""
        return next(states for module, states in calls if module is self.attention)

    @contextmanager
    def led_back_to_prompts(self, backbone: nn.Module, plan: RowPlan, rows: torch.Tensor) -> Iterator[None]:
        """While the block runs, the layer gives gradients to the rows of prompts alone, if nobody wants the others.

        Args:
            backbone: that it is of.
            plan: that is run.
            rows: ``[R, D]``, its input rows, or anything else.
        """
        with ExitStack() as block:
            if _prompts_alone_train(plan, rows):
                self._replace(self._projections(backbone), plan.front, block)
            yield

    def _projections(self, backbone):
        """What may be replaced, as the model stands: its attention's linear layers; none if somebody looks at what
        passes through the layer, or something in the backbone trains, or runs a second time."""
        parts: list[Any] = list(self.layer.modules())
        seen = any(vars(part)[hooks] for part in parts for hooks in _HOOKS)
        again = any(part.training and getattr(part, "gradient_checkpointing", False) for part in (backbone, *parts))
        compiled = any(map(is_compiled, parts))
        trains = any(parameter.requires_grad for parameter in backbone.parameters())
        if seen or again or others_checkpoint(self.layer) or compiled or trains or not self.is_plain(backbone):
            return []
        linears: list[Any] = [part for part in self.attention.children() if is_plain_linear(part)]
        return [part for part in linears if type(part.weight) is nn.Parameter]  # others are quantised, or sharded

    def _replace(self, projections, front, block):
        if not projections:
            return
        given: list[torch.Tensor] = []  # the states that attention is given, and those of the rows in front

        def remember(attention, args, kwargs):
            states = states_among(args, kwargs)
            given[:] = [] if states is None else (states, states[:, :front])

        block.callback(self.attention.register_forward_pre_hook(remember, with_kwargs=True).remove)
        for linear in projections:
            block.enter_context(forward_of(linear, partial(_project, linear, given)))


def _prompts_alone_train(plan, rows):
    made_by = getattr(rows.grad_fn, "of_prompt_alone", False)
    return torch.is_grad_enabled() and made_by and plan.front is not None and plan.front < len(rows)


def _project(linear, given, input):
    """The forward of ``linear``, whose gradient goes to the rows in front if ``input`` is what attention is given."""
    fits = given and input is given[0] and input.dim() == 3 and input.dtype == linear.weight.dtype
    if not fits or torch.is_autocast_enabled(input.device.type):
        return type(linear).forward(linear, input)
    return _Projection.apply(given[1], input.detach(), linear.weight, linear.bias)


class _Projection(torch.autograd.Function):
    """``[1, R, K] -> [1, R, N]`` of all rows by a frozen weight, with a gradient for those in front alone."""

    @staticmethod
    def forward(ctx, front, rows, weight, bias):
        ctx.save_for_backward(weight)
        ctx.count = front.shape[1]
        return F.linear(rows, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad[:, : ctx.count] @ weight, None, None, None
