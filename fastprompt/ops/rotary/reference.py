"""rotary by PyTorch's own operations."""

import torch


def forward(x, cosine, sine):
    """Heads ``[B, S, H, Dh]``, turned by tables ``[B or 1, S, Dh]``."""
    return _sum(x, cosine, _turned(_wide(x)) * _wide(sine).unsqueeze(2))


def backward(grad, cosine, sine):
    """The gradient of x."""
    return _sum(grad, cosine, -_turned(_wide(grad) * _wide(sine).unsqueeze(2)))


def _sum(x, cosine, turned):
    return (_wide(x) * _wide(cosine).unsqueeze(2) + turned).to(x.dtype).contiguous()


def _turned(x):
    """``(-b, a)`` of the halves ``(a, b)`` of each head."""
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()
