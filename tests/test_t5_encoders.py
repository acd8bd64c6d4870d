"""The encoders of T5 and its relatives alone: their attention sees distances and no positions."""

import warnings

import pytest
import torch
import transformers as hf
from needs import needs_t5
from parity import B, P, S, assert_equal, batch, both, peft_model
from tiny_models import drawn
from tiny_pairs import PAIRS

import fastprompt

# name of a config -> encoder, and encoder with a classifier of tokens
MODELS = {
    "t5_scaled": (hf.T5EncoderModel, hf.T5ForTokenClassification),
    "mt5": (hf.MT5EncoderModel, hf.MT5ForTokenClassification),
    "umt5": (hf.UMT5EncoderModel, hf.UMT5ForTokenClassification),
}


def build(name, kind):
    config = type(PAIRS[name])(**{**PAIRS[name].to_dict(), "classifier_dropout": 0.0, "num_labels": 3})
    torch.manual_seed(0)
    return drawn(MODELS[name][kind](config))


@needs_t5
@pytest.mark.parametrize("method", ["prompt_tuning", "multitask"])
@pytest.mark.parametrize("name", MODELS)
def test_classifiers_of_tokens(name, method):
    inputs = batch("right", method=method)
    model = peft_model(None, method, task_type="TOKEN_CLS", base=build(name, 1))
    inputs["labels"] = torch.cat(
        [torch.full((B, P), -100), (inputs["labels"] % 3).masked_fill(inputs["labels"] < 0, -100)], 1
    )
    assert_equal(*both(model, inputs), inputs)


@needs_t5
@pytest.mark.parametrize("padding", ["right", "none"])
@pytest.mark.parametrize("name", MODELS)
def test_hidden_states(name, padding):
    inputs = {key: x for key, x in batch(padding).items() if key != "labels"}
    model = peft_model(None, task_type="FEATURE_EXTRACTION", base=build(name, 0))
    mask = torch.ones(B, S) if padding == "none" else inputs["attention_mask"]
    real = torch.cat([torch.ones(B, P), mask], 1).bool()
    weight = torch.randn(B, P + S, 48, generator=torch.Generator().manual_seed(5))

    def states_and_gradient():
        model.zero_grad()
        states = model(**inputs).last_hidden_state[real]
        (states * weight[real]).sum().backward()
        return states.detach(), model.prompt_encoder["default"].embedding.weight.grad

    plain = states_and_gradient()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprompt runs")
        fastprompt.accelerate(model)
        fast = states_and_gradient()
    assert fastprompt.stats(model).padded == {} and fastprompt.stats(model).packed == 1
    for got, expected in zip(fast, plain):
        assert (got - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("name", MODELS)
def test_without_peft(name):
    """Rows are seen as alone behind the prompt, wherever they are padded."""
    method = fastprompt.PromptTuning(P, 48)
    model, inputs = fastprompt.SoftPromptModel(build(name, 0), method).eval(), batch("right")
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        for row in range(B):
            text = model.base.get_input_embeddings()(ids[row, mask[row]])
            alone = build(name, 0).eval()(inputs_embeds=torch.cat([method(), text])[None]).last_hidden_state
            torch.testing.assert_close(states[row, mask[row]], alone[0, P:], rtol=1e-4, atol=1e-4)
