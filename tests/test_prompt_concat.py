"""prompt_concat against its definition written row by row, with gradients, on every kind of input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprompt.ops import prompt_concat


def row_by_row(source, table, prompt, scale):
    rows = [table[s : s + 1] * scale if s >= 0 else prompt[-1 - s].unsqueeze(0) for s in source.tolist()]
    return torch.cat([table[:0], *rows])


def inputs(rows=13, vocabulary=7, prompts=5, width=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(-prompts, vocabulary, (rows,), generator=generator)
    table = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype)
    prompt = torch.randn(prompts, width, generator=generator, dtype=torch.float64).to(dtype)
    return source, table, prompt


@given(
    rows=st.integers(0, 40), vocabulary=st.integers(1, 9), prompts=st.integers(0, 9), width=st.integers(1, 9),
    scale=st.sampled_from([1.0, 24.0]), seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_forward_and_gradients_match_the_definition(rows, vocabulary, prompts, width, scale, seed):
    source, table, prompt = inputs(rows, vocabulary, prompts, width, seed=seed)
    grad = torch.randn(rows, width, dtype=torch.float64)
    results = []
    for function in (row_by_row, prompt_concat):
        leaves = [table.clone().requires_grad_(), prompt.clone().requires_grad_()]
        out = function(source, *leaves, scale)
        (out * grad).sum().backward()
        results.append([out, *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)])
    for expected, got in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    source, table, prompt = inputs()
    torch.autograd.gradcheck(
        lambda t, p: prompt_concat(source, t, p, 3.0), (table.requires_grad_(), prompt.requires_grad_())
    )


def test_opcheck():
    source, table, prompt = inputs(dtype=torch.float32)
    torch.library.opcheck(torch.ops.fastprompt.prompt_concat.default, (source, table, prompt, 2.0, "reference"))
    grad = torch.randn(len(source), table.shape[1])
    for need_table, need_prompt in ((True, True), (False, True)):
        torch.library.opcheck(
            torch.ops.fastprompt.prompt_concat_backward.default,
            (grad, source, 2.0, len(table), len(prompt), need_table, need_prompt, "reference"),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_gradients_are_summed_in_fp32(dtype):
    """4096 readers of one prompt row: a sum kept in half precision would stall at 2048 (fp16) or 256 (bf16)."""
    source = torch.full((4096,), -1)
    table, prompt = torch.zeros(1, 3, dtype=dtype), torch.zeros(1, 3, dtype=dtype, requires_grad=True)
    prompt_concat(source, table, prompt).sum().backward()
    assert prompt.grad.tolist() == [[4096.0] * 3]


def test_non_contiguous_expanded_and_int32_inputs():
    source, table, prompt = inputs(width=6)
    wide = torch.randn(5, 12, dtype=torch.float64)
    strided = wide[:, ::2]
    expected = row_by_row(source, table, strided, 1.0)
    torch.testing.assert_close(prompt_concat(source.int(), table.t().contiguous().t(), strided), expected)
    one = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    prompt_concat(source, table, one.expand(5, 6)).sum().backward()  # the gradient that comes in is expanded too
    assert one.grad.tolist() == [[float((source < 0).sum())] * 6]


def test_gradients_that_nobody_asked_for_are_skipped():
    source, table, prompt = inputs()
    prompt_concat(source, table, prompt.requires_grad_()).sum().backward()
    assert table.grad is None and prompt.grad is not None


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


def test_gradient_has_the_same_bits_every_time():
    """Many readers of one row on several threads: an atomic sum would come out differently from run to run."""
    source = torch.full((4096,), -1)
    grad = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        results = []
        for _ in range(10):
            prompt = torch.zeros(1, 64, requires_grad=True)
            (prompt_concat(source, torch.zeros(1, 64), prompt) * grad).sum().backward()
            results.append(prompt.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)
