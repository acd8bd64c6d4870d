"""rms_norm by the C++ library."""

import torch


def forward(x, weight, eps):
    """As the reference."""
    x = x.contiguous()
    out, factors = torch.empty_like(x), x.new_empty(len(x), 1, dtype=torch.float32)
    torch.ops.fastprompt.rms_norm_cpu.default(x, weight.contiguous(), eps, out, factors)
    return out, factors


def backward(grad, x, weight, factors):
    """As the reference."""
    x = x.contiguous()
    dx = torch.empty_like(x)
    torch.ops.fastprompt.rms_norm_backward_cpu.default(grad.contiguous(), x, weight.contiguous(), factors, dx)
    return dx
