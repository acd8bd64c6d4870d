"""prompt_lstm by the C++ library."""

import torch

from ...checks import accumulator


def forward(x, weights, keep, num_layers, bidirectional):
    """The outputs and the steps, as the reference returns them."""
    hidden, directions = weights[1].shape[1], 2 if bidirectional else 1
    out = x.new_empty(x.shape[0], directions * hidden)
    steps = x.new_empty(num_layers, directions, x.shape[0], 5, hidden, dtype=accumulator(x.dtype))
    weights, keep = ([t.contiguous() for t in tensors] for tensors in (weights, keep))
    torch.ops.fastprompt.prompt_lstm_cpu(x.contiguous(), weights, keep, num_layers, bidirectional, out, steps)
    return out, steps


def backward(grad, x, weights, keep, steps, num_layers, bidirectional, needs):
    """Gradients of [x, *weights]; an empty tensor stands for each that ``needs`` doesn't ask for."""
    grads = [t.new_empty(t.shape if need else 0) for t, need in zip((x, *weights), needs)]
    weights, keep = ([t.contiguous() for t in tensors] for tensors in (weights, keep))
    torch.ops.fastprompt.prompt_lstm_backward_cpu(
        grad.contiguous(), x.contiguous(), weights, keep, steps, num_layers, bidirectional, grads
    )
    return grads
