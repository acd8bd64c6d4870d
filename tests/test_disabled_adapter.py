"""Under disable_adapter() the base model runs packed rows, and gives what it gives."""

import warnings

import pytest
import torch
from parity import METHODS, PREFIXES, batch, is_packed, peft_model

import fastprompt


def disabled(model, **inputs):
    with model.disable_adapter():
        return model(**inputs)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral_window"])
@pytest.mark.parametrize("training", [True, False])
def test_the_base_model_s_own_numbers(name, padding, training):
    model, inputs = peft_model(name).train(training), batch(padding)
    expected = disabled(model, **inputs)
    fastprompt.accelerate(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprompt runs")
        output = disabled(model, **inputs)
        bare = disabled(model, **{k: x for k, x in inputs.items() if k != "labels"}).logits
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=0)
    real = torch.ones_like(inputs["input_ids"]).bool()
    real = real if inputs["attention_mask"] is None else inputs["attention_mask"].bool()
    for logits in (output.logits, bare):
        assert logits.shape == expected.logits.shape
        torch.testing.assert_close(logits[real], expected.logits[real], rtol=1e-4, atol=1e-4)
    assert fastprompt.stats(model).packed == 2


@pytest.mark.parametrize("method", METHODS)
def test_whatever_the_adapter_is(method):
    model, inputs = peft_model("llama", method), batch("right")
    expected = disabled(model, **inputs).loss
    plain = model(**batch("right", method=method)).loss
    fastprompt.accelerate(model)
    torch.testing.assert_close(disabled(model, **inputs).loss, expected, rtol=1e-5, atol=0)
    assert fastprompt.stats(model).packed == 1
    again = model(**batch("right", method=method)).loss  # and the adapter is back
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=0)
    assert is_packed(model, batch("right", method=method))
    assert abs(again - expected) > 1e-3


@pytest.mark.parametrize("method", ["prompt_tuning", PREFIXES[0]])
def test_calls_of_another_kind_are_the_base_model_s(method):
    model, inputs = peft_model("llama", method).eval(), batch("right")
    inputs.pop("labels")
    fastprompt.accelerate(model)
    for extra in ({"output_hidden_states": True}, {"position_ids": torch.arange(9)[None] + 3}, {"logits_to_keep": 1}):
        expected = model.base_model(**inputs, **extra)
        with pytest.warns(UserWarning, match="fastprompt runs PEFT's own padded forward"):
            output = disabled(model, **inputs, **extra)
        assert torch.equal(output.logits, expected.logits)
        fastprompt.accelerate(model)  # warns once
    with pytest.raises(TypeError):
        disabled(model, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)


def test_an_exception_gives_everything_back():
    model, inputs = fastprompt.accelerate(peft_model("llama")), batch("right")
    before = model.forward
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert model.forward is before and is_packed(model, inputs)
