"""prefix_attention against dense attention over an explicit concatenation, for every backend, flag and layout."""

import itertools
import math
from functools import partial

import pytest
import torch
from allocations import Allocations
from budget import assert_within
from covering import covering_array
from faults import assert_found, attention_faults
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.budget import attention_budget
from fastprompt import Sequences, prefix_attention

BACKENDS = ["reference", "composed"]  # in float64; the C++ kernel has tests/test_prefix_attention_cpu.py


def dense(
    q, k, v, prefix_k, prefix_v, sequences, *,
    causal=True, window=None, softcap=None, sinks=None, scale=None, dropout=None, alibi_slopes=None, position_bias=None,
):  # fmt: skip
    """The contract spelled out with autograd: every sequence alone, its prefix concatenated in front, one softmax.

    ``sequences`` lists ``(first row, length, prefix id, prefix length, gap)``. ``dropout`` is a Dropout, or None.
    """
    heads, head_dim = q.shape[1:]
    scale = head_dim**-0.5 if scale is None else scale
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    lse = torch.full((heads, q.shape[0]), -math.inf, dtype=q.dtype)
    for start, length, prefix_id, prefix_length, gap in sequences:
        if length == 0:
            continue
        keys, values = k[start : start + length], v[start : start + length]
        if prefix_id >= 0 and prefix_k is not None:
            keys = torch.cat([prefix_k[prefix_id, :prefix_length], keys])
            values = torch.cat([prefix_v[prefix_id, :prefix_length], values])
        else:
            prefix_length = 0
        group = heads // keys.shape[1]
        keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
        score = torch.einsum("qhd,khd->hqk", q[start : start + length], keys) * scale
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        query_position = prefix_length + gap + torch.arange(length)
        key_position = torch.cat([torch.arange(prefix_length), query_position])
        distance = query_position[:, None] - key_position[None, :]
        if alibi_slopes is not None:
            score = score - torch.stack([slope * distance for slope in alibi_slopes.to(score)])
        if position_bias is not None:
            last = position_bias.shape[1] - 1
            score = score + position_bias.to(score)[:, (last // 2 - distance).clamp(0, last)]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if causal:
            hidden |= distance < 0
        if window is not None:
            hidden |= distance.abs() >= window
        score = score.masked_fill(hidden, -math.inf)
        columns = score if sinks is None else torch.cat([score, sinks[:, None, None].expand(-1, length, 1)], -1)
        weight = torch.softmax(columns, -1)[..., : keys.shape[0]]
        if dropout is not None:
            kept = dropout.kept(torch.arange(start, start + length), heads, key_position)
            weight = weight * kept / (1 - dropout.p)
        out[start : start + length] = torch.einsum("hqk,khd->qhd", weight, values)
        lse[:, start : start + length] = torch.logsumexp(columns, -1)
    return out, lse


def tensors(
    rows, heads, kv_heads, head_dim, prefixes, prefix_length, dtype=torch.float64, seed=0, sinks=False, value_dim=None
):
    generator, widths = torch.Generator().manual_seed(seed), (head_dim, value_dim or head_dim)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = draw(rows, heads, head_dim), *(draw(rows, kv_heads, width) for width in widths)
    prefix = [draw(prefixes, prefix_length, kv_heads, width) if prefixes else None for width in widths]
    return [q, k, v, *prefix, draw(heads) if sinks else None]


def run(function, inputs, grad, *arguments, **flags):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    out, lse = function(*leaves[:5], *arguments, sinks=leaves[5], **flags)
    (out * grad).sum().backward()
    return [out.detach(), lse.detach(), *(t.grad for t in leaves if t is not None)]


def layout(lengths, kind, prefixes, prefix_length, seed, mixed):
    """The same sequences for prefix_attention and for :func:`dense`."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)
    ids = torch.randint(-1, prefixes, (batch,), generator=generator) if mixed and prefixes else None
    used = torch.randint(0, prefix_length + 1, (prefixes,), generator=generator) if mixed and prefixes else None
    gaps = torch.randint(0, 4, (batch,), generator=generator) if mixed else None
    options = dict(prefix_ids=ids, prefix_lens=used, gaps=gaps)
    if kind == "packed":
        starts = [0, *itertools.accumulate(lengths)]
        seq = Sequences.packed(starts, **options)
    else:
        width = max(lengths, default=0) + 3
        firsts = torch.tensor(
            [int(torch.randint(0, width - n + 1, (1,), generator=generator)) for n in lengths], dtype=torch.int64
        )
        seq = Sequences.padded(firsts, lengths, width, **options)
        starts = [b * width + int(f) for b, f in enumerate(firsts)]
    described = []
    for b, length in enumerate(lengths):
        prefix_id = 0 if ids is None else int(ids[b])
        prefix_used = prefix_length if used is None else (int(used[prefix_id]) if prefix_id >= 0 else 0)
        described.append((starts[b], length, prefix_id, prefix_used, 0 if gaps is None else int(gaps[b])))
    return seq, described


FLAGS = {
    "plain": {},
    "bidirectional": dict(causal=False),
    "window": dict(window=5),
    "wide_window": dict(window=1000),
    "bidirectional_window": dict(causal=False, window=4),
    "softcap": dict(softcap=1.5),
    "scale": dict(scale=0.3),
    "sinks": dict(sinks=True),
    "all": dict(window=6, softcap=2.0, sinks=True, scale=0.5),
}
# Heads, key heads, prefixes, and the widths of keys and of values.
SIZES = [(4, 2, 3, (8, 5)), (3, 3, 1, (8, 8)), (6, 1, 2, (5, 8)), (2, 2, 0, (8, 8))]
RUN_BY = [("reference", flags) for flags in FLAGS]
RUN_BY += [("composed", flags) for flags in ("plain", "bidirectional", "wide_window", "scale", "sinks")]


@pytest.mark.parametrize(
    "run_by, kind, mixed, sizes", covering_array(RUN_BY, ["packed", "padded"], [False, True], SIZES), ids=str
)
def test_equals_dense_attention(run_by, kind, mixed, sizes):
    (backend, flags), (heads, kv_heads, prefixes, widths) = run_by, sizes
    lengths, prefix_length = [5, 0, 9, 1, 5, 2], 7
    seq, described = layout(lengths, kind, prefixes, prefix_length, seed=heads, mixed=mixed)
    flags = dict(FLAGS[flags])
    options = dict(sinks=flags.pop("sinks", False), value_dim=widths[1])
    inputs = tensors(seq.rows, heads, kv_heads, widths[0], prefixes, prefix_length, **options)
    grad = torch.randn(seq.rows, heads, widths[1], dtype=torch.float64)
    expected = run(lambda *a, **f: dense(*a[:5], described, **f), inputs, grad, **flags)
    got = run(prefix_attention, inputs, grad, seq, backend=backend, **flags)
    for name, x, y in zip("out lse q k v prefix_k prefix_v sinks".split(), got, expected):
        torch.testing.assert_close(
            x,
            y if y is not None else torch.zeros_like(x),
            rtol=1e-10,
            atol=1e-10,
            msg=lambda m, name=name: f"{name}: {m}",
        )


@given(
    lengths=st.lists(st.integers(0, 40), max_size=7),
    prefix_length=st.integers(0, 9),
    prefixes=st.integers(1, 3),
    head_dim=st.sampled_from([1, 3, 16]),
    value_dim=st.sampled_from([1, 3, 16]),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    mixed=st.booleans(),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(lengths, prefix_length, prefixes, head_dim, value_dim, group, kv_heads, mixed, causal, seed):
    seq, described = layout(lengths, "packed", prefixes, prefix_length, seed, mixed)
    heads = group * kv_heads
    inputs = tensors(seq.rows, heads, kv_heads, head_dim, prefixes, prefix_length, seed=seed, value_dim=value_dim)
    grad = torch.randn(seq.rows, heads, value_dim, dtype=torch.float64)
    if seq.rows:
        expected = run(lambda *a, **f: dense(*a[:5], described, **f), inputs, grad, causal=causal)
    for backend in BACKENDS:
        got = run(prefix_attention, inputs, grad, seq, backend=backend, causal=causal)
        if seq.rows == 0:
            assert all(g is not None and not g.any() for g in got[2:])
            continue
        for x, y in zip(got, expected):
            torch.testing.assert_close(x, torch.zeros_like(x) if y is None else y, rtol=1e-9, atol=1e-9)


def low_precision_case(dtype, widths=(64, 64)):
    seq, _ = layout([17, 3, 40, 40, 9, 1], "packed", 2, 20, seed=0, mixed=True)
    inputs = tensors(seq.rows, 6, 2, widths[0], 2, 20, dtype=dtype, value_dim=widths[1])
    return inputs, torch.randn(seq.rows, 6, widths[1], generator=torch.Generator().manual_seed(1)).to(dtype), seq


@pytest.mark.parametrize("widths", [(64, 64), (24, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_within_budget(backend, dtype, widths):
    inputs, grad, seq = low_precision_case(dtype, widths)
    kept = (
        dtype if backend == "composed" else torch.float32
    )  # torch's own kernel keeps scores in the dtype of its inputs
    budget = attention_budget(inputs, grad, seq, results=kept)
    assert_within(budget, [*run(prefix_attention, inputs, grad, seq, backend=backend), None])


@pytest.mark.parametrize("flags", [{}, dict(window=7), dict(causal=False), dict(softcap=2.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_budget_finds_planted_faults(dtype, flags):
    """The wider of the two that the test above has."""
    case = low_precision_case(dtype, (64, 48))
    assert_found(attention_budget(*case, results=dtype, **flags), attention_faults(*case, **flags))


@pytest.mark.parametrize("flags", [{}, dict(softcap=3.0, window=4), dict(causal=False)])
def test_decode_equals_the_last_row_of_a_prefill(flags):
    """One query against its cache gives what the whole sequence gives in its last row; gradients reach the cache."""
    lengths, prefix_length, room = [4, 1, 7], 5, 9
    ids, used = torch.tensor([1, -1, 0]), torch.tensor([5, 3])
    starts = [0, *itertools.accumulate(lengths)]
    packed = Sequences.packed(starts, ids, used)
    q, k, v, prefix_k, prefix_v, sinks = tensors(packed.rows, 4, 2, 8, 2, prefix_length, sinks=True, value_dim=6)
    flags = dict(flags, sinks=sinks)
    full, full_lse = prefix_attention(q, k, v, prefix_k, prefix_v, packed, **flags)
    last = torch.tensor(starts[1:]) - 1
    cache_k, cache_v = (
        torch.full((3, 2, room, width), math.nan, dtype=torch.float64) for width in (8, 6)
    )  # unused keys: NaN
    for b, (start, length) in enumerate(zip(starts, lengths)):
        cache_k[b, :, :length], cache_v[b, :, :length] = (x[start : start + length].transpose(0, 1) for x in (k, v))
    leaf = cache_k.clone().requires_grad_()
    out, lse = prefix_attention(
        q[last], leaf, cache_v, prefix_k, prefix_v, Sequences.decode(lengths, ids, used), **flags
    )
    if flags.get("causal", True):
        torch.testing.assert_close(out, full[last])
        torch.testing.assert_close(lse, full_lse[:, last])
    out.sum().backward()
    for b, length in enumerate(lengths):
        assert leaf.grad[b, :, :length].abs().sum() > 0 and not leaf.grad[b, :, length:].any()


def test_gradcheck():
    seq, _ = layout([3, 1, 4], "packed", 2, 3, seed=0, mixed=True)
    inputs = [t.requires_grad_() for t in tensors(seq.rows, 2, 1, 4, 2, 3, sinks=True, value_dim=3)]
    for backend, flags in (
        ("reference", dict(window=4, softcap=2.0)),
        ("reference", dict(causal=False)),
        ("composed", {}),
    ):
        attend = partial(prefix_attention, backend=backend, **flags)
        torch.autograd.gradcheck(
            lambda q, k, v, pk, pv, s, attend=attend: attend(q, k, v, pk, pv, seq, sinks=s)[0],
            inputs,
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_prefix", [True, False])
def test_opcheck(backend, with_prefix):
    seq, _ = layout([3, 1, 4], "packed", 2 if with_prefix else 0, 3, seed=0, mixed=with_prefix)
    q, k, v, prefix_k, prefix_v, sinks = tensors(
        seq.rows, 2, 1, 4, 2 if with_prefix else 0, 3, torch.float32, sinks=True, value_dim=6
    )
    options = (seq.flat, True, None, None, 0.5, 0.0, backend)
    arguments = (q, k, v, prefix_k, prefix_v, sinks, None, None, None)
    torch.library.opcheck(torch.ops.fastprompt.prefix_attention.default, (*arguments, *options))
    out, lse = torch.ops.fastprompt.prefix_attention(*arguments, *options)
    needs = [True, True, False, True, True, True, False]
    torch.library.opcheck(
        torch.ops.fastprompt.prefix_attention_backward.default,
        (torch.randn_like(out), *arguments, out, lse, *options, needs),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs_and_expanded_gradients(backend):
    seq, described = layout([4, 6, 2], "packed", 1, 3, seed=0, mixed=False)
    inputs = tensors(seq.rows, 4, 2, 8, 1, 3)
    strided = [t if t is None else t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in inputs]
    strided[0] = inputs[0].transpose(0, 1).contiguous().transpose(0, 1)  # as Hugging Face hands queries over
    one = torch.ones(1, 1, 1, dtype=torch.float64).expand_as(inputs[0])
    expected = run(lambda *a, **f: dense(*a[:5], described, **f), inputs, one)
    leaves = [t if t is None else t.requires_grad_() for t in strided]
    out, _ = prefix_attention(*leaves[:5], seq, backend=backend)
    out.sum().backward()  # an expanded gradient
    for x, y in zip([out, *(t.grad for t in leaves[:5])], [expected[0], *expected[2:]]):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_wanted_gradients_and_one_backward(backend):
    seq, _ = layout([4, 6], "packed", 1, 3, seed=0, mixed=False)
    q, k, v, prefix_k, prefix_v, _ = tensors(seq.rows, 2, 2, 8, 1, 3)
    out, lse = prefix_attention(q, k, v, prefix_k.requires_grad_(), prefix_v, seq, backend=backend)
    assert not lse.requires_grad
    out.sum().backward()
    assert prefix_k.grad is not None and all(t.grad is None for t in (q, k, v, prefix_v))
    with pytest.raises(RuntimeError):
        out.sum().backward()


def largest_in_backward(backend, trains, dtype=torch.float64):
    """The largest tensor that a backward makes, in elements, and the size of the bank of prefixes."""
    seq, _ = layout([4, 6], "packed", 200, 3, seed=0, mixed=True)
    q, k, v, prefix_k, prefix_v, _ = tensors(seq.rows, 2, 2, 8, 200, 3, dtype)
    prefix_k.requires_grad_(trains), prefix_v.requires_grad_(trains)
    out, _ = prefix_attention(q.requires_grad_(), k, v, prefix_k, prefix_v, seq, backend=backend)
    with Allocations() as made:
        out.backward(torch.ones_like(out))
    return max(made.sizes), prefix_k.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_bank_of_prefixes_has_no_gradient_in_memory(backend):
    largest, bank = largest_in_backward(backend, trains=False)
    assert largest < bank / 4
    largest, bank = largest_in_backward(backend, trains=True)
    assert largest >= bank


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_from_run_to_run(backend):
    seq, _ = layout([40, 6, 33, 6], "packed", 2, 30, seed=0, mixed=True)
    inputs = tensors(seq.rows, 6, 2, 16, 2, 30, torch.float32)
    grad = torch.randn(seq.rows, 6, 16)
    first, second = (run(prefix_attention, inputs, grad, seq, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.usefixtures("fresh_graphs")
def test_compiles_without_a_graph_break():
    seq, described = layout([4, 6, 2], "packed", 1, 3, seed=0, mixed=False)
    inputs = tensors(seq.rows, 4, 2, 8, 1, 3, value_dim=5)
    grad = torch.randn(seq.rows, 4, 5, dtype=torch.float64)
    compiled = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
    expected = run(lambda *a, **f: dense(*a[:5], described, **f), inputs, grad)
    for x, y in zip(run(compiled, inputs, grad, seq), expected):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_auto_takes_what_can_run_and_an_explicit_backend_says_why_not():
    seq, _ = layout([4, 6], "packed", 1, 3, seed=0, mixed=False)
    inputs = tensors(seq.rows, 2, 2, 8, 1, 3)[:5]
    for flags, reason in ((dict(softcap=2.0), "softcap"), (dict(window=3), "window")):
        prefix_attention(*inputs, seq, **flags)
        with pytest.raises(RuntimeError, match=f"'composed' of prefix_attention cannot run this call: .*{reason}"):
            prefix_attention(*inputs, seq, backend="composed", **flags)
    with pytest.raises(RuntimeError, match="'triton' of prefix_attention cannot run this call"):
        prefix_attention(*inputs, seq, backend="triton")


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(q=torch.zeros(3, 4, 8)), ValueError, r"q must have shape \[10, H, Dh\], got \[3, 4, 8\]"),
        (dict(q=torch.zeros(10, 3, 8)), ValueError, "q must have a multiple of k's 2 heads, got 3"),
        (dict(q=torch.zeros(10, 4, 0)), ValueError, "q must have heads of at least one number"),
        (dict(v=torch.zeros(10, 3, 8)), ValueError, r"v must have shape \[10, 2, Dv\]"),
        (dict(v=torch.zeros(10, 2, 0)), ValueError, "v must have values of at least one number"),
        (dict(k=torch.zeros(10, 2, 8, dtype=torch.float16)), TypeError, "k must have dtype torch.float32 like q"),
        (dict(prefix_k=None), ValueError, "prefix_k and prefix_v must both be given"),
        (dict(prefix_v=torch.zeros(1, 4, 2, 8)), ValueError, r"prefix_v must have shape \[1, 3, 2, 8\]"),
        (dict(v=torch.zeros(10, 2, 5)), ValueError, r"prefix_v must have shape \[1, 3, 2, 5\]"),
        (dict(seq=[0, 4, 10]), TypeError, "seq must be a fastprompt.Sequences, got list"),
        (dict(seq=Sequences.packed([0, 4, 10], [0, 1])), ValueError, r"seq.prefix_ids must lie in \[-1, 1\)"),
        (dict(seq=Sequences.packed([0, 4, 10], None, [4])), ValueError, r"seq.prefix_lens must lie in \[0, 4\)"),
        (dict(window=0), ValueError, "window must be a positive int or None, got 0"),
        (dict(softcap=-1.0), ValueError, "softcap must be positive or None"),
        (dict(sinks=torch.zeros(3)), ValueError, r"sinks must have shape \[4\]"),
        (dict(backend="fast"), ValueError, "backend of prefix_attention must be"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = dict(
        q=torch.zeros(10, 4, 8),
        k=torch.zeros(10, 2, 8),
        v=torch.zeros(10, 2, 8),
        prefix_k=torch.zeros(1, 3, 2, 8),
        prefix_v=torch.zeros(1, 3, 2, 8),
        seq=Sequences.packed([0, 4, 10]),
    )
    with pytest.raises(error, match=message):
        prefix_attention(**{**arguments, **change})


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Sequences.packed([1, 4]), "cu_seqlens must start at 0 and never fall"),
        (lambda: Sequences.packed([0, 4, 2]), "cu_seqlens must start at 0 and never fall"),
        (lambda: Sequences.packed([0, 4], [0, 0]), "prefix_ids must have shape"),
        (lambda: Sequences.padded([0, 3], [4, 2], 4), "must stay within the 4 columns"),
        (lambda: Sequences.runs([0, 2], [3, 2], 9), "runs must not overlap"),
    ],
)
def test_sequences_refuse_what_they_cannot_mean(build, message):
    with pytest.raises(ValueError, match=message):
        build()
