"""A schedule in one tensor: launches of one size for all batches of a shape, and the same results."""

import pytest
import torch
from attention_cases import Cross, biased
from chains import LEARNED, chained, drawn
from chains import ROOM as CHAINED
from fastprompt.kernels.prefix_attention import config
from guard import DEVICE, guarded
from test_prefix_attention import draw, small_tiles
from triton.backends.compiler import GPUTarget

from fastprompt import Sequences
from fastprompt.ops.prefix_attention import triton
from fastprompt.ops.prefix_attention.dropout import Dropout
from fastprompt.ops.prefix_attention.scheduled import Shape

ROWS, PREFIXES, ROOM = 48, 3, 21


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    small_tiles(monkeypatch)


def batch(lengths, ids, used=None):
    starts = [sum(lengths[:i]) + i % 2 for i in range(len(lengths))]
    return Sequences.runs(starts, [n - i % 2 for i, n in enumerate(lengths)], ROWS, ids, used)


BATCHES = [
    batch([20, 9, 1, 14], [-1, 0, 0, 2]),
    batch([3] * 12, [0, 1, 2, -1] * 3, [21, 0, 7]),  # as many tiles as there can be
    batch([2] * 3, [0, 1, 2], [0, 0, 0]),
    batch([], []),
]


def packed(seq, shape, prefixes, causal, window=None, room=ROOM, key_seq=None):
    options = dict(prefixes=prefixes, room=room if prefixes else 0, element_size=4, device=torch.device(DEVICE))
    return triton.pack(seq, shape, causal=causal, window=window, key_seq=key_seq, **options)


def assert_same(seq, table, inputs, grad, options, key_seq=None):
    """The results of sequences and of their tables, bit for bit."""
    inputs, grad, results = [None if x is None else guarded(x) for x in inputs], guarded(grad), []
    options = dict(dict(window=None, softcap=None, sinks=None, scale=0.3, dropout=Dropout(0.3, 7)), **options)
    for of_batch, keys in ((seq.to(DEVICE), dict(key_seq=key_seq) if key_seq else {}), (triton.unpack(table), {})):
        out, lse = triton.forward(*inputs, of_batch, **options, **keys)
        grads = triton.backward(grad, *inputs, out, lse, of_batch, **options, **keys)
        results.append([out, lse, *(x for x in grads if x is not None)])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("flags", [dict(causal=True), dict(causal=False, window=9)], ids=str)
@pytest.mark.parametrize("prefixes", [0, PREFIXES])
@pytest.mark.parametrize("number", range(len(BATCHES)))
def test_results_are_those_of_the_sequences(number, prefixes, flags):
    *inputs, sinks, grad = draw(BATCHES[number], torch.float32, prefixes=prefixes, prefix_length=ROOM, sinks=True)
    table = packed(BATCHES[number], Shape.of(*inputs[:3]), prefixes, **flags)
    assert_same(BATCHES[number], table, inputs, grad, dict(flags, sinks=guarded(sinks)))


@pytest.mark.parametrize("learned", [True, False])
def test_chains_are_read_where_they_are(learned):
    seq = chained(3, 19, 5, (4, 1, 0, 6, 2, 3), learned=learned)
    *inputs, _ = drawn(seq, 2, 1, (16, 12), torch.float32, learned=learned)
    table = packed(seq, Shape.of(*inputs[:3]), LEARNED if learned else 0, True, room=CHAINED)
    assert table.shape[:2] == seq.chains.shape
    grad = torch.randn(seq.rows, 2, 12, generator=torch.Generator().manual_seed(1))
    assert_same(seq, table, inputs, grad, dict(causal=True))


def test_chains_of_no_tree_are_refused():
    rows = torch.arange(40)
    seq = Sequences.packed([0, 40, 41, 42], [-1, 0, 1], chains=torch.stack([rows, rows.flip(0)]))
    with pytest.raises(ValueError, match="seq.chains must be those of a tree"):
        packed(seq, Shape(4, 2, 16, 16), 0, True)


def test_keys_of_other_rows():
    case = Cross((5, 0, 11, 1, 18), (20, 3, 0, 33, 1), widths=(16, 12), room=ROOM, dtype=torch.float32, kind="runs")
    table = packed(case.seq, Shape.of(*case.inputs[:3]), 2, False, key_seq=case.key_seq)
    assert_same(case.seq, table, case.inputs[:5], case.grad, dict(causal=False), case.key_seq)


@pytest.mark.parametrize("feature", ["alibi", "bias"])
def test_what_scores_gain_by_distance(feature):
    *inputs, _, grad = draw(BATCHES[0], torch.float32, prefixes=PREFIXES, prefix_length=ROOM)
    bias = {name: guarded(x) for name, x in biased(feature, 4).items()}
    table = packed(BATCHES[0], Shape.of(*inputs[:3], **bias), PREFIXES, True)
    assert_same(BATCHES[0], table, inputs, grad, dict(causal=True, **bias))


@pytest.mark.parametrize("prefixes", [0, PREFIXES])
def test_its_size_is_that_of_every_batch_of_the_shape(prefixes):
    shape = Shape(4, 2, 16, 16)
    assert len({packed(seq, shape, prefixes, True).shape for seq in BATCHES}) == 1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_dropout_needs_no_other_tables(monkeypatch, architecture, bias):
    """The schedule is made before it is known whether a call drops weights."""
    monkeypatch.undo()
    target, found = GPUTarget("cuda", architecture, 32), set()
    for dropout in (False, True):
        tiles = config.backward_tiles(128, 2, target, dropout=dropout, group=48, bias=bias)
        found.add((tiles.queries, tiles.key_keys))
    assert len(found) == 1
