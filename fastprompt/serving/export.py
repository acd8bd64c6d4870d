"""Prompts for other engines: PEFT's Prefix-Tuning, and embeddings as vLLM takes them."""

import os
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ..hf.fingerprint import fingerprint
from ..hf.shared_state import layers_with_keys, why_not_learned
from ..methods import PrefixTuning
from ..peft import checkpoint
from .compile import CompiledPrompt, prompt_of, write_tensors

EMBEDS = "prompt_embeds"  # the tensor's name in the file


def to_peft(prompt: CompiledPrompt, model: PreTrainedModel, directory: str | os.PathLike[str]) -> None:
    """Write a compiled prompt of any method as an adapter of PEFT's Prefix-Tuning, which gives the same.

    Args:
        prompt: the compiled prompt.
        model: the model that it was compiled for.
        directory: made if it is not there; ``PeftModel.from_pretrained(model, directory)`` reads it.

    Raises:
        ValueError: another model, or one for which PEFT's format has no room: states, layers of different shapes,
            latents.
    """
    prompt.check(fingerprint(model))
    reason = why_not_learned(model.config) or _why_no_prefix(prompt, model)
    if reason is not None:
        raise ValueError(f"a prefix of PEFT's cannot hold the prompt of a {type(model).__name__}: {reason}")
    layers = sorted(prompt.state.keys_values)
    both = torch.stack([torch.stack(prompt.state.keys_values[layer]) for layer in layers]).float()
    sizes = prompt.length, len(layers), *both.shape[3:]
    checkpoint.save(directory, PrefixTuning(*sizes, init=both, layers=layers), model.config)


def prompt_embeds(model: nn.Module, adapter_name: str | None = None, *, task_id: int | None = None) -> torch.Tensor:
    """The embeddings ``[P, hidden]`` of a prompt, in the model's dtype: what an engine that takes ``inputs_embeds``
    puts in front of those of the text. Arguments as of :func:`compile_prompt`.

    Raises:
        ValueError: a method without embeddings (Prefix-Tuning).
    """
    base, prompt = prompt_of(model, adapter_name, task_id)
    if prompt.rows is None:
        raise ValueError(f"the prompt must have embeddings, but {prompt.method} learns keys and values")
    return prompt.rows.detach().to(base.dtype).cpu()


def save_prompt_embeds(embeds: torch.Tensor, path: str | os.PathLike[str]) -> None:
    """Write ``[P, hidden]`` embeddings as the tensor ``prompt_embeds`` of a safetensors file.

    ``fastprompt.integrations.vllm.embed_prompt`` makes requests of it, with no more than torch and safetensors.
    """
    write_tensors(Path(path), {EMBEDS: embeds}, {"format": "fastprompt-prompt-embeds", "length": str(len(embeds))})


def _why_no_prefix(prompt, model):
    """Why keys and values in all layers are not all that there is, in PEFT's order; or None."""
    if prompt.state.states:
        return "its layers keep a recurrent or convolution state"
    shapes = sorted({tuple(x.shape) for layer in prompt.state.keys_values.values() for x in layer})
    if len(shapes) > 1:
        return f"its layers have keys and values of shapes {shapes}"
    if sorted(prompt.state.keys_values) != list(range(len(layers_with_keys(model.config)))):
        return "some of its layers have none"
    return None
