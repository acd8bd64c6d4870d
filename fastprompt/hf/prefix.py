"""prefix_of_text: a real text's keys and values, to start Prefix-Tuning from."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def prefix_of_text(model: PreTrainedModel, token_ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """The keys and values of a real text in the frozen model, what Prefix-Tuning starts best from.

    Args:
        model: a Hugging Face causal LM.
        token_ids: the P tokens of the text, a list of ints or ``[P]``.

    Raises:
        ValueError: no tokens, or layers whose keys differ in shape.
    """
    ids = torch.as_tensor(token_ids, device=model.device).reshape(1, -1)
    if not ids.numel():
        raise ValueError("token_ids must hold at least one token, got none")
    cache = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
    layers = [(x.keys, x.values) for x in cache.layers]
    shapes = {tuple(x.shape) for layer in layers for x in layer}
    if len(shapes) > 1:
        raise ValueError(f"model must have keys and values of one shape in all layers, got {sorted(shapes)}")
    return torch.stack([torch.stack([x[0].transpose(0, 1) for x in layer]) for layer in layers])
