"""prefix_attention with keys of other rows than the queries, on every backend that runs on a CPU."""

import itertools
import math

import pytest
import torch
from budget import assert_within
from dropout_masks import InEveryDraw
from faults import assert_found, attention_faults
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_prefix_attention import run
from test_prefix_attention_cpu import all_results

from benchmarks.budget import attention_budget
from fastprompt import Sequences, native, prefix_attention
from fastprompt.ops.prefix_attention.dropout import Dropout

BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(bool(native.missing), reason="no library"))]
QUERIES, KEYS = (5, 0, 9, 1, 5, 2), (3, 4, 12, 0, 1, 20)


class Case:
    """A batch: sequences of queries and of keys, inputs, a gradient, and each sequence alone for dense attention."""

    def __init__(
        self, queries=QUERIES, keys=KEYS, heads=4, kv_heads=2, widths=(8, 5), prefixes=2, room=7, dtype=torch.float64,
        kind="packed", sinks=False, seed=0,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        batch, used = len(queries), None
        ids = torch.randint(-1, prefixes, (batch,), generator=generator) if prefixes else torch.full((batch,), -1)
        if prefixes:
            used = torch.randint(0, room + 1, (prefixes,), generator=generator)
        options = dict(prefix_ids=ids, prefix_lens=used)
        self.query_starts, self.key_starts = ([0, *itertools.accumulate(n)] for n in (queries, keys))
        if kind == "packed":
            self.seq, self.key_seq = Sequences.packed(self.query_starts, **options), Sequences.packed(self.key_starts)
        elif kind == "padded":
            self.query_starts, self.key_starts = ([b * (max(n) + 2) + 1 for b in range(batch)] for n in (queries, keys))
            self.seq = Sequences.padded([1] * batch, queries, max(queries) + 2, **options)
            self.key_seq = Sequences.padded([1] * batch, keys, max(keys) + 2)
        else:  # keys in the opposite order, some of nobody in between
            self.key_starts = [sum(keys[b + 1 :]) + 2 * (batch - b) for b in range(batch)]
            self.seq = Sequences.packed(self.query_starts, **options)
            self.key_seq = Sequences.runs(self.key_starts, keys, sum(keys) + 2 * batch + 1)
        self.lengths, self.ids, self.used = (queries, keys), ids.tolist(), used

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        rows = self.key_seq.rows
        bank = [draw(prefixes, room, kv_heads, width) if prefixes else None for width in widths]
        q, k, v = draw(self.seq.rows, heads, widths[0]), *(draw(rows, kv_heads, width) for width in widths)
        self.inputs = [q, k, v, *bank, draw(heads) if sinks else None]
        self.grad = draw(self.seq.rows, heads, widths[1])

    def dense(self, q, k, v, prefix_k, prefix_v, sinks=None, dropout=None):
        out, lse = q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_full((q.shape[1], q.shape[0]), -math.inf)
        for b, (queries, keys) in enumerate(zip(*self.lengths)):
            rows = slice(self.query_starts[b], self.query_starts[b] + queries)
            own, number = slice(self.key_starts[b], self.key_starts[b] + keys), self.ids[b]
            used = int(self.used[number]) if number >= 0 else 0
            if queries == 0 or keys + used == 0:
                continue
            seen = [x[own] if number < 0 else torch.cat([bank[number, :used], x[own]])
                    for x, bank in ((k, prefix_k), (v, prefix_v))]  # fmt: skip
            keys_of, values_of = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in seen)
            score = torch.einsum("qhd,khd->hqk", q[rows], keys_of) / math.sqrt(q.shape[2])
            columns = score if sinks is None else torch.cat([score, sinks[:, None, None].expand(-1, queries, 1)], -1)
            weight = torch.softmax(columns, -1)[..., : keys + used]
            if dropout is not None:
                kept = dropout.kept(torch.arange(rows.start, rows.stop), q.shape[1], torch.arange(keys + used))
                weight = weight * kept / (1 - dropout.p)
            out[rows] = torch.einsum("hqk,khd->qhd", weight, values_of)
            lse[:, rows] = torch.logsumexp(columns, -1)
        return out, lse

    def run(self, backend, **flags):
        flags = dict(causal=False, key_seq=self.key_seq, backend=backend) | flags
        return run(prefix_attention, self.inputs, self.grad, self.seq, **flags)

    def budget(self, **flags):
        return attention_budget(self.inputs, self.grad, self.seq, causal=False, key_seq=self.key_seq, **flags)

    def check(self, backend, dropout_p=0.0, **flags):
        """The results, within their budget."""
        dropout = InEveryDraw(dropout_p, 5, self.inputs[0].shape[1]) if dropout_p else None
        results = self.run(backend, dropout_p=dropout_p, dropout_seed=5, **flags)
        assert_within(self.budget(dropout=dropout, **flags), all_results(results, self.inputs))
        return results


