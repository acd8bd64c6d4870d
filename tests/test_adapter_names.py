"""``adapter_names``: every row of a batch behind the prompt of its own adapter."""

import pytest
import torch
from parity import TASKS, B, P, batch, known_names, peft_model
from peft import PromptTuningConfig
from test_heads import build as build_with_head

import fastprompt

METHODS = ["prompt_tuning", "p_tuning_lstm", "multitask", "prefix", "prefix_mlp"]
NAMES = ["second", "default", "second", "third"]
SAID = "adapter_names gives every row the prompt of its own adapter; PEFT ignores it"


def with_adapters(method):
    model = peft_model("llama", method)
    for seed, name in enumerate(("second", "third", "unused")):
        model.add_adapter(name, model.peft_config["default"])
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.prompt_encoder[name].parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape))
    for parameter in model.prompt_encoder.parameters():
        parameter.requires_grad_()
    return model


def row_by_row(model, inputs):
    """The summed loss of all labels, each row with its adapter active, and the gradients of all adapters."""
    model.zero_grad()
    total = 0.0
    for i, name in enumerate(NAMES):
        model.set_adapter(name)
        one = {key: x[i : i + 1] for key, x in inputs.items()}
        loss = model(**one, num_items_in_batch=1).loss
        loss.backward()
        total += loss.detach()
    model.set_adapter("default")
    return total, gradients(model)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.prompt_encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_equals_row_by_row(method, padding):
    model, inputs = with_adapters(method), batch(padding)
    if method == "multitask":
        inputs["task_ids"] = TASKS
    expected, theirs = row_by_row(model, inputs)
    fastprompt.accelerate(model)
    model.zero_grad()
    with pytest.warns(UserWarning, match=SAID):
        loss = model(**inputs, adapter_names=NAMES, num_items_in_batch=1).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)
    ours = gradients(model)
    ours = {name: x for name, x in ours.items() if x.any()}
    theirs = {name: x for name, x in theirs.items() if x.any()}
    assert ours.keys() == theirs.keys() and not any(name.startswith("unused") for name in ours)
    for name, x in theirs.items():
        assert (ours[name] - x).norm() <= 1e-4 * x.norm() + 1e-6, name
    assert fastprompt.stats(model).packed == 1 and model.active_adapter == "default"


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix"])
def test_a_classifier(method):
    base = build_with_head("llama", "SEQ_CLS")
    model, inputs = peft_model(None, method, base=base, task_type="SEQ_CLS"), batch("left")
    del inputs["labels"]
    model.add_adapter("second", model.peft_config["default"])
    with torch.no_grad():
        for parameter in model.prompt_encoder["second"].parameters():
            parameter.add_(1)
    expected = []
    for name in ("default", "second"):
        model.set_adapter(name)
        with known_names():
            expected.append(model(**inputs).logits)
    model.set_adapter("default")
    names = ["default", "second", "second", "default"]
    got = fastprompt.accelerate(model)(**inputs, adapter_names=names).logits
    for i, name in enumerate(names):
        torch.testing.assert_close(got[i], expected[name == "second"][i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "names, message",
    [
        (["default"] * (B - 1), f"one entry for each of the {B} rows, got {B - 1}"),
        (
            ["default", "nobody", "second", "other"],
            r"of \['default', 'second', 'third', 'unused'\], got \['nobody', 'other'\]",
        ),
    ],
)
def test_wrong_names_are_named(names, message):
    model = fastprompt.accelerate(with_adapters("prompt_tuning"))
    with pytest.raises(ValueError, match="adapter_names must " + ("have " if "entry" in message else "be ") + message):
        model(**batch("right"), adapter_names=names)


def test_adapters_unlike_the_active_one_are_refused():
    """Whose length is that of the prompts in front of the batch."""
    model = with_adapters("prompt_tuning")
    model.add_adapter("longer", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P + 2))
    with pytest.raises(ValueError, match=r"of the active one's method and length, .* got \['longer'\] where 'default'"):
        fastprompt.accelerate(model)(**batch("right"), adapter_names=["longer"] * B)


def test_what_cannot_be_packed_is_an_error():
    model, inputs = fastprompt.accelerate(with_adapters("prompt_tuning")), batch("right")
    inputs["attention_mask"][0, 3] = 0
    with pytest.raises(ValueError, match="adapter_names needs packed rows, but the attention mask has holes"):
        model(**inputs, adapter_names=NAMES)
