"""gated_activation: the elementwise middle of a gated MLP, with less saved for its backward."""

from collections.abc import Callable
from typing import Any

import torch

from ...backends import implementation, is_eager
from ...checks import FLOATS, check_tensor, without_autocast
from .reference import ACTIVATIONS


def gated_activation(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str | Callable[[torch.Tensor], torch.Tensor],
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """``activation(gate) * up``, which saves ``gate`` and ``up`` where autograd would save the activation, too.

    The middle of ``down(act(gate(x)) * up(x))``, the MLP of Llama and most decoders after it. The backward makes the
    activation again, which is cheap; behind frozen projections, which save nothing, that is a third less.

    Args:
        gate: float32, float16, bfloat16 or float64 of any shape.
        up: the shape, dtype and device of ``gate``.
        activation: "silu", "gelu", "gelu_tanh" or "relu", or an elementwise function that gives its argument's shape
            and dtype, the same whenever it is called. It may be the identity, or work in place: it is not given
            ``gate`` itself to write into. torch.compile sees through a function and chooses itself what to save.
        backend: "auto", "reference" or "cpu" (the C++ library, which has "silu" and "gelu_tanh").

    Returns:
        A tensor like ``gate``, differentiable in both. By "reference" its bits and those of the gradients are the ones
        of PyTorch's own operations in this dtype, with autocast off; "cpu" rounds where they do.

    Raises:
        TypeError, ValueError: an argument with another dtype, shape or device, an unknown name, or a function that is
            not elementwise.
        RuntimeError: a backend that was asked for and cannot run.
    """
    check_tensor("gate", gate, list(gate.shape) if isinstance(gate, torch.Tensor) else ["..."], dtypes=FLOATS)
    check_tensor("up", up, list(gate.shape), like=("gate", gate))
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)} or a function, got {activation!r}")
    elif not callable(activation):
        raise TypeError(f"activation must be a name or a function, got {type(activation).__name__}")
    elif torch.compiler.is_compiling():
        return activation(gate.clone()) * up
    return GatedActivation.apply(gate, up, activation, backend)


class GatedActivation(torch.autograd.Function):
    """Autograd of :func:`gated_activation`; arguments are positional and already checked."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: torch.Tensor,
        activation: str | Callable[[torch.Tensor], torch.Tensor],
        backend: str = "auto",
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.backend = activation, backend
        if is_eager(gate) or not isinstance(activation, str):  # an operator takes no function
            return _forward(gate, up, activation, backend)
        return torch.ops.fastprompt.gated_activation(gate, up, activation, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        gate, up = ctx.saved_tensors
        eager = is_eager(grad) or not isinstance(ctx.activation, str)
        run: Any = _backward if eager else torch.ops.fastprompt.gated_activation_backward
        needs = ctx.needs_input_grad[:2]
        grads = run(grad, gate, up, ctx.activation, *needs, ctx.backend)
        return *(g if need else None for g, need in zip(grads, needs)), None, None


_library = torch.library.Library("fastprompt", "FRAGMENT")
_library.define("gated_activation(Tensor gate, Tensor up, str activation, str backend) -> Tensor")
_library.define(
    "gated_activation_backward(Tensor grad, Tensor gate, Tensor up, str activation, bool need_gate, bool need_up, "
    "str backend) -> (Tensor, Tensor)"
)


@torch.library.impl(_library, "gated_activation", "CompositeExplicitAutograd")
def _forward(gate, up, activation, backend):
    with without_autocast(gate.device.type):
        return _implementation(gate, activation, backend).forward(gate, up, activation)


def _implementation(gate, activation, backend):
    name = activation if isinstance(activation, str) else "a function"
    return implementation("gated_activation", backend, gate.device.type, gate.dtype, activation=name)


@torch.library.register_fake("fastprompt::gated_activation", lib=_library)
def _forward_fake(gate, up, activation, backend):
    return torch.empty_like(gate)


@torch.library.impl(_library, "gated_activation_backward", "CompositeExplicitAutograd")
def _backward(grad, gate, up, activation, need_gate, need_up, backend):
    """Gradients of gate and up; an empty tensor stands for one that nobody asked for."""
    with without_autocast(gate.device.type):
        runner = _implementation(gate, activation, backend)
        grads = runner.backward(grad, gate, up, activation, need_gate, need_up)
    return tuple(gate.new_empty(0) if g is None else g for g in grads)


@torch.library.register_fake("fastprompt::gated_activation_backward", lib=_library)
def _backward_fake(grad, gate, up, activation, need_gate, need_up, backend):
    return tuple(torch.empty_like(x) if need else x.new_empty(0) for x, need in ((gate, need_gate), (up, need_up)))
