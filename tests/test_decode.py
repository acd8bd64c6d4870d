"""Decode on every backend that runs on a CPU: several queries a sequence, caches that are padded or in pages."""

import math

import pytest
import torch
from attention_cases import FEATURES, biased
from budget import assert_within
from decode_cases import LAYOUTS, make

from benchmarks import decode as benchmark
from benchmarks.budget import attention_budget
from fastprompt import Sequences, native, prefix_attention

LIBRARY = pytest.param("cpu", marks=pytest.mark.skipif(bool(native.missing), reason=str(native.missing)))
FLAGS = [{}, dict(window=4), dict(causal=False, window=5), dict(softcap=2.0)]


def row_by_row(case, *, causal=True, window=None, softcap=None, sinks=None, alibi_slopes=None, position_bias=None):
    """out and lse, one query after the other."""
    q, _, _, *bank, _ = (x.double() for x in case.inputs)
    queries, outs, lses = case.seq.host.queries, [], []
    for (keys, values), count, gap, prefix in zip(case.own, queries, case.gaps, case.prefixes):
        used = case.used[prefix] if prefix >= 0 else 0
        keys, values = (torch.cat([x[prefix, :used], own]) for x, own in zip(bank, (keys, values)))
        keys, values = (x.repeat_interleave(2, 1) for x in (keys, values))
        own = len(keys) - used
        position = torch.cat([torch.arange(used), used + gap + torch.arange(own)])
        for number in range(own - count, own):
            distance = position - (used + gap + number)
            score = torch.einsum("hd,khd->hk", q[len(outs)], keys) * q.shape[-1] ** -0.5
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            if alibi_slopes is not None:
                score = score + alibi_slopes.double()[:, None] * distance
            if position_bias is not None:
                most = position_bias.shape[1] // 2
                score = score + position_bias.double()[:, most + distance.clamp(-most, most)]
            hidden = (distance > 0) & causal
            if window is not None:
                hidden |= distance.abs() >= window
            score = score.masked_fill(hidden, -math.inf)
            if sinks is not None:
                score = torch.cat([score, sinks.double()[:, None]], 1)
            lses.append(torch.logsumexp(score, 1))
            outs.append(torch.einsum("hk,khd->hd", torch.softmax(score, 1)[:, : len(keys)], values))
    return torch.stack(outs), torch.stack(lses, 1)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_equals_attention_row_by_row(layout, flags, with_sinks):
    case = make(layout)
    flags = dict(flags, sinks=case.inputs[5] if with_sinks else None)
    got = prefix_attention(*case.inputs[:5], case.seq, backend="reference", **flags)
    torch.testing.assert_close(got, row_by_row(case, **flags))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("feature", FEATURES)
def test_the_reference_counts_distances_row_by_row(feature, layout):
    case, biases = make(layout), {name: x.double() for name, x in biased(feature, 4).items()}
    for flags in (biases, biases | dict(window=4)):
        got = prefix_attention(*case.inputs[:5], case.seq, backend="reference", **flags)
        torch.testing.assert_close(got, row_by_row(case, **flags))


@pytest.mark.parametrize(
    "layout, dtype, value_dim, flags",
    [
        *(("contiguous", torch.float32, 32, flags) for flags in FLAGS),
        *(("pages", torch.float32, 36, flags) for flags in FLAGS),
        ("contiguous", torch.float32, 36, dict(window=150)),
        ("pages", torch.float32, 32, dict(feature="alibi")),
        ("contiguous", torch.float32, 32, dict(feature="bias", window=150)),
        ("contiguous", torch.bfloat16, 32, {}),
        ("pages", torch.float16, 36, dict(window=150)),
    ],
    ids=str,
)
def test_the_library_is_within_the_budget(layout, dtype, value_dim, flags, every_isa):
    """Long and short sequences, and more queries than fit into a tile; what no sequence has is never read."""
    flags = dict(flags)
    case = make(layout, dtype, (20, value_dim), (9, 1, 0, 230, 33, 170), (3, 1, 0, 130, 2, 1))
    if "feature" in flags:
        flags |= biased(flags.pop("feature"), 4)
    grad = torch.zeros(case.seq.rows, 4, value_dim, dtype=dtype)
    budget = attention_budget(case.inputs, grad, case.seq, **flags)
    for _ in every_isa():
        got = prefix_attention(*case.inputs[:5], case.seq, sinks=case.inputs[5], backend="cpu", **flags)
        assert_within(budget, [*got, *budget.exact[2:]])


