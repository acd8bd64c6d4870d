"""prompt_concat in Triton, through the public functions, against the reference in float64."""

from itertools import product

import pytest
import torch
from budget import assert_sums_rounded_once
from covering import covering_array
from fastprompt.kernels.launch import INTERPRETED
from fastprompt.kernels.prompt_concat.backward import CHUNK
from guard import DEVICE, guarded, shuffled
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprompt.backends import available, choose
from fastprompt.ops.prompt_concat.api import PromptConcat, prompt_concat

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)


def inputs(rows=9, vocabulary=4, prompts=3, width=5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(-prompts, max(vocabulary, 1 - prompts), (rows,), generator=generator)
    shapes = (vocabulary, width), (prompts, width), (rows, width)
    return source, *(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def run(source, table, prompt, grad, scale, needs, backend):
    leaves = [x.detach().requires_grad_(need) for x, need in zip((table, prompt), needs)]
    out = prompt_concat(source, *leaves, scale, backend=backend)
    if any(needs):
        out.backward(grad)
    assert [x.grad is not None for x in leaves] == list(needs)
    assert out.is_contiguous()
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def check(source, table, prompt, grad, scale=1.0, needs=(True, True)):
    """Output and gradients of tensors that are guarded already."""
    got = run(source, table, prompt, grad, scale, needs, "triton")
    same = run(source, table, prompt, grad, scale, needs, "reference")
    tensors = [x.double() for x in (table, prompt, grad)]
    exact = run(source, *tensors, scale, needs, "reference")
    size = run(source, *(x.abs() for x in tensors), abs(scale), needs, "reference")
    for triple in zip(got, exact, size, strict=True):
        assert_sums_rounded_once(*triple, terms=len(source) + 1)
    if scale == 1.0:
        assert torch.equal(got[0], same[0])  # copies


@pytest.mark.parametrize(
    "dtype, width, index", covering_array(DTYPES, [1, 7, 33, 64, 72], [torch.int32, torch.int64]), ids=str
)
def test_forward_and_gradients(dtype, width, index):
    source, *tensors = inputs(width=width, dtype=dtype, seed=width)
    check(guarded(source.to(index)), *map(guarded, tensors), scale=24.0 if index == torch.int32 else 1.0)


@EVERY_DTYPE
@pytest.mark.parametrize("scale", [1.0, -0.37])
def test_rows_of_several_blocks(dtype, scale):
    check(*map(guarded, inputs(rows=3, vocabulary=2, prompts=1, width=576, dtype=dtype)), scale=scale)


def test_more_rows_than_a_tile_holds():
    check(*map(guarded, inputs(rows=150, vocabulary=20, prompts=2, width=64)))


@EVERY_DTYPE
@pytest.mark.parametrize("needs", list(product([False, True], repeat=2)))
def test_only_the_gradients_that_are_asked_for(dtype, needs):
    check(*map(guarded, inputs(rows=CHUNK + 30, prompts=1, vocabulary=1, width=3, dtype=dtype)), scale=2.0, needs=needs)


@pytest.mark.parametrize("needs", list(product([False, True], repeat=2)))
def test_what_nobody_asked_for_is_not_made(needs):
    source, table, prompt, grad = map(guarded, inputs())
    made = torch.ops.fastprompt.prompt_concat_backward(grad, source, 1.0, len(table), len(prompt), *needs, "triton")
    assert [x.numel() > 0 for x in made] == list(needs)


# How many rows read each row of the prompts (in front of the bar) and of the table.
READERS = {
    "one row, one chunk": ([CHUNK], []),
    "one token, one chunk": ([], [CHUNK]),
    "one short of a chunk": ([CHUNK - 1], [1]),
    "one more than a chunk": ([1, CHUNK + 1], []),
    "across two borders, no chunk within": ([40, CHUNK + 20, 3], []),
    "a chunk within": ([10, 2 * CHUNK, 5], []),
    "chunks within and rows at both ends": ([3], [50, 4 * CHUNK + 7, 2]),
    "a padding token": ([1] * 5, [3 * CHUNK + 1, 0, 1, 0, 2]),
    "chunks side by side": ([CHUNK, CHUNK], [CHUNK]),
    "prompt and token share a chunk": ([CHUNK // 2], [CHUNK // 2]),
    "long ones of both": ([0, 2 * CHUNK + 9, 0], [0, 2 * CHUNK + 9, 0]),
    "rows without a reader": ([0, 0, 1], [0] * 9 + [1] + [0] * 9),
}


@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "mixed"])
@pytest.mark.parametrize("name", READERS)
def test_many_readers_of_one_row(name, shuffle):
    prompts, table = READERS[name]
    source = torch.tensor(
        sum([[-1 - j] * n for j, n in enumerate(prompts)] + [[v] * n for v, n in enumerate(table)], [])
    )
    if shuffle:
        source = source[torch.randperm(len(source), generator=torch.Generator().manual_seed(0))]
    _, *tensors = inputs(len(source), len(table), len(prompts), width=3)
    check(guarded(source), *map(guarded, tensors), scale=3.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("reader", [-1, 0])
def test_sums_are_kept_in_fp32(dtype, reader):
    """A sum kept in half precision would stall at 2048 (fp16) or 256 (bf16)."""
    count = 4096
    source, table, prompt = torch.full((count,), reader), torch.zeros(1, 1), torch.zeros(1, 1)
    grad = torch.ones(1, 1, dtype=dtype).expand(count, 1)
    gradients = run(*map(guarded, (source, table.to(dtype), prompt.to(dtype), grad)), 1.0, (True, True), "triton")[1:]
    assert [g.item() for g in gradients] == ([0.0, count] if reader < 0 else [count, 0.0])


@pytest.mark.parametrize(
    "sizes",
    [
        dict(rows=0), dict(rows=0, vocabulary=0, prompts=0), dict(width=0), dict(rows=0, width=0), dict(prompts=0),
        dict(vocabulary=0), dict(rows=1, vocabulary=1, prompts=0, width=1),
    ],
    ids=str,
)  # fmt: skip
def test_empty_inputs(sizes):
    check(*map(guarded, inputs(**sizes)))


def strided(tensor, how):
    if how == "transposed":
        return tensor.t().contiguous().t()
    if how == "every other column":
        return tensor.repeat_interleave(2, 1)[:, ::2]
    if how == "part of wider rows":
        return torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]]
    if how == "every other row":
        return tensor.repeat_interleave(2, 0)[::2]
    return (tensor[:1] if how == "one row expanded" else tensor[:, :1]).expand_as(tensor)


@pytest.mark.parametrize(
    "how",
    [
        "transposed",
        "every other column",
        "part of wider rows",
        "every other row",
        "one row expanded",
        "one column expanded",
    ],
)
@pytest.mark.parametrize("which", range(3), ids=["table", "prompt", "grad"])
def test_strides(how, which):
    source, *tensors = inputs(width=16)
    tensors[which] = strided(tensors[which], how)
    check(guarded(source), *map(guarded, tensors))


def test_strided_source_and_expanded_gradient():
    source, table, prompt, _ = inputs()
    source = guarded(source.repeat_interleave(3)[::3])
    assert not source.is_contiguous()
    table, prompt = guarded(table.requires_grad_()), guarded(prompt.requires_grad_())
    prompt_concat(source, table, prompt, backend="triton").sum().backward()  # the gradient that comes in is expanded
    assert prompt.grad[:, 0].tolist() == [(source == -1 - j).sum().item() for j in range(len(prompt))]
    assert table.grad[:, 0].tolist() == [(source == v).sum().item() for v in range(len(table))]


@EVERY_DTYPE
@pytest.mark.parametrize("which", range(4), ids=["source", "table", "prompt", "grad"])
def test_misaligned(dtype, which):
    tensors = [guarded(x, offset=int(i == which)) for i, x in enumerate(inputs(rows=5, width=48, dtype=dtype))]
    assert tensors[which].data_ptr() % 16
    check(*tensors, scale=2.0)


def test_non_finite_rows_stay_where_they_are():
    source, table, prompt, grad = inputs()
    table[1], prompt[0], grad[2] = torch.nan, torch.inf, torch.nan
    arguments = [guarded(x) for x in (source, table, prompt, grad)]
    got, expected = (run(*arguments, 1.0, (True, True), backend) for backend in ("triton", "reference"))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_programs_changes_no_bit(seed):
    arguments = [guarded(x) for x in inputs(rows=3 * CHUNK, vocabulary=12, prompts=2, width=40, seed=seed)]
    arguments[0] = guarded(arguments[0].sort().values)
    expected = run(*arguments, 2.0, (True, True), "triton")
    with shuffled(seed):
        got = run(*arguments, 2.0, (True, True), "triton")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@given(
    rows=st.integers(0, 2 * CHUNK + 9),
    vocabulary=st.integers(1, 5),
    prompts=st.integers(0, 5),
    width=st.integers(1, 20),
    scale=st.sampled_from([1.0, 24.0]),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=15, deadline=None)
def test_any_shape(rows, vocabulary, prompts, width, scale, seed, dtype):
    check(*map(guarded, inputs(rows, vocabulary, prompts, width, dtype, seed)), scale=scale)


@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False)])
def test_opcheck(needs):
    source, table, prompt, grad = (x.to(DEVICE) for x in inputs())
    forward, backward = torch.ops.fastprompt.prompt_concat, torch.ops.fastprompt.prompt_concat_backward
    torch.library.opcheck(forward.default, (source, table, prompt, 2.0, "triton"))
    torch.library.opcheck(backward.default, (grad, source, 2.0, len(table), len(prompt), *needs, "triton"))


