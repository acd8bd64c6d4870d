"""ALiBi, position biases and cross-attention in the Triton kernels of prefix_attention, against float64."""

import math

import numpy as np
import pytest
import torch
from attention_cases import FEATURES, Cross, biased
from covering import covering_array
from faults import assert_found, attention_faults
from guard import DEVICE, guarded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_prefix_attention import (
    DTYPES,
    KINDS,
    LENGTHS,
    _shuffle_programs,
    check,
    draw,
    run,
    sequences,
    small_tiles,
)

from benchmarks.budget import attention_budget
from fastprompt import Sequences, prefix_attention


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch, request):
    if "real_tiles" not in request.function.__name__:
        small_tiles(monkeypatch)


@pytest.mark.parametrize(
    "kind, feature, causal, window, dtype",
    covering_array(KINDS, ["alibi", "bias"], [True, False], [None, 9], [torch.float32, torch.bfloat16], strength=3),
    ids=str,
)
def test_biases_with_every_flag(kind, feature, causal, window, dtype):
    flags = dict(causal=causal, window=window)
    seq = sequences(kind, LENGTHS, 2, 19)
    tensors = draw(seq, dtype, 4, 2, prefixes=2, prefix_length=19, sinks=True, value_dim=12)
    check(tensors, seq, **flags, **biased(feature, 4))


