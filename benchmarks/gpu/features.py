"""What models ask of attention beside causal sequences behind one prefix, each against float64; no rivals, no times."""

from itertools import accumulate

import torch

import fastprompt
from fastprompt import Sequences
from fastprompt.ops.prefix_attention import reference
from fastprompt.ops.prefix_attention.api import scheduled_attention
from fastprompt.ops.prefix_attention.dropout import Dropout
from fastprompt.ops.prefix_attention.scheduled import Shape, make_schedule

from ..budget import FEW, Budget
from .measure import normal
from .record import Row
from .rivals import uneven


def features(device, heads=8, kv_heads=2, head_dim=64, prefix=100, rows=512, dtype=torch.bfloat16):
    """Rows of prefix_attention with every flag, forward and backward; of chains; of a schedule in one tensor."""
    _, draw = normal(device, dtype)
    lengths = uneven(rows)
    seq = _packed(lengths, device)
    slopes = 0.5 ** (torch.arange(1, heads + 1, device=device) * 8 / heads)
    bias = torch.linspace(-2, 2, heads * 129, device=device).view(heads, 129)

    def tensors(keys=rows, values=head_dim):
        """q, k, v, prefix_k, prefix_v, and the gradient of out."""
        own, bank = (keys, kv_heads), (1, prefix, kv_heads)
        shapes = (rows, heads, head_dim), (*own, head_dim), (*own, values), (*bank, head_dim), (*bank, values)
        return [draw(*shape) for shape in (*shapes, (rows, heads, values))]

    return [
        _checked("window, softcap, sinks", tensors(), seq, window=prefix // 2, softcap=30.0, sinks=draw(heads)),
        _checked("both ways", tensors(), seq, causal=False),
        _checked("values of another width", tensors(values=head_dim // 2), seq),
        _checked("dropout", tensors(), seq, dropout=Dropout(0.1, seed=5)),
        _checked("ALiBi", tensors(), seq, alibi_slopes=slopes),
        _checked("position bias, both ways", tensors(), seq, position_bias=bias, causal=False),
        _checked("cross-attention", tensors(2 * rows), seq, causal=False, key_seq=_packed(lengths, device, 2)),
        _checked("chains", tensors(), _tree(lengths, prefix).to(device)),
        _scheduled(tensors(), seq, window=prefix // 2, sinks=draw(heads)),
    ]


def caches(device, heads=8, kv_heads=2, head_dim=64, prefix=100, room=256, page=16, dtype=torch.bfloat16):
    """Rows of decode, a forward alone: caches that are padded on the left or in pages, several queries a sequence."""
    _, draw = normal(device, dtype)
    lengths = [room - 3 * i for i in range(5)]
    starts, asked = [3 * i for i in range(5)], [1, 5, 2, 0, 1]
    table = torch.randperm(5 * -(-room // page), generator=torch.Generator().manual_seed(0)).view(5, -1)
    bank = [draw(1, prefix, kv_heads, head_dim) for _ in range(2)]
    found = []
    for name, options, cache in (
        ("padded on the left", dict(starts=starts), (5, kv_heads, room, head_dim)),
        ("padded on the left, several queries", dict(starts=starts, queries=asked), (5, kv_heads, room, head_dim)),
        ("in pages, several queries", dict(pages=table, queries=asked), (table.numel(), kv_heads, page, head_dim)),
    ):
        seq = Sequences.decode(lengths, **options).to(device)
        inputs = draw(seq.rows, heads, head_dim), draw(*cache), draw(*cache), *bank
        with torch.no_grad():
            out = fastprompt.prefix_attention(*inputs, seq)[0]
        doubles = [x.double() for x in inputs]
        budget = Budget.of(lambda _, x=doubles, seq=seq: [_reference(x, seq)[0]], dtype, draws=FEW)
        found.append(Row("features", f"decode: caches {name}", "fastprompt", budget.ratio([out])))
    return found


def _packed(lengths, device, times=1):
    return Sequences.packed([0, *accumulate(times * n for n in lengths)]).to(device)


def _tree(lengths, prefix):
    """The first sequence stands in front of all, the second of every other one behind it; learned keys of the first."""
    bounds = [0, *accumulate(lengths)]
    front = [*range(-1, -1 - prefix, -1)]
    chains = [front, front + [*range(bounds[1])], front + [*range(bounds[2])]]
    ids = [0, 1, *(1 + i % 2 for i in range(len(lengths) - 2))]
    rows = [chain + [0] * (len(chains[-1]) - len(chain)) for chain in chains]
    return Sequences.packed(bounds, ids, [len(chain) for chain in chains], chains=rows)


def _checked(case, tensors, seq, dropout=None, sinks=None, **flags):
    """One row of :func:`fastprompt.prefix_attention`, forward and backward."""
    drops = dict(dropout_p=dropout.p, dropout_seed=dropout.seed) if dropout else {}

    def run(q, k, v, prefix_k, prefix_v, sinks=None):
        return fastprompt.prefix_attention(q, k, v, prefix_k, prefix_v, seq, sinks=sinks, **drops, **flags)[0]

    return _row(case, run, tensors, seq, sinks, dropout=dropout, **flags)


def _scheduled(tensors, seq, window, sinks):
    """One row of the operator that compiled layers call, whose schedule is a tensor."""
    q, k, v, prefix_k, *_ = tensors
    prefixes, room = prefix_k.shape[:2]
    options = dict(prefixes=prefixes, room=room, dtype=q.dtype, device=q.device)
    schedule = make_schedule(seq, Shape.of(q, k, v), causal=True, window=window, **options)

    def run(*inputs):
        *inputs, sinks = inputs
        options = dict(causal=True, window=window, softcap=None, scale=q.shape[-1] ** -0.5, dropout_p=0.0)
        return scheduled_attention(*inputs, schedule, sinks=sinks, **options)

    return _row("a schedule in one tensor", run, tensors, seq, sinks, window=window)


def _row(case, run, tensors, seq, sinks, **flags):
    """Output and gradients of ``run(q, k, v, prefix_k, prefix_v)``, and sinks where there are some."""
    *inputs, grad = tensors
    inputs += [] if sinks is None else [sinks]
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    got = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    doubles = [x.double() for x in inputs]

    def evaluate(stored):
        out, lse = _reference(doubles, seq, **flags)
        return [out, *_reference(doubles, seq, (grad.double(), stored(out), lse), **flags)[: len(inputs)]]

    budget = Budget.of(evaluate, grad.dtype, draws=FEW)
    return Row("features", case, "fastprompt", budget.ratio(got))


def _reference(inputs, seq, behind=None, **flags):
    """The reference's forward of q, k, v, prefix_k, prefix_v and, perhaps, sinks; or the backward, ``behind`` the
    gradient of out, out and lse."""
    sinks = inputs[5] if len(inputs) > 5 else None
    options = dict(causal=True, window=None, softcap=None, scale=inputs[0].shape[-1] ** -0.5, sinks=sinks) | flags
    if behind is None:
        return reference.forward(*inputs[:5], seq, **options)
    grad, out, lse = behind
    return reference.backward(grad, *inputs[:5], out, lse, seq, **options)
