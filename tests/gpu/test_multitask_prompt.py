"""multitask_prompt in Triton, through the public functions, against the reference in float64."""

from itertools import product

import pytest
import torch
from budget import assert_sums_rounded_once
from covering import covering_array
from fastprompt.kernels.launch import INTERPRETED
from guard import DEVICE, guarded, shuffled
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprompt.backends import available, choose
from fastprompt.ops.multitask_prompt.api import MultitaskPrompt, multitask_prompt

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
ALL = (True, True, True)


def inputs(ids=(2, 0, 2), length=3, width=5, tasks=3, rank=2, dtype=torch.float32, seed=0):
    """``shared, rows, cols, task_ids, grad``"""
    generator = torch.Generator().manual_seed(seed)
    shapes = (length, width), (tasks, length, rank), (tasks, rank, width), (len(ids), length, width)
    *tensors, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return *tensors, torch.tensor(ids, dtype=torch.int64), grad


def run(shared, rows, cols, task_ids, grad, needs, backend):
    leaves = [x.detach().requires_grad_(need) for x, need in zip((shared, rows, cols), needs)]
    out = multitask_prompt(*leaves, task_ids, backend=backend)
    if any(needs):
        out.backward(grad)
    assert [x.grad is not None for x in leaves] == list(needs)
    assert out.is_contiguous()
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def check(shared, rows, cols, task_ids, grad, needs=ALL):
    """Output and gradients of tensors that are guarded already."""
    got = run(shared, rows, cols, task_ids, grad, needs, "triton")
    tensors = [x.double() for x in (shared, rows, cols)]
    exact = run(*tensors, task_ids, grad.double(), needs, "reference")
    size = run(*(x.abs() for x in tensors), task_ids, grad.double().abs(), needs, "reference")
    terms = len(task_ids) * max(*shared.shape, rows.shape[-1]) + 2  # at most, of any of the sums
    for triple in zip(got, exact, size, strict=True):
        assert_sums_rounded_once(*triple, terms)


@pytest.mark.parametrize("dtype, rank, width", covering_array(DTYPES, [1, 2, 3, 5, 8], [1, 7, 33]), ids=str)
def test_forward_and_gradients(dtype, rank, width):
    check(*map(guarded, inputs(ids=(1, 0), tasks=2, width=width, rank=rank, dtype=dtype, seed=rank)))


@EVERY_DTYPE
@pytest.mark.parametrize("length", [1, 9])
def test_wide_prompts(dtype, length):
    check(*map(guarded, inputs(ids=(1,), tasks=2, length=length, width=576, rank=1, dtype=dtype)))


@pytest.mark.parametrize("rank, length, width", [(1, 67, 16), (2, 70, 3), (5, 35, 2), (1, 130, 1), (3, 5, 130)])
def test_prompts_of_several_tiles(rank, length, width):
    check(*map(guarded, inputs(ids=(1,), tasks=2, length=length, width=width, rank=rank)))


@EVERY_DTYPE
@pytest.mark.parametrize("needs", list(product([False, True], repeat=3)))
def test_only_the_gradients_that_are_asked_for(dtype, needs):
    check(*map(guarded, inputs(width=4, dtype=dtype)), needs=needs)


