"""Learned keys and values inside of reentrant gradient checkpoints, and models without checkpoints for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .shared_state import SharedState


class _Bridge(torch.autograd.Function):
    """Passes ``rows`` through, and in backward hands the gradients that gathered in ``leaves`` on to ``sources``."""

    @staticmethod
    def forward(ctx, rows, leaves, *sources):
        ctx.leaves = leaves
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad):
        gathered = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None  # a second backward through a retained graph gathers again
        return grad, None, *gathered


def through_reentrant_checkpoints(
    shared: SharedState,
) -> tuple[SharedState, Callable[[torch.Tensor], torch.Tensor]]:
    """A shared state that gives the right gradients inside of reentrant checkpoints too, and what the rows must pass.

    A reentrant checkpoint runs a backward of its own that stops at the checkpoint's inputs, and learned keys and values
    are not among them: their graph (an embedding, an MLP) would be walked through once a layer, which it does not
    survive. So the layers read leaves, which may gather gradients from any number of backwards, and a node in front of
    the first layer, where backward arrives last, passes the sums on.

    Returns:
        The shared state of leaves, and the function that puts that node behind the rows ``[..., D]``.
    """
    sources = shared.tensors()
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in sources]
    return shared.with_tensors(leaves), lambda rows: _Bridge.apply(rows, leaves, *sources)


def checkpoints_reentrantly(model: nn.Module) -> bool:
    """Does the model, as it stands, recompute layers through reentrant checkpoints?"""
    for module in model.modules():
        if module.training and getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant", True):
                return True
    return False


@contextmanager
def without_checkpoints(model: nn.Module) -> Iterator[None]:
    """While the block runs, the layers of a model are run once and keep what backward needs."""
    switched: list[Any] = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    try:
        for module in switched:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True
