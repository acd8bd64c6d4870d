"""Errors name the argument, and come before anything is written."""

import dataclasses
import json
from pathlib import Path

import pytest
from training_runs import METHODS

from fastprompt.training import InputError, TrainedAdapter, TrainingRun, train


@pytest.mark.parametrize(
    ("changes", "argument", "said"),
    [
        ({"method": "lora"}, "method", "expected one of prompt-tuning, prefix-tuning, p-tuning, multitask, got 'lora'"),
        ({"init": "zero"}, "init", "expected one of random, vocab, text with method='prompt-tuning', got 'zero'"),
        ({"method": "prefix-tuning"}, "init", "one of random, zero, text with method='prefix-tuning', got 'vocab'"),
        ({"method": "p-tuning"}, "init", "expected one of random with method='p-tuning', got 'vocab'"),
        ({"projection": True}, "projection", "only prefix-tuning can use it, got method='prompt-tuning'"),
        ({"encoder": "lstm"}, "encoder", "only p-tuning can use it"),
        ({"encoder_hidden_size": 8}, "encoder_hidden_size", "only prefix-tuning and p-tuning can use it"),
        ({"only_task": "x"}, "only_task", "expected a task_column too"),
        ({"method": "multitask", "task_column": "topic", "only_task": "x"}, "only_task", "has all tasks"),
        ({"patience": 2}, "patience", "expected eval_steps too"),
        ({"data_seed": -1}, "data_seed", "at least 0"),
        ({"method": "p-tuning", "init": "random", "encoder": "gru"}, "encoder", "expected one of lstm, mlp, got 'gru'"),
        ({"method": "p-tuning", "init": "random", "encoder_hidden_size": 0}, "encoder_hidden_size",
         "at least 1, got 0"),
        ({**METHODS["prefix-tuning"], "encoder_hidden_size": 8}, "encoder_hidden_size", "expected projection too"),
        ({**METHODS["prefix-tuning text"], "projection": True}, "init", "got projection"),
        ({"method": "multitask", "source_init": "shared"}, "source_init", "expected a source too"),
        ({"method": "multitask", "source": "a"}, "init", "expected no init, since the prompt starts from source"),
        ({"method": "multitask", "init": "random", "source": "a", "source_init": "exact"}, "source_task", "exactly if"),
        ({"method": "multitask", "source_init": "b"}, "source_init", "expected one of average, exact, shared, got 'b'"),
        ({"precision": "fp8"}, "precision", "expected one of fp32, bf16, fp16"),
        ({"schedule": "step"}, "schedule", "expected one of linear, cosine, constant"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens", "at least 1, got 0"),
        ({"lr": 0.0}, "lr", "more than 0"),
        ({"epochs": 1.0}, "steps", "only one of steps and epochs"),
        ({"steps": None}, "steps", "steps or epochs"),
        ({"tokens_per_batch": 9}, "batch_size", "only one of"),
        ({"eval_data": "x.csv", "eval_fraction": 0.5}, "eval_data", "only one of"),
        ({"eval_fraction": 1.0}, "eval_fraction", "between 0 and 1"),
        ({"eval_steps": 5}, "eval_steps", "nothing to evaluate on"),
        ({"init": "text"}, "init_text", "exactly if init='text'"),
        ({"label_column": None}, "text_column", "got text_column='text'"),
        ({"prompt_column": "text"}, "text_column", "prompt_column and completion_column"),
        ({"template": "no field"}, "template", "has no field"),
        ({"template": "{text"}, "template", "{text"),
        ({"verbaliser": {"A": "same", "P": "same"}}, "verbaliser", "different, non-empty word"),
    ],
)  # fmt: skip
def test_unusable_configurations_are_named(config, changes, argument, said):
    with pytest.raises(InputError, match=said) as caught:
        dataclasses.replace(config, **changes)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("changes", "argument", "said"),
    [
        ({"model": "./nowhere"}, "model", "'./nowhere' is not a folder"),
        ({"gguf_file": "no.gguf"}, "gguf_file", "holds no file 'no.gguf'"),
        ({"data": "no.csv"}, "data", "is not a file"),
        (
            {"text_column": "body"},
            "text_column",
            r"row 1 of data has no column 'body'; expected one of \['text', 'label'",
        ),
        ({"verbaliser": {"A": "animal"}}, "verbaliser", "has label 'P'"),
        ({"template": "{text}" * 30}, "max_length", "with 4 virtual ones; the model takes 64"),
        ({"num_virtual_tokens": 63}, "max_length", "with 63 virtual ones; the model takes 64"),
        ({"batch_size": None, "tokens_per_batch": 2}, "tokens_per_batch", "a batch takes 2"),
        ({"warmup": 7}, "warmup", "at most the run's 6 steps"),
    ],
)
def test_nothing_is_written_before_an_error(config, changes, argument, said):
    config = dataclasses.replace(config, **changes)
    with pytest.raises(InputError, match=said) as caught:
        train(config)
    assert caught.value.argument == argument
    assert not Path(config.output).exists()


def test_output_of_something_else_is_left_alone(config, tmp_path):
    Path(config.output).mkdir()
    Path(config.output, "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        train(dataclasses.replace(config, resume=True))
    assert [path.name for path in Path(config.output).iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="is a file"):
        train(dataclasses.replace(config, output=str(Path(config.output, "thesis.txt"))))


def test_another_run_is_not_continued(config, tmp_path):
    data = tmp_path / "own.csv"
    data.write_text(Path(config.data).read_text())
    config = dataclasses.replace(config, data=str(data))
    train(config)
    before = {path: path.read_bytes() for path in Path(config.output).rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="already holds a run"):
        train(config)
    with pytest.raises(InputError, match="has 0.02, got 0.1") as caught:
        train(dataclasses.replace(config, resume=True, lr=0.1))
    assert caught.value.argument == "lr"
    data.write_text(data.read_text() + "ivy,P,x\n")
    with pytest.raises(InputError, match="contents changed"):
        train(dataclasses.replace(config, resume=True))
    assert before == {path: path.read_bytes() for path in Path(config.output).rglob("*") if path.is_file()}


def test_a_folder_without_a_run_is_no_adapter(tmp_path):
    with pytest.raises(InputError, match=r"holds no run\.json"):
        TrainedAdapter(str(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_run(config, value):
    run = TrainingRun(config)
    with pytest.raises(InputError, match="loss is (nan|inf) at step 3; expected a smaller one"):
        run.train(loss=lambda model, batch, step: model(**batch).loss * (value if step == 2 else 1))
    history = json.loads(Path(config.output, "log.json").read_text())["history"]
    assert [entry["step"] for entry in history] == [1, 2]
