"""prefix_attention with keys of other rows than the queries, on every backend that runs on a CPU."""

import math

import pytest
import torch
from attention_cases import Cross
from covering import covering_array
from faults import assert_found, attention_faults
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastprompt import Sequences, native, prefix_attention
from fastprompt.ops.prefix_attention.dropout import Dropout

BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(bool(native.missing), reason="no library"))]


@pytest.mark.parametrize(
    "kind, sizes, sinks, p",
    covering_array(
        ["packed", "padded", "runs"],
        [(4, 2, 2, (8, 5)), (3, 3, 1, (8, 8)), (6, 1, 0, (5, 8))],
        [False, True],
        [0.0, 0.4],
    ),
    ids=str,
)
def test_the_reference_equals_dense_attention(kind, sizes, sinks, p):
    heads, kv_heads, prefixes, widths = sizes
    case = Cross(heads=heads, kv_heads=kv_heads, prefixes=prefixes, widths=widths, kind=kind, sinks=sinks, seed=heads)
    dropout = Dropout(p, 5) if p else None
    expected = case.differentiate(lambda *x: case.dense(*x, dropout=dropout))
    for x, y in zip(case.run("reference", dropout_p=p, dropout_seed=5), expected):
        if x is not None:  # autograd through dense attention never meets a prefix that nobody reads
            torch.testing.assert_close(x, torch.zeros_like(x) if y is None else y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "heads, kv_heads, queries, keys",
    [(6, 2, (17, 3, 150, 40, 9, 1), (40, 200, 17, 1, 9, 3)), (2, 1, (700, 2), (90, 300))],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_within_the_budget_in_every_dtype(backend, heads, kv_heads, queries, keys, dtype, every_isa):
    case = Cross(queries, keys, heads, kv_heads, (20, 12), room=70, dtype=dtype, sinks=True)
    for _ in every_isa() if backend == "cpu" else "r":
        case.check(backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_budget_finds_planted_faults(dtype):
    case = Cross((17, 3, 150, 40, 9, 1), (40, 200, 17, 1, 9, 3), 6, 2, (20, 12), room=70, dtype=dtype)
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
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape(backend, lengths, room, prefixes, widths, group, kv_heads, kind, sinks, dropout_p, seed):
    queries, keys = zip(*lengths)
    case = Cross(
        queries, keys, group * kv_heads, kv_heads, widths, prefixes, room, torch.float32, kind, sinks, seed
    )  # fmt: skip
    case.check(backend, dropout_p)


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("kind", ["packed", "padded", "runs"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_without_keys_are_as_rows_outside(backend, kind, sinks, poisoned):
    case = Cross((3, 2, 4), (0, 5, 0), prefixes=0, dtype=torch.float32, kind=kind, sinks=sinks)
    out, lse, dq, *_ = results = case.run(backend)
    assert all(x.isfinite().all() for x in (out, *results[2:]) if x is not None)
    for start, count in zip(case.query_starts[::2], (3, 4)):
        rows = slice(start, start + count)
        assert not out[rows].any() and not dq[rows].any() and bool((lse[:, rows] == -math.inf).all())
    assert out[case.query_starts[1]].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_nobody_reads_have_gradients_of_zero(backend, poisoned):
    """Those of a sequence without queries, and those of no sequence, which are not read either."""
    case = Cross((0, 4), (3, 2), prefixes=1, dtype=torch.float32, kind="runs")
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
    case = Cross(queries, keys, prefixes=prefixes, dtype=torch.float32)
    out, lse, *_ = case.check(backend)
    assert out.shape == (sum(queries), 4, 5) and lse.shape == (4, sum(queries))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_query_a_sequence_reads_its_source_without_a_decode_batch(backend):
    """Generation: the new token of each sequence against the keys of its text."""
    case = Cross((1, 1, 1, 1), (9, 0, 4, 30), dtype=torch.float32)
    case.check(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_expanded_gradients(backend):
    case = Cross(dtype=torch.float32)
    case.grad = torch.ones(1, 1, 1).expand_as(case.grad)
    expected = case.run("reference")

    def strided(x):
        return torch.stack([x, x], -1)[..., 0]

    for x, y in zip(case.run(backend, put=strided)[:7], expected):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    case.grad = torch.ones(1, 1, 1).expand_as(case.grad)
    for x, y in zip(case.run(backend, put=lambda x: x.detach())[:7], expected):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(bool(native.missing), reason="no library")
def test_same_bits_with_any_number_of_threads():
    """Queries of one sequence in several chunks, whose parts of the keys' gradients are added up."""
    case, before, results = Cross((700, 2, 40), (90, 300, 5), dtype=torch.float32), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(case.run("cpu")[:7])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))


def test_gradcheck():
    case = Cross((3, 1, 0, 2), (2, 0, 1, 4), 2, 1, (4, 3), room=3, sinks=True)
    leaves = [x.requires_grad_() for x in case.inputs]
    for p in (0.0, 0.3):
        options = dict(causal=False, key_seq=case.key_seq, dropout_p=p, dropout_seed=3)
        torch.autograd.gradcheck(
            lambda *x, options=options: prefix_attention(*x[:5], case.seq, sinks=x[5], **options)[0], leaves
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    case = Cross((3, 1, 4), (2, 0, 5), 2, 1, dtype=torch.float32, sinks=True)
    options = (torch.cat([case.seq.flat, case.key_seq.flat]), False, None, None, 0.5, 0.0, backend)
    arguments = (*case.inputs, None, None, None)
    torch.library.opcheck(torch.ops.fastprompt.prefix_attention.default, (*arguments, *options))
    out, lse = torch.ops.fastprompt.prefix_attention(*arguments, *options)
    torch.library.opcheck(
        torch.ops.fastprompt.prefix_attention_backward.default,
        (torch.randn_like(out), *arguments, out, lse, *options, [True] * 6 + [False]),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("fresh_graphs")
def test_compiles_without_a_graph_break(backend):
    case = Cross(dtype=torch.float32)
    compiled = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
    results = [case.run(backend, function)[:7] for function in (compiled, prefix_attention)]
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
