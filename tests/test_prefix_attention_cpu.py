"""The C++ kernel of prefix_attention against float64, with every instruction set this machine has."""

import csv
import itertools
import math

import pytest
import torch
from budget import assert_within
from covering import covering_array
from faults import assert_found, attention_faults
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_prefix_attention import FLAGS, SIZES, dense, largest_in_backward, layout, run, tensors

from benchmarks import prefix_attention as benchmark
from benchmarks.budget import attention_budget
from fastprompt import Sequences, backends, native, prefix_attention
from fastprompt.ops.prefix_attention import api

pytestmark = pytest.mark.skipif(native.missing is not None, reason=str(native.missing))

NAMES = "out lse q k v prefix_k prefix_v sinks".split()


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def ours(*arguments, **flags):
    return prefix_attention(*arguments, backend="cpu", **flags)


def random_grad(seq, heads, head_dim, dtype=torch.float32):
    return torch.randn(seq.rows, heads, head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)


def all_results(results, inputs):
    """The results of :func:`run`, with None for the gradient of an input that is None."""
    out, lse, *grads = results
    found = iter(grads)
    return [out, lse, *(None if x is None else next(found) for x in inputs)]


def check(every_isa, inputs, grad, seq, **flags):
    """The results of every instruction set within the budget, which is returned."""
    budget = attention_budget(inputs, grad, seq, **flags)
    for _ in every_isa():
        assert_within(budget, all_results(run(ours, inputs, grad, seq, **flags), inputs))
    return budget


