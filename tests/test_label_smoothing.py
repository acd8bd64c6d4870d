"""Trainer's label smoothing on accelerated models, against the same loss written down by hand."""

import pickle
import warnings

import pytest
import torch
from parity import METHODS, P, batch, peft_model
from test_resuming import trainer_of
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.trainer_pt_utils import LabelSmoother

import fastprompt
from fastprompt.hf.cache_names import cache_in

EPSILON = 0.1
METHODS = [name for name in METHODS if name != "cpt"]  # whose loss is another one


def by_hand(model, inputs, epsilon=EPSILON):
    """(1 - epsilon) * cross entropy + epsilon * its mean over all words, of the tokens behind the prompt."""
    given = {name: x for name, x in inputs.items() if name != "labels"}
    labels = inputs["labels"][:, 1:]
    logits = model(**given).logits[:, -inputs["labels"].shape[1] : -1]
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), label_smoothing=epsilon, ignore_index=-100
    )


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("method", METHODS)
def test_the_smoothed_loss_of_trainer(method, padding, tmp_path):
    model, inputs = peft_model("llama", method), batch(padding, method=method)
    expected = by_hand(model, inputs)
    expected.backward()
    gradients = {name: x.grad.clone() for name, x in model.prompt_encoder.named_parameters() if x.grad is not None}
    model.zero_grad()
    fastprompt.accelerate(model)
    trainer = trainer_of(model, tmp_path, method, label_smoothing_factor=EPSILON, save_strategy="no")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprompt runs")
        warnings.filterwarnings("ignore", message="fastprompt: with label smoothing")
        loss = trainer.compute_loss(model, {name: x for name, x in inputs.items() if x is not None})
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    for name, expected in gradients.items():
        got = model.prompt_encoder.get_parameter(name).grad
        assert (got - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix"])
def test_whole_trainings_and_evaluations(method, tmp_path):
    model = fastprompt.accelerate(peft_model("llama", method))
    trainer = trainer_of(model, tmp_path, method, label_smoothing_factor=EPSILON, save_strategy="no")
    with pytest.warns(UserWarning, match="every label is predicted by the token before it") as told:
        trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
    assert fastprompt.stats(model).padded == {} and told
    rows = trainer.eval_dataset
    inputs = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        assert evaluated == pytest.approx(float(by_hand(fastprompt.restore(model).eval(), inputs)), rel=1e-5)


def test_a_padded_forward_is_smoothed_right_too(tmp_path):
    model, inputs = fastprompt.accelerate(peft_model("llama", "prefix")), batch("none")
    inputs.pop("attention_mask")
    inputs["output_hidden_states"] = True
    trainer = trainer_of(model, tmp_path, "prefix", label_smoothing_factor=EPSILON, save_strategy="no")
    with pytest.warns(UserWarning):
        loss = trainer.compute_loss(model, dict(inputs))
    assert fastprompt.stats(model).padded
    torch.testing.assert_close(loss, by_hand(fastprompt.restore(model), inputs), rtol=1e-5, atol=0)


def test_a_compiled_model_is_smoothed_right_too(tmp_path):
    model, inputs = fastprompt.accelerate(peft_model("llama", "prefix")), batch("right")
    expected = by_hand(model, inputs)
    trainer = trainer_of(model, tmp_path, "prefix", label_smoothing_factor=EPSILON, save_strategy="no")
    with pytest.warns(UserWarning, match="every label is predicted by the token before it"):
        loss = trainer.compute_loss(torch.compile(model, backend="eager"), inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_what_is_not_behind_a_prompt_is_smoothed_as_ever():
    smooth, generator = LabelSmoother(EPSILON), torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 4, 9, generator=generator), torch.randint(9, (2, 4), generator=generator)
    expected = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=EPSILON)
    torch.testing.assert_close(smooth({"logits": logits}, labels), expected)
    shifted = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=EPSILON)
    torch.testing.assert_close(smooth({"logits": logits}, labels, shift_labels=True), shifted)
    torch.testing.assert_close(smooth((logits[:, 0],), labels[:, 0]), smooth({"logits": logits[:, 0]}, labels[:, 0]))


def test_the_output_behind_a_prefix_is_that_of_the_model():
    inputs = batch("none")
    inputs.pop("labels")
    model = fastprompt.accelerate(peft_model("llama", "prefix")).eval()
    with torch.no_grad():
        output = model(**inputs)
    assert isinstance(output, CausalLMOutputWithPast) and output.logits is output["logits"]
    assert type(pickle.loads(pickle.dumps(output))) is CausalLMOutputWithPast
    assert P + inputs["input_ids"].shape[1] == cache_in(output).get_seq_length()
