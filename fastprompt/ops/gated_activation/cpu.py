"""gated_activation by the C++ library: each number is read once and written once."""

import torch

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}  # in the order of csrc/cpu/gated_activation.h


def forward(gate, up, activation):
    """As the reference, for the names in ``ACTIVATIONS``."""
    flat = gate.contiguous()
    out = torch.empty_like(flat)
    torch.ops.fastprompt.gated_activation_cpu.default(flat, up.contiguous(), ACTIVATIONS[activation], out)
    return _laid_out_like(gate, out)


def backward(grad, gate, up, activation, need_gate, need_up):
    """As the reference."""
    flat = gate.contiguous()
    dgate, dup = (torch.empty_like(flat) if need else flat.new_empty(0) for need in (need_gate, need_up))
    torch.ops.fastprompt.gated_activation_backward_cpu.default(
        grad.contiguous(), flat, up.contiguous(), ACTIVATIONS[activation], dgate, dup
    )
    return _laid_out_like(gate, dgate) if need_gate else None, _laid_out_like(up, dup) if need_up else None


def _laid_out_like(x, result):
    """A contiguous result with the strides that the registered operator promises, those of its input."""
    return result if x.is_contiguous() else torch.empty_like(x).copy_(result)
