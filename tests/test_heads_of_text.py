"""Heads where PEFT's own reading is of padding or of virtual tokens: what accelerate() reads is the text."""

import warnings

import pytest
import torch
from parity import PREFIXES, B, P, S, known_names, peft_model
from test_heads import DECODERS, build, inputs_for

import fastprompt

TELLS = "fastprompt: a row's class is read off its last real token"


@known_names()
def row_by_row(model, inputs):
    """Logits, and gradients of the mean loss, of every row of a batch run alone and without padding by PEFT."""
    model.zero_grad()
    logits = []
    for row in range(B):
        real = inputs["attention_mask"][row].bool()
        alone = {name: x[row : row + 1] for name, x in inputs.items()}
        for name in ("input_ids", "attention_mask"):
            alone[name] = alone[name][:, real]
        output = model(**alone)
        (output.loss / B).backward()
        logits.append(output.logits.detach())
    return torch.cat(logits), gradients_of(model)


def gradients_of(model):
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_close(model, output, logits, gradients):
    torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=1e-5)
    model.zero_grad()
    output.loss.backward()
    for name, expected in gradients.items():
        assert (model.get_parameter(name).grad - expected).norm() <= 1e-4 * expected.norm() + 1e-7, name


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_lstm", "multitask", "prefix"])
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("packed", [True, False])
def test_a_class_is_read_off_the_last_real_token(name, method, packed):
    if not packed and method != "prompt_tuning":
        pytest.skip("PEFT's own forward is the same for all")
    model, inputs = peft_model(None, method, task_type="SEQ_CLS", base=build(name, "SEQ_CLS")), None
    inputs = inputs_for("SEQ_CLS", "right", method)
    # A token with the id of padding that is real, and padding with an id that is not padding's.
    inputs["input_ids"][0, -1], inputs["input_ids"][1, -1] = 0, 7
    plain = row_by_row(model, inputs) if method not in PREFIXES else None
    extra = {} if packed else {"output_hidden_states": True}
    fastprompt.accelerate(model)
    if method in PREFIXES:  # alone, the model would look for row 0's last token by its id
        inputs["input_ids"][0, -1] = 5
        plain = row_by_row(fastprompt.restore(model), inputs)
        fastprompt.accelerate(model)
    with pytest.warns(UserWarning, match=TELLS):
        output = model(**inputs, **extra)
    assert bool(fastprompt.stats(model).padded) != packed
    assert_close(model, output, *plain)


@pytest.mark.parametrize("padding", ["left", "none"])
def test_what_peft_reads_right_is_not_told(padding):
    model = fastprompt.accelerate(peft_model(None, task_type="SEQ_CLS", base=build("llama", "SEQ_CLS")))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprompt")
        model(**inputs_for("SEQ_CLS", padding, "prompt_tuning"))


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_mlp", "multitask", "prefix"])
@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("packed", [True, False])
def test_labels_of_the_text_s_tokens(name, method, packed):
    model = peft_model(None, method, task_type="TOKEN_CLS", base=build(name, "TOKEN_CLS"))
    inputs = inputs_for("TOKEN_CLS", "right", method)
    given = {**inputs, "labels": inputs["labels"][:, -S:]}
    extra = {} if packed else {"output_hidden_states": True}
    with known_names():
        expected = model(**inputs)
    expected.loss.backward()
    gradients = gradients_of(model)
    fastprompt.accelerate(model)
    output = model(**given, **extra)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=0)
    assert output.logits.shape[:2] == (B, S)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(output.logits[real], expected.logits[:, -S:][real], rtol=1e-4, atol=1e-5)
    assert_close(model, output, output.logits, gradients)
    assert model(**given, return_dict=False)[1].shape[:2] == (B, S)
    whole = model(**{k: x for k, x in inputs.items() if k != "labels"}).logits.shape[1]
    assert whole == S + (0 if method in PREFIXES else P)  # PEFT's shape, where it is asked what PEFT is asked
    assert model(**inputs).logits.shape[1] == whole


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_positions_of_the_text_s_answers(name, padding):
    model = peft_model(None, task_type="QUESTION_ANS", base=build(name, "QUESTION_ANS"))
    inputs = inputs_for("QUESTION_ANS", padding, "prompt_tuning")
    inputs["start_positions"][2] = inputs["end_positions"][2] = S + 3  # not in the text: ignored
    counted = {key: x + P if key.endswith("positions") else x for key, x in inputs.items()}
    expected = model(**counted)
    fastprompt.accelerate(model)
    with pytest.warns(UserWarning, match="PEFT counts virtual tokens"):
        output = model(**inputs)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=0)
    real = torch.ones(B, S).bool() if padding == "none" else inputs["attention_mask"].bool()
    for name in ("start_logits", "end_logits"):
        assert output[name].shape == (B, S)
        torch.testing.assert_close(output[name][real], expected[name][:, P:][real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "QUESTION_ANS"])
def test_peft_s_reading_can_be_kept(task_type):
    model = peft_model(None, task_type=task_type, base=build("llama", task_type))
    inputs = inputs_for(task_type, "right", "prompt_tuning")
    expected = model(**inputs).loss
    fastprompt.accelerate(model, heads="peft")
    with pytest.warns(UserWarning, match="fastprompt runs PEFT's own padded forward"):
        assert torch.equal(model(**inputs).loss, expected)


def test_another_reading_is_refused():
    model = peft_model("llama")
    with pytest.raises(ValueError, match='heads must be "text" or "peft", got \'mine\''):
        fastprompt.accelerate(model, heads="mine")
    assert "forward" not in vars(model)
