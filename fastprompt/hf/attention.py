"""prefix_attention behind Hugging Face's attention interface.

A model is switched over by its ``config._attn_implementation`` (of its own copy of the config). Inside of a
:func:`running` block the mask function then returns a :class:`PackedMask` in place of a mask tensor, and the attention
function brings queries, keys and values to the operator. Outside of one both hand over to the implementation the model
had before.

Both interfaces have to know the name: with only the attention function registered, transformers drops the padding
mask without a word.
"""

import copy
import inspect
import sys
from functools import cache, partial

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..ops import prefix_attention
from .masks import DenseMask, PackedMask, PackedRows, UnsupportedAttention, active, make_mask

# Our name for a model that ran on ... before. transformers treats names with "sdpa", "flash" or "/" specially.
_BEFORE = {
    "fastprompt": "sdpa",
    "fastprompt_eager": "eager",
    "fastprompt_flex": "flex_attention",
    "fastprompt_fa2": "flash_attention_2",
    "fastprompt_fa3": "flash_attention_3",
    "fastprompt_fa4": "flash_attention_4",
}
_NAMES = {before: name for name, before in _BEFORE.items()}

# Of these the ones that compute what the mask says, whatever ``is_causal`` says.
_BLIND_TO_CAUSALITY = {"eager", "flex_attention"}

