"""A schedule in one tensor: launches of one size for all batches of a shape, and the same results."""

import pytest
import torch
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


def packed(seq, shape, prefixes, causal, window=None):
    options = dict(prefixes=prefixes, room=ROOM if prefixes else 0, element_size=4, device=torch.device(DEVICE))
    return triton.pack(seq, shape, causal=causal, window=window, **options)


@pytest.mark.parametrize("flags", [dict(causal=True), dict(causal=False, window=9)], ids=str)
@pytest.mark.parametrize("prefixes", [0, PREFIXES])
@pytest.mark.parametrize("number", range(len(BATCHES)))
def test_results_are_those_of_the_sequences(number, prefixes, flags):
    q, k, v, prefix_k, prefix_v, sinks, grad = (
        None if x is None else guarded(x)
        for x in draw(BATCHES[number], torch.float32, prefixes=prefixes, prefix_length=ROOM, sinks=True)
    )
    options = dict(dict(window=None, softcap=None, sinks=sinks, scale=0.3, dropout=Dropout(0.3, 7)), **flags)
    results = []
    table = packed(BATCHES[number], Shape.of(q, k, v), prefixes, **flags)
    for seq in (BATCHES[number].to(DEVICE), triton.unpack(table)):
        inputs = q, k, v, prefix_k, prefix_v
        out, lse = triton.forward(*inputs, seq, **options)
        grads = triton.backward(grad, *inputs, out, lse, seq, **options)
        results.append([out, lse, *(x for x in grads if x is not None)])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("prefixes", [0, PREFIXES])
def test_its_size_is_that_of_every_batch_of_the_shape(prefixes):
    shape = Shape(4, 2, 16, 16)
    assert len({packed(seq, shape, prefixes, True).shape for seq in BATCHES}) == 1


@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_dropout_needs_no_other_tables(monkeypatch, architecture):
    """The schedule is made before it is known whether a call drops weights."""
    monkeypatch.undo()
    target, found = GPUTarget("cuda", architecture, 32), set()
    for dropout in (False, True):
        tiles = config.backward_tiles(128, 2, target, dropout=dropout, group=48)
        found.add((tiles.queries, tiles.key_keys))
    assert len(found) == 1
