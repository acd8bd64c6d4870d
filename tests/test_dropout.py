"""Dropout in the frozen model on packed rows: drawn anew in every step, distributed as in PEFT's forward."""

import warnings

import pytest
import torch
from parity import batch, is_packed, peft_model
from torch import nn

import fastprompt

DRAWS = 250
PADDED = "fastprompt runs PEFT's own padded forward: "


def draw(model, inputs, count=DRAWS):
    """Of so many steps the losses ``[count]`` and the gradients of the prompt ``[count, numbers]``."""
    (parameter,) = model.prompt_encoder.parameters()
    losses, gradients = [], []
    for seed in range(count):
        torch.manual_seed(seed)
        parameter.grad = None
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(parameter.grad.flatten())
    return torch.stack(losses).double(), torch.stack(gradients).double()


def standard_errors(x, y):
    """How many standard errors the means of two samples are apart, at most."""
    error = (x.var(0) / len(x) + y.var(0) / len(y)).sqrt()
    return float(((x.mean(0) - y.mean(0)).abs() / error).max())


@pytest.mark.parametrize(
    "name, method, changes",
    [
        ("gpt2", "prompt_tuning", dict(resid_pdrop=0.3, embd_pdrop=0.2)),
        ("llama", "prompt_tuning", dict(attention_dropout=0.4)),
        ("llama", "prefix", dict(attention_dropout=0.4)),
        ("opt", "prompt_tuning", dict(dropout=0.2, attention_dropout=0.2)),
    ],
    ids=str,
)
def test_loss_and_gradient_have_the_expectation_of_peft(name, method, changes):
    """Within what that many draws can tell; without dropout both are further away than that."""
    inputs = batch("right", common=2)
    model = peft_model(name, method, **changes)
    model.train()
    plain = draw(model, inputs)
    fastprompt.accelerate(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=PADDED)
        fast = draw(model, inputs)
    model.base_model.eval()
    fixed = draw(model, inputs, 2)
    assert torch.equal(fixed[0][0], fixed[0][1]) and fast[0].unique().numel() > DRAWS / 2
    assert max(standard_errors(x, y) for x, y in zip(plain, fast)) < 5
    assert max(standard_errors(x, y.mean(0, keepdim=True).expand(2, *y.shape[1:])) for x, y in zip(plain, fixed)) > 6


def test_a_seed_repeats_a_step_and_checkpointing_recomputes_it():
    inputs = batch("right")
    model = fastprompt.accelerate(peft_model("gpt2", resid_pdrop=0.3, attn_pdrop=0.3))
    model.train()
    expected = draw(model, inputs, 3)
    for reentrant in (False, True):
        model.base_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for x, y in zip(draw(model, inputs, 3), expected):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("noise", [lambda: nn.Dropout1d(0.5), lambda: jittering()], ids=["features", "jitter"])
def test_noise_that_is_not_of_single_numbers_takes_the_padded_path_until_it_is_off(noise):
    model, inputs = peft_model("llama"), batch("right")
    model.base_model.model.layers[0].noise = noise()
    fastprompt.accelerate(model)
    with pytest.warns(UserWarning, match=PADDED + ".*is at work in the base model"):
        model(**inputs)
    model.base_model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_packed(model, inputs)


def jittering():
    router = nn.Identity()
    router.router_jitter_noise = 0.1
    return router
