"""ALiBi and relative position biases in prefix_attention, on every backend that runs on a CPU."""

import functools
import math

import pytest
import torch
from attention_cases import FEATURES, biased
from budget import assert_within
from covering import covering_array
from dropout_masks import InEveryDraw
from faults import assert_found, attention_faults
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_prefix_attention import SIZES, dense, layout, run, tensors
from test_prefix_attention_cpu import all_results

from benchmarks.budget import attention_budget
from fastprompt import Sequences, native, prefix_attention
from fastprompt.ops.prefix_attention.dropout import Dropout

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(bool(native.missing), reason="no library"))]


def case(feature, heads=4, kv_heads=2, prefixes=2, dtype=torch.float64, lengths=(5, 0, 9, 1, 5, 2), **options):
    """Sequences and how dense attention is told of them, inputs, gradient, flags."""
    options = dict(kind="packed", widths=(8, 5), prefix_length=7, sinks=False, mixed=True) | options
    room, (head_dim, value_dim) = options["prefix_length"], options["widths"]
    seq, described = layout(list(lengths), options["kind"], prefixes, room, seed=heads, mixed=options["mixed"])
    inputs = tensors(
        seq.rows, heads, kv_heads, head_dim, prefixes, room, dtype, sinks=options["sinks"], value_dim=value_dim
    )
    grad = torch.randn(seq.rows, heads, value_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    return seq, described, inputs, grad, biased(feature, heads)


@pytest.mark.parametrize(
    "feature, kind, causal, window, sizes",
    covering_array(FEATURES, ["packed", "padded"], [True, False], [None, 4], SIZES),
    ids=str,
)
def test_the_reference_equals_dense_attention(feature, kind, causal, window, sizes):
    (heads, kv_heads, prefixes, widths), flags = sizes, dict(causal=causal, window=window)
    case_ = case(feature, heads, kv_heads, prefixes, kind=kind, widths=widths, sinks=prefixes == 2)
    seq, described, inputs, grad, biases = case_
    biases = {name: x.double() for name, x in biases.items()}
    expected = run(lambda *a, **f: dense(*a[:5], described, **f), inputs, grad, **flags, **biases)
    got = run(prefix_attention, inputs, grad, seq, backend="reference", **flags, **biases)
    for x, y in zip(got, expected):
        torch.testing.assert_close(x, torch.zeros_like(x) if y is None else y, rtol=1e-10, atol=1e-10)


@functools.cache
def checked_cases(feature, dtype):
    """Sequences, inputs, gradient, and two sets of flags with the budget of each: the same for every backend."""
    options = dict(prefix_length=70, widths=(20, 12), sinks=True)
    seq, _, inputs, grad, biases = case(feature, 6, 2, 2, dtype, (17, 3, 150, 40, 9, 1), **options)
    several = (biases, biases | dict(causal=False, window=30))
    return seq, inputs, grad, [(flags, attention_budget(inputs, grad, seq, **flags)) for flags in several]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_the_budget_in_every_dtype(backend, feature, dtype, every_isa):
    seq, inputs, grad, checks = checked_cases(feature, dtype)
    for flags, budget in checks:
        for _ in every_isa() if backend == "cpu" else "r":
            results = run(prefix_attention, inputs, grad, seq, backend=backend, **flags)
            assert_within(budget, all_results(results, inputs))


@pytest.mark.parametrize("feature, causal, dtype", covering_array(["alibi", "bias"], [True, False], DTYPES), ids=str)
def test_the_budget_finds_planted_faults(feature, causal, dtype):
    options = dict(prefix_length=70, widths=(20, 12))
    seq, _, inputs, grad, biases = case(feature, 6, 2, 2, dtype, (17, 3, 150, 40, 9, 1), **options)
    flags = dict(causal=causal, **biases)
    found = assert_found(attention_budget(inputs, grad, seq, **flags), attention_faults(inputs, grad, seq, **flags))
    assert {"a gap left out of distances"} < set(found)


@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(any),
    prefix_length=st.integers(0, 60),
    prefixes=st.integers(0, 3),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    group=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    kind=st.sampled_from(["packed", "padded"]),
    feature=st.sampled_from(FEATURES),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 60),
    dropout_p=st.sampled_from([0.0, 0.3]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape(
    backend, lengths, prefix_length, prefixes, widths, group, kv_heads, kind, feature, causal, window, dropout_p
):
    options = dict(prefix_length=prefix_length, widths=widths, kind=kind)
    heads = group * kv_heads
    seq, _, inputs, grad, biases = case(feature, heads, kv_heads, prefixes, torch.float32, lengths, **options)
    flags = dict(causal=causal, window=window, **biases)
    dropout = InEveryDraw(dropout_p, 5, heads) if dropout_p else None
    budget = attention_budget(inputs, grad, seq, dropout=dropout, **flags)
    got = run(prefix_attention, inputs, grad, seq, backend=backend, dropout_p=dropout_p, dropout_seed=5, **flags)
    assert_within(budget, all_results(got, inputs))


@pytest.mark.parametrize("feature", FEATURES)
def test_dropout_equals_dense_attention(feature):
    seq, described, inputs, grad, biases = case(feature)
    expected = run(lambda *a, **f: dense(*a[:5], described, dropout=Dropout(0.4, 5), **f), inputs, grad, **biases)
    got = run(prefix_attention, inputs, grad, seq, dropout_p=0.4, dropout_seed=5, **biases)
    for x, y in zip(got, expected):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_equals_the_last_row_of_a_prefill(backend, feature):
    lengths, room = [4, 1, 7], 9
    seq, described, inputs, _, biases = case(feature, dtype=torch.float32, lengths=lengths)
    full, full_lse = prefix_attention(*inputs[:5], seq, backend="reference", **biases)
    starts = [start for start, *_ in described]
    last = torch.tensor([start + n - 1 for start, n in zip(starts, lengths)])
    q, k, v, *bank, _ = inputs
    cache_k, cache_v = (torch.full((3, 2, room, x.shape[-1]), math.nan) for x in (k, v))
    for b, (start, length) in enumerate(zip(starts, lengths)):
        cache_k[b, :, :length], cache_v[b, :, :length] = (x[start : start + length].transpose(0, 1) for x in (k, v))
    decoding = Sequences.decode(lengths, seq.prefix_ids, seq.prefix_lens, seq.gaps)
    out, lse = prefix_attention(q[last], cache_k, cache_v, *bank, decoding, backend=backend, **biases)
    torch.testing.assert_close(out, full[last])
    torch.testing.assert_close(lse, full_lse[:, last])


def test_slopes_are_those_of_a_bias_that_adds_the_key_position():
    """What Bloom, MPT and Falcon add, slope times the key's position, differs by a constant a row: lse shows it."""
    seq, _, inputs, _, biases = case("alibi", prefixes=0, mixed=False, lengths=(6,))
    slopes = biases["alibi_slopes"].double()
    q, k, v = (x.transpose(0, 1).repeat_interleave(n, 0) for x, n in zip(inputs[:3], (1, 2, 2)))
    position = torch.arange(6, dtype=torch.float64)
    mask = (slopes[:, None, None] * position).expand(4, 6, 6) + torch.full((6, 6), -math.inf).triu(1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out, lse = prefix_attention(*inputs[:3], None, None, seq, alibi_slopes=slopes)
    torch.testing.assert_close(out.transpose(0, 1), expected)
    scores = torch.einsum("hqd,hkd->hqk", q, k) * 8**-0.5 + mask
    torch.testing.assert_close(lse, torch.logsumexp(scores, -1) - slopes[:, None] * position)


@pytest.mark.parametrize("flags", [{}, dict(causal=False, scale=1.0), dict(dropout_p=0.3, dropout_seed=2)], ids=str)
def test_gradcheck(flags):
    seq, _, inputs, _, _ = case("bias", 2, 1, 2, lengths=(3, 1, 4), prefix_length=3, widths=(4, 3), sinks=True)
    *inputs, sinks = (x.requires_grad_() for x in inputs)
    table = biased("bias", 2, torch.float64)["position_bias"].requires_grad_()
    torch.autograd.gradcheck(
        lambda *x: prefix_attention(*x[:5], seq, sinks=x[5], position_bias=x[6], **flags)[0], [*inputs, sinks, table]
    )
    slopes = biased("alibi", 2, torch.float64)["alibi_slopes"]
    attend = functools.partial(prefix_attention, alibi_slopes=slopes, **flags)
    torch.autograd.gradcheck(lambda *x: attend(*x[:5], seq, sinks=x[5])[0], [*inputs, sinks])


@pytest.mark.parametrize("kind", ["packed", "padded"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trained_table_has_a_gradient_on_every_backend(backend, kind):
    """Alone, too, where no other gradient is asked for."""
    seq, described, inputs, grad, biases = case("bias", dtype=torch.float32, kind=kind)
    exact = biases["position_bias"].double().requires_grad_()
    out, _ = dense(*(x if x is None else x.double() for x in inputs[:5]), described, position_bias=exact, causal=False)
    out.backward(grad.double())
    for need in (True, False):
        table = biases["position_bias"].clone().requires_grad_()
        leaves = [x.clone().requires_grad_(need) for x in inputs[:5]]
        out, _ = prefix_attention(*leaves, seq, position_bias=table, causal=False, backend=backend)
        out.backward(grad)
        torch.testing.assert_close(table.grad, exact.grad.float(), rtol=1e-4, atol=1e-5)
        assert all((x.grad is not None) == need for x in leaves)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_expanded_gradients(backend, feature):
    seq, _, inputs, grad, biases = case(feature, dtype=torch.float32)
    one = torch.ones(1, 1, 1).expand_as(grad)
    expected = run(prefix_attention, inputs, one, seq, backend="reference", **biases)
    strided = [x if x is None else x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in inputs]
    biases = {name: torch.stack([x, x], -1)[..., 0] for name, x in biases.items()}
    for x, y in zip(run(prefix_attention, strided, one, seq, backend=backend, **biases), expected):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("lengths", [(), (0, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend, lengths, feature):
    seq, _, inputs, grad, biases = case(feature, dtype=torch.float32, lengths=lengths)
    out, lse, *grads = run(prefix_attention, inputs, grad, seq, backend=backend, **biases)
    assert out.shape == (0, 4, 5) and lse.shape == (4, 0) and all(not g.any() for g in grads)


@pytest.mark.parametrize("feature", ["alibi", "bias"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, feature):
    seq, _, inputs, _, biases = case(feature, 2, 1, dtype=torch.float32, lengths=(3, 1, 4), sinks=True)
    options = (seq.flat, True, None, None, 0.5, 0.0, backend)
    arguments = (*inputs, biases.get("position_bias"), biases.get("alibi_slopes"), None)
    torch.library.opcheck(torch.ops.fastprompt.prefix_attention.default, (*arguments, *options))
    out, lse = torch.ops.fastprompt.prefix_attention(*arguments, *options)
    needs = [True] * 6 + [feature == "bias"]
    torch.library.opcheck(
        torch.ops.fastprompt.prefix_attention_backward.default,
        (torch.randn_like(out), *arguments, out, lse, *options, needs),
    )


@pytest.mark.parametrize("feature", ["alibi", "bias"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("fresh_graphs")
def test_compiles_without_a_graph_break(backend, feature):
    seq, _, inputs, grad, biases = case(feature, dtype=torch.float32)
    compiled = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
    options = dict(backend=backend, **biases)
    if feature == "bias":
        biases["position_bias"].requires_grad_()
    for x, y in zip(run(compiled, inputs, grad, seq, **options), run(prefix_attention, inputs, grad, seq, **options)):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(alibi_slopes=torch.zeros(3)), ValueError, r"alibi_slopes must have shape \[4\], got \[3\]"),
        (dict(alibi_slopes=torch.zeros(4).bfloat16()), TypeError, "alibi_slopes must have one of the dtypes"),
        (dict(alibi_slopes=torch.zeros(4).double()), TypeError, "alibi_slopes must have one of the dtypes"),
        (dict(alibi_slopes=torch.zeros(4).requires_grad_()), ValueError, "alibi_slopes must not require a gradient"),
        (dict(position_bias=torch.zeros(4)), ValueError, r"position_bias must have shape \[4, 2 \* M \+ 1\]"),
        (dict(position_bias=torch.zeros(4, 6)), ValueError, "position_bias must have an odd number of columns"),
        (dict(position_bias=[1.0]), TypeError, "position_bias must be a torch.Tensor"),
        (dict(position_bias=torch.zeros(4, 5), softcap=2.0), ValueError, "softcap must be None with position_bias"),
        (dict(alibi_slopes=torch.zeros(4), softcap=2.0), ValueError, "softcap must be None with alibi_slopes"),
        (dict(alibi_slopes=torch.zeros(4), position_bias=torch.zeros(4, 5)), ValueError, "must not both be given"),
        (dict(alibi_slopes=torch.zeros(4), backend="composed"), RuntimeError, "take no ALiBi slopes"),
        (dict(position_bias=torch.zeros(4, 1), backend="composed"), RuntimeError, "take no position bias"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = dict(
        q=torch.zeros(10, 4, 8),
        k=torch.zeros(10, 2, 8),
        v=torch.zeros(10, 2, 8),
        prefix_k=None,
        prefix_v=None,
        seq=Sequences.packed([0, 4, 10]),
    )
    with pytest.raises(error, match=message):
        prefix_attention(**{**arguments, **change})
