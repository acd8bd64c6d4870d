"""rms_norm against its definition in float64, with gradients, and the norms of models that run on it."""

import copy
import pickle

import pytest
import torch
from budget import assert_within
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_checkpoints_change_nothing, batch, peft_model, step
from tiny_models import build
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import fastprompt
from benchmarks.budget import Budget
from fastprompt import rms_norm
from fastprompt.backends import available
from fastprompt.hf.masks import PackedRows, running
from fastprompt.hf.norms import NORMS
from fastprompt.layout import plan_padded_input

BACKENDS = [name for name, problem in available("rms_norm").items() if problem is None]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(shape=(2, 3, 37), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    weight = 1 + 0.3 * torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    return x, weight.to(dtype), grad


def results(function, x, weight, grad):
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def budget_of(x, weight, grad, dtype, eps=1e-6):
    def evaluate(stored):
        def definition(x, weight):
            quotient = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
            return stored(stored(quotient) * weight)

        out, *grads = results(definition, x.double(), weight.double(), grad.double())
        return [out, *map(stored, grads)]

    return Budget.of(evaluate, dtype, operands=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64, 576])
@pytest.mark.parametrize("backend", BACKENDS)
def test_within_the_budget(backend, width, dtype, every_isa):
    x, weight, grad = inputs((3, 5, width), dtype)
    budget = budget_of(x, weight, grad, dtype)
    for _ in every_isa() if backend == "cpu" else [None]:
        got = results(lambda x, weight: rms_norm(x, weight, backend=backend), x, weight, grad)
        assert_within(budget, got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_planted_faults_are_found(dtype):
    x, weight, grad = inputs((3, 64), dtype)
    budget = budget_of(x, weight, grad, dtype)
    faults = {
        "a wrong row": (x.roll(1, 0), weight, grad),
        "no weight": (x, torch.ones_like(weight), grad),
        "another gradient": (x, weight, grad.roll(1, 0)),
    }
    for name, arguments in faults.items():
        assert budget.ratio(results(rms_norm, *arguments)) > 1, name
    exact = results(lambda x, weight: rms_norm(x, weight, 1e-1), x, weight, grad)
    assert budget.ratio(exact) > 1


def test_gradcheck_and_opcheck():
    x, weight, _ = inputs((2, 5))
    for needs in ((True, True), (True, False), (False, True)):
        leaves = [t.clone().requires_grad_(need) for t, need in zip((x, weight), needs)]
        assert torch.autograd.gradcheck(rms_norm, leaves)
    x, weight, grad = inputs((2, 5), torch.float32)
    torch.library.opcheck(torch.ops.fastprompt.rms_norm.default, (x, weight, 1e-6, "auto"))
    factors = torch.ops.fastprompt.rms_norm(x, weight, 1e-6, "auto")[1]
    for needs in ((True, True), (True, False), (False, True)):
        arguments = (grad, x, weight, factors, *needs, "auto")
        torch.library.opcheck(torch.ops.fastprompt.rms_norm_backward.default, arguments)


@given(st.integers(0, 4), st.integers(0, 70), st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_shape_and_stride(rows, width, transposed):
    x, weight, grad = inputs((rows, max(width, 1)), torch.float32)
    if width == 0:
        x, weight, grad = x[:, :0], weight[:0], grad[:, :0]
    expected = results(lambda x, weight: rms_norm(x, weight, backend="reference"), x, weight, grad)
    if transposed:
        x, grad = (t.t().contiguous().t() for t in (x, grad))
        weight = torch.stack([weight, weight], 1)[:, 0]
    for got, exact in zip(results(rms_norm, x, weight, grad), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-6)


def test_an_expanded_gradient_and_a_second_backward():
    x, weight, _ = inputs(dtype=torch.float32)
    x.requires_grad_()
    out = rms_norm(x, weight)
    out.sum().backward(retain_graph=True)
    first = x.grad.clone()
    x.grad = None
    out.sum().backward()
    assert torch.equal(x.grad, first)


def test_torch_compile_sees_one_graph():
    x, weight, grad = inputs(dtype=torch.float32)
    compiled = torch.compile(lambda x, weight: rms_norm(x, weight), fullgraph=True, backend="aot_eager")
    for got, exact in zip(results(compiled, x, weight, grad), results(rms_norm, x, weight, grad), strict=True):
        torch.testing.assert_close(got, exact)
    with FakeTensorMode() as mode:
        out = rms_norm(*(mode.from_tensor(t) for t in (x, weight)))
    assert out.shape == x.shape and out.dtype == x.dtype


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (([1.0], torch.ones(1)), TypeError, "x must be a torch.Tensor"),
        ((torch.ones(2, 3), torch.ones(2)), ValueError, r"weight must have shape \[3\], got \[2\]"),
        ((torch.tensor(1.0), torch.ones(1)), ValueError, "x must have shape"),
        ((torch.ones(2, 3).long(), torch.ones(3)), TypeError, "x must have one of the dtypes"),
        ((torch.ones(2, 3), torch.ones(3).half()), TypeError, "weight must have dtype torch.float32 like x"),
        ((torch.ones(2, 3), torch.ones(3), -1.0), ValueError, "eps must be a number >= 0, got -1.0"),
        ((torch.ones(2, 3), torch.ones(3), float("nan")), ValueError, "eps must be a number >= 0, got nan"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        rms_norm(*arguments)


# The norms of models.


def packed_rows():
    return running(PackedRows(plan_padded_input(2, 3, 1)))


class Scaled(LlamaRMSNorm):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


class Cubed(LlamaRMSNorm):
    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(3).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama_s_norm_gives_the_same(dtype):
    norm, (x, weight, grad) = LlamaRMSNorm(37).to(dtype), inputs(dtype=dtype)
    norm.weight.data.copy_(weight)
    plain = results(lambda x, _: norm(x) + 0 * _.sum(), x, weight, grad)
    NORMS.apply(norm)
    assert NORMS.is_on(norm)
    assert torch.equal(norm(x), LlamaRMSNorm.forward(norm, x))  # no packed rows
    rtol = 1e-5 if dtype == torch.float32 else 2e-2
    with packed_rows():
        for got, exact in zip(results(lambda x, _: norm(x) + 0 * _.sum(), x, weight, grad), plain, strict=True):
            torch.testing.assert_close(got, exact, rtol=rtol, atol=rtol)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(norm(x), LlamaRMSNorm.forward(norm, x))
        assert torch.equal(norm(x.half()), LlamaRMSNorm.forward(norm, x.half()))  # another dtype than the weight's
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        torch.testing.assert_close(twin(x), norm(x))
    NORMS.undo(norm)
    assert "forward" not in vars(norm)


@pytest.mark.parametrize("kind", [Scaled, Cubed, GemmaRMSNorm, nn.LayerNorm])
def test_any_other_norm_is_left_alone(kind):
    norm = kind(8)
    NORMS.apply(norm)
    assert not NORMS.is_on(norm)


def test_a_norm_with_a_forward_of_its_own_is_left_alone():
    norm = LlamaRMSNorm(8)
    norm.forward = lambda x: x
    NORMS.apply(norm)
    assert not NORMS.is_on(norm)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_run_the_same_norm_again(reentrant):
    assert_checkpoints_change_nothing(reentrant)


def test_checkpoints_of_others_run_the_norm_of_the_class():
    base = build("llama")
    model, inputs = fastprompt.accelerate(peft_model(None, base=base)), batch("right", "last")
    expected, gradients, _ = step(model, inputs)
    for index, layer in enumerate(base.model.layers):
        base.model.layers[index] = checkpoint_wrapper(layer)
    loss, again, _ = step(model, inputs)
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients.items():
        assert (again[name] - gradient).norm() <= 1e-4 * gradient.norm()


def test_accelerate_patches_and_restore_gives_back():
    base = build("llama")
    model = fastprompt.accelerate(peft_model(None, base=base))
    assert all(NORMS.is_on(module) for module in base.modules() if isinstance(module, LlamaRMSNorm))
    fastprompt.restore(model)
    assert not any(NORMS.is_on(module) for module in base.modules())
