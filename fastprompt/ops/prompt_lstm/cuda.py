"""prompt_lstm by the CUDA library: its kernels run the steps of a layer, torch the matrix products around them.

No GPU has run these kernels yet. They are compiled for GPUs and tested under emulation on a CPU (``csrc/cuda/host``),
and "auto" does not choose them before they are measured.
"""

import torch


def forward(x, weights, keep, num_layers, bidirectional):
    """The outputs and the steps, as the reference returns them."""
    layers = _layers(weights, num_layers, bidirectional)
    count, hidden, directions = len(x), weights[1].shape[1], len(layers[0])
    rows = x.float()
    steps = rows.new_empty(num_layers, directions, count, 5, hidden)
    for layer, cells in enumerate(layers):
        if layer > 0 and keep:
            rows = rows * keep[layer - 1]
        gates = rows.new_empty(directions, count, 4 * hidden)  # what the input adds to them
        for gate, (w_input, _, *biases) in zip(gates, cells):
            if biases:
                torch.addmm(biases[0].float() + biases[1].float(), rows, w_input.float().t(), out=gate)
            else:
                torch.mm(rows, w_input.float().t(), out=gate)
        rows = rows.new_empty(count, directions * hidden)
        _recurrence([w_hidden for _, w_hidden, *_ in cells], gates, steps[layer], rows, backward=False)
    return rows.to(x.dtype), steps


def backward(grad, x, weights, keep, steps, num_layers, bidirectional, needs):
    """Gradients of [x, *weights]; an empty tensor stands for each that ``needs`` doesn't ask for."""
    layers = _layers(weights, num_layers, bidirectional)
    directions, size = len(layers[0]), len(layers[0][0])
    grads = [x.new_empty(0) for _ in needs]
    grad, hidden = grad.float(), _outputs(steps[-1])
    for layer in reversed(range(num_layers)):
        first = 1 + layer * directions * size  # this layer's place in needs
        below, here = any(needs[:first]), needs[first : first + directions * size]
        if not (below or any(here)):
            break
        rows = below_hidden = _outputs(steps[layer - 1]) if layer > 0 else x.float()
        if layer > 0 and keep:
            rows = rows * keep[layer - 1]
        dgates = grad.new_empty(directions, len(x), 4 * steps.shape[-1])
        matrices = [w_hidden.t() for _, w_hidden, *_ in layers[layer]]
        _recurrence(matrices, grad.contiguous(), steps[layer], dgates, backward=True)
        for direction, (dgate, states) in enumerate(zip(dgates, hidden.chunk(directions, dim=1))):
            at = first + direction * size
            if needs[at]:
                grads[at] = dgate.t() @ rows
            if needs[at + 1]:  # the first step's hidden state is zero; the second direction comes from the row after
                after, before = (dgate[:-1], states[1:]) if direction else (dgate[1:], states[:-1])
                grads[at + 1] = after.t() @ before
            for bias in range(at + 2, at + size):
                if needs[bias]:
                    grads[bias] = dgate.sum(0)
        if not below:
            break
        grad = sum(dgate @ cell[0].float() for dgate, cell in zip(dgates, layers[layer]))
        if layer > 0 and keep:
            grad = grad * keep[layer - 1]
        hidden = below_hidden
    if needs[0]:
        grads[0] = grad
    return [g.to(x.dtype) for g in grads]


def _recurrence(matrices, given, steps, result, *, backward):
    """All steps of one layer; ``Args`` in csrc/cuda/prompt_lstm.h says what the tensors are."""
    if steps.shape[1] == 0:
        return
    words = torch.zeros(len(matrices), 2, matrices[0].shape[1], dtype=torch.int64, device=given.device)
    matrices = [_whole_chunks(matrix) for matrix in matrices]
    torch.ops.fastprompt.prompt_lstm_recurrence_cuda(matrices, given, steps, result, words, backward)


def _whole_chunks(matrix):
    """Contiguous rows, filled up with zeros, that start at multiples of 16 bytes."""
    missing = -matrix.shape[1] % (16 // matrix.element_size())
    matrix = torch.nn.functional.pad(matrix, (0, missing)) if missing else matrix.contiguous()
    return matrix.clone() if matrix.data_ptr() % 16 else matrix.contiguous()


def _outputs(steps):
    """The hidden states [P, directions * H] of one layer, in the order of the rows."""
    hidden = steps[:, :, 3] * steps[:, :, 4].tanh()
    return torch.cat([hidden[0], *(h.flip(0) for h in hidden[1:])], dim=1)


def _layers(weights, num_layers, bidirectional):
    """layers[layer][direction] = [w_input [4H, K], w_hidden [4H, H], no or two biases [4H]]."""
    directions = 2 if bidirectional else 1
    size = len(weights) // (num_layers * directions)
    cells = [weights[at : at + size] for at in range(0, len(weights), size)]
    return [cells[at : at + directions] for at in range(0, len(cells), directions)]
