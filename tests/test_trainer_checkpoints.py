"""transformers' Trainer around a SoftPromptModel: small checkpoints, and a resumed run is the run without the break."""

import logging
from pathlib import Path

import pytest
import torch
from parity import batch
from safetensors.torch import load_file
from tiny_models import VOCABULARY, build
from transformers import AutoModelForSequenceClassification, LlamaConfig, Trainer, TrainingArguments

from fastprompt import MultitaskPromptTuning, PrefixTuning, PromptTuning, PTuning, SoftPromptModel

P, D = 5, 48
METHODS = {
    "prompt": lambda: PromptTuning(P, D),
    "p-tuning": lambda: PTuning(P, D, hidden_size=7, num_layers=1),
    "multitask": lambda: MultitaskPromptTuning(P, D, 3, num_ranks=2),
    "prefix": lambda: PrefixTuning(P, 3, 2, 8),
    "projected prefix": lambda: PrefixTuning(P, 3, 2, 8, projection=6),
}


def language_model(method):
    base = build("llama", tie_word_embeddings=True)  # which safetensors do not write twice
    torch.manual_seed(1)
    return SoftPromptModel(base, METHODS[method]())


def classifier():
    sizes = dict(vocab_size=VOCABULARY, hidden_size=D, num_hidden_layers=3, num_attention_heads=6)
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_key_value_heads=2, intermediate_size=80, num_labels=3, pad_token_id=0)
    return SoftPromptModel(AutoModelForSequenceClassification.from_config(config), PromptTuning(P, D))


def rows(of_classes=False):
    inputs = batch("right")
    if of_classes:
        inputs["labels"] = torch.arange(len(inputs["labels"])) % 3
    return [{name: x[i] for name, x in inputs.items()} for i in range(len(inputs["labels"]))]


def trainer(model, folder, data, **changes):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        seed=3,
        save_steps=2,
        disable_tqdm=True,
        **changes,
    )
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)


def losses(trained):
    return [line["loss"] for line in trained.state.log_history if "loss" in line]


def warnings_of_trainer(caplog):
    return [x.getMessage() for x in caplog.records if x.name == "transformers.trainer" and x.levelno >= logging.WARNING]


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_hold_what_trains(method, tmp_path):
    model = language_model(method)
    trainer(model, tmp_path, rows()).train()
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert saved.keys() == {f"method.{name}" for name in model.method.state_dict()}
    for name, value in saved.items():
        assert torch.equal(value, model.get_parameter(name))
    again = language_model(method)
    again.load_state_dict(saved)  # strictly: nothing is missing
    inputs = batch("right")
    assert torch.equal(again(**inputs).loss, model(**inputs).loss)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_run_without_the_break(method, tmp_path, caplog):
    whole = trainer(language_model(method), tmp_path, rows())
    whole.train()
    resumed = trainer(language_model(method), tmp_path, rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    for ours, expected in zip(resumed.model.method.parameters(), whole.model.method.parameters()):
        assert torch.equal(ours, expected)
    latest = trainer(language_model(method), tmp_path, rows(), num_train_epochs=1)
    latest.train(resume_from_checkpoint=True)
    assert torch.equal(next(latest.model.method.parameters()), next(whole.model.method.parameters()))
    assert warnings_of_trainer(caplog) == []


def test_the_best_model_is_loaded_at_the_end(tmp_path, caplog):
    made = trainer(language_model("prompt"), tmp_path, rows(), eval_strategy="steps", eval_steps=2,
                   load_best_model_at_end=True, greater_is_better=True)  # fmt: skip
    made.train()
    best = Path(made.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"  # the worst, so that it is not the last
    prompt = load_file(best / "model.safetensors")["method.prompt"]
    assert torch.equal(made.model.method.prompt, prompt)
    assert not torch.equal(load_file(tmp_path / "checkpoint-6" / "model.safetensors")["method.prompt"], prompt)
    assert warnings_of_trainer(caplog) == []


def test_a_head_that_trains_along_is_saved(tmp_path, caplog):
    whole = trainer(classifier(), tmp_path, rows(of_classes=True))
    whole.train()
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert saved.keys() == {"method.prompt", "base.score.weight"}
    model = classifier()
    torch.nn.init.normal_(model.base.score.weight)
    resumed = trainer(model, tmp_path, rows(of_classes=True))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(resumed) == losses(whole)
    assert warnings_of_trainer(caplog) == []


def test_what_is_missing_is_named(tmp_path):
    model = language_model("prompt")
    state = model.state_dict()
    assert state.keys() == {"method.prompt"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "method.prompt"'):
        model.load_state_dict({})
    with pytest.raises(RuntimeError, match='Missing key.*"base.score.weight"'):
        classifier().load_state_dict(state)
    inside = torch.nn.ModuleDict({"base": model})  # of another module, under a name that the model uses, too
    assert inside.state_dict().keys() == {"base.method.prompt"}
    inside.load_state_dict(inside.state_dict())
    with pytest.raises(RuntimeError, match='Missing key.*"base.method.prompt"'):
        inside.load_state_dict({})


def test_a_part_of_the_base_that_trains_is_saved():
    model = language_model("prompt")
    norm = model.base.model.norm.weight.requires_grad_(True)
    assert model.state_dict().keys() == {"method.prompt", "base.model.norm.weight"}
    model.load_state_dict({**model.state_dict(), "base.model.norm.weight": norm + 1})
    with pytest.raises(RuntimeError, match='Missing key.*"base.model.norm.weight"'):
        model.load_state_dict({"method.prompt": model.method.prompt})


def test_a_state_with_the_whole_base_is_loaded():
    model = language_model("prompt")
    whole = {f"base.{name}": torch.zeros_like(x) for name, x in model.base.state_dict().items()}
    model.load_state_dict({**model.state_dict(), **whole})
    assert not model.base.lm_head.weight.any()
    assert model.release().state_dict().keys() == {name.removeprefix("base.") for name in whole}
