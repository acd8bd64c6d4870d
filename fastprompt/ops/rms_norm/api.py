"""rms_norm: rows over their root mean square, times a weight."""

from typing import Any

import torch

from ...backends import implementation, is_eager
from ...checks import FLOATS, check_tensor, without_autocast
from .reference import weight_gradient


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, backend: str = "auto") -> torch.Tensor:
    """``weight * (x / sqrt(mean(x ** 2, -1) + eps))``, which saves ``x`` and a number for each row.

    Args:
        x: ``[..., D]``, float32, float16, bfloat16 or float64.
        weight: ``[D]``, of the dtype and device of ``x``.
        eps: what is added to the mean.
        backend: "auto", "reference" or "cpu" (the C++ library).

    Returns:
        A tensor like ``x``, differentiable in ``x`` and ``weight``. Sums are taken in fp32 (float64 of float64); the
        quotient is rounded to the dtype before the weight multiplies it, as Llama's norm does.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device.
        RuntimeError: a backend that was asked for and cannot run.
    """
    check_tensor("x", x, list(x.shape) if isinstance(x, torch.Tensor) and x.dim() else ["...", "D"], dtypes=FLOATS)
    check_tensor("weight", weight, [x.shape[-1]], like=("x", x))
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not eps >= 0:
        raise ValueError(f"eps must be a number >= 0, got {eps!r}")
    return RMSNorm.apply(x, weight, float(eps), backend)


class RMSNorm(torch.autograd.Function):
    """Autograd of :func:`rms_norm`; arguments are positional and already checked."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, backend: str = "auto") -> torch.Tensor:
        run: Any = _forward if is_eager(x) else torch.ops.fastprompt.rms_norm
        out, factors = run(x, weight, eps, backend)
        ctx.save_for_backward(x, weight, factors)
        ctx.backend = backend
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        x, weight, factors = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        run: Any = _backward if is_eager(grad) else torch.ops.fastprompt.rms_norm_backward
        grads = run(grad, x, weight, factors, *needs, ctx.backend)
        return *(g if need else None for g, need in zip(grads, needs)), None, None


_library = torch.library.Library("fastprompt", "FRAGMENT")
_library.define("rms_norm(Tensor x, Tensor weight, float eps, str backend) -> (Tensor, Tensor)")
_library.define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor factors, bool need_x, bool need_weight, "
    "str backend) -> (Tensor, Tensor)"
)


@torch.library.impl(_library, "rms_norm", "CompositeExplicitAutograd")
def _forward(x, weight, eps, backend):
    runner = implementation("rms_norm", backend, x.device.type, x.dtype)
    with without_autocast(x.device.type):
        out, factors = runner.forward(_rows(x), weight, eps)
    return out.view(x.shape), factors


def _rows(x):
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


@torch.library.register_fake("fastprompt::rms_norm", lib=_library)
def _forward_fake(x, weight, eps, backend):
    rows = x.shape[:-1].numel()
    factors = x.new_empty(rows, 1, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return x.new_empty(x.shape), factors


@torch.library.impl(_library, "rms_norm_backward", "CompositeExplicitAutograd")
def _backward(grad, x, weight, factors, need_x, need_weight, backend):
    """Gradients of x and weight; an empty tensor stands for one that nobody asked for."""
    runner = implementation("rms_norm", backend, x.device.type, x.dtype)
    flat_grad, flat = _rows(grad), _rows(x)
    with without_autocast(x.device.type):
        dx = runner.backward(flat_grad, flat, weight, factors).view(x.shape) if need_x else x.new_empty(0)
        dweight = weight_gradient(flat_grad, flat, factors) if need_weight else x.new_empty(0)
    return dx, dweight


@torch.library.register_fake("fastprompt::rms_norm_backward", lib=_library)
def _backward_fake(grad, x, weight, factors, need_x, need_weight, backend):
    return (x.new_empty(x.shape if need_x else 0), x.new_empty(weight.shape if need_weight else 0))
