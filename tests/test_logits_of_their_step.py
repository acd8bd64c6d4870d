"""Logits that are read late are those of their step, whatever became of the model and the batch meanwhile."""

import pytest
import torch
from parity import batch, peft_model
from test_later_logits import Squares
from test_share_prefixes import lora
from tiny_models import build

import fastprompt


def unpadded(labelled="last"):
    inputs = batch("right", labelled)
    return dict(inputs, attention_mask=torch.ones_like(inputs["attention_mask"]))


def distilled(model):
    """A loss of the logits of three forward passes, which are read when all is over; and its gradients."""
    inputs = unpadded()
    made = model(**inputs)
    with torch.no_grad():
        constant = model(**inputs)
        with model.disable_adapter():
            without = model(**inputs)
    for x in inputs.values():
        x.fill_(1)
    front = constant.logits.shape[1] - without.logits.shape[1]
    with torch.no_grad():
        best = made.logits.argmax(-1)  # read without a graph first
    with model.disable_adapter():
        likely = made.logits.log_softmax(-1)
    loss = (likely - constant.logits.log_softmax(-1) / 2)[:, front:].sub(without.logits).square().mean()
    model.zero_grad()
    loss.backward()
    return loss.detach(), best, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


MODELS = {
    "lora": (lora, fastprompt.share_prefixes),
    "prompt": (lambda: peft_model("llama"), fastprompt.accelerate),
    "prefix": (lambda: peft_model("llama", "prefix"), fastprompt.accelerate),
}


@pytest.mark.parametrize("name", MODELS)
def test_distillation(name):
    make, attach = MODELS[name]
    expected, best, gradients = distilled(make().train())
    loss, ours, got = distilled(attach(make().train()))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert torch.equal(ours, best) and got.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert (got[key] - gradient).norm() <= 1e-4 * gradient.norm(), key


def test_weights_that_train_are_known_before_anything_is_computed():
    model, inputs = fastprompt.share_prefixes(lora()).train(), unpadded()
    assert model(**inputs).logits.requires_grad
    with torch.no_grad():
        made = model(**inputs)
    assert not made.logits.requires_grad and not (made.logits * 1).requires_grad


def test_an_autograd_function_of_logits_reaches_weights():
    def gradients(model):
        Squares.apply(model.train()(**unpadded()).logits).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected, got = gradients(lora()), gradients(fastprompt.share_prefixes(lora()))
    assert all((got[key] - x).norm() <= 1e-4 * x.norm() for key, x in expected.items())


@pytest.mark.parametrize("method", [fastprompt.PromptTuning(3, 48), fastprompt.PrefixTuning(3, 3, 2, 8)])
def test_a_prompt_that_was_trained_on_meanwhile(method):
    model, inputs = fastprompt.SoftPromptModel(build("llama"), method), unpadded()
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
    output = model.train()(**inputs)
    output.loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    torch.testing.assert_close(output.logits.detach(), expected, rtol=1e-4, atol=1e-5)


def test_adapters_that_came_or_went_meanwhile():
    model, inputs = fastprompt.share_prefixes(lora()).train(), unpadded()
    first, second = model(**inputs), model(**inputs)
    expected = model.eval()(**inputs).logits
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    torch.testing.assert_close(first.logits, expected, rtol=1e-4, atol=1e-5)
    assert model.active_adapter == "other"
    model.delete_adapter("default")
    with pytest.raises(RuntimeError, match="the model has changed since the step"):
        second.logits.sum()
