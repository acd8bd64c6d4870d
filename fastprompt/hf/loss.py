"""Cross-entropy behind a frozen linear head, without the logits.

The gradient of a row's loss by its hidden state is ``softmax(hidden W^T) W - W[label]``: attention over the vocabulary,
with the head's weight as keys and values. So it is computed as attention is: over a block of columns at a time, with a
running maximum and sum, and the block's softmax weights are multiplied with the block's rows of the weight while they
are in cache. The same two matrix products as with the logits in memory, and a buffer of a few MiB in their place.

It is also closer to float64 than cross_entropy on a CPU (3e-7 against 1e-5 over 49k classes), so in training the two
drift apart: up to ``ROWS`` labelled rows, where it would save little, the engine leaves the loss to the model.
"""

from typing import Any

import torch

ROWS = 256
_BLOCK = {"cpu": (1024, 2048)}  # rows and columns of a block: on a CPU it should stay in the cache
_LARGE_BLOCK = (8192, 16384)  # elsewhere, few large products
_SPREAD = 16  # unused columns, so that the rows of a block do not compete for the same cache lines


class SummedCrossEntropy(torch.autograd.Function):
    """Sum over rows of the cross-entropy of ``hidden @ weight.T + bias`` against ``labels``; a gradient of ``hidden``.

    Args:
        hidden: ``[M, D]``.
        weight, bias: ``[V, D]`` and ``[V]`` or None; they get no gradient.
        labels: ``[M]`` int64 in ``[0, V)``.

    Returns:
        A scalar.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        rows, _ = block = _BLOCK.get(hidden.device.type, _LARGE_BLOCK)
        grad = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        total = hidden.new_zeros(())
        for at in range(0, len(hidden), rows):
            part = slice(at, at + rows)
            total += _block_of_rows(
                hidden[part], weight, bias, labels[part], None if grad is None else grad[part], block
            )
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        return ctx.saved_tensors[0] * grad, None, None, None


def _block_of_rows(hidden, weight, bias, labels, grad, block):
    """The summed loss of ``hidden [m, D]``; its gradient is written into ``grad``, zeros before."""
    columns = block[1]
    buffer = hidden.new_empty(len(hidden), columns + _SPREAD)
    largest = hidden.new_full((len(hidden), 1), -torch.inf)
    mass = hidden.new_zeros(len(hidden), 1)  # the sum of exp(logit - largest) so far
    for at in range(0, len(weight), columns):
        rows = weight[at : at + columns]  # [c, D]
        scores = torch.mm(hidden, rows.t(), out=buffer[:, : len(rows)])  # [m, c]
        if bias is not None:
            scores += bias[at : at + columns]
        larger = torch.maximum(largest, scores.amax(1, keepdim=True))
        shrink = (largest - larger).exp_()  # the first time exp(-inf): nothing to keep
        weights = scores.sub_(larger).exp_()
        mass.mul_(shrink).add_(weights.sum(1, keepdim=True))
        if grad is not None:
            grad.mul_(shrink).addmm_(weights, rows)
        largest = larger
    chosen = weight[labels]  # [m, D]
    target = torch.linalg.vecdot(hidden, chosen)
    if bias is not None:
        target += bias[labels]
    if grad is not None:
        grad.div_(mass).sub_(chosen)
    return (largest + mass.log()).sum() - target.sum()
