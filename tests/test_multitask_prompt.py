"""multitask_prompt against its definition written task by task, with gradients, on every kind of input."""

import pytest
import torch
from budget import assert_sums_rounded_once, assert_within
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.budget import Budget
from fastprompt.backends import available, choose
from fastprompt.ops.multitask_prompt.api import multitask_prompt

BACKENDS = [name for name, problem in available("multitask_prompt").items() if problem is None]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def task_by_task(shared, rows, cols, task_ids):
    prompts = [shared * (rows[t] @ cols[t]) for t in task_ids.tolist()]
    return torch.stack(prompts) if prompts else shared.new_zeros(0, *shared.shape)


def inputs(ids=(2, 0, 2), length=5, width=6, tasks=4, rank=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (length, width), (tasks, length, rank), (tasks, rank, width)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return *tensors, torch.tensor(ids, dtype=torch.int64)


def gradients(function, tensors, task_ids, grad, **options):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves, task_ids, **options)
    if out.requires_grad:
        out.backward(grad)
    return out.detach(), [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def assert_right(got, tensors, task_ids, grad):
    """The prompts and the three gradients against the definition in float64."""
    exact, exact_grads = gradients(task_by_task, [x.double() for x in tensors], task_ids, grad.double())
    size, size_grads = gradients(task_by_task, [x.double().abs() for x in tensors], task_ids, grad.double().abs())
    terms = len(task_ids) * max(*tensors[0].shape, tensors[1].shape[-1]) + 2  # at most, of any of the sums
    for triple in zip(got, [exact, *exact_grads], [size, *size_grads], strict=True):
        assert_sums_rounded_once(*triple, terms)


def check(backend, dtype, tensors, task_ids):
    tensors = [x.to(dtype) for x in tensors]
    generator = torch.Generator().manual_seed(len(task_ids))
    grad = torch.randn(len(task_ids), *tensors[0].shape, generator=generator).to(dtype)
    got, got_grads = gradients(multitask_prompt, tensors, task_ids, grad, backend=backend)
    assert_right([got, *got_grads], tensors, task_ids, grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_planted_faults_are_found(dtype):
    """What has one fault, and makes no other error but the last rounding."""
    *tensors, task_ids = inputs([2, 0, 2, 1], 9, 33, rank=7, dtype=dtype)
    grad = torch.randn(4, 9, 33, generator=torch.Generator().manual_seed(1)).to(dtype)
    shared, rows, cols = (x.double() for x in tensors)

    def without_a_rank():
        return [shared, torch.cat([rows[..., :-1], torch.zeros_like(rows[..., :1])], -1), cols]

    faults = {
        "a rank left out": (without_a_rank(), task_ids),
        "a shifted row": ([shared, rows.roll(1, 1), cols], task_ids),
        "another task": ([shared, rows, cols], torch.tensor([2, 0, 1, 1])),
    }
    if dtype == torch.float32:
        rounded = [x.to(torch.bfloat16).double() for x in tensors]
        faults["bf16 for fp32"] = (rounded, task_ids)
    for name, (wrong, ids) in faults.items():
        out, grads = gradients(task_by_task, wrong, ids, grad.double())
        with pytest.raises(AssertionError, match="more than rounding explains"):
            assert_right([x.to(dtype) for x in (out, *grads)], tensors, task_ids, grad)
            pytest.fail(f"not found: {name}")


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    ids=st.lists(st.integers(0, 2), max_size=7),
    length=st.integers(0, 9),
    width=st.integers(0, 40),
    rank=st.integers(0, 6),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_forward_and_gradients_match_the_definition(backend, ids, length, width, rank, dtype, seed):
    *tensors, task_ids = inputs(ids, length, width, tasks=3, rank=rank, seed=seed)
    check(backend, dtype, tensors, task_ids)


def test_float64_runs_on_the_reference():
    *tensors, task_ids = inputs([0, 2, 2, 1], length=9, width=9, rank=3)
    grad = torch.randn(4, 9, 9, dtype=torch.float64)
    expected, got = (gradients(f, tensors, task_ids, grad) for f in (task_by_task, multitask_prompt))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "length, width, rank", [(6, 700, 1), (9, 257, 7), (1, 33, 70), (3, 5, 2), (33, 300, 16), (20, 40, 9)]
)
def test_every_instruction_set(cpu_isa, poisoned, dtype, length, width, rank):
    """More columns than are computed together, ends of every length, small ranks and large ones."""
    *tensors, task_ids = inputs([2, 0, 2, 1], length, width, tasks=5, rank=rank)
    check("cpu", dtype, tensors, task_ids)


def test_gradcheck():
    *tensors, task_ids = inputs()
    tensors = [x.requires_grad_() for x in tensors]
    torch.autograd.gradcheck(lambda *t: multitask_prompt(*t, task_ids), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    args = inputs(dtype=torch.float32)
    torch.library.opcheck(torch.ops.fastprompt.multitask_prompt.default, (*args, backend))
    strided = [x.mT.contiguous().mT for x in args[:3]]  # outputs must be contiguous all the same
    torch.library.opcheck(torch.ops.fastprompt.multitask_prompt.default, (*strided, args[3], backend))
    grad = torch.randn(3, 5, 6)
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        torch.library.opcheck(
            torch.ops.fastprompt.multitask_prompt_backward.default, (grad, *strided, args[3], *needs, backend)
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_rounded_once(backend, dtype):
    """The fp32 result of the same inputs, rounded: not a bit of the factors or sums is lost before."""
    *tensors, task_ids = inputs([0, 1, 0, 3] * 4, length=7, width=24, rank=5, dtype=dtype)
    grad = torch.randn(16, 7, 24).to(dtype)
    expected, expected_grads = gradients(task_by_task, [x.double() for x in tensors], task_ids, grad.double())
    got, got_grads = gradients(multitask_prompt, tensors, task_ids, grad, backend=backend)
    for a, b in zip([got, *got_grads], [expected, *expected_grads], strict=True):
        assert a.dtype == dtype
        half_step = torch.finfo(dtype).eps / 2 * b.abs()
        sums = 64 * torch.finfo(torch.float32).eps * b.abs().max()
        assert ((a.double() - b).abs() <= half_step + sums).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_a_repeated_task_are_summed_in_fp32(backend, dtype):
    """4096 prompts of one task: a sum kept in half precision would stall at 2048 (fp16) or 256 (bf16)."""
    tensors = [torch.ones(shape, dtype=dtype) for shape in ((1, 1), (2, 1, 1), (2, 1, 1))]
    task_ids, grad = torch.ones(4096, dtype=torch.int64), torch.ones(4096, 1, 1, dtype=dtype)
    _, grads = gradients(multitask_prompt, tensors, task_ids, grad, backend=backend)
    assert [g.flatten().tolist() for g in grads] == [[4096.0], [0.0, 4096.0], [0.0, 4096.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_repeated_task_have_the_same_bits_every_time(backend):
    """Large enough that a CPU would share the sum out among threads."""
    *tensors, task_ids = inputs([1] * 2048, length=16, width=8, rank=64, dtype=torch.float32)
    grad = torch.randn(2048, 16, 8)
    _, first = gradients(multitask_prompt, tensors, task_ids, grad, backend=backend)
    for _ in range(10):
        _, again = gradients(multitask_prompt, tensors, task_ids, grad, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_expanded_and_int32_inputs(backend):
    *tensors, task_ids = inputs(dtype=torch.float32)
    expected = multitask_prompt(*tensors, task_ids, backend=backend)
    strided = [x.mT.contiguous().mT for x in tensors]
    assert not any(x.is_contiguous() for x in strided)
    assert torch.equal(multitask_prompt(*strided, task_ids.int(), backend=backend), expected)
    shared, rows = torch.randn(1, 6), torch.randn(1, 5, 2)

    def expanded(function):
        return lambda s, r, c, ids, **options: function(s.expand(5, 6), r.expand(4, 5, 2), c, ids, **options)

    grad = torch.ones(1, 1, 1).expand(3, 5, 6)  # as .sum() sends it
    parts = (shared, rows, tensors[2])
    exact = [x.double() for x in parts]
    budget = Budget.of(lambda _: gradients(expanded(task_by_task), exact, task_ids, grad.double())[1], torch.float32)
    assert_within(budget, gradients(expanded(multitask_prompt), parts, task_ids.int(), grad, backend=backend)[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_task_out_of_range_names_the_values(backend):
    *tensors, _ = inputs(dtype=torch.float32)
    for task_ids in (torch.tensor([0, 4]), torch.tensor([0, -1], dtype=torch.int32)):
        values = f"from {min(task_ids)} to {max(task_ids)}"
        with pytest.raises(ValueError, match=rf"task_ids must lie in \[0, 4\), got values {values}"):
            multitask_prompt(*tensors, task_ids, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("asked", range(3))
def test_gradients_that_nobody_asked_for_are_skipped(asked, backend):
    *tensors, task_ids = inputs(dtype=torch.float32)
    needs = [i == asked for i in range(3)]
    grads = torch.ops.fastprompt.multitask_prompt_backward(torch.ones(3, 5, 6), *tensors, task_ids, *needs, backend)
    assert [g.numel() > 0 for g in grads] == needs
    tensors[asked].requires_grad_()
    multitask_prompt(*tensors, task_ids, backend=backend).sum().backward()
    assert [x.grad is not None for x in tensors] == needs
    assert torch.equal(tensors[asked].grad, grads[asked])


def test_autocast_changes_nothing():
    *tensors, task_ids = inputs(dtype=torch.float32)
    grad = torch.randn(3, 5, 6)
    expected, expected_grads = gradients(multitask_prompt, tensors, task_ids, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, got_grads = gradients(multitask_prompt, tensors, task_ids, grad)
    for a, b in zip([got, *got_grads], [expected, *expected_grads], strict=True):
        assert torch.equal(a, b)


def test_second_backward_raises():
    *tensors, task_ids = inputs()
    shared = tensors[0].requires_grad_()
    loss = multitask_prompt(*tensors, task_ids).square().sum()
    (first_order,) = torch.autograd.grad(loss, shared, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first_order.sum().backward()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_compiles_without_a_graph_break():
    *tensors, task_ids = inputs(dtype=torch.float32)
    compiled = torch.compile(lambda *a: multitask_prompt(*a) * 3, fullgraph=True, backend="aot_eager")
    grad = torch.randn(3, 5, 6)
    expected, expected_grads = gradients(lambda *a: task_by_task(*a) * 3, tensors, task_ids, grad)
    got, got_grads = gradients(compiled, tensors, task_ids, grad)
    torch.testing.assert_close([got, *got_grads], [expected, *expected_grads])


def test_fake_tensors_take_the_registered_operator():
    """Who asks for shapes only: no kernel may run on what has no memory."""
    mode = FakeTensorMode()
    *tensors, task_ids = (mode.from_tensor(x) for x in inputs(dtype=torch.float32))
    with mode:
        prompts = multitask_prompt(*(x.requires_grad_() for x in tensors), task_ids)
        prompts.sum().backward()
    assert prompts.shape == (3, 5, 6) and [x.grad.shape for x in tensors] == [x.shape for x in tensors]


def test_backends():
    assert available("multitask_prompt")["reference"] is None
    assert choose("multitask_prompt", "auto", "cpu") == ("cpu" if "cpu" in BACKENDS else "reference")
    assert choose("multitask_prompt", "auto", "cuda") in ("triton", "reference")
    if "cpu" in BACKENDS:
        with pytest.raises(
            RuntimeError, match="'cpu' of multitask_prompt cannot run this call: the C.. kernels have no float64"
        ):
            multitask_prompt(*inputs(), backend="cpu")
    with pytest.raises(RuntimeError, match="'triton' of multitask_prompt cannot run this call: the Triton kernel"):
        multitask_prompt(*inputs(), backend="triton")


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(task_ids=torch.tensor([4])), ValueError, r"task_ids must lie in \[0, 4\), got values from 4 to 4"),
        (dict(task_ids=torch.tensor([-1, 0])), ValueError, "task_ids must lie in"),
        (dict(task_ids=torch.tensor([0.0])), TypeError, "task_ids must have one of the dtypes"),
        (dict(task_ids=torch.tensor(1)), ValueError, r"task_ids must have shape \[N\], got \[\]"),
        (dict(shared=torch.zeros(5, 6).int()), TypeError, "shared must have one of the dtypes"),
        (dict(shared=[1.0]), TypeError, "shared must be a torch.Tensor"),
        (dict(rows=torch.zeros(4, 3, 2).double()), ValueError, r"rows must have shape \[T, 5, r\], got \[4, 3, 2\]"),
        (dict(rows=torch.zeros(4, 5, 2)), TypeError, "rows must have dtype torch.float64 like shared"),
        (dict(cols=torch.zeros(4, 3, 6).double()), ValueError, r"cols must have shape \[4, 2, 6\]"),
        (dict(cols=torch.zeros(3, 2, 6).double()), ValueError, r"cols must have shape \[4, 2, 6\]"),
        (dict(cols=torch.zeros(4, 2, 6)), TypeError, "cols must have dtype torch.float64 like shared"),
        (dict(shared=torch.zeros(5, 6, device="meta").double()), ValueError, "rows must be on meta like shared"),
        (dict(backend="tritn"), ValueError, "backend of multitask_prompt must be 'auto' or one of"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    named = dict(zip(("shared", "rows", "cols", "task_ids"), inputs()))
    with pytest.raises(error, match=message):
        multitask_prompt(**{**named, **change})