def test_compiles_without_a_graph_break():
    source, table, prompt, grad = (x.to(DEVICE) for x in inputs())
    compiled = torch.compile(
        lambda *a: prompt_concat(*a, 2.0, backend="triton") * 3, fullgraph=True, backend="aot_eager"
    )
    leaf = prompt.clone().requires_grad_()
    out = compiled(source, table, leaf)
    out.backward(grad)
    expected = run(source, table, prompt, grad * 3, 2.0, (False, True), "reference")
    torch.testing.assert_close([out / 3, leaf.grad], expected)


def test_second_backward_raises():
    source, table, prompt, _ = map(guarded, inputs())
    loss = prompt_concat(source, table, prompt.requires_grad_(), backend="triton").sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the check stops the program")
def test_source_out_of_range_is_refused_before_anything_is_read():
    _, table, prompt, _ = inputs()
    for source in ([4], [-4]):
        with pytest.raises(ValueError, match=r"source must lie in \[-3, 4\)"):
            prompt_concat(torch.tensor(source), table, prompt, backend="triton")


def test_backends(monkeypatch):
    assert available("prompt_concat")["triton"] is None
    assert choose("prompt_concat", "auto", "cuda") == "triton" != choose("prompt_concat", "auto", "cpu")
    source, table, prompt, _ = (x.to(DEVICE) for x in inputs())
    with pytest.raises(RuntimeError, match="cannot run this call: the Triton kernels have no float64"):
        prompt_concat(source, table.double(), prompt.double(), backend="triton")
    rows = prompt_concat(source, table.double(), prompt.double())  # "auto" takes the reference
    assert torch.equal(rows.float(), prompt_concat(source, table, prompt))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors of the CPU")
def test_tensors_of_the_cpu_are_refused():
    source, table, prompt, _ = inputs()
    with pytest.raises(RuntimeError, match="cannot run this call: Triton kernels run on a GPU, the tensors are on cpu"):
        prompt_concat(source, table, prompt, backend="triton")


def test_the_autograd_function_is_public():
    source, table, prompt, _ = map(guarded, inputs())
    out = PromptConcat.apply(source, table, prompt, 1.0, "triton")
    assert torch.equal(out, prompt_concat(source, table, prompt, backend="reference"))
