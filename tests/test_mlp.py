"""Gated MLPs that keep less: the same output and gradients, fewer bytes, and no trace afterwards."""

import pytest
import torch
from parity import batch, peft_model
from tiny_models import build

import fastprompt
from fastprompt.hf.mlp import GatedActivation


@pytest.mark.parametrize(
    "activation", [torch.nn.functional.silu, torch.nn.functional.gelu, torch.relu, torch.nn.Identity()]
)
def test_gradients_equal_autograd_s(activation):
    generator = torch.Generator().manual_seed(0)
    gate, up, grad = (torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    results = []
    for function in (lambda g, u: GatedActivation.apply(g, u, activation), lambda g, u: activation(g) * u):
        leaves = [x.clone().requires_grad_() for x in (gate, up)]
        out = function(*leaves)
        out.backward(grad, retain_graph=True)
        out.backward(grad)  # what was saved was not written into
        results.append((out.detach(), *(x.grad for x in leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert torch.autograd.gradcheck(
        lambda g, u: GatedActivation.apply(g, u, activation), (gate.requires_grad_(), up.requires_grad_())
    )


def kept_bytes(model, inputs):
    """What autograd saves in a forward, each storage once, the parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(**inputs).loss
    total = sum(size for pointer, size in kept.items() if pointer not in own)
    loss.backward()
    return total


def test_a_step_keeps_less():
    inputs = batch("right")
    model = fastprompt.accelerate(peft_model("llama"))
    rows = 5 + int(inputs["attention_mask"].sum())
    less = kept_bytes(model, inputs)
    for module in model.base_model.modules():
        vars(module).pop("forward", None)
    more = kept_bytes(model, inputs)
    assert more - less == 3 * rows * 80 * 4  # of 3 layers the activation, 80 wide


def test_nothing_is_left_behind():
    model, inputs = peft_model("llama"), batch("right")
    mlp = model.base_model.model.layers[0].mlp
    fastprompt.accelerate(model)
    assert "forward" in vars(mlp)
    x = torch.randn(2, 3, 48)
    assert torch.equal(mlp(x), type(mlp).forward(mlp, x))
    fastprompt.restore(model)
    assert "forward" not in vars(mlp)
    model.base_model.model.layers[0].mlp.act_fn = torch.nn.Identity()  # another MLP than its class has elsewhere
    plain = model(**inputs).loss
    torch.testing.assert_close(fastprompt.accelerate(model)(**inputs).loss, plain)


def test_an_mlp_with_its_own_forward_is_left_alone():
    base = build("llama")
    mlp = base.model.layers[1].mlp

    def own(x):
        return 2 * type(mlp).forward(mlp, x)

    mlp.forward = own
    model, inputs = peft_model(None, base=base), batch("right")
    plain = model(**inputs).loss
    torch.testing.assert_close(fastprompt.accelerate(model)(**inputs).loss, plain)
    fastprompt.restore(model)
    assert mlp.forward is own