@pytest.mark.parametrize("needs", list(product([False, True], repeat=3)))
def test_what_nobody_asked_for_is_not_made(needs):
    *tensors, grad = map(guarded, inputs())
    made = torch.ops.fastprompt.multitask_prompt_backward(grad, *tensors, *needs, "triton")
    assert [x.numel() > 0 for x in made] == list(needs)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "ids", [(0,), (3,), (1, 1, 1, 1), (3, 2, 1, 0), (0, 3, 0, 3, 1), (2,) * 9], ids=lambda ids: "-".join(map(str, ids))
)
def test_tasks_repeated_and_left_out(ids, index):
    shared, rows, cols, task_ids, grad = inputs(ids, tasks=4, rank=1, width=6)
    check(*map(guarded, (shared, rows, cols, task_ids.to(index), grad)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=NAMES.get)
def test_gradients_of_a_repeated_task_are_summed_in_fp32(dtype):
    """To its ``large`` a sum kept in half precision would add ones in vain."""
    large, count = 2 / torch.finfo(dtype).eps, 16
    shared, rows, cols = (guarded(torch.ones(shape, dtype=dtype)) for shape in ((1, 1), (1, 1, 1), (1, 1, 1)))
    grad = torch.ones(1 + count, 1, 1, dtype=dtype)
    grad[0] = large
    task_ids = torch.zeros(len(grad), dtype=torch.int64)
    gradients = run(shared, rows, cols, guarded(task_ids), guarded(grad), ALL, "triton")[1:]
    assert [g.item() for g in gradients] == [large + count] * 3


@pytest.mark.parametrize(
    "sizes",
    [
        dict(ids=()),
        dict(length=0),
        dict(width=0),
        dict(rank=0),
        dict(ids=(), tasks=0),
        dict(ids=(), length=0, width=0),
        dict(ids=(), rank=0),
    ],
    ids=str,
)
def test_empty_inputs(sizes):
    check(*map(guarded, inputs(**sizes)))


@pytest.mark.parametrize("how", ["transposed", "every other column", "one expanded"])
@pytest.mark.parametrize("which", [0, 1, 2, 4], ids=["shared", "rows", "cols", "grad"])
def test_strides(how, which):
    tensors = list(inputs(width=16, length=4))
    x = tensors[which]
    if how == "transposed":
        x = x.mT.contiguous().mT
    elif how == "every other column":
        x = x.repeat_interleave(2, -1)[..., ::2]
    else:
        x = x[:1].expand_as(x)
    tensors[which] = x
    check(*map(guarded, tensors))


def test_strided_ids_and_expanded_gradient():
    shared, rows, cols, task_ids, _ = inputs()
    task_ids = guarded(task_ids.repeat_interleave(3)[::3])
    assert not task_ids.is_contiguous()
    results = []
    for backend in ("triton", "reference"):
        leaves = [guarded(x).requires_grad_() for x in (shared, rows, cols)]
        multitask_prompt(*leaves, task_ids, backend=backend).sum().backward()  # the gradient that comes in is expanded
        results.append([x.grad for x in leaves])
    torch.testing.assert_close(*results)


@EVERY_DTYPE
@pytest.mark.parametrize("which", range(5), ids=["shared", "rows", "cols", "task_ids", "grad"])
def test_misaligned(dtype, which):
    tensors = [
        guarded(x, offset=int(i == which)) for i, x in enumerate(inputs(ids=(1,), tasks=2, width=48, dtype=dtype))
    ]
    assert tensors[which].data_ptr() % 16
    check(*tensors)


def test_rows_that_are_not_finite_stay_with_their_task():
    shared, rows, cols, task_ids, grad = inputs(ids=(0, 1, 0))
    rows[1, 0, 0] = torch.nan
    arguments = [guarded(x) for x in (shared, rows, cols, task_ids, grad)]
    got, expected = (run(*arguments, ALL, backend) for backend in ("triton", "reference"))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_programs_changes_no_bit(seed):
    arguments = [guarded(x) for x in inputs(ids=(2, 0, 2, 1), length=9, width=40, rank=5, seed=seed)]
    expected = run(*arguments, ALL, "triton")
    with shuffled(seed):
        got = run(*arguments, ALL, "triton")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@given(
    ids=st.lists(st.integers(0, 2), max_size=4),
    length=st.integers(0, 9),
    width=st.integers(1, 20),
    rank=st.integers(1, 5),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=15, deadline=None)
def test_any_shape(ids, length, width, rank, seed, dtype):
    check(*map(guarded, inputs(ids, length, width, 3, rank, dtype, seed)))


@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_opcheck(needs):
    *tensors, grad = (x.to(DEVICE) for x in inputs())
    torch.library.opcheck(torch.ops.fastprompt.multitask_prompt.default, (*tensors, "triton"))
    torch.library.opcheck(torch.ops.fastprompt.multitask_prompt_backward.default, (grad, *tensors, *needs, "triton"))


def test_compiles_without_a_graph_break():
    *tensors, grad = (x.to(DEVICE) for x in inputs())
    compiled = torch.compile(lambda *a: multitask_prompt(*a, backend="triton") * 3, fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    out = compiled(*leaves, tensors[3])
    out.backward(grad)
    expected = run(*tensors, grad * 3, ALL, "reference")
    torch.testing.assert_close([out / 3, *(x.grad for x in leaves)], expected)


def test_autocast_changes_nothing():
    arguments = [guarded(x) for x in inputs()]
    expected = run(*arguments, ALL, "triton")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = run(*arguments, ALL, "triton")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_second_backward_raises():
    shared, rows, cols, task_ids, _ = map(guarded, inputs())
    loss = multitask_prompt(shared.requires_grad_(), rows, cols, task_ids, backend="triton").sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the check stops the program")
def test_a_task_out_of_range_is_refused_before_anything_is_read():
    shared, rows, cols, _, _ = inputs()
    for task in (3, -1):
        with pytest.raises(ValueError, match=r"task_ids must lie in \[0, 3\)"):
            multitask_prompt(shared, rows, cols, torch.tensor([task]), backend="triton")


def test_backends():
    assert available("multitask_prompt")["triton"] is None
    assert choose("multitask_prompt", "auto", "cuda") == "triton" != choose("multitask_prompt", "auto", "cpu")
    shared, rows, cols, task_ids, _ = (x.to(DEVICE) for x in inputs())
    double = [x.double() for x in (shared, rows, cols)]
    with pytest.raises(RuntimeError, match="cannot run this call: the Triton kernels have no float64"):
        multitask_prompt(*double, task_ids, backend="triton")
    torch.testing.assert_close(
        multitask_prompt(*double, task_ids).float(), multitask_prompt(shared, rows, cols, task_ids)
    )


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors of the CPU")
def test_tensors_of_the_cpu_are_refused():
    shared, rows, cols, task_ids, _ = inputs()
    with pytest.raises(RuntimeError, match="cannot run this call: Triton kernels run on a GPU, the tensors are on cpu"):
        multitask_prompt(shared, rows, cols, task_ids, backend="triton")


def test_the_autograd_function_is_public():
    shared, rows, cols, task_ids, _ = map(guarded, inputs())
    out = MultitaskPrompt.apply(shared, rows, cols, task_ids, "triton")
    torch.testing.assert_close(out, multitask_prompt(shared, rows, cols, task_ids, backend="reference"))
