"""prefix_attention behind Hugging Face's attention interface.

A model is switched by its ``config._attn_implementation`` (of its own copy of the config). Inside of a
:func:`running` block the mask function then returns a :class:`PackedMask` in place of a mask tensor, and the attention
function brings queries, keys and values to the operator. Outside of one both hand over to the implementation the model
had before.

Both interfaces have to know the name: with only the attention function registered, transformers drops the padding
mask without a word.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..backends import is_eager
from ..ops import prefix_attention
from ..ops.prefix_attention.api import scheduled_attention
from ..ops.prefix_attention.scheduled import Shape
from .cache_names import CACHE_NAMES
from .masks import DenseMask, PackedMask, PackedRows, RefusedMask, UnsupportedAttention, active, make_mask
from .positions import PositionBias
from .shared_state import KeysValues, SharedState

# Our name for a model that ran on ... before. transformers treats names with "sdpa", "flash" or "/" specially.
IMPLEMENTATIONS = {
    "fastprompt": "sdpa",
    "fastprompt_eager": "eager",
    "fastprompt_flex": "flex_attention",
    "fastprompt_fa2": "flash_attention_2",
    "fastprompt_fa3": "flash_attention_3",
    "fastprompt_fa4": "flash_attention_4",
}

# Of these the ones that compute what the mask says, whatever ``is_causal`` says.
_BLIND_TO_CAUSALITY = {"eager", "flex_attention"}

# What the forward of a module takes that attends to its own states, beside these states.
_OF_SELF_ATTENTION = {
    "attention_mask",
    *CACHE_NAMES,
    "layer_past",
    "position_embeddings",
    "position_ids",
    "cache_position",
    "layer_idx",
    "output_attentions",
    "use_cache",
    "cu_seqlens",
    "max_seqlen",
}

# Where attention modules of compiled layers find what was learned for their layer. They cannot look it up by the number
# of the layer, which would be a constant of the graph.
LEARNED = "_fastprompt_learned"

# Keyword arguments that models hand to every attention function and that do not change what attention computes.
# sliding_window is among them because the mask already carries the window.
WITHOUT_EFFECT = {
    "is_causal",
    "sliding_window",
    "position_ids",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "num_items_in_batch",
    "logits_to_keep",
    "shift_labels",
    "labels",
    "cache_position",
    "layer_idx",
    "position_embeddings",
    "deterministic",
    "target_dtype",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
}


def _attention(before, module, query, key, value, attention_mask, **arguments):
    original, blind = partial(_as_before, before), before in _BLIND_TO_CAUSALITY
    return attend(original, blind, module, query, key, value, attention_mask, **arguments)


def attend(
    original: Callable[..., Any],
    blind: bool,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **arguments: Any,
) -> tuple[torch.Tensor, Any]:
    """The attention of a module under the mask that it was given, ``[B, S, H, Dv]``, and its weights or None.

    Args:
        original: an attention function of transformers, which takes all the rest: for masks that are not ours.
        blind: does it compute what a mask says, whatever ``module.is_causal`` says?
        module, query, key, value, attention_mask, arguments: as transformers hands them to attention functions.

    Raises:
        UnsupportedAttention: prefix_attention does not compute what the module asks for.
    """
    mask = attention_mask
    if not is_ours(module, mask):
        return original(module, query, key, value, mask, **arguments)
    if isinstance(mask, PackedMask):
        learned = _learned(module, mask.shared, key, value)
        reason = _why_not(blind, module, mask, arguments.get("is_causal"))
        if reason is None:
            return _run(module, query, key, value, mask, learned, **arguments), None
        if mask.dense is None or learned is not None:
            raise UnsupportedAttention(reason)
        mask = mask.dense
    learned = _learned(module, mask.of_each_row, key, value)
    if learned is None:
        return original(module, query, key, value, mask.behind_nothing, **arguments)
    in_front = [x.transpose(1, 2).expand(len(key), -1, -1, -1) for x in learned]
    key, value = (torch.cat(both, 2) for both in zip(in_front, (key, value)))  # [B, Hkv, P + S, Dh]
    return original(module, query, key, value, mask.behind_prefix, **arguments)


def is_ours(module: nn.Module, mask: Any) -> bool:
    """Is a mask one of the batch that is being run on prefix_attention?

    Raises:
        UnsupportedAttention: there is such a batch, and the mask is another one, or refused.
    """
    if isinstance(mask, RefusedMask):
        raise UnsupportedAttention(mask.reason)
    if isinstance(mask, PackedMask | DenseMask):
        return True
    batch = active()
    if isinstance(batch, PackedRows) or (batch is not None and batch.shared.learned):
        given = "no mask" if mask is None else f"a ready-made mask of shape {list(mask.shape)}"
        raise UnsupportedAttention(f"{type(module).__name__} handed {given} to attention instead of asking for one")
    return False


def _layer_of(module):
    """The index of the layer that an attention module belongs to."""
    for name in ("layer_idx", "layer_id"):  # GPT-Neo's name
        if isinstance(index := getattr(module, name, None), int):
            return index
    raise UnsupportedAttention(f"{type(module).__name__} has no layer_idx")


def _why_not(blind, module, mask, is_causal):
    """None if the mask says all that ``module`` would do with the implementation before, else what it does not say."""
    name = type(module).__name__
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)  # as transformers does
    if not blind and bool(is_causal) != mask.causal:
        return f"{name}.is_causal is {is_causal} under a mask that is {'' if mask.causal else 'not '}causal"
    # The mask of padding is one of keys. It is one of queries too unless they are other rows than the keys.
    one_sided = mask.shared.learned or mask.seq.gaps is not None
    if one_sided and not mask.causal and mask.dense is not None and _takes_other_states(type(module)):
        return f"{name} may attend to the states of another sequence"
    return None


@cache
def _takes_other_states(attention_class):
    """May a module of this class compute its keys of other states than its queries?"""
    parameters = list(inspect.signature(attention_class.forward).parameters.values())[2:]  # behind self and its states
    named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return not named <= _OF_SELF_ATTENTION


def _learned(module, shared, key, value):
    """What ``shared`` holds for the layer of ``module``, in the dtype and on the device of its own keys; or None."""
    if not shared.layers:
        return None
    if torch.compiler.is_compiling() and (learned := getattr(module, LEARNED, None)) is not None:
        return tuple(x.to(key.device, key.dtype) for x in learned)
    layer = _layer_of(module)
    if layer >= len(shared.layers):
        raise UnsupportedAttention(
            f"{type(module).__name__} has no layer_idx below the prefix's {len(shared.layers)} layers"
        )
    learned = shared.layers[layer]
    if learned is None:
        return None
    for name, own, front in (("keys", key, learned.keys), ("values", value, learned.values)):
        found, expected = list(front.shape[2:]), [own.shape[1], own.shape[3]]
        if found != expected:
            raise UnsupportedAttention(f"layer {layer} has {name} of (heads, width) {expected}, its prefix {found}")
    return tuple(x.to(key.device, key.dtype) for x in learned)


def _run(
    module,
    query,
    key,
    value,
    mask,
    learned,
    *,
    scaling=None,
    dropout=0.0,
    softcap=None,
    s_aux=None,
    alibi_slopes=None,
    position_bias=None,
    indices=None,
    **other,
):
    if indices is not None and indices.numel():  # of none, an indexer was asked about no keys (indexers.py)
        raise UnsupportedAttention(f"{type(module).__name__} attends to the keys that an indexer chose")
    unknown = sorted(name for name, x in other.items() if name not in WITHOUT_EFFECT and x is not None)
    if not isinstance(position_bias, PositionBias | None):
        raise UnsupportedAttention(f"{type(module).__name__} adds a bias of its own to each pair of rows")
    if unknown:
        raise UnsupportedAttention(f"{type(module).__name__} passes {unknown}, which prefix_attention does not know")
    if torch.is_autocast_enabled(query.device.type):  # as scaled_dot_product_attention does
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        learned = learned and tuple(x.to(dtype) for x in learned)
    batch, heads, width, _ = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B * S, heads, Dh]
    bias = None if position_bias is None else position_bias.on(q)
    options = dict(
        causal=mask.causal,
        window=mask.window,
        softcap=softcap,
        sinks=None if s_aux is None else s_aux.to(q.dtype),
        scale=scaling,
        alibi_slopes=alibi_slopes,
        position_bias=bias,
        dropout_p=dropout,  # its seed is drawn there, so every layer has its own and checkpointing draws the same again
    )
    inputs = q, k, v, *(learned or (None, None))
    seq, keys, schedule, shape = mask.seq, mask.keys, None, Shape.of(q, k, v, alibi_slopes, bias)
    if is_eager(q):
        seq, keys = seq.to(q.device), keys and keys.to(q.device)
        if mask.shapes is not None:
            mask.shapes.add(shape)
    else:
        schedule = mask.schedules.get((q.dtype, *shape, learned is not None))
    if schedule is not None:
        out = scheduled_attention(*inputs, schedule, **options)
    else:
        out, _ = prefix_attention(*inputs, seq, key_seq=keys, **options)
    return out.view(batch, width, heads, out.shape[-1])


def _as_before(before, module, *args, **arguments):
    if before != "eager":
        return ALL_ATTENTION_FUNCTIONS[before](module, *args, **arguments)
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **arguments)


@contextmanager
def handed_out(model: nn.Module, shared: SharedState) -> Iterator[None]:
    """While the block runs, attention modules of compiled layers find in themselves what was learned for them."""
    layers = {module: vars(module).get("layer_idx") for module in model.modules()} if shared.learned else {}
    given = {x: shared.layers[i] for x, i in layers.items() if isinstance(i, int) and 0 <= i < len(shared.layers)}
    try:
        for module, learned in given.items():
            # Views: guards tell the mask's own tensors of one layer from those of another.
            vars(module)[LEARNED] = learned and KeysValues(*(x.view_as(x) for x in learned))
        yield
    finally:
        for module in given:
            vars(module).pop(LEARNED, None)


for _name, _before in IMPLEMENTATIONS.items():
    AttentionInterface.register(_name, partial(_attention, _before))
    AttentionMaskInterface.register(_name, partial(make_mask, _before))
