"""gated_activation by PyTorch's own operations: those that autograd would run, in the same order."""

import torch
from torch.nn import functional

_aten = torch.ops.aten

# The function, and its gradient by its argument as autograd computes it.
ACTIVATIONS = {
    "silu": (functional.silu, _aten.silu_backward),
    "gelu": (functional.gelu, _aten.gelu_backward),
    "gelu_tanh": (
        lambda x: functional.gelu(x, approximate="tanh"),
        lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh"),
    ),
    "relu": (torch.relu, lambda grad, x: _aten.threshold_backward(grad, x, 0)),
}


def forward(gate, up, activation):
    """``activation(gate) * up``; ``activation`` is a key of ``ACTIVATIONS`` or an elementwise function."""
    if isinstance(activation, str):
        return ACTIVATIONS[activation][0](gate).mul_(up)
    _, activated = _record(activation, gate)
    return _multiply(activated, up, gate)


def backward(grad, gate, up, activation, need_gate, need_up):
    """Gradients of gate and up, None for one that is not needed."""
    if isinstance(activation, str):
        function, derivative = ACTIVATIONS[activation]
        dgate = derivative(grad * up, gate) if need_gate else None
        return dgate, function(gate).mul_(grad) if need_up else None
    leaf, activated = _record(activation, gate)
    dgate = None
    if need_gate:
        if activated.requires_grad:
            (dgate,) = torch.autograd.grad(activated, leaf, grad * up)
        else:  # a step function
            dgate = torch.zeros_like(gate)
    return dgate, _multiply(activated, grad, gate) if need_up else None


def _record(activation, gate):
    """A leaf with the values of ``gate``, and what the activation makes of it, as autograd records it."""
    if torch.is_inference_mode_enabled():  # nothing is recorded then, nor kept from being written into
        leaf = gate.clone()
        activated = activation(leaf)
    else:
        leaf = gate.detach().requires_grad_()
        with torch.enable_grad():
            try:
                activated = activation(leaf)
            except RuntimeError:  # one in place: a leaf refuses to be written into
                activated = activation(leaf.clone())
    if activated.shape != gate.shape or activated.dtype != gate.dtype:
        raise ValueError(
            f"activation must be elementwise, of {gate.dtype} {list(gate.shape)} it made "
            f"{activated.dtype} {list(activated.shape)}"
        )
    return leaf, activated


def _multiply(activated, factor, gate):
    """In place where the activation made a tensor of its own: what comes and goes between saved tensors leaves holes in
    the heap. Not into ``gate``, which an identity gives back, nor into what is no result of this call."""
    own = activated.grad_fn is not None and _memory(activated) != _memory(gate)
    activated = activated.detach()
    return activated.mul_(factor) if own else activated * factor


def _memory(x):
    return x.untyped_storage().data_ptr()
