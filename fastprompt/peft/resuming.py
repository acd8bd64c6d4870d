"""Saving and loading accelerated models so that training can go on.

PEFT stores what P-Tuning's encoder and Prefix-Tuning's MLP give, not what they are made of. Loading that into a model
that trains puts the output where the input belongs (P-Tuning) or fails (Prefix-Tuning). So what they are made of is
written beside PEFT's files, where PEFT does not look, and read from there.
"""

import functools
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, PeftType
from peft.utils import load_peft_weights
from torch import nn

from ..hf.checkpointing import without_checkpoints
from .checkpoint import ENCODER, read_encoder, write_encoder


def save_pretrained(
    model: PeftModel, state: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> Any:
    """``PeftModel.save_pretrained``, and beside each adapter the parameters of the encoder that gave its prompt.

    Args:
        model: the model.
        state: what it remembers; the other arguments are passed on.
    """
    result = state.original(model, "save_pretrained")(save_directory, *args, **kwargs)
    if not kwargs.get("is_main_process", True):
        return result
    for name in kwargs.get("selected_adapters") or model.peft_config:
        if not _has_encoder(model, name):
            continue
        folder = Path(save_directory, *([] if name == "default" else [name]))
        in_model, given = f"prompt_encoder.{name}.", kwargs.get("state_dict") or {}
        encoder = {key.removeprefix(in_model): x for key, x in given.items() if key.startswith(in_model)}
        written = load_peft_weights(str(folder), device="cpu")["prompt_embeddings"]
        write_encoder(folder, encoder or model.prompt_encoder[name].state_dict(), written)
    return result


def add_adapter(model: PeftModel, state: Any, *args: Any, **kwargs: Any) -> None:
    """``PeftModel.add_adapter``, which refuses a prefix while gradient checkpointing is on: packed rows can do it."""
    with without_checkpoints(model):
        state.original(model, "add_adapter")(*args, **kwargs)


def load_adapter(
    model: PeftModel,
    state: Any,
    model_id: str | os.PathLike[str],
    adapter_name: str,
    is_trainable: bool = False,
    **kwargs: Any,
) -> Any:
    """``PeftModel.load_adapter``, which brings an encoder back whole, and takes ``is_trainable=True``.

    Args:
        model: the model.
        state: what it remembers; the other arguments are passed on.

    Raises:
        ValueError: training is to go on, and the folder holds what an encoder gave but not the encoder.
    """
    load = functools.partial(
        state.original(model, "load_adapter"), model_id, adapter_name, is_trainable=is_trainable, **kwargs
    )
    if adapter_name in model.peft_config:
        written = _read_encoder(model_id) if _has_encoder(model, adapter_name) else None
        return _load(model, adapter_name, written, load)
    config = PeftConfig.from_pretrained(str(model_id)) if is_trainable else None
    if config is None or not config.is_prompt_learning:
        return load()
    written = _read_encoder(model_id) if _makes_encoder(config) else None  # or refuse before anything is added
    _add_trainable(model, adapter_name, config)
    try:
        return _load(model, adapter_name, written, load)
    except BaseException:
        model.delete_adapter(adapter_name)
        raise


def _load(model, adapter_name, written, load):
    """Let PEFT load an adapter (a head may be saved with it), and put the encoder that was ``written`` back, if any."""
    if written is None:
        return load()
    (prompt, tensors), encoder = written, model.prompt_encoder[adapter_name]
    with _output_in_place_of_embedding(encoder, prompt):
        result = load()
    encoder.load_state_dict(tensors)
    return result


def _read_encoder(model_id):
    """An adapter's prompt, and the state of the encoder that gave it."""
    prompt = load_peft_weights(str(model_id), device="cpu")["prompt_embeddings"]
    tensors = read_encoder(Path(model_id), prompt)
    if tensors is None:
        raise ValueError(
            f"{model_id} must hold {ENCODER} of the prompt in it to train on: PEFT's files have what the encoder "
            f"gave, which is enough to use it; load it under a new name without is_trainable"
        )
    return prompt, tensors


def _has_encoder(model, name):
    """Does the adapter's prompt come out of more than an embedding, which its file does not keep?"""
    kinds = (PeftType.P_TUNING, PeftType.PREFIX_TUNING)
    return model.peft_config[name].peft_type in kinds and len(list(model.prompt_encoder[name].children())) > 1


def _makes_encoder(config):
    return config.peft_type == PeftType.P_TUNING or bool(getattr(config, "prefix_projection", False))


def _add_trainable(model, name, config):
    """Add an adapter that trains; its values come later, so a prompt is not made from a text or a vocabulary."""
    config.inference_mode = hasattr(config, "prompt_tuning_init")
    model.add_adapter(name, config)
    config.inference_mode = False


@contextmanager
def _output_in_place_of_embedding(encoder, prompt):
    """PEFT loads a prompt into the embedding of its encoder: while the block runs, into one that is made for it."""
    embedding = encoder.embedding
    encoder.embedding = nn.Embedding(*prompt.shape, device=embedding.weight.device)
    try:
        yield
    finally:
        encoder.embedding = embedding
