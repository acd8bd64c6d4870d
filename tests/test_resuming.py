"""Training that goes on from a checkpoint, by Trainer and by hand, is the training that was not interrupted."""

import copy

import peft
import pytest
import torch
from parity import METHODS, peft_model
from tiny_models import VOCABULARY
from transformers import Trainer, TrainingArguments

import fastprompt
from fastprompt.methods import PrefixTuning, PTuning
from fastprompt.peft.checkpoint import load

ENCODED = ["p_tuning_lstm", "p_tuning_mlp", "prefix_mlp"]
REFUSAL = "must hold encoder.safetensors"


def examples(count=24):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(3, VOCABULARY, (count, 7), generator=generator)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in rows]


def trainer_of(model, folder, method, **changes):
    data = examples()
    if method == "multitask":
        data = [{**row, "task_ids": torch.tensor(i % 3)} for i, row in enumerate(data)]
    options = dict(max_steps=6, save_steps=3, save_strategy="steps", learning_rate=0.05, seed=7) | changes
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        **options,
    )
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8])


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("method", [*ENCODED, "prompt_tuning", "multitask", "prefix", "cartridge"])
def test_a_trainer_resumes(method, tmp_path):
    model = fastprompt.accelerate(peft_model("llama", method))
    whole = trainer_of(model, tmp_path, method)
    whole.train()
    again = trainer_of(fastprompt.accelerate(peft_model("llama", method)), tmp_path, method)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(again) == pytest.approx(losses(whole), rel=1e-5)
    assert fastprompt.stats(again.model).padded == {}
    state = again.model.prompt_encoder.state_dict()
    for name, x in model.prompt_encoder.state_dict().items():
        torch.testing.assert_close(state[name], x)


@pytest.mark.parametrize("method", ENCODED)
def test_the_best_model_comes_back_at_the_end(method, tmp_path):
    changes = dict(eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True)
    changes.update(metric_for_best_model="loss", greater_is_better=True)  # which is not the last one
    trainer = trainer_of(fastprompt.accelerate(peft_model("llama", method)), tmp_path, method, **changes)
    trainer.train()
    evaluated = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert max(evaluated) > evaluated[-1], "the last model is the best one; the test would see nothing"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(evaluated), rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_loaded_to_train_on(method, tmp_path):
    model = fastprompt.accelerate(peft_model("llama", method))
    model.save_pretrained(tmp_path)
    other = fastprompt.accelerate(peft_model("llama", method))
    with torch.no_grad():
        for parameter in other.prompt_encoder.parameters():
            parameter.zero_()
    other.load_adapter(tmp_path, "second", is_trainable=True)
    assert other.training  # which PEFT ends for an adapter that does not train
    other.set_adapter("second")
    inputs = {name: x[None] for name, x in examples(1)[0].items()}
    if method == "multitask":
        inputs["task_ids"] = torch.tensor([1])
    expected, got = (m(**inputs).loss for m in (model, other))
    torch.testing.assert_close(got, expected)
    expected.backward()
    got.backward()
    own, seconds = model.prompt_encoder["default"], other.prompt_encoder["second"]
    for (name, p), (same, q) in zip(own.named_parameters(), seconds.named_parameters(), strict=True):
        assert (name, p.requires_grad) == (same, q.requires_grad)
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad)


@pytest.mark.parametrize("method", ENCODED)
def test_without_the_encoder_there_is_nothing_to_train_on(method, tmp_path):
    model = peft_model("llama", method)
    model.save_pretrained(tmp_path)  # PEFT's own
    fastprompt.accelerate(model)
    before = copy.deepcopy(model.prompt_encoder.state_dict())
    for name, options in (("default", {}), ("new", {"is_trainable": True})):
        with pytest.raises(ValueError, match=REFUSAL):
            model.load_adapter(tmp_path, name, **options)
    assert list(model.peft_config) == ["default"]
    assert all(torch.equal(x, before[name]) for name, x in model.prompt_encoder.state_dict().items())
    model.load_adapter(tmp_path, "to use")  # what PEFT can do


@pytest.mark.parametrize("method", ENCODED)
def test_an_encoder_of_another_prompt_is_not_taken(method, tmp_path):
    model = fastprompt.accelerate(peft_model("llama", method))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.add_(1)
    fastprompt.restore(model).save_pretrained(tmp_path)  # the encoder's file is that of before
    fastprompt.accelerate(model)
    with pytest.warns(UserWarning, match="another prompt"), pytest.raises(ValueError, match=REFUSAL):
        model.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("method", ENCODED)
def test_checkpoints_are_read_by_peft_and_by_softpromptmodel(method, tmp_path):
    model = fastprompt.accelerate(peft_model("llama", method)).eval()
    model.save_pretrained(tmp_path)
    inputs = {name: x[None] for name, x in examples(1)[0].items()}
    expected = model(**inputs).loss
    read = peft.PeftModel.from_pretrained(peft_model("llama", method).base_model, tmp_path).eval()
    torch.testing.assert_close(read(**inputs).loss, expected)
    found = load(tmp_path)
    if method == "prefix_mlp":
        assert isinstance(found, PrefixTuning) and found.projection == 12
    else:
        assert isinstance(found, PTuning) and found.encoder == method.removeprefix("p_tuning_")
    own = model.prompt_encoder["default"].state_dict()
    assert found.state_dict().keys() == own.keys()
    assert all(torch.equal(x, own[name]) for name, x in found.state_dict().items())


def test_selected_adapters_and_other_processes(tmp_path):
    model = fastprompt.accelerate(peft_model("llama", "p_tuning_mlp"))
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    assert not (tmp_path / "one" / "encoder.safetensors").exists()
    assert (tmp_path / "one" / "second" / "encoder.safetensors").exists()
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not list((tmp_path / "none").rglob("*.safetensors"))
    fastprompt.restore(model)
    assert "save_pretrained" not in vars(model) and "load_adapter" not in vars(model)
