"""Caches that start with a prompt of its own in every row."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch.nn.functional import pad
from transformers import Cache

from .prompt_state import PromptState

AnyCache = TypeVar("AnyCache", bound=Cache)


def fill(cache: AnyCache, rows: Sequence[PromptState]) -> AnyCache:
    """An empty cache, filled with a state of its own for each row: the prompts end in one column, W.

    In front of shorter ones it holds zeros, which an attention mask has to hide; see :func:`virtual_columns`. A row
    without a prompt starts from states of zeros, as if it had none.
    """
    distinct = list({id(row): row for row in rows}.values())
    place = {id(row): index for index, row in enumerate(distinct)}
    index = torch.tensor([place[id(row)] for row in rows])
    width = max((row.length for row in rows), default=0)
    if not width:
        return cache
    layers: list[Any] = cache.layers
    for layer in sorted({layer for row in distinct for layer in row.keys_values}):
        parts = [row.keys_values.get(layer) for row in distinct]
        like = next(part for part in parts if part is not None)
        both = (_aligned([part and part[i] for part in parts], x, width) for i, x in enumerate(like))
        cache.update(*(x[index.to(x.device)].transpose(1, 2) for x in both), layer)
    for key in sorted({key for row in distinct for key in row.states}):
        found = [row.states.get(key) for row in distinct]
        zeros = torch.zeros_like(next(x for x in found if x is not None))
        states = torch.stack([zeros if x is None else x for x in found])[index.to(zeros.device)]
        holder = layers[key.layer]
        update = holder.update_conv_state if key.kind == "conv" else holder.update_recurrent_state
        update(states, key.number)
    return cache


def virtual_columns(rows: Sequence[PromptState], device: torch.device | str) -> torch.Tensor:
    """``[B, W]`` int64: 1 where :func:`fill` puts a prompt's position."""
    width = max((row.length for row in rows), default=0)
    lengths = torch.tensor([row.length for row in rows], device=device)
    return (torch.arange(width, device=device) >= width - lengths[:, None]).long()


def _aligned(parts, like, width):
    """``[P, Hkv, D]`` tensors or None -> ``[n, W, Hkv, D]``, zeros in front."""
    zeros = like.new_zeros(0, *like.shape[1:])
    parts = [zeros if part is None else part for part in parts]
    return torch.stack([pad(part, (0, 0, 0, 0, width - len(part), 0)) for part in parts])
