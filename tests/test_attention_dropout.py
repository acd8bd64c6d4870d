"""Attention dropout: the quality of its mask, the same mask on every backend, outputs and gradients against float64."""

import itertools
import math
from functools import partial

import pytest
import torch
from budget import assert_within
from covering import covering_array
from dropout_masks import InEveryDraw, describe
from test_prefix_attention import FLAGS, dense, layout, run, tensors
from test_prefix_attention_cpu import all_results

from benchmarks.budget import attention_budget
from fastprompt import Sequences, native, prefix_attention
from fastprompt.ops.prefix_attention.dropout import Dropout

PROBABILITIES = [0.1, 0.5, 0.999]


def kept_by_hand(p, seed, row, head, position):
    """The definition in whole numbers."""

    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    key = mix((mix((seed + 0x9E3779B97F4A7C15) % 2**64) + head * 2**40 + row) % 2**64)
    x = (position * 0x9E3779B9 + key) % 2**32
    x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
    x = (x ^ x >> 15 ^ key >> 32) * 0x735A2D97 % 2**32
    return x >= p * 2**32


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x1234567890ABCDEF])
def test_the_mask_is_the_one_that_is_written_down(seed):
    rows, positions = torch.tensor([0, 1, 77, 2**31 + 5]), torch.tensor([0, 1, 2, 1000, 2**31 + 9])
    kept = Dropout(0.3, seed).kept(rows, 3, positions)
    for h, (i, row), (j, position) in itertools.product(range(3), enumerate(rows), enumerate(positions)):
        assert bool(kept[h, i, j]) == kept_by_hand(0.3, seed, int(row), h, int(position))


def masks(p, seed, heads=16, rows=512, keys=512):
    """What a mask has above its expectation, in standard deviations: ``[H, rows, keys]``."""
    kept = Dropout(p, seed).kept(torch.arange(rows), heads, torch.arange(keys))
    return (kept.double() - (1 - p)) / math.sqrt(p * (1 - p))


@pytest.mark.parametrize("p", [0.01, *PROBABILITIES])
def test_mean_and_spread_over_rows_heads_and_keys(p):
    mask = masks(p, seed=3)
    assert abs(mask.mean()) * math.sqrt(mask.numel()) < 4
    for axes in ((0, 1), (0, 2), (1, 2), (2,), (1,), (0,)):
        # Sums over an axis have variance 1 each: their squares are chi-square, here about normal.
        n = math.prod(mask.shape[a] for a in axes)
        squares = mask.sum(axes).square() / n
        kurtosis = 2 + (1 - 6 * p * (1 - p)) / (p * (1 - p)) / n  # the variance of such a square
        assert abs(squares.mean() - 1) * math.sqrt(squares.numel() / kurtosis) < 4, axes


@pytest.mark.parametrize("p", PROBABILITIES[:2])
def test_neighbours_are_independent(p):
    """Pairs of keys, rows, heads and seeds, next to one another and a power of two or a Fibonacci number apart."""
    mask, other = masks(p, seed=3), masks(p, seed=4)
    pairs = {("seed", 1): (mask, other), ("seed and row", 1): (mask[:, 1:], other[:, :-1])}
    pairs["row and key", 1] = mask[:, 1:, :-1], mask[:, :-1, 1:]
    for axis, name in enumerate(("head", "row", "key")):
        for lag in (1, 2, 3, 4, 5, 8, 13, 16, 21, 32, 34, 55, 64, 89, 128, 144, 233, 256, 377):
            if lag < mask.shape[axis]:
                size = mask.shape[axis] - lag
                pairs[name, lag] = mask.narrow(axis, 0, size), mask.narrow(axis, lag, size)
    for pair, (a, b) in pairs.items():
        assert abs((a * b).sum()) / math.sqrt(a.numel()) < 4, pair


