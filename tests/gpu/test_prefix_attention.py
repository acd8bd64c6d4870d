"""The Triton kernels of prefix_attention against the float64 reference: flags, layouts and dtypes, both directions."""

from unittest import mock

import numpy as np
import pytest
import torch
from allocations import Allocations
from budget import assert_within
from covering import covering_array
from dropout_masks import InEveryDraw, describe
from fastprompt.kernels.launch import Options
from fastprompt.kernels.prefix_attention import config, schedule
from faults import assert_found, attention_faults
from guard import DEVICE, guarded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.budget import attention_budget
from fastprompt import Sequences, prefix_attention
from fastprompt.ops.prefix_attention.dropout import Dropout

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = ["packed", "padded", "decode"]
LENGTHS = [5, 0, 11, 1, 18]


def small_tiles(monkeypatch, queries=16, keys=16):
    """Tiles so small that a short batch has several of each sort."""
    tiles = config.Tiles(queries, keys, Options(4, 2), key_queries=keys, key_keys=queries)
    for name in ("forward_tiles", "backward_tiles"):
        monkeypatch.setattr(config, name, lambda *_, **__: tiles)
    monkeypatch.setattr(
        config, "decode_tiles", lambda *_, fold, **__: tiles if fold <= queries else config.Tiles(64, keys, Options())
    )
    monkeypatch.setattr(config, "chunk_rows", lambda *_: 11)
    monkeypatch.setattr(config, "decode_split", lambda *_: 16)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch, request):
    if request.function is not test_real_tiles:
        small_tiles(monkeypatch)


def sequences(kind, lengths, prefixes=0, prefix_length=0, mixed=True, seed=0, **given):
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)
    options = {}
    if mixed:
        options["gaps"] = torch.randint(0, 4, (batch,), generator=generator)
        if prefixes:
            options["prefix_ids"] = torch.randint(-1, prefixes, (batch,), generator=generator)
            options["prefix_lens"] = torch.randint(0, prefix_length + 1, (prefixes,), generator=generator)
    options |= given
    if kind == "packed":
        return Sequences.packed(np.cumsum([0, *lengths]).tolist(), **options)
    if kind == "padded":
        return Sequences.padded([i % 3 for i in range(batch)], lengths, max(lengths, default=0) + 3, **options)
    return Sequences.decode(lengths, **options)


def draw(
    seq, dtype, heads=4, kv_heads=2, head_dim=16, prefixes=0, prefix_length=0, sinks=False, seed=1, value_dim=None
):
    """q, k, v, prefix_k, prefix_v, sinks and the gradient of the output."""
    generator, widths = torch.Generator().manual_seed(seed), (head_dim, value_dim or head_dim)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    room = int(seq.host.lengths.max(initial=0)) + 2
    own = (seq.rows, kv_heads, room) if seq.kind == "decode" else (seq.rows, kv_heads)
    bank = [normal(prefixes, prefix_length, kv_heads, width) if prefixes else None for width in widths]
    q, k, v = normal(seq.rows, heads, head_dim), *(normal(*own, width) for width in widths)
    return [q, k, v, *bank, normal(heads) if sinks else None, normal(seq.rows, heads, widths[1])]


def run(tensors, seq, backend, needs=(True,) * 6, **flags):
    """out, lse and the gradients of all inputs (None where there is none)."""
    *inputs, grad = tensors
    leaves = [None if x is None else x.detach().requires_grad_(need) for x, need in zip(inputs, needs)]
    out, lse = prefix_attention(*leaves[:5], seq, sinks=leaves[5], backend=backend, **flags)
    if any(needs):
        out.backward(grad)
    return [out.detach(), lse, *(None if x is None else x.grad for x in leaves)]


def check(tensors, seq, needs=(True,) * 6, put=guarded, dropout_p=0.0, **flags):
    """The kernels' results, having compared each with the reference's in float64."""
    on_device = {name: put(x) if isinstance(x, torch.Tensor) else x for name, x in flags.items()}
    options = dict(dropout_p=dropout_p, dropout_seed=5, **on_device)
    actual = run([None if x is None else put(x) for x in tensors], seq, "triton", needs, **options)
    *inputs, grad = tensors
    dropout = InEveryDraw(dropout_p, 5, inputs[0].shape[1]) if dropout_p else None
    budget = attention_budget(inputs, grad, seq, dropout=dropout, **flags)
    asked = [True, True, *(need and x is not None for x, need in zip(inputs, needs))]
    assert [x is not None for x in actual] == asked
    assert_within(budget, [x if wanted else exact for x, exact, wanted in zip(actual, budget.exact, asked)])
    return actual