def compare_with_dense(every_isa, seq, described, inputs, **flags):
    """Also the exact results against attention over an explicit concatenation."""
    grad = random_grad(seq, inputs[0].shape[1], inputs[2].shape[-1], inputs[0].dtype)
    budget = check(every_isa, inputs, grad, seq, **flags)
    exact = [t if t is None else t.double() for t in inputs]
    expected = run(lambda *a, **f: dense(*a[:5], described, **f), exact, grad.double(), **flags)
    for name, x, y in zip(NAMES, budget.exact, all_results(expected, inputs)):
        if x is not None:  # autograd through dense attention never meets a prefix that nobody reads
            torch.testing.assert_close(x, torch.zeros_like(x) if y is None else y, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flags", [{}, dict(window=7), dict(causal=False), dict(softcap=2.0)], ids=str)
def test_the_budget_finds_planted_faults(flags, dtype):
    """In a batch of the size that the tests below have."""
    seq, _ = layout([17, 3, 150, 40, 9, 1], "packed", 2, 140, seed=0, mixed=True)
    inputs = tensors(seq.rows, 3, 1, 20, 2, 140, dtype, value_dim=12)
    case = inputs, random_grad(seq, 3, 12, dtype), seq
    assert_found(attention_budget(*case, **flags), attention_faults(*case, **flags))


@pytest.mark.parametrize(
    "flags, kind, mixed, sizes", covering_array(list(FLAGS), ["packed", "padded"], [False, True], SIZES), ids=str
)
def test_equals_dense_attention(every_isa, flags, kind, mixed, sizes):
    heads, kv_heads, prefixes, widths = sizes
    seq, described = layout([5, 0, 9, 1, 5, 2], kind, prefixes, 7, seed=heads, mixed=mixed)
    flags = dict(FLAGS[flags])
    options = dict(sinks=flags.pop("sinks", False), value_dim=widths[1])
    inputs = tensors(seq.rows, heads, kv_heads, widths[0], prefixes, 7, torch.float32, **options)
    compare_with_dense(every_isa, seq, described, inputs, **flags)


WIDTHS = [*((n, n) for n in (1, 7, 20, 64, 80, 96, 112, 128, 256)), (192, 128), (24, 12), (12, 24), (1, 300)]


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_width_and_dtype(every_isa, widths, dtype):
    seq, described = layout([17, 3, 150, 40, 9, 1], "packed", 2, 140, seed=0, mixed=True)
    inputs = tensors(seq.rows, 3, 1, widths[0], 2, 140, dtype, value_dim=widths[1])
    compare_with_dense(every_isa, seq, described, inputs)


@pytest.mark.parametrize(
    "heads, lengths, flags",
    [
        (2, [700, 3, 260], "plain"),
        (2, [700, 3, 260], "all"),
        (24, [150, 3, 60], "bidirectional"),
        (24, [150, 3, 60], "all"),
        (300, [30, 3], "bidirectional"),
        (300, [30, 3], "plain"),
    ],
)
def test_sequences_longer_than_a_tile_or_a_chunk(every_isa, heads, lengths, flags):
    """Slices in one chunk share sums of gradients; slices in several leave parts. 300 heads: one query fills a tile."""
    seq, _ = layout(lengths, "packed", 1, 40, seed=0, mixed=False)
    flags = dict(FLAGS[flags])
    inputs = tensors(seq.rows, heads, 1, 16, 1, 40, torch.float32, sinks=flags.pop("sinks", False), value_dim=20)
    check(every_isa, inputs, random_grad(seq, heads, 20), seq, **flags)


@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=7).filter(any),
    prefix_length=st.integers(0, 140),
    prefixes=st.integers(1, 3),
    head_dim=st.integers(1, 40),
    value_dim=st.integers(1, 40),
    group=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    mixed=st.booleans(),
    kind=st.sampled_from(["packed", "padded"]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 100),
    softcap=st.none() | st.floats(0.5, 30),
    sinks=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(
    every_isa,
    lengths,
    prefix_length,
    prefixes,
    head_dim,
    value_dim,
    group,
    kv_heads,
    mixed,
    kind,
    causal,
    window,
    softcap,
    sinks,
    seed,
):
    seq, described = layout(lengths, kind, prefixes, prefix_length, seed, mixed)
    inputs = tensors(
        seq.rows, group * kv_heads, kv_heads, head_dim, prefixes, prefix_length, torch.float32, seed, sinks, value_dim
    )
    compare_with_dense(every_isa, seq, described, inputs, causal=causal, window=window, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flags", [{}, dict(softcap=3.0, window=4), dict(causal=False), dict(sinks=True)])
def test_decode(every_isa, dtype, flags):
    """Forward and gradients, those of the cache too; what stands in the cache behind a sequence is never read."""
    lengths, ids, used = [40, 0, 1, 170, 7], torch.tensor([1, 0, -1, 0, 0]), torch.tensor([50, 33])
    flags = dict(flags)
    _, _, _, *inputs = tensors(5, 6, 2, 20, 2, 50, dtype, sinks=flags.pop("sinks", False), value_dim=36)
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(5, 6, 20, generator=generator).to(dtype)
    cache = [torch.randn(5, 2, 180, width, generator=generator).to(dtype) for width in (20, 36)]
    inputs, grad = [q, *cache, *inputs], torch.randn(5, 6, 36, generator=generator).to(dtype)
    seq = Sequences.decode(lengths, ids, used)
    budget = attention_budget(inputs, grad, seq, **flags)
    for x in cache:
        for b, length in enumerate(lengths):
            x[b, :, length:] = math.nan
    for _ in every_isa():
        assert_within(budget, all_results(run(ours, inputs, grad, seq, **flags), inputs))


def guarded(x):
    """``x`` between columns, heads and rows of nan."""
    room = torch.full([n + 2 for n in x.shape], math.nan, dtype=x.dtype)
    inner = room[tuple(slice(1, -1) for _ in x.shape)]
    return inner.copy_(x)


def test_nothing_beside_the_inputs_is_read_and_every_result_is_written(cpu_isa, poisoned):
    seq, _ = layout([5, 40, 9, 1], "packed", 2, 35, seed=0, mixed=True)
    inputs = tensors(seq.rows, 6, 2, 20, 2, 35, torch.float32, sinks=True, value_dim=12)
    grad = random_grad(seq, 6, 12)
    expected = run(ours, inputs, grad, seq)
    leaves = [guarded(t) if t.dim() > 1 else t.clone() for t in inputs]
    leaves = [t.requires_grad_() for t in leaves]
    out, lse = ours(*leaves[:5], seq, sinks=leaves[5])
    got = [out, lse, *torch.autograd.grad(out, leaves, guarded(grad))]
    for name, x, y in zip(NAMES, got, expected):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("prefixes, lengths", [(1, [0, 0]), (2, [3, 1]), (1, [3, 0])])
@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_prefixes_that_nobody_reads_have_gradients_of_zero(poisoned, kind, prefixes, lengths):
    seq = (
        Sequences.packed([0, *itertools.accumulate(lengths)])
        if kind == "packed"
        else Sequences.padded([0, 1], lengths, 5)
    )
    inputs = tensors(seq.rows, 4, 2, 8, prefixes, 6, torch.float32)
    grads = run(ours, inputs, random_grad(seq, 4, 8), seq)[5:7]
    for grad in grads:
        assert bool(grad[0].any()) == any(lengths)
        assert not grad[1:].any()


def test_rows_outside_sequences_are_never_read(cpu_isa):
    seq = Sequences.runs([3, 20], [9, 30], 60)
    inputs = tensors(60, 4, 2, 16, 1, 10, torch.float32)
    outside = torch.ones(60, dtype=torch.bool)
    outside[3:12] = outside[20:50] = False
    grad = random_grad(seq, 4, 16)
    for x in (*inputs[:3], grad):
        x[outside] = math.nan
    out, lse, *grads = run(ours, inputs, grad, seq)
    assert not out[outside].any() and bool((lse[:, outside] == -math.inf).all())
    assert all(not g[outside].any() for g in grads[:3]) and all(g.isfinite().all() for g in grads)


def test_nan_stays_in_its_sequence(cpu_isa):
    seq = Sequences.packed([0, 9, 30, 33])
    q, k, v, prefix_k, prefix_v, _ = tensors(33, 4, 2, 16, 1, 10, torch.float32)
    clean, _ = ours(q, k, v, prefix_k, prefix_v, seq)
    for x in (q, k, v):
        y = x.clone()
        y[12] = math.nan
        out, _ = ours(*(y if t is x else t for t in (q, k, v)), prefix_k, prefix_v, seq)
        assert out[12].isnan().all()
        assert torch.equal(out[:9], clean[:9]) and torch.equal(out[30:], clean[30:])


def test_same_bits_with_any_number_of_threads(cpu_isa):
    seq, _ = layout([40, 6, 500, 6, 64, 30, 1], "packed", 2, 130, seed=0, mixed=True)
    inputs = tensors(seq.rows, 6, 2, 16, 2, 130, torch.float32, sinks=True, value_dim=12)
    grad, before, results = random_grad(seq, 6, 12), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(ours, inputs, grad, seq))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_only_wanted_gradients(threads):
    """Any subset of inputs may want a gradient, and gets the same bits as if all did."""
    seq, _ = layout([40, 6, 9], "packed", 1, 30, seed=0, mixed=False)
    inputs = tensors(seq.rows, 4, 2, 16, 1, 30, torch.float32, sinks=True, value_dim=20)
    grad = random_grad(seq, 4, 20)
    every = dict(zip(NAMES, run(ours, inputs, grad, seq)))
    for wanted in itertools.product([False, True], repeat=6):
        if not any(wanted):
            continue
        leaves = [t.clone().requires_grad_(need) for t, need in zip(inputs, wanted)]
        out, _ = ours(*leaves[:5], seq, sinks=leaves[5])
        out.backward(grad)
        for name, leaf, need in zip(NAMES[2:], leaves, wanted):
            assert torch.equal(leaf.grad, every[name]) if need else leaf.grad is None, (wanted, name)


