"""A run: exact against plain PEFT, repeatable to the bit, its schedule, its batches and what it leaves behind."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from training_runs import METHODS, adapter_of, every_method, losses
from transformers import AutoModelForCausalLM

from fastprompt.training import InputError, TrainingRun, train


@every_method
def test_losses_follow_plain_peft(config, tmp_path, changes):
    config = dataclasses.replace(config, **changes)
    fast = TrainingRun(config).train()
    plain = TrainingRun(dataclasses.replace(config, output=str(tmp_path / "plain")), accelerated=False).train()
    assert losses(fast) == pytest.approx(losses(plain), abs=1e-4)
    assert len(losses(fast)) == 6


def test_the_same_seed_gives_the_same_bits(config, tmp_path):
    # Evaluations on the way change nothing either.
    again = dataclasses.replace(config, output=str(tmp_path / "b"), eval_data=config.data, eval_steps=2, eval_rows=8)
    other = dataclasses.replace(config, output=str(tmp_path / "c"), seed=1)
    assert losses(train(config)) == losses(train(again)) != losses(train(other))
    assert torch.equal(adapter_of(config), adapter_of(again))


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_gradient_checkpointing_changes_nothing(config, tmp_path, method):
    config = dataclasses.replace(config, **METHODS[method])
    saving = dataclasses.replace(config, output=str(tmp_path / "b"), gradient_checkpointing=True)
    assert losses(train(config)) == pytest.approx(losses(train(saving)), rel=1e-5)


def test_plain_peft_cannot_checkpoint_a_prefix(config):
    config = dataclasses.replace(config, **METHODS["prefix-tuning"], gradient_checkpointing=True)
    with pytest.raises(InputError, match="plain PEFT") as caught:
        TrainingRun(config, accelerated=False)
    assert caught.value.argument == "gradient_checkpointing"


def test_prompt_stays_fp32_on_bf16_weights(config):
    run = TrainingRun(dataclasses.replace(config, precision="bf16"))
    assert run.model.get_base_model().dtype == torch.bfloat16
    start = run.model.prompt_encoder["default"].embedding.weight.detach().clone()
    assert all(torch.tensor(losses(run.train())).isfinite())
    assert adapter_of(run.config).dtype == start.dtype == torch.float32
    assert not torch.equal(adapter_of(run.config), start)


def test_a_loss_of_ones_own(config, tmp_path):
    twice, steps = TrainingRun(dataclasses.replace(config, output=str(tmp_path / "b"))), []

    def loss(model, batch, step):
        assert torch.equal(batch["input_ids"], twice.batch(step)["input_ids"])
        steps.append(step)
        return 2 * model(**batch).loss

    history = twice.train(loss=loss)
    assert steps == list(range(6)) and losses(history)[0] == pytest.approx(2 * losses(train(config))[0])


@pytest.mark.parametrize(
    ("schedule", "rates"), [("linear", [0, 1, 0.5]), ("constant", [0, 1, 1]), ("cosine", [0, 1, 0.5])]
)
def test_schedule_and_warmup(config, schedule, rates):
    history = train(dataclasses.replace(config, schedule=schedule, warmup=1, steps=3, lr=0.1))
    assert [entry["learning_rate"] / 0.1 for entry in history] == pytest.approx(rates)


def test_epochs_with_a_token_budget(config):
    config = dataclasses.replace(config, steps=None, epochs=1, batch_size=None, tokens_per_batch=60)
    run = TrainingRun(config)
    assert len(losses(run.train())) == len(run.batches) == run.steps
    assert all(run.batch(step)["attention_mask"].sum() <= 60 for step in range(run.steps))


def test_output_is_a_peft_adapter_and_a_log(config):
    run = TrainingRun(dataclasses.replace(config, eval_fraction=0.25))
    history = run.train()
    base = AutoModelForCausalLM.from_pretrained(config.model)
    loaded = PeftModel.from_pretrained(base, config.output)
    assert torch.equal(loaded.get_prompt(1)[0], run.model.get_prompt(1)[0])
    log = json.loads(Path(config.output, "log.json").read_text())
    assert log == {"finished": True, "history": history}
    assert [entry["step"] for entry in history] == [1, 2, 3, 4, 5, 6, 6]
    assert set(history[-1]) == {"step", "eval_loss", "eval_accuracy", "eval_rows"} and history[-1]["eval_rows"] == 16
    assert sorted(path.name for path in Path(config.output).glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-6"]