@pytest.mark.parametrize("flags", [{}, dict(window=9), dict(causal=False), dict(softcap=2.0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_finds_planted_faults(kind, dtype, flags):
    seq = sequences(kind, LENGTHS, 2, 19)
    *inputs, grad = draw(seq, dtype, 2, 1, prefixes=2, prefix_length=19, value_dim=12)
    assert_found(attention_budget(inputs, grad, seq, **flags), attention_faults(inputs, grad, seq, **flags))


@pytest.mark.parametrize(
    "kind, causal, window, softcap, sinks, dtype",
    covering_array(KINDS, [True, False], [None, 9], [None, 2.0], [False, True], DTYPES, strength=3),
    ids=str,
)
def test_flags(kind, causal, window, softcap, sinks, dtype):
    flags = dict(causal=causal, window=window, softcap=softcap)
    seq = sequences(kind, LENGTHS, 2, 19)
    value_dim = 12 if sinks else 16
    check(draw(seq, dtype, 2, 1, prefixes=2, prefix_length=19, sinks=sinks, value_dim=value_dim), seq, **flags)


WIDTHS = [*((n, n) for n in (7, 16, 80, 96, 112, 128, 256)), (192, 128), (24, 12), (12, 40)]


@pytest.mark.parametrize("kind, widths, dtype", covering_array(KINDS, WIDTHS, DTYPES), ids=str)
def test_widths(kind, widths, dtype):
    seq = sequences(kind, [3, 20, 1], 2, 5)
    check(draw(seq, dtype, 2, 1, widths[0], prefixes=2, prefix_length=5, value_dim=widths[1]), seq)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 3), (9, 3), (5, 1), (16, 1), (17, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_heads(kind, heads, kv_heads):
    """Up to 16 heads of a group stand in one tile here; 17 are taken apart."""
    seq = sequences(kind, [3, 12, 1], 2, 5)
    check(draw(seq, torch.float32, heads, kv_heads, prefixes=2, prefix_length=5), seq)


@pytest.mark.parametrize("prefixes, prefix_length", [(0, 0), (1, 0), (1, 1), (1, 16), (1, 50), (5, 17)])
@pytest.mark.parametrize("mixed", [False, True], ids=["one", "mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_prefixes(kind, mixed, prefixes, prefix_length):
    """None, empty, short of a block, a block, several; one for all sequences, or a bank in any order with gaps."""
    seq = sequences(kind, LENGTHS, prefixes, prefix_length, mixed)
    check(draw(seq, torch.float32, prefixes=prefixes, prefix_length=prefix_length), seq)


@pytest.mark.parametrize("lengths", [[], [0, 0], [1], [50], [1] * 20, [16, 16], [33, 1, 33]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_lengths(kind, lengths):
    seq = sequences(kind, lengths, 2, 5)
    check(draw(seq, torch.float32, prefixes=2, prefix_length=5), seq)


def test_runs_in_any_order():
    seq = Sequences.runs([20, 3, 40], [9, 14, 2], 45, prefix_ids=[1, 0, 1])
    check(draw(seq, torch.float16, prefixes=2, prefix_length=5), seq)


@pytest.mark.parametrize(
    "kind, sizes, dtype",
    covering_array(KINDS, [(9, 3, (64, 64)), (4, 1, (128, 128)), (4, 4, (192, 128))], DTYPES),
    ids=str,
)
def test_real_tiles(kind, sizes, dtype):
    heads, kv_heads, widths = sizes
    seq = sequences(kind, [40, 3, 90], 2, 70)
    check(draw(seq, dtype, heads, kv_heads, widths[0], prefixes=2, prefix_length=70, value_dim=widths[1]), seq)


@pytest.mark.parametrize("queries, keys", [(16, 64), (64, 16), (32, 32)])
@pytest.mark.parametrize("kind", KINDS)
def test_other_tiles(monkeypatch, kind, queries, keys):
    small_tiles(monkeypatch, queries, keys)
    seq = sequences(kind, LENGTHS, 3, 40)
    check(draw(seq, torch.float32, prefixes=3, prefix_length=40), seq, window=30)


@pytest.mark.parametrize("kind", KINDS)
def test_no_result_depends_on_the_order_of_programs(monkeypatch, kind):
    seq = sequences(kind, LENGTHS, 3, 21)
    tensors = draw(seq, torch.float32, prefixes=3, prefix_length=21, sinks=True, value_dim=20)
    results = [check(tensors, seq)]
    for seed in range(3):
        with monkeypatch.context() as patch:
            _shuffle_programs(patch, np.random.default_rng(seed))
            results.append(
                run([x if x is None else x.to(DEVICE) for x in tensors], sequences(kind, LENGTHS, 3, 21), "triton")
            )
    for result in results[1:]:
        torch.testing.assert_close(result[0], results[0][0], rtol=0, atol=0)
        for a, b in zip(result[2:], results[0][2:]):
            assert torch.equal(a, b)


def _shuffle_programs(patch, generator):
    """Every table of programs comes in another order."""
    tiles, backward, decode = schedule.query_tiles, schedule.backward_items, schedule.decode_items

    def shuffled_decode_items(*arguments, **options):
        with mock.patch.object(schedule, "query_tiles", tiles):  # which it makes its items of, in order
            return _shuffle_first(generator, decode(*arguments, **options))

    patch.setattr(schedule, "query_tiles", lambda *a: generator.permutation(tiles(*a)))
    patch.setattr(schedule, "backward_items", lambda *a, **o: _shuffle_first(generator, backward(*a, **o)))
    patch.setattr(schedule, "decode_items", shuffled_decode_items)


def _shuffle_first(generator, results):
    return generator.permutation(results[0]), *results[1:]


@pytest.mark.parametrize(
    "needs", [(i == 0, i == 1, i == 2, i == 3, i == 4, i == 5) for i in range(6)] + [(False,) * 6], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_asked_for(kind, needs):
    seq = sequences(kind, [3, 20, 1], 2, 5)
    check(draw(seq, torch.float32, prefixes=2, prefix_length=5, sinks=True, value_dim=24), seq, needs)


def test_a_frozen_bank_of_prefixes_has_no_gradient_in_memory():
    seq = sequences("packed", [3, 9], 2000, 50)
    q, k, v, prefix_k, prefix_v = draw(seq, torch.float32, prefixes=2000, prefix_length=50)[:5]
    out, _ = prefix_attention(q.requires_grad_(), k, v, prefix_k, prefix_v, seq, backend="triton")
    with Allocations() as made:
        out.backward(torch.ones_like(out))
    assert max(made.sizes) < prefix_k.numel() / 4  # the guards' bands among them


def test_the_backward_skips_programs_nobody_asks_for():
    batch = schedule.make_batch([(0, 40, 0, 0)], [20], causal=True, window=None)
    sizes = dict(query_rows=8, key_block=16, chunk_rows=20)

    def roles(**needs):
        return set(schedule.backward_items(batch, **sizes, **needs)[0][:, 0].tolist())

    assert roles(dq=True, dkv=True, dprefix=True) == {schedule.QUERIES, schedule.KEYS, schedule.PREFIX}
    assert roles(dq=False, dkv=False, dprefix=True) == {schedule.PREFIX}
    assert roles(dq=True, dkv=False, dprefix=False) == {schedule.QUERIES}


def transposed(x):
    """Heads before rows in memory, as Hugging Face's models make them; a cache with places before heads."""
    return guarded(x.transpose(0, 1).contiguous()).transpose(0, 1) if x.dim() == 3 else guarded(x)


def strided_last(x):
    return guarded(torch.stack([x, x], -1)).select(-1, 0)


def misaligned(x):
    return guarded(x, offset=1)


def gapped_rows(x):
    return guarded(torch.cat([x, x], -1))[..., : x.shape[-1]]


@pytest.mark.parametrize("put", [transposed, strided_last, misaligned, gapped_rows])
@pytest.mark.parametrize("kind", KINDS)
def test_strides(kind, put):
    seq = sequences(kind, [3, 20, 1], 2, 5)
    check(draw(seq, torch.float16, prefixes=2, prefix_length=5, sinks=True, value_dim=24), seq, put=put)


@pytest.mark.parametrize("kind", KINDS)
def test_expanded_gradient(kind):
    seq = sequences(kind, [3, 20, 1], 2, 5)
    *tensors, grad = draw(seq, torch.float32, prefixes=2, prefix_length=5)
    check([*tensors, torch.ones(()).expand(grad.shape)], seq)


@pytest.mark.skipif(DEVICE == "cuda", reason="needs memory that is reserved but not touched")
def test_offsets_beyond_two_to_the_31():
    """Two rows of queries, keys and gradients 2**31 elements apart."""
    seq = Sequences.packed([0, 2])
    tensors = draw(seq, torch.float16, prefixes=1, prefix_length=3, value_dim=24)
    far = []
    for x in tensors:
        if x is not None and x.dim() == 3:  # q, k, v, grad
            space = torch.from_numpy(np.empty(2**31 + 1024, np.float16))
            far.append(space.as_strided(x.shape, (2**31, x.shape[2], 1)).copy_(x))
        else:
            far.append(x)
    for a, b in zip(run(far, seq, "triton"), run(tensors, seq, "triton")):
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_second_backward_raises(kind):
    seq = sequences(kind, [3, 4])
    q, k, v, *_ = (x if x is None else x.to(DEVICE).requires_grad_() for x in draw(seq, torch.float32))
    out, _ = prefix_attention(q, k, v, None, None, seq, backend="triton")
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


def test_opcheck():
    seq = sequences("packed", [3, 20, 1], 2, 5)
    q, k, v, prefix_k, prefix_v, sinks, _ = (
        x.to(DEVICE) for x in draw(seq, torch.float32, prefixes=2, prefix_length=5, sinks=True, value_dim=24)
    )
    inputs = (q, k, v, prefix_k, prefix_v, sinks, None, None, None)
    options = (seq.flat, True, None, None, 0.25, 0.0, "triton")
    torch.library.opcheck(torch.ops.fastprompt.prefix_attention.default, (*inputs, *options))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 40), max_size=6),
    kind=st.sampled_from(KINDS),
    groups=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    head_dim=st.integers(1, 40),
    value_dim=st.integers(1, 40),
    prefixes=st.integers(0, 3),
    prefix_length=st.integers(0, 40),
    window=st.one_of(st.none(), st.integers(1, 60)),
    causal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(lengths, kind, groups, head_dim, value_dim, prefixes, prefix_length, window, causal, seed):
    seq = sequences(kind, lengths, prefixes, prefix_length, seed=seed)
    tensors = draw(seq, torch.float32, *groups, head_dim, prefixes, prefix_length, seed=seed, value_dim=value_dim)
    check(tensors, seq, window=window, causal=causal)


def test_refusals():
    seq = Sequences.packed([0, 2])
    wide = torch.zeros(2, 1, 264, device=DEVICE)
    with pytest.raises(RuntimeError, match="at most 256, q has 264"):
        prefix_attention(wide, wide, wide, None, None, seq, backend="triton")
    narrow = torch.zeros(2, 1, 64, device=DEVICE)
    with pytest.raises(RuntimeError, match="values of at most 256, v has 264"):
        prefix_attention(narrow, narrow, wide, None, None, seq, backend="triton")
    double = torch.zeros(2, 1, 8, dtype=torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match="no float64"):
        prefix_attention(double, double, double, None, None, seq, backend="triton")


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_draws_the_mask_of_the_reference_bit_for_bit(kind, causal, p):
    case = describe(kind, [5, 0, 11, 1, 8], 2, 21, Dropout(p, -(2**62) - 5), causal)
    assert torch.equal(case.of_forward(4, 2, torch.float32, "triton", guarded), case.expected(4))
    assert torch.equal(case.of_backward(2, torch.float32, "triton", guarded), case.expected(2))


@pytest.mark.parametrize("queries, keys", [(16, 64), (64, 16)])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_draws_the_same_mask_in_other_tiles(monkeypatch, kind, queries, keys):
    small_tiles(monkeypatch, queries, keys)
    case = describe(kind, [5, 0, 11, 1, 8], 3, 40, Dropout(0.3, 2**63 - 1))
    assert torch.equal(case.of_forward(2, 1, torch.float32, "triton", guarded), case.expected(2))
    assert torch.equal(case.of_backward(2, torch.float32, "triton", guarded), case.expected(2))


@pytest.mark.parametrize(
    "kind, causal, window, softcap",
    covering_array(KINDS, [True, False], [None, 9], [None, 2.0], strength=3),
    ids=str,
)
def test_dropout_with_every_flag(kind, causal, window, softcap):
    flags = dict(causal=causal, window=window, softcap=softcap)
    seq = sequences(kind, LENGTHS, 2, 19)
    tensors = draw(seq, torch.float32, 2, 1, prefixes=2, prefix_length=19, sinks=True, value_dim=12)
    check(tensors, seq, dropout_p=0.3, **flags)


@pytest.mark.parametrize("kind, p, dtype", covering_array(KINDS, [0.5, 0.999], DTYPES), ids=str)
def test_dropout_in_every_dtype(kind, p, dtype):
    seq = sequences(kind, [3, 20, 1], 2, 5)
    check(draw(seq, dtype, 6, 2, prefixes=2, prefix_length=5), seq, dropout_p=p)
