"""What the tests of fastprompt.training share: what each method changes in a run, and what a run leaves behind."""

import csv
import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORDS = {"A": "animal", "P": "plant"}

# What each method changes in the fixture `config` of tests/training.
METHODS = {
    "prompt-tuning": {},
    "prefix-tuning": {"method": "prefix-tuning", "init": "random"},
    "prefix-tuning zero": {"method": "prefix-tuning", "init": "zero"},
    "prefix-tuning text": {"method": "prefix-tuning", "init": "text", "init_text": "Word: cat"},
    "prefix-tuning projection": {
        "method": "prefix-tuning",
        "init": "random",
        "projection": True,
        "encoder_hidden_size": 8,
    },
    "prefix-tuning projection zero": {"method": "prefix-tuning", "init": "zero", "projection": True},
    "p-tuning lstm": {"method": "p-tuning", "init": "random", "encoder_hidden_size": 8},
    "p-tuning mlp": {"method": "p-tuning", "init": "random", "encoder": "mlp"},
    "multitask": {"method": "multitask", "task_column": "topic", "num_ranks": 2},
}
every_method = pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)


def losses(history):
    return [entry["loss"] for entry in history if "loss" in entry]


def adapter_of(config):
    return load_file(Path(config.output, "adapter_model.safetensors"))["prompt_embeddings"]


def encoder_of(run):
    return run.model.prompt_encoder["default"]


def write_tasks(file, rows, task_of):
    """The rows with a column ``task``; returns the file's name."""
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [*rows[0], "task"])
        writer.writeheader()
        writer.writerows({**row, "task": task_of(i)} for i, row in enumerate(rows))
    return str(file)


def alone(config, task, folder, **changes):
    """The configuration of a run of its own."""
    return dataclasses.replace(config, only_task=task, output=str(folder), **changes)


def assert_equal_runs(history, expected):
    assert [entry.keys() for entry in history] == [entry.keys() for entry in expected]
    for ours, theirs in zip(history, expected):
        # The norm, unlike the loss, is compared with its own size: it grows with the model.
        norms = [entry.get("grad_norm", 0.0) for entry in (ours, theirs)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
        assert {**ours, "grad_norm": 0.0} == pytest.approx({**theirs, "grad_norm": 0.0}, abs=1e-4)


def assert_equal_adapters(folder, expected):
    ours, theirs = (adapter_of(dataclasses.replace(expected, output=str(x))) for x in (folder, expected.output))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
