"""The Triton kernels on caches that are padded or in pages, with several queries a sequence."""

import pytest
import torch
from attention_cases import FEATURES, biased
from budget import assert_within
from decode_cases import LAYOUTS, make
from guard import guarded
from test_prefix_attention import DTYPES, small_tiles

from benchmarks.budget import attention_budget
from fastprompt import prefix_attention


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    small_tiles(monkeypatch)


def check(case, put=guarded, **flags):
    inputs = [put(x) for x in case.inputs]
    grad = torch.zeros(case.seq.rows, 4, inputs[2].shape[-1], dtype=inputs[0].dtype)
    budget = attention_budget(case.inputs, grad, case.seq, **flags)
    with torch.no_grad():
        got = prefix_attention(*inputs[:5], case.seq, sinks=inputs[5], backend="triton", **flags)
    assert_within(budget, [*got, *budget.exact[2:]])


@pytest.mark.parametrize("flags", [{}, dict(window=4), dict(causal=False, window=5), dict(softcap=2.0)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_flags(layout, flags):
    """More queries than a tile holds, and more keys than a program reads, in pages of four."""
    check(make(layout, torch.float32, (20, 12), (9, 1, 0, 34), (3, 1, 0, 21)), **flags)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_halves(dtype):
    check(make("pages", dtype, (20, 12), (9, 1, 0, 34), (3, 1, 0, 21)), window=20)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_distances(layout, feature):
    check(make(layout, torch.float32), window=7, **biased(feature, 4))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_query_each(layout):
    check(make(layout, torch.float16, (16, 16), (9, 0, 40), None))


def test_gradients_reach_a_padded_cache():
    case = make("contiguous", torch.float32, lengths=(9, 1, 0, 45, 33), queries=(3, 1, 0, 21, 2))
    leaves = [guarded(x).requires_grad_() for x in case.inputs]
    grad = torch.randn(case.seq.rows, 4, 6, generator=torch.Generator().manual_seed(1))
    budget = attention_budget(case.inputs, grad, case.seq, window=12)
    out, lse = prefix_attention(*leaves[:5], case.seq, sinks=leaves[5], backend="triton", window=12)
    assert_within(budget, [out.detach(), lse, *torch.autograd.grad(out, leaves, guarded(grad))])
