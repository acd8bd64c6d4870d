"""Attention dropout of Hugging Face models on prefix_attention: drawn anew, repeated by checkpointing, unbiased."""

import math

import pytest
import torch
from tiny_models import VOCABULARY, build

import fastprompt

IDS = torch.randint(3, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 8, [1] * 3 + [0] * 5, [0] * 4 + [1] * 4])


def patched(name="llama", p=0.3, learned=True):
    key = "attn_pdrop" if name == "gpt2" else "attention_dropout"
    model = build(name, **{key: p}).train()
    prefix = None
    if learned:
        heads, width = (6, 8) if name == "gpt2" else (2, 8)
        prefix = torch.randn(3, 2, 4, heads, width, generator=torch.Generator().manual_seed(1)).requires_grad_()
    return fastprompt.patch_attention(model, prefix), prefix


def step(model, prefix, seed):
    """The loss and the gradients of one training step."""
    torch.manual_seed(seed)
    loss = model(input_ids=IDS, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100), use_cache=False).loss
    leaves = [*model.parameters()] if prefix is None else [*model.parameters(), prefix]
    for leaf in leaves:
        leaf.grad = None
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral_window"])
def test_each_step_draws_anew_and_a_seed_repeats_it(name):
    model, prefix = patched(name)
    first, again, other = (step(model, prefix, seed) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(first, again) if x is not None)
    assert not torch.equal(first[0], other[0])
    model.eval()
    assert torch.equal(step(model, prefix, 0)[0], step(model, prefix, 1)[0])


def test_every_layer_draws_one_seed_of_its_own_from_the_cpu_generator():
    model, _ = patched()
    torch.manual_seed(7)
    model(input_ids=IDS)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    for _ in range(model.config.num_hidden_layers):
        torch.randint(2**63 - 1, ())
    assert torch.equal(torch.get_rng_state(), after)


# Reentrant checkpointing gives no gradient to what is no argument of a layer, such as a prefix.
@pytest.mark.parametrize("learned, reentrant", [(True, False), (False, False), (False, True)])
def test_checkpointing_recomputes_the_same_masks(learned, reentrant):
    model, prefix = patched(learned=learned)
    expected = step(model, prefix, 5)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for x, y in zip(step(model, prefix, 5), expected):
        assert (x is None and y is None) or torch.equal(x, y)


def test_the_mean_over_seeds_is_attention_without_dropout():
    """The first layer's, whose inputs do not depend on dropout; what follows it inside the module is linear."""
    model, prefix = patched(p=0.2)
    outputs = []
    model.model.layers[0].self_attn.register_forward_hook(lambda module, args, out: outputs.append(out[0].detach()))
    with torch.no_grad():
        for seed in range(250):
            torch.manual_seed(seed)
            model(input_ids=IDS, attention_mask=MASK)
        model.eval()(input_ids=IDS, attention_mask=MASK)
    *drawn, plain = (x[MASK.bool()] for x in outputs)
    drawn = torch.stack(drawn)
    errors = (drawn.mean(0) - plain) / (drawn.std(0) / math.sqrt(len(drawn)))
    assert errors.abs().max() < 4


def test_it_is_the_dropout_of_torch_s_own_attention_in_distribution():
    """Mean and spread of the loss over seeds, of one model on scaled_dot_product_attention and on prefix_attention."""
    model = build("llama", attention_dropout=0.4).train()
    losses = []
    for patch in (False, True):
        if patch:
            fastprompt.patch_attention(model)
        with torch.no_grad():
            found = []
            for seed in range(250):
                torch.manual_seed(seed)
                found.append(model(input_ids=IDS, labels=IDS).loss)
        losses.append(torch.stack(found))
    theirs, ours = losses
    error = torch.stack([x.var() / len(x) for x in losses]).sum().sqrt()
    assert abs(theirs.mean() - ours.mean()) < 4 * error
    assert 0.75 < ours.std() / theirs.std() < 1.33  # 4 errors of the ratio of two samples' deviations
