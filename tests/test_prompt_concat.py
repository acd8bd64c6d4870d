"""prompt_concat against its definition written row by row, with gradients, on every kind of input."""

import pytest
import torch
from budget import assert_sums_rounded_once
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fastprompt.backends import available, choose
from fastprompt.ops import prompt_concat

BACKENDS = [name for name, problem in available("prompt_concat").items() if problem is None]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def row_by_row(source, table, prompt, scale):
    rows = [table[s : s + 1] * scale if s >= 0 else prompt[-1 - s].unsqueeze(0) for s in source.tolist()]
    return torch.cat([table[:0], *rows])


def inputs(rows=13, vocabulary=7, prompts=5, width=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(-prompts, vocabulary, (rows,), generator=generator)
    table = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype)
    prompt = torch.randn(prompts, width, generator=generator, dtype=torch.float64).to(dtype)
    return source, table, prompt


def results(function, source, table, prompt, scale, grad, **options):
    """The rows and the gradients of both tensors."""
    leaves = [x.detach().clone().requires_grad_() for x in (table, prompt)]
    out = function(source, *leaves, scale, **options)
    out.backward(grad)
    return [out.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]


def assert_right(got, source, table, prompt, scale, grad):
    """The three results against the definition in float64."""
    table, prompt, grad = (x.double() for x in (table, prompt, grad))
    exact = results(row_by_row, source, table, prompt, scale, grad)
    size = results(row_by_row, source, table.abs(), prompt.abs(), abs(scale), grad.abs())
    for triple in zip(got, exact, size, strict=True):
        assert_sums_rounded_once(*triple, terms=len(source) + 1)


