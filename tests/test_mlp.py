"""Gated MLPs that keep less: the same output and gradients, fewer bytes, and no trace afterwards."""

import torch
from parity import batch, peft_model
from tiny_models import build

import fastprompt


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
    mlp.forward = own = lambda x: 2 * type(mlp).forward(mlp, x)
    model, inputs = peft_model(None, base=base), batch("right")
    plain = model(**inputs).loss
    torch.testing.assert_close(fastprompt.accelerate(model)(**inputs).loss, plain)
    fastprompt.restore(model)
    assert mlp.forward is own
