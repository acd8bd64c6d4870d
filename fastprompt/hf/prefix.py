"""prefix_of_text: a real text's keys and values, to start Prefix-Tuning from."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ..checks import INTS, check_range, check_tensor
from .attachment import evaluation_mode
from .cache_names import CACHE_NAMES, cache_argument
from .masks import AsBefore, running
from .shared_state import layers_with_keys, layers_with_own_keys, text_config, why_not_learned
from .structure import keeps_state


@torch.no_grad()
def prefix_of_text(model: PreTrainedModel, token_ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """The keys and values of a real text in the frozen model: what Prefix-Tuning starts best from.

    As a prefix they are the text in front, in layers with a sliding window too, whose cache would keep its end only.
    The model is run in evaluation mode and without a prefix of its own, whatever mode it is in, patched or not.

    Args:
        model: a Hugging Face causal LM.
        token_ids: the P tokens of the text, a list of ints or ``[P]`` (or ``[1, P]``).

    Returns:
        ``[L, 2, P, Hkv, Dh]`` for the L layers that have keys and values of their own, in the model's dtype.

    Raises:
        ValueError: no tokens, ids out of range, or a model whose layers do not all keep keys and values of one shape.
        TypeError: ids that are no integers.
    """
    ids = _checked_ids(model, token_ids)
    reason = _why_no_keys(model)
    if reason is not None:
        raise ValueError(f"model must keep the keys and values of all tokens in all layers, but {reason}")
    # Not the model's own kind of cache: one without windows keeps every token's, and changes no mask.
    cache = DynamicCache()
    with evaluation_mode(model), running(AsBefore()):
        given = cache_argument(model.forward, cache)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **given)
    filled: list[Any] = cache.layers
    layers = [(layer.keys, layer.values) for layer in filled if layer.keys is not None]
    shapes = {tuple(x.shape) for layer in layers for x in layer}
    if len(layers) != layers_with_own_keys(model.config) or len(layers) != len(filled):
        raise ValueError(
            f"model must keep keys and values in {layers_with_own_keys(model.config)} layers, "
            f"but {len(layers)} of a {type(model).__name__} did"
        )
    if len(shapes) > 1:
        raise ValueError(f"model must have keys and values of one shape in all layers, got {sorted(shapes)}")
    if shapes.pop()[2] != ids.shape[1]:
        raise ValueError(
            f"model must run the {ids.shape[1]} tokens of the text alone, got keys of {layers[0][0].shape[2]}"
        )
    return torch.stack([torch.stack([x[0].transpose(0, 1).to(ids.device) for x in layer]) for layer in layers])


def _checked_ids(model, token_ids):
    table = model.get_input_embeddings().weight
    ids = torch.as_tensor(token_ids, device=table.device)
    if ids.numel() == 0:
        raise ValueError("token_ids must hold at least one token, got none")
    if ids.dim() == 2 and len(ids) == 1:
        ids = ids[0]
    check_tensor("token_ids", ids, ["P"], dtypes=INTS)
    check_range("token_ids", ids, 0, len(table))
    return ids[None]


def _why_no_keys(model):
    """Why the model does not keep the keys and values of all tokens, as far as its config tells, or None."""
    config = model.config
    if config.is_encoder_decoder:
        return "an encoder-decoder has no place in front of its text"
    if (reason := why_not_learned(config)) is not None:
        return reason
    if (mixer := next(filter(keeps_state, model.modules()), None)) is not None:
        return f"a {type(mixer).__name__} keeps a recurrent or convolution state"
    layers, with_keys = DynamicCache(config=text_config(config)).layers, layers_with_keys(config)
    for index, layer in enumerate(layers[: layers_with_own_keys(config)]):
        if index not in with_keys:
            return f"layer {index} keeps none ({type(layer).__name__})"
    parameters = inspect.signature(model.forward).parameters
    if not {*CACHE_NAMES, "kwargs"} & parameters.keys():
        return f"{type(model).__name__} takes no cache"
    return None