@pytest.mark.parametrize("kind", ["packed", "padded", "runs"])
@pytest.mark.parametrize("heads, kv_heads, prefixes, widths", [(4, 2, 2, (8, 5)), (3, 3, 1, (8, 8)), (6, 1, 0, (5, 8))])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_the_reference_equals_dense_attention(kind, heads, kv_heads, prefixes, widths, sinks, p):
    case = Case(heads=heads, kv_heads=kv_heads, prefixes=prefixes, widths=widths, kind=kind, sinks=sinks, seed=heads)
    dropout = Dropout(p, 5) if p else None
    expected = run(lambda *a, **f: case.dense(*a, **f), case.inputs, case.grad, dropout=dropout)
    for x, y in zip(case.run("reference", dropout_p=p, dropout_seed=5), expected):
        torch.testing.assert_close(x, torch.zeros_like(x) if y is None else y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries, keys", [((17, 3, 150, 40, 9, 1), (40, 200, 17, 1, 9, 3)), ((700, 2), (90, 300))])
@pytest.mark.parametrize("backend", BACKENDS)
def test_within_the_budget_in_every_dtype(backend, queries, keys, dtype, every_isa):
    case = Case(queries, keys, 6, 2, (20, 12), room=70, dtype=dtype, sinks=True)
    for _ in every_isa() if backend == "cpu" else "r":
        case.check(backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_budget_finds_planted_faults(dtype):
    case = Case((17, 3, 150, 40, 9, 1), (40, 200, 17, 1, 9, 3), 6, 2, (20, 12), room=70, dtype=dtype)
    flags = dict(causal=False, key_seq=case.key_seq)
    assert "the keys of a neighbour" in assert_found(
        case.budget(), attention_faults(case.inputs, case.grad, case.seq, **flags)
    )


@given(
    lengths=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=6),
    room=st.integers(0, 60),
    prefixes=st.integers(0, 3),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    group=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    kind=st.sampled_from(["packed", "padded", "runs"]),
    sinks=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape(backend, lengths, room, prefixes, widths, group, kv_heads, kind, sinks, dropout_p, seed):
    queries, keys = zip(*lengths)
    case = Case(
        queries, keys, group * kv_heads, kv_heads, widths, prefixes, room, torch.float32, kind, sinks, seed
    )  # fmt: skip
    case.check(backend, dropout_p)


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("kind", ["packed", "padded", "runs"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_without_keys_are_as_rows_outside(backend, kind, sinks, poisoned):
    case = Case((3, 2, 4), (0, 5, 0), prefixes=0, dtype=torch.float32, kind=kind, sinks=sinks)
    out, lse, dq, *_ = results = case.run(backend)
    assert all(x.isfinite().all() for x in (out, *results[2:]))
    for start, count in zip(case.query_starts[::2], (3, 4)):
        rows = slice(start, start + count)
        assert not out[rows].any() and not dq[rows].any() and bool((lse[:, rows] == -math.inf).all())
    assert out[case.query_starts[1]].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_nobody_reads_have_gradients_of_zero(backend, poisoned):
    """Those of a sequence without queries, and those of no sequence, which are not read either."""
    case = Case((0, 4), (3, 2), prefixes=1, dtype=torch.float32, kind="runs")
    unread = torch.ones(case.key_seq.rows, dtype=torch.bool)
    unread[case.key_starts[1] : case.key_starts[1] + 2] = False
    for x in case.inputs[1:3]:
        x[unread] = math.nan
    out, _, _, dk, dv, *_ = case.run(backend)
    assert out.isfinite().all() and not dk[unread].any() and not dv[unread].any() and dk[~unread].any()


@pytest.mark.parametrize("queries, keys", [((), ()), ((0, 0), (0, 0)), ((0, 0), (3, 2)), ((3, 2), (0, 0))])
@pytest.mark.parametrize("prefixes", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend, prefixes, queries, keys):
    case = Case(queries, keys, prefixes=prefixes, dtype=torch.float32)
    out, lse, *grads = case.check(backend)
    assert out.shape == (sum(queries), 4, 5) and lse.shape == (4, sum(queries))
    assert [len(x) for x in grads[:3]] == [sum(queries), sum(keys), sum(keys)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_query_a_sequence_reads_its_source_without_a_decode_batch(backend):
    """Generation: the new token of each sequence against the keys of its text."""
    case = Case((1, 1, 1, 1), (9, 0, 4, 30), dtype=torch.float32)
    case.check(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_expanded_gradients(backend):
    case = Case(dtype=torch.float32)
    case.grad = torch.ones(1, 1, 1).expand_as(case.grad)
    expected = case.run("reference")
    case.inputs = [x if x is None else x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in case.inputs]
    for x, y in zip(case.run(backend), expected):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_gradcheck():
    case = Case((3, 1, 0, 2), (2, 0, 1, 4), 2, 1, (4, 3), room=3, sinks=True)
    leaves = [x.requires_grad_() for x in case.inputs]
    for p in (0.0, 0.3):
        options = dict(causal=False, key_seq=case.key_seq, dropout_p=p, dropout_seed=3)
        torch.autograd.gradcheck(
            lambda *x, options=options: prefix_attention(*x[:5], case.seq, sinks=x[5], **options)[0], leaves
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    case = Case((3, 1, 4), (2, 0, 5), 2, 1, dtype=torch.float32, sinks=True)
    sequences = [x for seq in (case.seq, case.key_seq) for x in (seq.tensors(), seq.kind, seq.rows)]
    options = (*sequences, False, None, None, 0.5, 0.0, backend)
    arguments = (*case.inputs, None, None, None)
    torch.library.opcheck(torch.ops.fastprompt.prefix_attention.default, (*arguments, *options))
    out, lse = torch.ops.fastprompt.prefix_attention(*arguments, *options)
    torch.library.opcheck(
        torch.ops.fastprompt.prefix_attention_backward.default,
        (torch.randn_like(out), *arguments, out, lse, *options, [True] * 6 + [False]),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend):
    case = Case(dtype=torch.float32)
    compiled = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
    options = dict(causal=False, key_seq=case.key_seq, backend=backend)
    results = [run(f, case.inputs, case.grad, case.seq, **options) for f in (compiled, prefix_attention)]
    assert all(torch.equal(x, y) for x, y in zip(*results))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(key_seq=[0, 2, 7]), TypeError, "key_seq must be a fastprompt.Sequences, got list"),
        (dict(key_seq=Sequences.packed([0, 7])), ValueError, "key_seq must have seq's 2 sequences, got 1"),
        (dict(key_seq=Sequences.packed([0, 2, 6])), ValueError, r"k must have shape \[6, Hkv, 8\], got \[7, 2, 8\]"),
        (dict(causal=True), ValueError, "causal must be False with key_seq"),
        (dict(window=3), ValueError, "window must be None with key_seq"),
        (dict(alibi_slopes=torch.zeros(4)), ValueError, "alibi_slopes must be None with key_seq"),
        (dict(position_bias=torch.zeros(4, 3)), ValueError, "position_bias must be None with key_seq"),
        (dict(key_seq=Sequences.packed([0, 2, 7], [0, 0])), ValueError, "key_seq must have no prefix_ids"),
        (dict(key_seq=Sequences.packed([0, 2, 7], gaps=[0, 1])), ValueError, "key_seq must have no gaps"),
        (dict(key_seq=Sequences.decode([1, 2]), k=torch.zeros(2, 2, 8), v=torch.zeros(2, 2, 8)), ValueError, "decode"),
        (dict(backend="composed"), RuntimeError, "take no keys of other rows than the queries"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = dict(
        q=torch.zeros(10, 4, 8),
        k=torch.zeros(7, 2, 8),
        v=torch.zeros(7, 2, 8),
        prefix_k=None,
        prefix_v=None,
        seq=Sequences.packed([0, 4, 10]),
        key_seq=Sequences.packed([0, 2, 7]),
        causal=False,
    )
    with pytest.raises(error, match=message):
        prefix_attention(**{**arguments, **change})
