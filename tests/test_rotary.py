"""rotary against its definition in float64, with gradients, and the attention of models that turns its heads by it."""

import copy
import pickle

import pytest
import torch
from budget import assert_within
from parity import assert_checkpoints_change_nothing, batch, peft_model, step
from rotary_cases import SIZES, budget_of, definition, faults, inputs, results, strided
from tiny_models import build
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.cohere.modeling_cohere import CohereAttention
from transformers.models.llama import modeling_llama as llama

import fastprompt
from fastprompt import rotary
from fastprompt.backends import available
from fastprompt.hf import rotary as patch

BACKENDS = [name for name, problem in available("rotary").items() if problem is None]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, width, tables", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_within_the_budget(backend, heads, width, tables, dtype, every_isa):
    tensors = inputs(heads, width, dtype, tables)
    budget = budget_of(tensors)
    for _ in every_isa() if backend == "cpu" else [None]:
        assert_within(budget, results(lambda *args: rotary(*args, backend=backend), *tensors))
    for name, wrong in faults(*tensors).items():
        assert budget.ratio(results(rotary, *wrong)) > 1, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_no_rows(backend):
    x, cosine, sine, grad = inputs(dtype=torch.float32)
    expected = results(definition, x, cosine, sine, grad)
    for tensors in strided([x, cosine, sine, grad]):
        got = results(lambda *args: rotary(*args, backend=backend), *tensors)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        assert got[0].is_contiguous()
    for empty in (inputs(rows=0, dtype=torch.float32), inputs(heads=0, dtype=torch.float32)):
        assert rotary(*empty[:3], backend=backend).shape == empty[0].shape
    ones = torch.ones(()).expand(x.shape)
    torch.testing.assert_close(results(rotary, x, cosine, sine, ones), results(definition, x, cosine, sine, ones))


def test_gradcheck_opcheck_and_one_graph():
    x, cosine, sine, grad = inputs()
    assert torch.autograd.gradcheck(lambda x: rotary(x, cosine, sine), x.requires_grad_())
    x, cosine, sine, grad = inputs(dtype=torch.float32)
    for backward in (False, True):
        torch.library.opcheck(torch.ops.fastprompt.rotary.default, (x, cosine, sine, backward, "auto"))
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, x, cosine, sine, grad), results(rotary, x, cosine, sine, grad))
    with FakeTensorMode() as mode:
        out = rotary(*(mode.from_tensor(t) for t in (x, cosine, sine)))
    assert out.shape == x.shape and out.dtype == x.dtype


X, TABLE = torch.ones(2, 3, 4, 6), torch.ones(1, 3, 6)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (([1.0], TABLE, TABLE), TypeError, "x must be a torch.Tensor"),
        ((X[0], TABLE, TABLE), ValueError, "x must have shape"),
        ((X[..., :5], TABLE[..., :5], TABLE[..., :5]), ValueError, "x must have heads of even width, got 5"),
        ((X, TABLE[:, :2], TABLE), ValueError, r"cosine must have shape .*got \[1, 2, 6\]"),
        ((X, TABLE.expand(3, 3, 6), TABLE), ValueError, r"cosine must have shape .*got \[3, 3, 6\]"),
        ((X, TABLE, TABLE.expand(2, 3, 6)), ValueError, r"sine must have shape \[1, 3, 6\], got \[2, 3, 6\]"),
        ((X, TABLE, TABLE.half()), TypeError, "sine must have dtype torch.float32 like x"),
        ((X, TABLE.clone().requires_grad_(), TABLE), ValueError, "cosine must not require a gradient"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        rotary(*arguments)


# The attention of models.


def attentions(model):
    return [module for module in model.modules() if isinstance(module, llama.LlamaAttention)]


@pytest.mark.parametrize("labels", ["all", "last"])
def test_a_step_is_that_of_the_model_s_own_function(labels, monkeypatch):
    model, inputs = fastprompt.accelerate(peft_model("llama")), batch("right", labels)
    assert all(patch.ROTARY.is_on(module) for module in attentions(model))
    calls = []
    monkeypatch.setattr(patch.Rotary, "apply", lambda *args, apply=patch.Rotary.apply: calls.append(1) or apply(*args))
    loss, gradients, _ = step(model, inputs)
    assert len(calls) >= 2 * len(attentions(model))
    patch.ROTARY.undo(model)
    calls.clear()
    expected, exact, _ = step(model, inputs)
    assert not calls
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, exact[name], rtol=1e-4, atol=1e-6)


def test_accelerate_patches_and_restore_gives_back():
    base = build("llama")
    attention = attentions(base)[0]
    model = fastprompt.accelerate(peft_model(None, base=base))
    x, tables = torch.randn(1, 3, base.config.hidden_size), [torch.randn(1, 3, attention.head_dim) for _ in range(2)]
    expected = llama.LlamaAttention.forward(attention, x, tuple(tables))[0]  # no packed rows run
    for twin in (attention, copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert torch.equal(twin(x, tuple(tables))[0], expected)
    fastprompt.restore(model)
    assert not any(patch.ROTARY.is_on(module) for module in base.modules())


def test_what_turns_otherwise_is_left_alone(monkeypatch):
    config = build("llama").config
    attention = llama.LlamaAttention(config, 0)
    attention.forward = lambda *args: None
    patch.ROTARY.apply(attention)
    assert not patch.ROTARY.is_on(attention)
    assert not patch._turns_as_llama(CohereAttention.forward)  # its halves are every other number
    assert patch._turns_as_llama(llama.LlamaAttention.forward)
    monkeypatch.setattr(llama, "rotate_half", lambda x: -x)
    assert not patch._turns_as_llama(llama.LlamaAttention.forward)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_turn_in_the_same_way_again(reentrant):
    assert_checkpoints_change_nothing(reentrant)