@pytest.mark.parametrize("feature", ["alibi", "bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_finds_planted_faults_of_biases(kind, feature):
    read = dict(gaps=[3, 0, 2, 3, 1], prefix_ids=[0, 1, 1, 1, 0], prefix_lens=[19, 12])  # all faults show
    seq = sequences(kind, LENGTHS, 2, 19, **read)
    *inputs, grad = draw(seq, torch.bfloat16, 4, 2, prefixes=2, prefix_length=19, value_dim=12)
    flags = biased(feature, 4)
    assert_found(attention_budget(inputs, grad, seq, **flags), attention_faults(inputs, grad, seq, **flags))


@pytest.mark.parametrize(
    "kind, sizes, feature", covering_array(KINDS, [(9, 3, 64), (4, 1, 128)], ["alibi", "bias"]), ids=str
)
def test_biases_with_real_tiles(kind, sizes, feature):
    heads, kv_heads, width = sizes
    seq = sequences(kind, [20, 3, 40], 2, 30)
    tensors = draw(seq, torch.bfloat16, heads, kv_heads, width, prefixes=2, prefix_length=30)
    check(tensors, seq, **biased(feature, heads))


@pytest.mark.parametrize("feature", ["alibi", "bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_a_group_that_are_taken_apart_have_their_own_biases(kind, feature):
    seq = sequences(kind, [3, 12, 1], 2, 5)
    check(draw(seq, torch.float32, 17, 1, prefixes=2, prefix_length=5), seq, **biased(feature, 17))


@pytest.mark.parametrize("feature", ["alibi", "bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_biases_with_dropout(kind, feature):
    seq = sequences(kind, LENGTHS, 2, 19)
    tensors = draw(seq, torch.float32, 4, 2, prefixes=2, prefix_length=19)
    check(tensors, seq, dropout_p=0.3, **biased(feature, 4))


def test_a_trained_table_has_a_gradient():
    seq = sequences("packed", LENGTHS, 2, 19)
    *inputs, grad = draw(seq, torch.float32, 4, 2, prefixes=2, prefix_length=19)
    tables = []
    for backend in ("triton", "reference"):
        table = biased("bias", 4)["position_bias"].to(DEVICE).requires_grad_()
        leaves = [x.to(DEVICE) for x in inputs[:5]]
        prefix_attention(*leaves, seq, position_bias=table, backend=backend)[0].backward(grad.to(DEVICE))
        tables.append(table.grad)
    torch.testing.assert_close(*tables, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["packed", "padded", "runs"])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_cross_attention(kind, sinks, dtype):
    queries, keys = (5, 0, 11, 1, 18, 4), (20, 3, 0, 33, 1, 7)
    case = Cross(queries, keys, widths=(16, 12), room=19, dtype=dtype, kind=kind, sinks=sinks)
    case.check("triton", put=guarded)
    case.check("triton", 0.3, put=guarded)


@pytest.mark.parametrize("heads, kv_heads, widths", [(9, 3, (64, 64)), (4, 4, (192, 128))])
def test_cross_attention_with_real_tiles(heads, kv_heads, widths):
    case = Cross((20, 3, 40), (50, 30, 3), heads, kv_heads, widths, 2, 30, torch.bfloat16)
    case.check("triton", put=guarded)


def test_the_budget_finds_planted_faults_of_cross_attention():
    case = Cross((5, 0, 11, 1, 18), (20, 3, 0, 33, 1), widths=(16, 12), room=19, dtype=torch.bfloat16)
    flags = dict(causal=False, key_seq=case.key_seq)
    assert_found(case.budget(), attention_faults(case.inputs, case.grad, case.seq, **flags))


@pytest.mark.parametrize("kind", ["packed", "padded", "runs"])
@pytest.mark.parametrize("queries, keys", [((), ()), ((0, 0), (3, 2)), ((3, 2), (0, 0)), ((3, 0, 2, 4), (0, 2, 5, 0))])
@pytest.mark.parametrize("prefixes", [0, 1])
def test_sequences_without_queries_or_keys(prefixes, queries, keys, kind):
    """Those without any key are as rows outside; keys that nobody reads have gradients of zero."""
    case = Cross(queries, keys, prefixes=prefixes, dtype=torch.float32, kind=kind, sinks=True)
    out, lse, *_ = case.check("triton", put=guarded)
    for start, count, own in zip(case.query_starts, queries, keys):
        if own == 0 and prefixes == 0:
            rows = slice(start, start + count)
            assert not out[rows].any() and bool((lse[:, rows] == -math.inf).all())


@pytest.mark.parametrize("feature", ["alibi", "bias", "cross"])
def test_no_result_depends_on_the_order_of_programs(monkeypatch, feature):
    case = Cross((5, 0, 11, 1, 18), (20, 3, 0, 33, 1), widths=(16, 12), room=19, dtype=torch.float32)
    seq = sequences("packed", LENGTHS, 3, 21)
    tensors, flags = draw(seq, torch.float32, prefixes=3, prefix_length=21), biased(feature, 4)

    def results():
        if feature == "cross":
            case.seq = Sequences.from_flat(case.seq.flat)
            return case.run("triton", put=guarded)
        return check(tensors, sequences("packed", LENGTHS, 3, 21), **flags)

    first = results()
    for seed in range(2):
        with monkeypatch.context() as patch:
            _shuffle_programs(patch, np.random.default_rng(seed))
            for x, y in zip(results(), first):
                assert x is y is None or torch.equal(x, y)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=5),
    feature=st.sampled_from([*FEATURES, "cross"]),
    kind=st.sampled_from(["packed", "padded"]),
    groups=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    prefixes=st.integers(0, 3),
    room=st.integers(0, 40),
    window=st.one_of(st.none(), st.integers(1, 60)),
    causal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(lengths, feature, kind, groups, widths, prefixes, room, window, causal, seed):
    queries, keys = zip(*lengths)
    if feature == "cross":
        Cross(queries, keys, *groups, widths, prefixes, room, torch.float32, kind, seed=seed).check(
            "triton", put=guarded
        )
        return
    seq = sequences(kind, list(queries), prefixes, room, seed=seed)
    tensors = draw(seq, torch.float32, *groups, widths[0], prefixes, room, seed=seed, value_dim=widths[1])
    check(tensors, seq, window=window, causal=causal, **biased(feature, groups[0]))


def test_opcheck():
    case = Cross(dtype=torch.float32, sinks=True)
    inputs = (*(x.to(DEVICE) for x in case.inputs), None, None, None)
    options = (torch.cat([case.seq.flat, case.key_seq.flat]), False, None, None, 0.25, 0.0, "triton")
    torch.library.opcheck(torch.ops.fastprompt.prefix_attention.default, (*inputs, *options))


@pytest.mark.parametrize("feature", ["alibi", "bias"])
def test_strided_slopes_and_tables(feature):
    seq = sequences("packed", LENGTHS, 2, 19)
    tensors = [x if x is None else x.to(DEVICE) for x in draw(seq, torch.float32, prefixes=2, prefix_length=19)]
    ((name, x),) = biased(feature, 4).items()
    strided = torch.stack([x, x], -1).to(DEVICE)[..., 0]
    for a, b in zip(
        run(tensors, seq, "triton", **{name: strided}), run(tensors, seq, "triton", **{name: x.to(DEVICE)})
    ):
        assert a is b is None or torch.equal(a, b)
