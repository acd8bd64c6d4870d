"""Inputs of rotary, its definition, and what may come out of it."""

import torch

from benchmarks.budget import Budget

SIZES = [(1, 2, 1), (3, 22, 2), (9, 64, 1), (2, 160, 2)]  # heads, their width, how many tables


def inputs(heads=3, width=16, dtype=torch.float64, tables=2, rows=5, seed=0):
    """x ``[2, rows, heads, width]``, cosine, sine, and a gradient like x."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(2, rows, heads, width, generator=generator, dtype=torch.float64) for _ in range(2))
    angles = torch.randn(tables, rows, width, generator=generator, dtype=torch.float64)
    return [t.to(dtype) for t in (x, angles.cos(), angles.sin(), grad)]


def definition(x, cosine, sine):
    cosine, sine = cosine.unsqueeze(2), sine.unsqueeze(2)
    a, b = x.chunk(2, -1)
    return x * cosine + torch.cat([-b, a], -1) * sine


def results(function, x, cosine, sine, grad):
    """Output, and gradient of x."""
    x = x.detach().requires_grad_()
    out = function(x, cosine, sine)
    return [out.detach(), *torch.autograd.grad(out, x, grad)]


def budget_of(tensors):
    """Computed in fp32 and rounded once."""

    def evaluate(stored):
        return [stored(y) for y in results(definition, *(t.double() for t in tensors))]

    return Budget.of(evaluate, tensors[0].dtype, operands=False)


def faults(x, cosine, sine, grad):
    """Arguments whose results must not pass for those of the right ones."""
    return {
        "another row": (x.roll(1, 1), cosine, sine, grad),
        "the other way": (x, cosine, -sine, grad),
        "another gradient": (x, cosine, sine, grad.roll(1, 1)),
    }


def strided(tensors):
    """The same numbers with other strides: rows outside of batches, numbers apart, a part of wider heads."""
    yield [t.transpose(0, 1).contiguous().transpose(0, 1) for t in tensors]
    yield [t.unsqueeze(-1).expand(*t.shape, 2).contiguous()[..., 0] for t in tensors]
    yield [torch.cat([t, t], -1)[..., : t.shape[-1]] for t in tensors]
