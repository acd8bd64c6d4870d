"""Requests for vLLM's prompt embeddings, which need no connector: a prompt's embeddings in front of those of a text."""

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


def embed_prompt(
    file: str | Path, token_ids: Sequence[int], embed: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The embeddings of a prompt and of the text behind it, as ``LLM.generate({"prompt_embeds": ...})`` takes them.

    Args:
        file: a safetensors file with one tensor ``[P, D]``: an exported prompt, or the ``adapter_model.safetensors`` of
            PEFT's Prompt Tuning or P-Tuning.
        token_ids: of the text, at least one.
        embed: ids ``[n]`` -> ``[n, D]``: the model's ``get_input_embeddings()``.

    Returns:
        ``[P + n, D]``, in the dtype of ``embed``.

    Raises:
        ValueError: another file, no token, an id that the model does not have, or another width.
    """
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"file must be a safetensors file, got {str(file)!r}: {error}") from error
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if [len(shape) for shape in shapes.values()] != [2]:
        raise ValueError(f"{str(file)!r} must hold one tensor [P, D], the embeddings of a prompt; it holds {shapes}")
    if not len(token_ids):
        raise ValueError("token_ids must have at least one token, got none")
    (prompt,) = tensors.values()
    ids = torch.tensor(list(token_ids))
    try:
        with torch.no_grad():
            text = embed(ids).cpu()
    except IndexError as error:
        raise ValueError(f"token_ids must be ids of the model, got {int(ids.min())} to {int(ids.max())}") from error
    if text.shape[-1] != prompt.shape[-1]:
        raise ValueError(
            f"{str(file)!r} has embeddings of width {prompt.shape[-1]}; the model's have {text.shape[-1]} (keys and "
            "values of Prefix-Tuning are no embeddings: serve them by the connector)"
        )
    return torch.cat([prompt.to(text.dtype), text])


def encode_prompt_embeds(embeds: torch.Tensor) -> str:
    """Embeddings as the field ``prompt_embeds`` of a request to ``/v1/completions``: base64 of torch's format."""
    if not isinstance(embeds, torch.Tensor) or embeds.dim() != 2:
        raise TypeError(f"embeds must be a tensor [P + n, D], got {getattr(embeds, 'shape', type(embeds).__name__)}")
    buffer = io.BytesIO()
    torch.save(embeds.detach().cpu().clone(), buffer)  # a clone: torch writes all of a view's storage
    return base64.b64encode(buffer.getvalue()).decode()
