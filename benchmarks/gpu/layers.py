"""What a layer computes beside products and attention, and the loss, beside PyTorch's operations that models run."""

from functools import partial

import torch
from torch.nn import functional

import fastprompt
from fastprompt.checks import accumulator
from fastprompt.ops.linear_cross_entropy import reference as whole_loss

from .measure import compare, exactly, normal, results_of


def layers(device, rows=8192, heads=32, head_dim=128, hidden=4096, inner=11008, dtype=torch.bfloat16, **timing):
    """Rows of rms_norm, gated_activation and rotary, the last of whole heads and of a half of each."""
    _, draw = normal(device, dtype)
    found = _beside(
        "rms_norm", f"{rows} rows of {hidden}", fastprompt.rms_norm, _norm, _exact_norm,
        [draw(rows, hidden), 1 + 0.3 * draw(hidden)], draw(rows, hidden), device, timing,
    )  # fmt: skip
    found += _beside(
        "gated_activation", f"{rows} rows of {inner}, silu", lambda *x: fastprompt.gated_activation(*x, "silu"),
        lambda gate, up: functional.silu(gate) * up, _exact_gated,
        [draw(rows, inner), draw(rows, inner)], draw(rows, inner), device, timing,
    )  # fmt: skip
    for width in (head_dim, head_dim // 2):
        angles = draw(1, rows, width)
        tables = angles.cos(), angles.sin()
        found += _beside(
            "rotary", f"{rows} rows of {heads} heads, {width} of {head_dim} numbers",
            lambda x, tables=tables: fastprompt.rotary(x, *tables), lambda x, tables=tables: turned(x, *tables), None,
            [draw(1, rows, heads, head_dim)[..., :width]], draw(1, rows, heads, width), device, timing,
        )  # fmt: skip
    return found


def loss(device, rows=1024, width=2048, classes=32768, dtype=torch.bfloat16, **timing):
    """Rows of linear_cross_entropy behind a frozen head; losses are rounded, so that one budget holds for all."""
    generator, draw = normal(device, dtype)
    hidden, weight, grad = draw(rows, width), draw(classes, width) / width**0.5, draw(rows)
    labels = torch.randint(classes, (rows,), generator=generator, device=device)

    def fused(hidden):
        return fastprompt.linear_cross_entropy(hidden, weight, None, labels, reduction="none").to(dtype)

    def plain(hidden):
        logits = functional.linear(hidden, weight.to(hidden.dtype)).to(accumulator(hidden.dtype))
        return functional.cross_entropy(logits, labels, reduction="none").to(hidden.dtype)

    def exact(inputs, grad, _):
        counted = torch.ones_like(labels, dtype=torch.bool)
        losses, _, slope = whole_loss.forward(inputs[0].double(), weight.double(), None, labels, counted, True)
        return [losses, slope * grad[:, None].double()]

    case = f"{rows} rows of {width}, {classes} classes"
    return _beside("linear_cross_entropy", case, fused, plain, exact, [hidden], grad, device, timing)


def _beside(section, case, ours, plain, exact, inputs, grad, device, timing):
    """Rows of ours, by the roundings that it may make (one of each result, unless ``exact`` says what else is stored),
    and of PyTorch's own operations, which round every result."""
    definition = exactly(plain, inputs, grad)
    made = partial(exact, inputs, grad) if exact else definition
    found = compare(section, case, {"fastprompt": ours}, made, inputs, grad, device, **timing)
    rival = compare(section, case, {"PyTorch": plain}, definition, inputs, grad, device, results=grad.dtype, **timing)
    return found + rival


def _norm(x, weight, eps=1e-6):
    """As Llama's."""
    wide = x.to(accumulator(x.dtype))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _exact_norm(inputs, grad, stored, eps=1e-6):
    def definition(x, weight):
        return weight * stored(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

    return results_of(definition, [x.double() for x in inputs], grad.double())


def _exact_gated(inputs, grad, stored):
    gate, up, grad = (x.double() for x in (*inputs, grad))
    activated = stored(functional.silu(gate))
    return [activated * up, torch.ops.aten.silu_backward(stored(grad * up), gate), activated * grad]


def turned(x, cosine, sine):
    """As Llama's."""
    cosine, sine = (table.to(x.dtype).unsqueeze(2) for table in (cosine, sine))
    a, b = x.chunk(2, -1)
    return x * cosine + torch.cat([-b, a], -1) * sine