# What the forward of a module takes that attends to its own states, beside these states.
_OF_SELF_ATTENTION = {
    "attention_mask",
    "past_key_values",
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

# Keyword arguments that models hand to every attention function and that do not change what attention computes.
# sliding_window is among them because the mask already carries the window.
_WITHOUT_EFFECT = {
    "is_causal",
    "sliding_window",
    "position_ids",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "num_items_in_batch",
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


def switch_over(model):
    """Make ``model`` run on prefix_attention inside :func:`running` blocks.

    Gives the model a config of its own first: models built from one config object share it, and only this one is to
    change.

    Raises:
        UnsupportedAttention: the model's present attention is not one that can be handed back to.
    """
    copies = {}
    copy.deepcopy(model.config, copies)
    own = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is not None and id(config) in copies:
            module.config = own[id(config)] = copies[id(config)]
    configs = list({id(c): c for c in own.values()}.values())
    before = [c._attn_implementation for c in configs]
    for implementation in before:
        if implementation not in _NAMES and implementation not in _BEFORE:
            raise UnsupportedAttention(f"attention implementation {implementation!r} is not one of {sorted(_NAMES)}")
    for config in configs:
        # The public setter would also overwrite sub-configs, which may run on something else.
        config._attn_implementation_internal = _NAMES.get(config._attn_implementation, config._attn_implementation)


def is_switched_over(config):
    """Does a model with this config run on prefix_attention inside of :func:`running` blocks?"""
    return config._attn_implementation in _BEFORE


def switch_back(model):
    """Undo :func:`switch_over`; the model keeps its config object and whatever was changed in it meanwhile."""
    for module in model.modules():
        config = module.__dict__.get("config")
        name = getattr(config, "_attn_implementation", None)
        if name in _BEFORE:
            config._attn_implementation_internal = _BEFORE[name]


def _attention(before, module, query, key, value, attention_mask, **arguments):
    if not isinstance(attention_mask, PackedMask | DenseMask):
        batch = active()
        if isinstance(batch, PackedRows) or getattr(batch, "prefix", None) is not None:
            given = "no mask" if attention_mask is None else f"a ready-made mask of shape {list(attention_mask.shape)}"
            raise UnsupportedAttention(f"{type(module).__name__} handed {given} to attention instead of asking for one")
        return _original(before, module)(module, query, key, value, attention_mask, **arguments)
    mask = attention_mask
    prefix = None if mask.prefix is None else _of_layer(module, mask.prefix, key)
    if isinstance(mask, PackedMask):
        reason = _why_not(before, module, mask, arguments.get("is_causal"))
        if reason is None:
            return _run(module, query, key, value, mask, prefix, **arguments), None
        if mask.dense is None or prefix is not None:
            raise UnsupportedAttention(reason)
        mask = mask.dense
    return _original(before, module)(module, query, *_behind(mask, prefix, key, value), **arguments)


def _why_not(before, module, mask, is_causal):
    """None if the mask says all that ``module`` would do with the implementation before, else what it does not say."""
    name = type(module).__name__
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)  # as transformers does
    if before not in _BLIND_TO_CAUSALITY and bool(is_causal) != mask.causal:
        return f"{name}.is_causal is {is_causal} under a mask that is {'' if mask.causal else 'not '}causal"
    # The mask of padding is one of keys. It is one of queries too unless they are other rows than the keys.
    one_sided = mask.prefix is not None or mask.seq.gaps is not None
    if one_sided and not mask.causal and mask.dense is not None and _takes_other_states(type(module)):
        return f"{name} may attend to the states of another sequence"
    return None


@cache
def _takes_other_states(attention_class):
    """May a module of this class compute its keys of other states than its queries?"""
    parameters = list(inspect.signature(attention_class.forward).parameters.values())[2:]  # behind self and its states
    named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return not named <= _OF_SELF_ATTENTION


def _behind(mask, prefix, key, value):
    """Keys and values behind a layer's prefix, ``[B, Hkv, P + S, Dh]``, and the mask over them."""
    if prefix is None:
        return key, value, mask.behind_nothing
    rows = [x if mask.prefix_ids is None else x[mask.prefix_ids] for x in prefix]
    in_front = [x.transpose(1, 2).expand(key.shape[0], -1, -1, -1) for x in rows]
    return torch.cat([in_front[0], key], 2), torch.cat([in_front[1], value], 2), mask.behind_prefix


def _of_layer(module, prefix, key):
    """The learned keys and values of the layer that ``module`` is in, in the dtype and on the device of its own."""
    if not isinstance(layer := getattr(module, "layer_idx", None), int) or layer >= len(prefix):
        raise UnsupportedAttention(f"{type(module).__name__} has no layer_idx below the prefix's {len(prefix)} layers")
    if prefix[layer] is None:
        return None
    found, expected = list(prefix[layer][0].shape[2:]), [key.shape[1], key.shape[3]]
    if found != expected:
        raise UnsupportedAttention(f"layer {layer} has keys of (heads, width) {expected}, its prefix {found}")
    return tuple(x.to(key.device, key.dtype) for x in prefix[layer])


def _run(module, query, key, value, mask, prefix, *, scaling=None, dropout=0.0, softcap=None, s_aux=None, **other):
    if dropout:
        raise UnsupportedAttention(
            f"{type(module).__name__} asks for attention dropout {dropout}, which prefix_attention does not have: "
            "set it to 0 in the model's config, or call model.eval()"
        )
    unknown = sorted(name for name, x in other.items() if name not in _WITHOUT_EFFECT and x is not None)
    if unknown:
        raise UnsupportedAttention(f"{type(module).__name__} passes {unknown}, which prefix_attention does not know")
    if torch.is_autocast_enabled(query.device.type):  # as scaled_dot_product_attention does
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        prefix = prefix and tuple(x.to(dtype) for x in prefix)
    batch, heads, width, head_dim = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B * S, heads, Dh]
    seq = mask.seq if mask.seq.starts.device == q.device else mask.seq.to(q.device)
    prefix_k, prefix_v = (_bank(learned, x, mask.shared) for learned, x in zip(prefix or (None, None), (k, v)))
    out, _ = prefix_attention(
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        seq,
        causal=mask.causal,
        window=mask.window,
        softcap=softcap,
        sinks=None if s_aux is None else s_aux.to(q.dtype),
        scale=scaling,
    )
    return out.view(batch, width, heads, out.shape[-1])


def _bank(learned, rows, shared):
    """The prefixes that sequences refer to, ``[N, length, Hkv, Dh]``, of keys or of values, or None.

    Learned ones, shared rows, or both: then every prompt stands there twice, the learned prefix alone for the shared rows
    behind it, and with them for the rest; ``prefix_lens`` tells the two apart.
    """
    if not shared:
        return learned
    (first, length), count = shared[0], len(shared)
    if all(n == length for _, n in shared):
        common = rows[first : first + count * length].unflatten(0, (count, length))  # a view
    else:
        common = pad_sequence([rows[start : start + n] for start, n in shared], batch_first=True)
    if learned is None:
        return common
    both = torch.cat([learned, common], 1)
    return both.expand(2, -1, -1, -1) if count == 1 else torch.cat([both, both])


def _original(before, module):
    if before != "eager":
        return ALL_ATTENTION_FUNCTIONS[before]
    return sys.modules[type(module).__module__].eager_attention_forward


for _name, _before in _BEFORE.items():
    AttentionInterface.register(_name, partial(_attention, _before))
    AttentionMaskInterface.register(_name, partial(make_mask, _before))
