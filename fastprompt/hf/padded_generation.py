"""generate of a SoftPromptModel whose model cannot start with compiled prompts: padded, as the model has it."""

from dataclasses import replace
from typing import Any

import torch

from .patch import PaddedCalls
from .shared_state import SharedState


def generate_behind_prefix(base: Any, shared: SharedState, ids: torch.Tensor, **options: Any) -> Any:
    """``base.generate(**options)`` with attention that puts entry ``ids[b]`` of ``shared`` in front of row b."""
    calls = PaddedCalls(base, replace(shared, ids=ids))
    try:
        calls.start()
        return base.generate(**options)
    finally:
        calls.remove()


def generate_from_embeddings(
    base: Any, prompts: torch.Tensor, embeds: torch.Tensor, input_ids: torch.Tensor, mask: torch.Tensor, **options: Any
) -> Any:
    """``base.generate`` of prompts ``[B, P, D]`` and text ``[B, S, D]`` as embeddings; ``[B, S + new]`` ids."""
    mask = torch.cat([mask.new_ones(prompts.shape[:2]), mask], 1)
    result = base.generate(inputs_embeds=torch.cat([prompts, embeds], 1), attention_mask=mask, **options)
    if base.config.is_encoder_decoder:
        return result
    sequences = result if isinstance(result, torch.Tensor) else result.sequences
    sequences = torch.cat([input_ids.repeat_interleave(len(sequences) // len(input_ids), 0), sequences], 1)
    if isinstance(result, torch.Tensor):
        return sequences
    result.sequences = sequences
    return result
