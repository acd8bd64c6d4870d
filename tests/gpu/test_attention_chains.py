"""Chains in the Triton kernels of prefix_attention, against float64."""

import pytest
import torch
from attention_cases import biased
from chains import chained, drawn
from test_prefix_attention import check, run, small_tiles


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    small_tiles(monkeypatch)


def case(learned=True, dtype=torch.float32, sinks=False, others=(4, 1, 0, 6, 2, 3)):
    seq = chained(3, 19, 5, others, learned=learned)
    inputs = drawn(seq, 2, 1, (16, 12), dtype, sinks, learned)
    grad = torch.randn(seq.rows, 2, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [*inputs, grad], seq


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(
    "flags, dtype",
    [
        ({}, torch.bfloat16),
        (dict(window=9, softcap=2.0), torch.float32),
        (dict(causal=False, dropout_p=0.3), torch.float32),
    ],
    ids=str,
)
def test_chains(flags, dtype, learned):
    tensors, seq = case(learned, dtype, sinks="window" in flags)
    check(tensors, seq, **flags)


def test_alibi_counts_along_chains():
    tensors, seq = case()
    check(tensors, seq, **biased("alibi", 2))


@pytest.mark.parametrize("asked", [(1, 2), (3, 4), (0,)])
def test_gradients_that_nobody_asks_for_change_no_other(asked):
    tensors, seq = case()
    whole = run(tensors, seq, "triton")[2:7]
    some = run(tensors, seq, "triton", [i in asked for i in range(6)])[2:7]
    for i, (x, y) in enumerate(zip(some, whole)):
        assert (x is None) == (i not in asked)
        assert x is None or torch.equal(x, y)
