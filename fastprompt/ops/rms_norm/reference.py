"""rms_norm by PyTorch's own operations."""

import torch


def forward(x, weight, eps):
    """``weight * x / rms(x)`` like ``x [n, D]``, and ``1 / rms(x) [n, 1]`` in the arithmetic of the sums."""
    wide = _wide(x)
    factors = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * factors).to(x.dtype), factors


def backward(grad, x, weight, factors):
    """The gradient of x."""
    direct, wide = _wide(grad) * _wide(weight), _wide(x)
    along = (direct * wide).mean(-1, keepdim=True) * factors.square()
    return ((direct - wide * along) * factors).to(x.dtype)


def weight_gradient(grad, x, factors):
    """``[D]``; the same for every backend: weights rarely train."""
    wide = _wide(x)
    return (_wide(grad) * (wide * factors).to(x.dtype)).sum(0).to(x.dtype)


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()