def test_patterns_of_eight_keys_are_equally_frequent():
    kept = Dropout(0.5, 11).kept(torch.arange(1024), 16, torch.arange(256))
    patterns = (kept.view(16, 1024, 32, 8).long() << torch.arange(8)).sum(-1).flatten()
    expected = len(patterns) / 256
    chi_square = ((torch.bincount(patterns, minlength=256) - expected) ** 2 / expected).sum()
    assert abs(chi_square - 255) < 4 * math.sqrt(2 * 255)


@pytest.mark.parametrize("p, fewest, most", [(1e-12, 1.0, 1.0), (1 - 1e-12, 0.0, 0.0)])
def test_probabilities_next_to_zero_and_one(p, fewest, most):
    kept = Dropout(p, 0).kept(torch.arange(64), 4, torch.arange(64)).double().mean()
    assert fewest <= kept <= most


BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(bool(native.missing), reason="no library"))]


def case(
    flags="plain",
    kind="packed",
    heads=4,
    kv_heads=2,
    prefixes=2,
    dtype=torch.float64,
    head_dim=8,
    lengths=None,
    value_dim=5,
):
    seq, described = layout(lengths or [5, 0, 9, 1, 5, 2], kind, prefixes, 7, seed=heads, mixed=True)
    flags = dict(FLAGS[flags])
    options = dict(sinks=flags.pop("sinks", False), value_dim=value_dim)
    inputs = tensors(seq.rows, heads, kv_heads, head_dim, prefixes, 7, dtype, **options)
    grad = torch.randn(seq.rows, heads, value_dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return seq, described, inputs, grad.to(dtype), flags


@pytest.mark.parametrize(
    "flags, kind, sizes, p",
    covering_array(list(FLAGS), ["packed", "padded"], [(4, 2, 2), (3, 3, 0)], [0.1, 0.999]),
    ids=str,
)
def test_the_reference_equals_dense_attention(flags, kind, sizes, p):
    seq, described, inputs, grad, flags = case(flags, kind, *sizes)
    dropout = Dropout(p, 5)
    expected = run(lambda *a, **f: dense(*a[:5], described, dropout=dropout, **f), inputs, grad, **flags)
    got = run(prefix_attention, inputs, grad, seq, backend="reference", dropout_p=p, dropout_seed=5, **flags)
    for name, x, y in zip("out lse q k v prefix_k prefix_v sinks".split(), got, expected):
        y = torch.zeros_like(x) if y is None else y
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_gradcheck():
    seq, _, inputs, _, _ = case("all", heads=2, kv_heads=1, head_dim=3, lengths=[3, 1, 4])
    options = dict(dropout_p=0.4, dropout_seed=9, backend="reference")

    def call(*inputs, **flags):
        return prefix_attention(*inputs[:5], seq, sinks=inputs[5], **options, **flags)[0]

    for flags in (dict(window=4, softcap=2.0), dict(causal=False)):
        torch.autograd.gradcheck(partial(call, **flags), [x.requires_grad_() for x in inputs])


def test_a_seed_is_drawn_from_the_cpu_generator_and_kept_for_the_backward():
    seq, _, inputs, grad, _ = case()

    def call(p):
        return run(prefix_attention, inputs, grad, seq, backend="reference", dropout_p=p)

    torch.manual_seed(3)
    first, second = call(0.5), call(0.5)
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(3)
    for x, y in zip(first, call(0.5)):
        assert torch.equal(x, y)
    before = torch.get_rng_state()
    call(0.0)
    assert torch.equal(torch.get_rng_state(), before)  # without dropout nothing is drawn
    torch.manual_seed(3)
    drawn = torch.randint(2**63 - 1, (), dtype=torch.int64)
    given = run(prefix_attention, inputs, grad, seq, backend="reference", dropout_p=0.5, dropout_seed=drawn)
    for x, y in zip(first, given):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_int_and_a_tensor_are_the_same_seed(backend):
    seq, _, inputs, grad, _ = case(dtype=torch.float32)
    for seed in (0, -7, 2**63 - 1):
        results = [
            run(prefix_attention, inputs, grad, seq, backend=backend, dropout_p=0.3, dropout_seed=s)
            for s in (seed, torch.tensor(seed), torch.tensor([seed]))
        ]
        for other in results[1:]:
            assert all(torch.equal(x, y) for x, y in zip(results[0], other))


def test_the_mean_over_seeds_is_attention_without_dropout():
    seq, _, inputs, _, flags = case("all", dtype=torch.float64)
    sinks = inputs.pop()
    plain, plain_lse = prefix_attention(*inputs, seq, sinks=sinks, **flags)
    options = dict(sinks=sinks, dropout_p=0.3, backend="reference", **flags)
    outs = []
    for seed in range(1000, 1600):
        out, lse = prefix_attention(*inputs, seq, dropout_seed=seed, **options)
        torch.testing.assert_close(lse, plain_lse)
        outs.append(out)
    outs = torch.stack(outs)
    errors = (outs.mean(0) - plain) / (outs.std(0) / math.sqrt(len(outs)))
    assert errors.abs().max() < 4


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(dropout_p=1.0), ValueError, r"dropout_p must lie in \[0, 1\), got 1.0"),
        (dict(dropout_p=1), ValueError, r"dropout_p must lie in \[0, 1\), got 1"),
        (dict(dropout_p=-0.1), ValueError, r"dropout_p must lie in \[0, 1\), got -0.1"),
        (dict(dropout_p=math.nan), ValueError, r"dropout_p must lie in \[0, 1\), got nan"),
        (dict(dropout_p="0.1"), TypeError, "dropout_p must be a float, got str"),
        (dict(dropout_p=None), TypeError, "dropout_p must be a float, got NoneType"),
        (dict(dropout_seed=0.5), TypeError, "dropout_seed must be an int, a tensor or None, got float"),
        (dict(dropout_seed=2**63), ValueError, r"dropout_seed must lie in \[-2\*\*63, 2\*\*63\)"),
        (dict(dropout_seed=torch.tensor(1.0)), ValueError, r"dropout_seed must be one int64, got torch.float32"),
        (dict(dropout_seed=torch.tensor([1, 2])), ValueError, r"dropout_seed must be one int64, .* shape \[2\]"),
        (dict(backend="composed"), RuntimeError, "'composed' .* cannot run this call: torch's .* take no dropout mask"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    x = torch.zeros(4, 2, 8)
    with pytest.raises(error, match=message):
        prefix_attention(x, x, x, None, None, Sequences.packed([0, 4]), **{"dropout_p": 0.5, **change})


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    seq, _, inputs, _, _ = case("all", heads=2, kv_heads=1, dtype=torch.float32, lengths=[3, 1, 4])
    arguments = (*inputs, None, None, torch.tensor(3))
    options = (seq.flat, True, None, None, 0.5, 0.2, backend)
    torch.library.opcheck(torch.ops.fastprompt.prefix_attention.default, (*arguments, *options))
    out, lse = torch.ops.fastprompt.prefix_attention(*arguments, *options)
    torch.library.opcheck(
        torch.ops.fastprompt.prefix_attention_backward.default,
        (torch.randn_like(out), *arguments, out, lse, *options, [True] * 6 + [False]),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", ["given", "drawn"])
@pytest.mark.usefixtures("fresh_graphs")
def test_compiles_without_a_graph_break(backend, seed):
    seq, _, inputs, grad, _ = case(dtype=torch.float32)
    options = dict(backend=backend, dropout_p=0.5, dropout_seed=torch.tensor(4) if seed == "given" else None)
    compiled = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
    results = []
    for function in (prefix_attention, compiled):
        torch.manual_seed(8)
        results.append([run(function, inputs, grad, seq, **options) for _ in range(2)])
    for eager, traced in zip(*results):
        assert all(torch.equal(x, y) for x, y in zip(eager, traced))
    if seed == "drawn":
        assert not torch.equal(results[1][0][0], results[1][1][0])  # not a constant of the graph


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_draws_the_same_mask_again(backend, use_reentrant):
    seq, _, inputs, grad, _ = case(dtype=torch.float32)

    def call(*leaves, sinks, **flags):
        return prefix_attention(*leaves, seq, sinks=sinks, backend=backend, dropout_p=0.5)

    def checkpointed(*leaves, **options):
        return torch.utils.checkpoint.checkpoint(lambda *x: call(*x, **options), *leaves, use_reentrant=use_reentrant)

    results = []
    for function in (call, checkpointed):
        torch.manual_seed(2)
        results.append(run(function, inputs, grad))
    assert all(torch.equal(x, y) for x, y in zip(*results))


@pytest.mark.parametrize("p", PROBABILITIES[:2])
@pytest.mark.parametrize("kind", ["packed", "padded", "decode"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (6, 2)])
def test_forward_and_backward_of_the_reference_draw_the_mask(kind, causal, heads, kv_heads, p):
    case = describe(kind, [5, 0, 9, 1, 5, 2], 2, 20, Dropout(p, 77), causal)
    expected = case.expected(heads)
    assert torch.equal(case.of_forward(heads, kv_heads, torch.float64, "reference"), expected)
    if heads == kv_heads:
        assert torch.equal(case.of_backward(heads, torch.float64, "reference"), expected)


@pytest.mark.parametrize("p, seed", [(0.02, 0), (0.5, -(2**62) - 5)])
@pytest.mark.parametrize("kind", ["packed", "padded", "decode"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_library_draws_the_same_mask_bit_for_bit(cpu_isa, kind, causal, seed, p):
    """Over several blocks of keys, and over tiles of several sequences and of part of one."""
    case = describe(kind, [5, 0, 9, 1, 205, 2], 2, 150, Dropout(p, seed), causal)
    assert torch.equal(case.of_forward(6, 2, torch.float32, "cpu"), case.expected(6))
    assert torch.equal(case.of_backward(2, torch.float32, "cpu"), case.expected(2))


def check_library(every_isa, seq, inputs, grad, p, **flags):
    """The results of the C++ library within the error budget, on every instruction set."""
    budget = attention_budget(inputs, grad, seq, dropout=InEveryDraw(p, 5, inputs[0].shape[1]), **flags)
    for _ in every_isa():
        got = run(prefix_attention, inputs, grad, seq, backend="cpu", dropout_p=p, dropout_seed=5, **flags)
        assert_within(budget, all_results(got, inputs))


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("kind, heads, kv_heads, prefixes", [("packed", 6, 2, 3), ("padded", 2, 2, 0)])
def test_the_library_with_every_flag(every_isa, flags, kind, heads, kv_heads, prefixes):
    seq, _, inputs, grad, flags = case(flags, kind, heads, kv_heads, prefixes, torch.float32)
    check_library(every_isa, seq, inputs, grad, 0.3, **flags)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.1, 0.999])
def test_the_library_in_every_dtype_and_over_several_tiles(every_isa, dtype, p):
    seq, _, inputs, grad, _ = case("plain", heads=6, head_dim=20, dtype=dtype, lengths=[17, 3, 150, 9])
    check_library(every_isa, seq, inputs, grad, p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flags", [{}, dict(softcap=3.0, window=4), dict(causal=False), dict(sinks=True)])
def test_the_library_decodes(every_isa, dtype, flags):
    flags = dict(flags)
    _, _, _, *inputs = tensors(5, 6, 2, 20, 2, 50, dtype, sinks=flags.pop("sinks", False))
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(5, 6, 20, generator=generator).to(dtype)
    cache = torch.randn(2, 5, 2, 180, 20, generator=generator).to(dtype)
    grad = torch.randn(q.shape, generator=generator).to(dtype)
    seq = Sequences.decode([40, 0, 1, 170, 7], torch.tensor([1, 0, -1, 0, 0]), torch.tensor([50, 33]))
    check_library(every_isa, seq, [q, *cache, *inputs], grad, 0.4, **flags)


def test_the_library_gives_the_same_bits_with_any_number_of_threads(cpu_isa):
    seq, _, inputs, grad, _ = case("all", dtype=torch.float32, lengths=[40, 6, 500, 6, 64, 30, 1])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(prefix_attention, inputs, grad, seq, backend="cpu", dropout_p=0.4, dropout_seed=5))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))