def check(backend, dtype, source, table, prompt, scale):
    generator = torch.Generator().manual_seed(len(source))
    table, prompt = table.to(dtype), prompt.to(dtype)
    grad = torch.randn(len(source), table.shape[1], generator=generator).to(dtype)
    got = results(prompt_concat, source, table, prompt, scale, grad, backend=backend)
    assert_right(got, source, table, prompt, scale, grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_planted_faults_are_found(dtype):
    """What has one fault, and makes no other error but the last rounding."""
    source, table, prompt = inputs(40, dtype=dtype)
    grad = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    last = source.clone()
    last[-1] = last[-1] + 1 if last[-1] < 0 else last[-1] - 1
    dropped = grad.clone()
    dropped[7] = 0
    faults = {
        "a wrong row": (last, table, prompt, 1.5, grad),
        "shifted rows": (source.roll(1), table, prompt, 1.5, grad),
        "no scale": (source, table, prompt, 1.0, grad),
        "a row that is not added": (source, table, prompt, 1.5, dropped),
    }
    if dtype == torch.float32:
        faults["bf16 for fp32"] = (source, *(x.to(torch.bfloat16) for x in (table, prompt)), 1.5, grad)
    for name, (ids, rows, learned, scale, seen) in faults.items():
        wrong = results(row_by_row, ids, rows.double(), learned.double(), scale, seen.double())
        with pytest.raises(AssertionError, match="more than rounding explains"):
            assert_right([x.to(dtype) for x in wrong], source, table, prompt, 1.5, grad)
            pytest.fail(f"not found: {name}")


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    rows=st.integers(0, 40),
    vocabulary=st.integers(1, 9),
    prompts=st.integers(0, 9),
    width=st.integers(0, 40),
    scale=st.sampled_from([1.0, 24.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_forward_and_gradients_match_the_definition(backend, rows, vocabulary, prompts, width, scale, dtype, seed):
    check(backend, dtype, *inputs(rows, vocabulary, prompts, width, seed=seed), scale)


def test_float64_runs_on_the_reference():
    source, table, prompt = inputs(rows=40)
    grad = torch.randn(40, 6, dtype=torch.float64)
    expected = results(row_by_row, source, table, prompt, 24.0, grad)
    got = results(prompt_concat, source, table, prompt, 24.0, grad)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, prompts, width", [(300, 7, 1037), (90, 1, 2500), (65, 80, 31)])
def test_every_instruction_set(cpu_isa, poisoned, dtype, rows, prompts, width):
    """Rows wider than what one sum takes, ends of every length, one reader and many."""
    for scale in (1.0, 0.37):
        check("cpu", dtype, *inputs(rows, 9, prompts, width), scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_number_is_scaled_as_torch_scales_it(cpu_isa, dtype):
    """Also the infinite ones, nan, and those that become subnormal or infinite."""
    table = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    for scale in (1.0, 0.37, 2.0**-9, 3e3):
        got = prompt_concat(torch.tensor([0]), table, table[:0], scale, backend="cpu")
        torch.testing.assert_close(got, table * scale, rtol=0, atol=0, equal_nan=True)


def test_gradcheck():
    source, table, prompt = inputs()
    torch.autograd.gradcheck(
        lambda t, p: prompt_concat(source, t, p, 3.0), (table.requires_grad_(), prompt.requires_grad_())
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    source, table, prompt = inputs(dtype=torch.float32)
    torch.library.opcheck(torch.ops.fastprompt.prompt_concat.default, (source, table, prompt, 2.0, backend))
    grad = torch.randn(len(source), table.shape[1])
    for need_table, need_prompt in ((True, True), (False, True)):
        torch.library.opcheck(
            torch.ops.fastprompt.prompt_concat_backward.default,
            (grad, source, 2.0, len(table), len(prompt), need_table, need_prompt, backend),
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision_gradients_are_summed_in_fp32(backend, dtype):
    """4096 readers of one prompt row: a sum kept in half precision would stall at 2048 (fp16) or 256 (bf16)."""
    source = torch.full((4096,), -1)
    table, prompt = torch.zeros(1, 3, dtype=dtype), torch.zeros(1, 3, dtype=dtype, requires_grad=True)
    prompt_concat(source, table, prompt, backend=backend).sum().backward()
    assert prompt.grad.tolist() == [[4096.0] * 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_expanded_misaligned_and_int32_inputs(backend):
    source, table, prompt = inputs(width=6, dtype=torch.float32)
    expected = row_by_row(source, table, prompt, 1.0)
    between = torch.stack([prompt, torch.full_like(prompt, torch.nan)], 2)[..., 0]
    apart = torch.cat([prompt, torch.full_like(prompt, torch.nan)], 1)[:, :6]
    misaligned = torch.cat([torch.zeros(1), prompt.flatten()])[1:].view_as(prompt)
    for vectors in (between, apart, misaligned):
        assert torch.equal(prompt_concat(source.int(), table.t().contiguous().t(), vectors, backend=backend), expected)
    every_second = torch.stack([source, torch.full_like(source, 99)], 1)[:, 0]
    assert torch.equal(prompt_concat(every_second, table, prompt, backend=backend), expected)
    one = torch.randn(1, 6, requires_grad=True)
    prompt_concat(
        source, table, one.expand(5, 6), backend=backend
    ).sum().backward()  # the incoming gradient is expanded too
    assert one.grad.tolist() == [[float((source < 0).sum())] * 6]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_source_out_of_range_names_the_values(backend):
    _, table, prompt = inputs(dtype=torch.float32)
    for source in (torch.tensor([0, 7]), torch.tensor([0, -6], dtype=torch.int32), torch.tensor([0, -(2**40)])):
        value = int(source[1])
        message = rf"source must lie in \[-5, 7\), got values from {min(0, value)} to {max(0, value)}"
        with pytest.raises(ValueError, match=message):
            prompt_concat(source, table, prompt, backend=backend)
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            torch.ops.fastprompt.prompt_concat_backward(torch.ones(2, 6), source, 1.0, 7, 5, True, True, backend)


def test_backends():
    assert choose("prompt_concat", "auto", "cpu") == ("cpu" if "cpu" in BACKENDS else "reference")
    assert choose("prompt_concat", "auto", "cuda") in ("triton", "reference")
    if "cpu" in BACKENDS:
        with pytest.raises(
            RuntimeError, match="'cpu' of prompt_concat cannot run this call: the C.. kernels have no float64"
        ):
            prompt_concat(*inputs(), backend="cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_nobody_asked_for_are_skipped(backend):
    source, table, prompt = inputs(dtype=torch.float32)
    prompt_concat(source, table, prompt.requires_grad_(), backend=backend).sum().backward()
    assert table.grad is None and prompt.grad is not None
    grad = torch.ones(len(source), 6)
    dtable, dprompt = torch.ops.fastprompt.prompt_concat_backward(grad, source, 1.0, 7, 5, True, False, backend)
    assert dtable.shape == (7, 6) and dprompt.numel() == 0


def test_second_backward_raises():
    source, table, prompt = inputs()
    loss = prompt_concat(source, table, prompt.requires_grad_()).sum()
    loss.backward()
    with pytest.raises(RuntimeError):
        loss.backward()


def test_compiles_without_a_graph_break():
    source, table, prompt = inputs(dtype=torch.float32)
    compiled = torch.compile(lambda s, t, p: prompt_concat(s, t, p, 2.0) * 3, fullgraph=True, backend="aot_eager")
    leaf = prompt.clone().requires_grad_()
    out = compiled(source, table, leaf)
    torch.testing.assert_close(out, row_by_row(source, table, prompt, 2.0) * 3)
    out.sum().backward()
    assert torch.equal(leaf.grad[:, 0], 3.0 * torch.bincount(-1 - source[source < 0], minlength=5).float())


def test_fake_tensors_take_the_registered_operator():
    """Who asks for shapes only: no kernel may run on what has no memory."""
    mode = FakeTensorMode()
    source, table, prompt = (mode.from_tensor(x) for x in inputs(dtype=torch.float32))
    with mode:
        rows = prompt_concat(source, table, prompt.requires_grad_())
        rows.sum().backward()
    assert rows.shape == (13, 6) and prompt.grad.shape == (5, 6)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(source=torch.tensor([7])), ValueError, r"source must lie in \[-5, 7\), got values from 7 to 7"),
        (dict(source=torch.tensor([-6])), ValueError, "source must lie in"),
        (dict(source=torch.tensor([0.5])), TypeError, "source must have one of the dtypes"),
        (dict(source=torch.tensor([[1]])), ValueError, r"source must have shape \[R\], got \[1, 1\]"),
        (dict(prompt=torch.zeros(5, 4, dtype=torch.float64)), ValueError, r"prompt must have shape \[M, 6\]"),
        (dict(prompt=torch.zeros(5, 6)), TypeError, "prompt must have dtype torch.float64 like table"),
        (dict(table=[1.0]), TypeError, "table must be a torch.Tensor"),
        (dict(backend="tritn"), ValueError, "backend of prompt_concat must be 'auto' or one of"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    source, table, prompt = inputs()
    with pytest.raises(error, match=message):
        prompt_concat(**{**dict(source=source, table=table, prompt=prompt), **change})


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_has_the_same_bits_every_time(backend):
    """Many readers of one row on several threads: an atomic sum would come out differently from run to run."""
    source = torch.full((4096,), -1)
    grad = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        results = []
        for _ in range(10):
            prompt = torch.zeros(1, 64, requires_grad=True)
            (prompt_concat(source, torch.zeros(1, 64), prompt, backend=backend) * grad).sum().backward()
            results.append(prompt.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)
