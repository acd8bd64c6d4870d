"""prompt_lstm in plain PyTorch: the definition every other backend is measured against."""

import torch

from ...checks import accumulator


def forward(x, weights, keep, num_layers, bidirectional):
    """The outputs [P, directions * H], and the gates and cells i, f, g, o, c of all steps for :func:`backward`.

    The steps [layers, directions, P, 5, H] are kept in the accumulator's dtype, in the order they ran: the backward
    direction's first step is row P - 1.
    """
    cells = _cells(weights, num_layers, bidirectional)
    rows = x.to(accumulator(x.dtype))
    steps = rows.new_empty(num_layers, len(cells[0]), len(x), 5, weights[1].shape[1])
    for layer, directions in enumerate(cells):
        if layer > 0 and keep:
            rows = rows * keep[layer - 1]
        for direction, cell in enumerate(directions):
            _run(_turn(rows, direction), cell, steps[layer, direction])
        rows = _outputs(steps[layer])
    return rows.to(x.dtype), steps


def backward(grad, x, weights, keep, steps, num_layers, bidirectional, needs):
    """Gradients of [x, *weights]; an empty tensor stands for each that ``needs`` doesn't ask for."""
    cells = _cells(weights, num_layers, bidirectional)
    grads = [x.new_empty(0) for _ in needs]
    per_cell = len(weights) // (num_layers * len(cells[0]))
    grad = grad.to(steps.dtype)
    for layer in reversed(range(num_layers)):
        rows = x.to(steps.dtype) if layer == 0 else _outputs(steps[layer - 1])
        if layer > 0 and keep:
            rows = rows * keep[layer - 1]
        first = 1 + layer * per_cell * len(cells[0])  # this layer's place in needs
        need_rows = any(needs[:first])
        below = rows.new_zeros(rows.shape)  # contiguous, whatever x is
        for direction, (cell, dhidden) in enumerate(zip(cells[layer], grad.chunk(len(cells[0]), dim=1))):
            at = first + direction * per_cell
            if not (need_rows or any(needs[at : at + per_cell])):
                continue
            dgates, hidden = _run_back(_turn(dhidden, direction), cell, steps[layer, direction])
            if needs[at]:
                grads[at] = dgates.t() @ _turn(rows, direction)
            if needs[at + 1]:
                grads[at + 1] = dgates[1:].t() @ hidden[:-1]  # the first step's hidden state is zero
            for bias in range(at + 2, at + per_cell):
                if needs[bias]:
                    grads[bias] = dgates.sum(0)
            if need_rows:
                below += _turn(dgates @ cell[0], direction)
        if not need_rows:
            break
        grad = below * keep[layer - 1] if layer > 0 and keep else below
    if needs[0]:
        grads[0] = grad
    return [g.to(x.dtype) for g in grads]


def _run(rows, cell, steps):
    """One direction of one layer over rows [P, K]; fills its steps [P, 5, H]."""
    w_input, w_hidden, *biases = cell
    gates = rows @ w_input.t() + sum(biases)  # of all steps at once
    h = c = rows.new_zeros(w_hidden.shape[1])
    for step, from_input in zip(steps, gates):
        i, f, g, o = (from_input + w_hidden @ h).chunk(4)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        h = o * c.tanh()
        step.copy_(torch.stack([i, f, g, o, c]))


def _run_back(dhidden, cell, steps):
    """The gradient of the gates [P, 4H] from that of the hidden states [P, H], and the hidden states themselves."""
    i, f, g, o, c = steps.unbind(1)
    tanh_c = c.tanh()
    c_before = torch.cat([torch.zeros_like(c[:1]), c[:-1]])
    # What depends on no later step, for all steps at once: the gates' own derivatives, and dc/dh.
    from_dc = torch.stack([g * i * (1 - i), c_before * f * (1 - f), i * (1 - g * g)], dim=1)
    from_dh = tanh_c * o * (1 - o)
    dc_dh = o * (1 - tanh_c * tanh_c)
    dgates = torch.empty_like(steps[:, :4])
    dh = dc = torch.zeros_like(dhidden[:1])  # [1, H]: what the step after this one sends back
    for t in reversed(range(len(steps))):
        dh = dhidden[t] + dh
        dc = dh * dc_dh[t] + dc
        dgates[t, :3] = from_dc[t] * dc
        dgates[t, 3:] = from_dh[t] * dh
        dh = dgates[t].view(1, -1) @ cell[1]
        dc = dc * f[t]
    return dgates.flatten(1), o * tanh_c


def _outputs(steps):
    """The hidden states [P, directions * H] of one layer, in the order of the rows."""
    o, c = steps[:, :, 3], steps[:, :, 4]
    return torch.cat([_turn(hidden, direction) for direction, hidden in enumerate(o * c.tanh())], dim=1)


def _turn(rows, direction):
    """Between the order of the rows and the order in which a direction runs them."""
    return rows.flip(0) if direction else rows


def _cells(weights, num_layers, bidirectional):
    """cells[layer][direction] = [w_input [4H, K], w_hidden [4H, H], no or two biases [4H]] in the dtype of sums."""
    weights = [w.to(accumulator(w.dtype)) for w in weights]
    directions = 2 if bidirectional else 1
    size = len(weights) // (num_layers * directions)
    cells = [weights[at : at + size] for at in range(0, len(weights), size)]
    return [cells[at : at + directions] for at in range(0, len(cells), directions)]
