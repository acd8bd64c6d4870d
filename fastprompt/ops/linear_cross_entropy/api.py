"""linear_cross_entropy: the loss behind a linear head, without its logits in memory."""

from typing import Any

import torch

from ...backends import implementation, is_eager
from ...checks import FLOATS, INTS, accumulator, check_range, check_tensor, without_autocast


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "sum",
    backend: str = "auto",
) -> torch.Tensor:
    """The cross-entropy of ``hidden @ weight.T + bias`` against ``labels``, summed over the rows or of each.

    What ``torch.nn.functional.cross_entropy(linear(hidden, weight, bias), labels, reduction=reduction)`` is, by
    "blocked" in blocks of rows and columns that take a few MiB in place of ``M * V`` logits. Behind a frozen head the
    gradient of ``hidden`` is made in the forward pass, where its blocks are in the cache: two matrix products in place
    of three.

    Args:
        hidden: ``[M, D]`` float32, float16, bfloat16 or float64.
        weight: ``[V, D]``, the dtype and device of ``hidden``.
        bias: ``[V]``, likewise, or None. -inf takes a class out.
        labels: ``[M]`` int64 or int32 in ``[0, V)``, or ``ignore_index``.
        ignore_index: the label of rows without a loss; all of their gradient is zero. Any int.
        reduction: "sum" or "none".
        backend: "auto", "reference" or "blocked". "auto" takes "blocked".

    Returns:
        A scalar, with "none" ``[M]``, differentiable in ``hidden``, ``weight`` and ``bias``; float32 for half
        precision, which could not hold a sum over many rows, else the dtype of ``hidden``; under autocast, too. Half
        precision is computed in fp32 and gradients are rounded once, but for the softmax weights that "blocked" hands
        to a GPU's matrix units in the dtype of ``weight``. Zero for no rows. The same bits every time.

    Raises:
        TypeError, ValueError: an argument with another dtype, shape or device, a label out of range, or another
            ``reduction``.
        RuntimeError: a backend that was asked for and cannot run.
    """
    check_tensor("hidden", hidden, ["M", "D"], dtypes=FLOATS)
    check_tensor("weight", weight, ["V", hidden.shape[1]], like=("hidden", hidden))
    if bias is not None:
        check_tensor("bias", bias, [weight.shape[0]], like=("hidden", hidden))
    if len(weight) == 0 and len(hidden) > 0:
        raise ValueError(f"weight must have a row for every class, got {list(weight.shape)}")
    check_tensor("labels", labels, [hidden.shape[0]], dtypes=INTS, like=("hidden", hidden))
    if reduction not in ("sum", "none"):
        raise ValueError(f'reduction must be "sum" or "none", got {reduction!r}')
    losses = LinearCrossEntropy.apply(hidden, weight, bias, labels, int(ignore_index), backend)
    return losses.sum() if reduction == "sum" else losses


class LinearCrossEntropy(torch.autograd.Function):
    """Autograd of :func:`linear_cross_entropy`, the loss of each row; arguments are positional and already checked."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        ignore_index: int,
        backend: str,
    ) -> torch.Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        ctx.frozen = not (need_weight or need_bias)
        run = _forward if is_eager(hidden) else torch.ops.fastprompt.linear_cross_entropy
        need_now = need_hidden and ctx.frozen
        losses, lse, dhidden = run(hidden, weight, bias, labels, ignore_index, need_now, backend)
        if ctx.frozen:
            ctx.save_for_backward(dhidden)
        else:
            ctx.save_for_backward(hidden, weight, bias, labels, lse)
        ctx.dtype, ctx.ignore_index, ctx.backend = hidden.dtype, ignore_index, backend
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        if ctx.frozen:
            (dhidden,) = ctx.saved_tensors
            return (dhidden * grad[:, None]).to(ctx.dtype), None, None, None, None, None
        needs = ctx.needs_input_grad[:3]
        run: Any = _backward if is_eager(grad) else torch.ops.fastprompt.linear_cross_entropy_backward
        grads = run(grad, *ctx.saved_tensors, ctx.ignore_index, *needs, ctx.backend)
        return *(g if need else None for g, need in zip(grads, needs)), None, None, None


_library = torch.library.Library("fastprompt", "FRAGMENT")
_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"
_library.define(
    f"linear_cross_entropy({_INPUTS}, int ignore_index, bool need_hidden, str backend) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"linear_cross_entropy_backward(Tensor grad, {_INPUTS}, Tensor lse, int ignore_index, bool need_hidden, "
    "bool need_weight, bool need_bias, str backend) -> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(_library, "linear_cross_entropy", "CompositeExplicitAutograd")
def _forward(hidden, weight, bias, labels, ignore_index, need_hidden, backend):
    """The rows' losses ``[M]``, log-sum-exp ``[M]`` of their logits, and the gradient of the losses' sum by ``hidden``,
    all in the dtype of sums; an empty tensor in place of a gradient that is not needed."""
    runner = implementation("linear_cross_entropy", backend, hidden.device.type, hidden.dtype)
    counted = labels != ignore_index
    labels = labels.long().masked_fill(~counted, 0)
    check_range("labels", labels[counted] if labels.device.type == "cpu" else labels, 0, weight.shape[0])
    with without_autocast(hidden.device.type):
        return runner.forward(hidden, weight, bias, labels, counted, need_hidden)


@torch.library.register_fake("fastprompt::linear_cross_entropy", lib=_library)
def _forward_fake(hidden, weight, bias, labels, ignore_index, need_hidden, backend):
    dtype = accumulator(hidden.dtype)
    shape = hidden.shape if need_hidden else (0,)
    return tuple(hidden.new_empty(size, dtype=dtype) for size in (hidden.shape[:1], hidden.shape[:1], shape))


@torch.library.impl(_library, "linear_cross_entropy_backward", "CompositeExplicitAutograd")
def _backward(grad, hidden, weight, bias, labels, lse, ignore_index, need_hidden, need_weight, need_bias, backend):
    """Gradients of hidden, weight and bias for ``grad [M]``; an empty tensor stands for one that nobody asked for."""
    runner = implementation("linear_cross_entropy", backend, hidden.device.type, hidden.dtype)
    counted = labels != ignore_index
    labels = labels.long().masked_fill(~counted, 0)
    needs = (need_hidden, need_weight, need_bias and bias is not None)
    with without_autocast(hidden.device.type):
        grads = runner.backward(grad, hidden, weight, bias, labels, counted, lse, needs)
    return tuple(hidden.new_empty(0) if g is None else g.to(hidden.dtype) for g in grads)


@torch.library.register_fake("fastprompt::linear_cross_entropy_backward", lib=_library)
def _backward_fake(grad, hidden, weight, bias, labels, lse, ignore_index, need_hidden, need_weight, need_bias, backend):
    pairs = ((hidden, need_hidden), (weight, need_weight), (bias, need_bias and bias is not None))
    return tuple(hidden.new_empty(x.shape if need else 0) for x, need in pairs)
