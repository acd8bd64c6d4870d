"""rotary: queries or keys turned by the positions of their rows."""

from typing import Any

import torch

from ...backends import implementation, is_eager
from ...checks import FLOATS, check_tensor, without_autocast


def rotary(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """``x * cosine + turned(x) * sine``, where ``turned((a, b))`` is ``(-b, a)`` of the halves of each head.

    Rotary position embeddings as Llama and most decoders after it have them (Su et al. 2021, arXiv 2104.09864), in one
    pass over the rows; nothing but the tables is saved.

    Args:
        x: ``[B, S, H, Dh]`` float32, float16, bfloat16 or float64; ``Dh`` even. Where a model turns a part of each
            head only, that part: any strides will do, and "triton" reads them in place.
        cosine, sine: ``[B, S, Dh]`` or ``[1, S, Dh]``, of the dtype and device of ``x``. Not trained.
        backend: "auto", "reference", "cpu" (the C++ library) or "triton".

    Returns:
        ``[B, S, H, Dh]``, contiguous, in the dtype of ``x`` and differentiable in it. Half precision is computed in
        fp32 and rounded once.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device, a width that is odd, or a table that
            requires a gradient.
        RuntimeError: a backend that was asked for and cannot run.
    """
    check_tensor("x", x, ["B", "S", "H", "Dh"], dtypes=FLOATS)
    batch, rows, _, width = x.shape
    if width % 2:
        raise ValueError(f"x must have heads of even width, got {width}")
    check_tensor("cosine", cosine, ["B", rows, width], like=("x", x))
    if cosine.shape[0] not in (1, batch):
        raise ValueError(f"cosine must have shape [{batch}, {rows}, {width}] or [1, ...], got {list(cosine.shape)}")
    check_tensor("sine", sine, list(cosine.shape), like=("x", x))
    for name, table in (("cosine", cosine), ("sine", sine)):
        if table.requires_grad:
            raise ValueError(f"{name} must not require a gradient")
    return Rotary.apply(x, cosine, sine, backend)


class Rotary(torch.autograd.Function):
    """Autograd of :func:`rotary`; arguments are positional and already checked."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, backend: str = "auto"
    ) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        ctx.backend = backend
        run: Any = _run if is_eager(x) else torch.ops.fastprompt.rotary
        return run(x, cosine, sine, False, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        run: Any = _run if is_eager(grad) else torch.ops.fastprompt.rotary
        return run(grad, *ctx.saved_tensors, True, ctx.backend), None, None, None


_library = torch.library.Library("fastprompt", "FRAGMENT")
_library.define("rotary(Tensor x, Tensor cosine, Tensor sine, bool backward, str backend) -> Tensor")


@torch.library.impl(_library, "rotary", "CompositeExplicitAutograd")
def _run(x, cosine, sine, backward, backend):
    """Forward, or the gradient of x from that of the result in its place."""
    runner = implementation("rotary", backend, x.device.type, x.dtype)
    with without_autocast(x.device.type):
        return (runner.backward if backward else runner.forward)(x, cosine, sine)


@torch.library.register_fake("fastprompt::rotary", lib=_library)
def _run_fake(x, cosine, sine, backward, backend):
    return x.new_empty(x.shape)
