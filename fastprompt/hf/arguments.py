"""What a SoftPromptModel is made of and called with, checked."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..methods import MultitaskPromptTuning, PrefixTuning, PromptTuning, PTuning
from .shared_state import head_width, layers_with_keys, why_not_learned
from .structure import is_encoder_decoder

Method = PromptTuning | PTuning | MultitaskPromptTuning | PrefixTuning

# What the forward of another head than a language model's may be given besides.
_OF_HEADS = {"token_type_ids", "start_positions", "end_positions"}


def check_call(
    base: Any,
    method: Method,
    is_lm: bool,
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None,
    virtual_tokens: torch.Tensor | None,
    cu_seqlens: Any,
    options: Mapping[str, Any],
) -> None:
    """Raises ValueError or TypeError for arguments of a call that go together in no way, or not with the model."""
    if isinstance(method, PrefixTuning) and virtual_tokens is not None:
        raise ValueError("virtual_tokens must be None with Prefix-Tuning, which puts nothing among the tokens")
    if cu_seqlens is not None and attention_mask is not None:
        raise ValueError("attention_mask must be None with cu_seqlens, which say where sequences end")
    pairs = is_encoder_decoder(base)
    if pairs or not is_lm:
        for name, value in (("cu_seqlens", cu_seqlens), ("virtual_tokens", virtual_tokens)):
            if value is not None:
                raise ValueError(f"{name} must be None for a {type(base).__name__}, which is no causal LM")
    known = set(options) if pairs else set() if is_lm else _OF_HEADS
    if unknown := sorted(set(options) - known):
        raise TypeError(f"forward got unknown arguments {unknown}")
    if attention_mask is not None and attention_mask.shape != tokens.shape[:2]:
        raise ValueError(f"attention_mask must have shape {list(tokens.shape[:2])}, got {list(attention_mask.shape)}")


def checked_prompt_ids(prompt_ids: Any) -> torch.Tensor | None:
    """``prompt_ids`` as ``[B]`` int64, or None; their values are for :func:`check_chosen`.

    Raises:
        TypeError, ValueError: no integers, or another shape.
    """
    if prompt_ids is None:
        return None
    try:
        ids = torch.as_tensor(prompt_ids)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"prompt_ids must be integers, one a row, got {prompt_ids!r}") from None
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"prompt_ids must be integers, one a row, got {ids.dtype}")
    if ids.dim() != 1:
        raise ValueError(f"prompt_ids must have shape [B], got {list(ids.shape)}")
    return ids.long()


def check_chosen(prompts: Sequence[int], num_prompts: int) -> None:
    """Raises ValueError if these ``prompt_ids``, ascending, are not all in ``[0, num_prompts)``."""
    if prompts and (prompts[0] < 0 or prompts[-1] >= num_prompts):
        raise ValueError(f"prompt_ids must lie in [0, {num_prompts}), got values from {prompts[0]} to {prompts[-1]}")


def check_method(base: Any, method: Method) -> None:
    """Raises ValueError if the prompt fits the model in no way."""
    if not isinstance(method, PrefixTuning):
        width = base.get_input_embeddings().weight.shape[1]
        if method.token_dim != width:
            raise ValueError(
                f"method must produce prompts of width {width} like the model's embeddings, got {method.token_dim}"
            )
        return
    if base.config.is_encoder_decoder:
        raise ValueError("method must be one at the input for an encoder-decoder, got a PrefixTuning")
    config, last = base.config.get_text_config(), method.layers[-1]
    if (reason := why_not_learned(config)) is not None:
        raise ValueError(f"method must be one at the input for a {type(base).__name__}, got a PrefixTuning: {reason}")
    if last >= config.num_hidden_layers:
        raise ValueError(
            f"method must have a prefix for the model's {config.num_hidden_layers} layers, got one for layer {last}"
        )
    missing = sorted(set(layers_with_keys(config)) - set(method.layers))
    if missing:  # a cache has no such gaps, so the model has no forward of its own to be equal to
        expected = "a prefix in every layer with keys and values of its own"
        raise ValueError(f"method must have {expected}, got none in layers {missing}")
    if hasattr(config, "global_head_dim"):  # heads differ from layer to layer
        return
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    found = method.num_kv_heads, method.head_dim
    if found != (heads, head_width(config)):
        expected = f"{heads} key heads of width {head_width(config)} like the model"
        raise ValueError(f"method must have {expected}, got {found[0]} of width {found[1]}")
