"""linear_cross_entropy in plain PyTorch, all logits at once: the definition every other backend is measured against."""

import torch

from ...checks import accumulator


def forward(hidden, weight, bias, labels, counted, need_hidden):
    """The rows' losses ``[M]``, their logits' log-sum-exp ``[M]``, and the gradient of ``hidden`` by the losses' sum or
    an empty tensor.

    ``labels`` are int64 and in range; ``counted [M]`` says which rows have a loss.
    """
    logits = _logits(hidden, weight, bias)
    lse = torch.logsumexp(logits, 1)
    target = logits.gather(1, labels[:, None])[:, 0] if len(labels) else lse
    losses = (lse - target).masked_fill(~counted, 0.0)
    if not need_hidden:
        return losses, lse, lse.new_empty(0)
    return losses, lse, _slope(logits, lse, labels, counted) @ weight.to(lse.dtype)


def backward(grad, hidden, weight, bias, labels, counted, lse, needs):
    """Gradients of hidden, weight and bias for ``grad [M]``, None for one that ``needs`` leaves out."""
    slope = _slope(_logits(hidden, weight, bias), lse, labels, counted) * grad[:, None]
    dhidden = slope @ weight.to(lse.dtype) if needs[0] else None
    dweight = slope.t() @ hidden.to(lse.dtype) if needs[1] else None
    return dhidden, dweight, slope.sum(0) if needs[2] else None


def _logits(hidden, weight, bias):
    """``[M, V]`` in the dtype that sums are kept in."""
    dtype = accumulator(hidden.dtype)
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    return logits if bias is None else logits + bias


def _slope(logits, lse, labels, counted):
    """The losses' gradients by their logits: softmax - one-hot."""
    slope = torch.exp(logits - lse[:, None])
    slope[torch.arange(len(labels), device=labels.device), labels] -= 1.0
    return slope.masked_fill(~counted[:, None], 0.0)
