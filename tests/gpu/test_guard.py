"""The net itself: what a wrong kernel does is noticed."""

import pytest
import torch
import triton.language as tl
from budget import assert_sums_rounded_once
from fastprompt.kernels.launch import INTERPRETED, Kernel, Options
from guard import DEVICE, check_guards, guarded, guards
from triton.runtime.errors import InterpreterError


@Kernel
def copy(source, target, shift, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK) + shift
    tl.store(target + place, tl.load(source + place))


def run(source, target, shift=0):
    copy((1,), Options(), source, target, shift, BLOCK=8)


@pytest.mark.parametrize("shift", [-1, 1, -8, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_out_of_bounds_writes(shift, dtype):
    with pytest.raises(AssertionError, match="an output of .* bytes: bytes .* were written"), guards():
        run(torch.ones(24, dtype=dtype, device=DEVICE)[8:], torch.empty(8, dtype=dtype, device=DEVICE), shift)


def test_writes_between_strided_elements():
    with pytest.raises(AssertionError, match="an output"), guards():
        run(torch.ones(8, device=DEVICE), torch.empty_strided((4,), (2,), device=DEVICE))


def test_writes_into_an_input():
    with pytest.raises(AssertionError, match="an input of 32 bytes: bytes 0 to 31 were written"), guards():
        source = guarded(torch.zeros(8))
        run(torch.full((8,), 0.1, device=DEVICE), source)


@pytest.mark.parametrize("shift", [-1, 3])
@pytest.mark.skipif(not INTERPRETED, reason="on a GPU such a read gives NaN")
def test_out_of_bounds_reads(shift):
    target = torch.zeros(24, device=DEVICE)[8:]
    run(guarded(torch.ones(8)), target)
    with pytest.raises(InterpreterError, match="an input of 32 bytes: read at byte"):
        run(guarded(torch.ones(8)), target, shift)


def test_outputs_that_are_not_written():
    assert torch.empty(4, device=DEVICE).isnan().all() and torch.zeros(4, device=DEVICE).new_empty(4).isnan().all()
    assert torch.empty_like(torch.zeros(4, dtype=torch.int32, device=DEVICE)).min() > 1 << 30


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
def test_a_guarded_copy_is_like_the_original(offset, dtype):
    tensor = torch.arange(30).view(3, 1, 10)[..., ::2].expand(3, 4, 5).to(dtype)
    tensor = tensor[:, :1].expand(3, 4, 5)
    copied = guarded(tensor, offset)
    assert torch.equal(copied.cpu(), tensor) and copied.stride() == tensor.stride()
    assert copied.data_ptr() % 16 == offset * copied.element_size() % 16
    check_guards()


def test_the_bound_of_sums():
    terms = torch.tensor([1.0, 3e-4, -1.0], dtype=torch.float64)
    exact, size = terms.sum()[None], terms.abs().sum()[None]
    assert_sums_rounded_once(exact.float() + 1e-7, exact, size, terms=3)  # 3e-4 of itself, but 5e-8 of what cancelled
    assert_sums_rounded_once(exact.to(torch.bfloat16), exact, size, terms=3)
    for wrong in (exact.float() + 1e-6, exact.to(torch.bfloat16) * 1.01, exact.float() * torch.nan):
        with pytest.raises(AssertionError, match="more than rounding"):
            assert_sums_rounded_once(wrong, exact, size, terms=3)