def test_strided_inputs_and_expanded_gradients(cpu_isa):
    seq, _ = layout([4, 36, 2], "packed", 1, 33, seed=0, mixed=False)
    inputs = tensors(seq.rows, 4, 2, 20, 1, 33, torch.float32, value_dim=12)
    one = torch.ones(1, 1, 1).expand(seq.rows, 4, 12)
    expected = run(ours, inputs, one, seq)
    strided = [t if t is None else t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in inputs]
    strided[0] = inputs[0].transpose(0, 1).contiguous().transpose(0, 1)  # as Hugging Face hands queries over
    leaves = [t if t is None else t.requires_grad_() for t in strided]
    out, _ = ours(*leaves[:5], seq)
    out.sum().backward(retain_graph=True)
    for name, x, y in zip(NAMES[2:], leaves[:5], expected[2:]):
        assert torch.equal(x.grad, y), name
    out.sum().backward()  # nothing that was saved has been written to
    for name, x, y in zip(NAMES[2:], leaves[:5], expected[2:]):
        assert torch.equal(x.grad, 2 * y), name
    with pytest.raises(RuntimeError):
        out.sum().backward()


@pytest.mark.parametrize("prefixes", [0, 1])
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_rows(lengths, prefixes):
    seq, _ = layout(lengths, "packed", prefixes, 5, seed=0, mixed=False)
    inputs = tensors(0, 4, 2, 8, prefixes, 5, torch.float32, sinks=True, value_dim=6)
    out, lse, *grads = run(ours, inputs, torch.zeros(0, 4, 6), seq)
    assert out.shape == (0, 4, 6) and lse.shape == (4, 0) and all(not g.any() for g in grads)


