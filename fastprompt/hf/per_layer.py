"""Embeddings that a model looks up by token id for each of its layers (Gemma 4's E models), of rows that are no tokens.

Given embeddings alone, such a model searches its table for the ids that they are of, and raises where they are none of
the table's. So it is told what the ids of the batch look up; rows of a prompt have the id of padding, as those of
images have in transformers.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_INPUTS = "per_layer_inputs"


def searching_part(model: nn.Module) -> Any:
    """The part of a model that searches its table for the ids of the embeddings that it is given, or None.

    Gemma 3n does not search: of embeddings it looks nothing up.
    """
    return next((part for part in model.modules() if _searches(part)), None)


def why_no_padding(part: Any) -> str | None:
    """None if the part has an id that rows of a prompt can have, else what it lacks."""
    if part is None or part.config.pad_token_id is not None:
        return None
    return f"{type(part).__name__} looks embeddings up by token id in every layer, and has no pad_token_id for a prompt"


def per_layer_inputs(part: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a forward has to be given beside embeddings.

    Args:
        part: what :func:`searching_part` gave.
        ids: ``[...]`` int64 token ids, below 0 for rows of a prompt.

    Returns:
        ``{argument: [..., layers, width]}``; empty if ``part`` is None.
    """
    if part is None:
        return {}
    return {_INPUTS: part.get_per_layer_inputs(torch.where(ids < 0, part.config.pad_token_id, ids))}


def behind_prompt(ids: torch.Tensor, length: int) -> torch.Tensor:
    """``ids [B, S]`` behind a prompt: ``[B, length + S]``, -1 for its rows."""
    return torch.cat([ids.new_full((len(ids), length), -1), ids], 1)


@contextmanager
def told_ids(model: nn.Module, ids: torch.Tensor) -> Iterator[None]:
    """While the block runs, ``model`` is told what ``ids [B, W]`` look up where it is given their embeddings."""
    part = searching_part(model)

    def tell(module, args, kwargs):
        embeds = kwargs.get("inputs_embeds")
        if embeds is None or kwargs.get(_INPUTS) is not None or embeds.shape[:2] != ids.shape:
            return None
        return args, {**kwargs, **per_layer_inputs(part, ids)}

    hook = None if part is None else model.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def _searches(part):
    lookup = getattr(part, "get_per_layer_inputs", None)
    if not callable(lookup) or not getattr(part, "hidden_size_per_layer_input", 0):
        return False
    return _takes(lookup, "inputs_embeds") and _takes(part.forward, _INPUTS)


def _takes(function, argument):
    return argument in inspect.signature(function).parameters
