"""What the tests of fastprompt.training share: what each method changes in a run, and what a run leaves behind."""

from pathlib import Path

import pytest
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