def test_opcheck():
    seq, _ = layout([3, 1, 4], "packed", 2, 3, seed=0, mixed=True)
    *arguments, sinks = tensors(seq.rows, 2, 1, 4, 2, 3, torch.float32, sinks=True, value_dim=6)
    options = (seq.flat, True, None, None, 0.5, 0.0, "cpu")
    arguments = (*arguments, sinks, None, None, None)
    torch.library.opcheck(torch.ops.fastprompt.prefix_attention.default, (*arguments, *options))
    out, lse = torch.ops.fastprompt.prefix_attention(*arguments, *options)
    torch.library.opcheck(
        torch.ops.fastprompt.prefix_attention_backward.default,
        (torch.randn_like(out), *arguments, out, lse, *options, [True] * 6 + [False]),
    )


def test_compiles_without_a_graph_break():
    seq, _ = layout([4, 6, 2], "packed", 1, 3, seed=0, mixed=False)
    inputs = tensors(seq.rows, 4, 2, 8, 1, 3, torch.float32, value_dim=5)
    grad = random_grad(seq, 4, 5)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for x, y in zip(run(compiled, inputs, grad, seq), run(ours, inputs, grad, seq)):
        assert torch.equal(x, y)


def test_auto_takes_the_library_where_it_can(monkeypatch):
    seq, _ = layout([4, 6], "packed", 1, 3, seed=0, mixed=False)
    inputs = tensors(seq.rows, 2, 2, 8, 1, 3, torch.float32)[:5]
    assert backends.choose("prefix_attention", "auto", "cpu") == "cpu"
    assert torch.equal(prefix_attention(*inputs, seq, softcap=2.0)[0], ours(*inputs, seq, softcap=2.0)[0])
    with pytest.raises(
        RuntimeError, match="'cpu' of prefix_attention cannot run this call: the C.. kernels have no float64"
    ):
        ours(*(t.double() for t in inputs), seq)
    monkeypatch.setattr(native, "missing", "it was not compiled")
    monkeypatch.setattr(api, "implementation", backends.implementation.__wrapped__)  # which remembers the library
    assert backends.choose("prefix_attention", "auto", "cpu") == "composed"
    assert torch.equal(prefix_attention(*inputs, seq)[0], prefix_attention(*inputs, seq, backend="composed")[0])
    with pytest.raises(RuntimeError, match="'cpu' of prefix_attention cannot run this call: it was not compiled"):
        ours(*inputs, seq)


@pytest.mark.parametrize("wrong", [False, True])
def test_the_benchmark_gives_a_speed_up_only_for_right_results(wrong, tmp_path, monkeypatch, capsys):
    if wrong:
        call = benchmark.Packed.__call__
        factor = {"cpu": 1 + 1e-3, "composed": 1}
        monkeypatch.setattr(benchmark.Packed, "__call__", lambda self: [x * factor[self.backend] for x in call(self)])
    monkeypatch.setattr(benchmark, "SECONDS", 0.0)
    monkeypatch.setattr(benchmark.Gemm, "size", 16)
    cases = [
        benchmark.Case((4, 2, 16), torch.float32, 5, (9, 3)),
        benchmark.Case((4, 2, 16), torch.bfloat16, 5, (9, 3, 1)),
    ]
    assert benchmark.run(tmp_path, cases=cases[: 1 if wrong else 2]) != wrong
    printed = capsys.readouterr().out
    assert ("WRONG" in printed) == wrong and ("geometric mean" in printed) != wrong
    with open(tmp_path / "prefix_attention.csv") as stream:
        records = list(csv.DictReader(line for line in stream if not line.startswith("#")))
    assert all((record["speed-up"] == "WRONG") == wrong for record in records)


def test_a_frozen_bank_of_prefixes_has_no_gradient_in_memory():
    largest, bank = largest_in_backward("cpu", trains=False, dtype=torch.float32)
    assert largest < bank / 4


@pytest.mark.parametrize("backend", ["reference", "composed", "cpu"])
def test_lengths_of_prefixes_mean_nothing_where_there_are_none(backend):
    seq = Sequences.packed([0, 3, 5], prefix_ids=[0, 1], prefix_lens=[2, 4])
    q, k, v = torch.randn(3, 5, 2, 8)
    found = prefix_attention(q, k, v, None, None, seq, backend=backend)
    expected = prefix_attention(q, k, v, None, None, Sequences.packed([0, 3, 5]), backend="reference")
    torch.testing.assert_close(found, expected)
