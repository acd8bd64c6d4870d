"""Adapters and compiled prompts whose files are broken, of something else, or hold what is no prompt."""

import json
import shutil

import pytest
from parity import peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from serving_models import frozen

from fastprompt import PromptBank, compile_prompt
from fastprompt.peft import checkpoint

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An adapter of each method, as PEFT writes it, and a compiled prompt."""
    folder = tmp_path_factory.mktemp("adapters")
    for method in ("prompt_tuning", "multitask", "prefix"):
        peft_model("llama", method).save_pretrained(folder / method)
    return folder


def cut(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10])


def without(folder):
    (folder / WEIGHTS).unlink()


def changed(name, change):
    """The tensor of a name changed; None: left out."""

    def write(folder):
        tensors = load_file(folder / WEIGHTS)
        x = change(tensors.pop(name))
        save_file(tensors if x is None else tensors | {name: x.contiguous()}, folder / WEIGHTS)

    return write


def said(**values):
    def write(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | values))

    return write


def no_config(folder):
    (folder / CONFIG).write_text("{")


BROKEN = [
    ("prompt_tuning", cut, "adapter_model.safetensors must be a whole file of safetensors"),
    ("prompt_tuning", without, "must hold adapter_model.safetensors"),
    ("prompt_tuning", no_config, "adapter_config.json must hold an adapter's config"),
    ("prompt_tuning", said(peft_type="NEW"), "adapter_config.json must hold an adapter's config"),
    ("prompt_tuning", said(num_virtual_tokens=7), "must hold 7 virtual tokens as its config says, got 5"),
    ("prompt_tuning", changed("prompt_embeddings", lambda x: None), "must hold a tensor prompt_embeddings, got"),
    ("prompt_tuning", changed("prompt_embeddings", lambda x: x.long()), r"floats, got \[5, 48\] torch.int64"),
    ("prompt_tuning", changed("prompt_embeddings", lambda x: x / 0), "must hold finite numbers"),
    ("multitask", changed("prefix_task_cols", lambda x: None), "must hold a tensor prefix_task_cols"),
    ("multitask", changed("prefix_task_rows", lambda x: x[:1]), "must hold factors of tasks"),
    ("prefix", said(num_attention_heads=3), "heads that share the width"),
]


@pytest.mark.parametrize("method, change, message", BROKEN)
def test_an_adapter_that_is_none_is_refused_by_name(folders, tmp_path, method, change, message):
    folder = tmp_path / "adapter"
    shutil.copytree(folders / method, folder)
    checkpoint.load(folder)
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        checkpoint.load(folder)


def of_layer(number, change):
    return lambda tensors: tensors | {f"layers.{number}.keys": change(tensors[f"layers.{number}.keys"])}


COMPILED = [
    (lambda tensors: {name: x for name, x in tensors.items() if "layers.2" not in name}, "states of shapes"),
    (of_layer(0, lambda x: x[..., :4]), "states of shapes"),
    (of_layer(1, lambda x: x.bfloat16()), "layers.1.keys must be of torch.float32, got torch.bfloat16"),
    (of_layer(1, lambda x: x / 0), "layers.1.keys must hold finite numbers"),
]


@pytest.mark.parametrize("change, message", COMPILED)
def test_a_compiled_prompt_that_is_none_is_refused_by_name(tmp_path, change, message):
    base = frozen("llama")
    path, bank = tmp_path / "prompt.safetensors", PromptBank(base)
    compile_prompt(peft_model(None, base=base)).save(path)
    bank.add("whole", path)
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file({name: x.contiguous() for name, x in change(tensors).items()}, path, metadata=metadata)
    with pytest.raises(ValueError, match=message):
        bank.add("other", path)
    assert bank.names == ["whole"]