@pytest.mark.parametrize("flags", [{}, dict(window=40)], ids=str)
@pytest.mark.parametrize("backend", ["reference", LIBRARY])
def test_gradients_reach_a_padded_cache(backend, flags):
    """Those of several queries, the last of a long sequence in several tiles."""
    case = make("contiguous", torch.float32, lengths=(9, 1, 0, 230, 33), queries=(3, 1, 0, 130, 2))
    leaves = [x.requires_grad_() for x in case.inputs]
    grad = torch.randn(case.seq.rows, 4, 6, generator=torch.Generator().manual_seed(1))
    budget = attention_budget(case.inputs, grad, case.seq, **flags)
    out, lse = prefix_attention(*leaves[:5], case.seq, sinks=leaves[5], backend=backend, **flags)
    assert_within(budget, [out.detach(), lse, *torch.autograd.grad(out, leaves, grad)])


def test_the_reference_has_the_gradients_of_attention_row_by_row():
    case = make("contiguous")
    q, k, v, prefix_k, prefix_v, sinks = leaves = [x.requires_grad_() for x in case.inputs]
    starts, lengths = case.seq.key_starts.tolist(), case.seq.lengths.tolist()
    own = [tuple(x[b, :, s : s + n].transpose(0, 1) for x in (k, v)) for b, (s, n) in enumerate(zip(starts, lengths))]
    case.own = own
    grad = torch.randn(case.seq.rows, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out, _ = prefix_attention(q, k, v, prefix_k, prefix_v, case.seq, sinks=sinks, backend="reference", window=6)
    expected, _ = row_by_row(case, sinks=sinks, window=6)
    for x, y in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad)):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", ["reference", LIBRARY])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_query_each_is_what_decode_has_without_being_asked(layout, backend):
    """An empty cache gives zeros."""
    case = make(layout, torch.float32, lengths=(9, 0, 6), queries=None)
    out, lse = prefix_attention(*case.inputs[:5], case.seq, backend=backend)
    assert not out[1].any() and (lse[:, 1] == -math.inf).all()
    asked = make(layout, torch.float32, lengths=(9, 0, 6), queries=(1, 0, 1))
    got, _ = prefix_attention(case.inputs[0][[0, 2]], *case.inputs[1:5], asked.seq, backend=backend)
    torch.testing.assert_close(got, out[[0, 2]])


def test_sequences_cross_an_operator_and_devices_with_their_caches():
    seq = make("pages").seq
    found = Sequences.from_flat(seq.flat)
    for name in ("starts", "lengths", "prefix_ids", "prefix_lens", "gaps", "queries", "key_starts", "pages"):
        assert torch.equal(getattr(found, name), getattr(seq, name)), name


@pytest.mark.parametrize(
    "options, error",
    [
        (dict(queries=[1, 3]), r"queries must lie between 0 and the lengths \[4, 2\], .* got \[1, 3\]"),
        (dict(queries=-1), r"queries must lie between 0"),
        (dict(queries=[1]), r"queries must have shape \[2\]"),
        (dict(starts=[0, 7]), r"starts and lengths must stay within the 8 columns .* 2 keys from column 7 on"),
        (dict(starts=[-1, 0]), r"must stay within the 8 columns .* 4 keys from column -1"),
        (dict(starts=[0]), r"starts must have shape \[2\]"),
        (dict(pages=[[0], [2]]), r"seq.pages must lie in \[0, 2\), got values from 0 to 2"),
        (dict(pages=[[0, 1], [1, 0]], starts=[6, 15]), r"must stay within the 16 columns .* 2 keys from column 15"),
        (dict(pages=[[0, 1]]), r"pages must have shape \[2, M\]"),
        (dict(pages=[[], []]), r"pages must have at least one column"),
    ],
    ids=str,
)
def test_what_a_cache_does_not_have_is_refused(options, error):
    q, cache = torch.zeros(2, 4, 8), torch.zeros(2, 2, 8, 8)
    with pytest.raises(ValueError, match=error):
        prefix_attention(q, cache, cache, None, None, Sequences.decode([4, 2], **options))


def test_pages_have_no_backward():
    case = make("pages", torch.float32)
    case.inputs[0].requires_grad_()
    with pytest.raises(NotImplementedError, match="a cache in pages has no backward"):
        prefix_attention(*case.inputs[:5], case.seq)
    with torch.no_grad():
        prefix_attention(*case.inputs[:5], case.seq)


@pytest.mark.skipif(bool(native.missing), reason=str(native.missing))
@pytest.mark.parametrize("wrong", [False, True])
def test_the_benchmark_gives_a_speed_up_only_for_right_results(wrong, tmp_path, monkeypatch, capsys):
    if wrong:
        call = benchmark.Numbers.ours
        monkeypatch.setattr(benchmark.Numbers, "ours", lambda self, keys, seq: call(self, keys, seq) * 1.001)
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    monkeypatch.setattr(benchmark, "ROWS", 3)
    assert benchmark.run(tmp_path, cases=[benchmark.Case(torch.float32, 5, 16)]) != wrong
    assert ("WRONG" in capsys.readouterr().out) == wrong
    assert ("WRONG" in (tmp_path / "decode.csv").read_text()) == wrong
