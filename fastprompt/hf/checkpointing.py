"""Gradient checkpoints: learned keys and values inside of reentrant ones, and what layers need to run a second time."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .masks import PackedRows, running
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


@contextmanager
def recomputing(model: nn.Module, batch: PackedRows) -> Iterator[None]:
    """While the block runs, the model's own checkpoints are told to recompute their layers as layers of ``batch``.

    Attention finds its batch in the mask, which a checkpoint keeps; a layer with a state, or a norm, is given no mask.
    Where layers use the keys and values of others, reentrant checkpoints would lose what of the gradient goes that way
    (in transformers' own forward they do): there they are run as others.
    """
    name = "_gradient_checkpointing_func"
    checkpoints = {module: vars(module)[name] for module in _checkpointing(model) if name in vars(module)}
    if _shares_keys(model):
        checkpoints = {module: partial(function, use_reentrant=False) for module, function in checkpoints.items()}

    @contextmanager
    def told():
        before = {module: vars(module)[name] for module in checkpoints}
        try:
            for module, checkpoint in checkpoints.items():
                vars(module)[name] = knowing(checkpoint)
            yield
        finally:
            for module, checkpoint in before.items():
                vars(module)[name] = checkpoint

    def knowing(checkpoint):
        def checkpoint_in_batch(function, *args, **kwargs):
            def run(*args, **kwargs):
                again = copy.copy(batch)
                # A reentrant checkpoint runs its layers without gradients first; it may hold other checkpoints.
                again.differentiable = torch.is_grad_enabled()
                with running(again), told():
                    return function(*args, **kwargs)

            return checkpoint(run, *args, **kwargs)

        return checkpoint_in_batch

    with told():
        yield


def _shares_keys(model):
    config: Any = getattr(model, "config", None)
    return config is not None and bool(getattr(config.get_text_config(), "num_kv_shared_layers", 0))


def others_checkpoint(model: nn.Module) -> bool:
    """Are parts of the model wrapped into checkpoints that are not its own (torch's CheckpointWrapper)?"""
    return any(hasattr(module, "_checkpoint_wrapped_module") for module in model.modules())


def checkpoints_reentrantly(model: nn.Module) -> bool:
    """Does the model, as it stands, recompute layers through reentrant checkpoints?"""
    functions = (getattr(module, "_gradient_checkpointing_func", None) for module in _checkpointing(model))
    return any(getattr(function, "keywords", {}).get("use_reentrant", True) for function in functions)


def _checkpointing(model):
    """The modules that recompute, as the model stands."""
    return [
        module for module in model.modules() if module.training and getattr(module, "gradient_checkpointing", False)
    ]


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
