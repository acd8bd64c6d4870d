"""rotary in Triton, through the public function, against float64."""

import pytest
import torch
from budget import assert_within
from guard import DEVICE, guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from rotary_cases import SIZES, budget_of, faults, inputs, results, strided

from fastprompt import rotary
from fastprompt.backends import available, choose

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run(tensors, put=guarded):
    got = results(lambda *x: rotary(*x, backend="triton"), *map(put, tensors))
    assert all(x.is_contiguous() for x in got)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, width, tables", [*SIZES, (5, 100, 1)])
def test_within_the_budget(heads, width, tables, dtype):
    tensors = inputs(heads, width, dtype, tables)
    budget = budget_of(tensors)
    assert_within(budget, run(tensors))
    for name, wrong in faults(*tensors).items():
        assert budget.ratio(run(wrong)) > 1, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_and_addresses(dtype):
    tensors = inputs(width=64, dtype=dtype)
    budget = budget_of(tensors)
    for others in strided(tensors):
        assert_within(budget, run(others))
    assert_within(budget, run(tensors, lambda x: guarded(x, offset=1)))
    x, cosine, sine, grad = tensors
    expanded = [x[:, :, :1].expand(x.shape), cosine, sine, torch.ones((), dtype=dtype).expand(x.shape)]
    assert_within(budget_of(expanded), run(expanded))
    one = [x, cosine[:1], sine[:1], grad]
    assert all(map(torch.equal, run([x, *(t.expand(cosine.shape) for t in one[1:3]), grad]), run(one)))


@pytest.mark.parametrize("sizes", [dict(rows=0), dict(heads=0), dict(width=0)], ids=str)
def test_empty_inputs(sizes):
    tensors = inputs(**sizes, dtype=torch.float32)
    assert all(x.shape == tensors[0].shape for x in run(tensors))
    nothing = [x[:0] for x in tensors]
    assert all(x.shape == nothing[0].shape for x in run(nothing))


@given(
    heads=st.integers(1, 12),
    half=st.integers(1, 40),
    rows=st.integers(0, 4),
    tables=st.integers(1, 2),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=8, deadline=None)
def test_any_shape(heads, half, rows, tables, dtype, seed):
    tensors = inputs(heads, 2 * half, dtype, tables, rows, seed)
    assert_within(budget_of(tensors), run(tensors))


def test_opcheck_and_backends():
    x, cosine, sine, _ = (t.to(DEVICE) for t in inputs(dtype=torch.float32))
    for backward in (False, True):
        torch.library.opcheck(torch.ops.fastprompt.rotary.default, (x, cosine, sine, backward, "triton"))
    assert available("rotary")["triton"] is None
    assert choose("rotary", "auto", "cuda") == "triton" != choose("rotary", "auto", "cpu")
    assert choose("rotary", "auto", "cuda", torch.float64) == "reference"
    with pytest.raises(RuntimeError, match="cannot run this call: the Triton kernels have no float64"):
        rotary(*(t.double() for t in (x, cosine, sine)), backend="triton")
