"""Attention modules that do not ask transformers' attention interface, taken to prefix_attention.

GPT-J, Falcon and a few others compute attention in a method of their own. Where that method is known, the module is
given another one: under a mask of ours it hands the module's queries, keys and values to prefix_attention, and under
any other it is the method itself.

A method is known by its name in transformers and by the names that its code uses. The method of a subclass, of code
that comes with a model, or one that another transformers writes in another way is not: such a module is left alone,
and its model is refused, as it takes our mask for a tensor.
"""

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import IMPLEMENTATIONS, attend, is_ours
from .masks import PackedMask, UnsupportedAttention
from .structure import has_own_forward


@dataclass(frozen=True)
class _Known:
    """A method of an attention module.

    Attributes:
        uses: the names in its code.
        ours: what it is under a mask of ours: for ``_attn`` the arguments of attention, for ``forward`` all of it.
    """

    uses: str
    ours: Callable[..., Any]


class ConfigAsBefore:
    """The config of a module that asks it for the attention implementation, and is told that of before.

    Attributes:
        switched: the config itself.
    """

    def __init__(self, switched: Any) -> None:
        self.switched = switched

    def __getattr__(self, name: str) -> Any:
        if name == "switched":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.switched, name)

    @property
    def _attn_implementation(self):
        name = self.switched._attn_implementation
        return IMPLEMENTATIONS.get(name, name)


def patch_own_attention(model: nn.Module) -> None:
    """Let the model's attention modules of a known kind run on prefix_attention; :func:`unpatch_own_attention` undoes
    it.

    Modules with a forward of their own are left alone.
    """
    for module in model.modules():
        for method in (_attn, forward):
            if not has_own_forward(module) and _known(module, method.__name__) is not None:
                setattr(module, method.__name__, types.MethodType(method, module))
                config = vars(module).get("config")
                if config is not None and not isinstance(config, ConfigAsBefore):
                    module.config = ConfigAsBefore(config)


def unpatch_own_attention(model: nn.Module) -> None:
    """Undo :func:`patch_own_attention`."""
    for module in model.modules():
        for method in (_attn, forward):
            if getattr(vars(module).get(method.__name__), "__func__", None) is method:
                delattr(module, method.__name__)
        config = vars(module).get("config")
        if isinstance(config, ConfigAsBefore):
            module.config = config.switched


def adds_alibi(model: nn.Module) -> bool:
    """Are there attention modules of a known kind whose scores depend on distances, and on no positions?"""
    found = (_known(module, "forward") for module in model.modules())
    return any(known is not None and known.ours in (_bloom, _mpt) for known in found)


def _known(module, name):
    """What is known of the method ``name`` of a module's class, or None."""
    return _known_method(getattr(type(module), name, None))


@cache
def _known_method(method):
    known = _KNOWN.get(getattr(method, "__qualname__", ""))
    if known is None or not isinstance(method, types.FunctionType):
        return None
    in_transformers = method.__module__.startswith("transformers.models.")
    return known if in_transformers and set(method.__code__.co_names) == set(known.uses.split()) else None


# What stands in the modules, by the name that it has there: pickle looks that up, and finds the method of the class.


def _attn(self, query, key, value, attention_mask=None):
    """Queries, keys and values ``[B, H, S, Dh]`` -> ``[B, H, S, Dh]``, and the weights or None."""

    def original(module, query, key, value, mask, **arguments):
        out, weights = type(self)._attn(self, query, key, value, mask)
        return out.transpose(1, 2), weights

    dtype = value.dtype
    arguments = {}
    if is_ours(self, attention_mask):
        arguments = _known(self, "_attn").ours(self)
        attention_mask = _within(attention_mask, arguments.pop("window", None))
        # Rotary embeddings may leave queries and keys in a wider dtype than values.
        widest = torch.promote_types(torch.promote_types(query.dtype, key.dtype), dtype)
        query, key, value = query.to(widest), key.to(widest), value.to(widest)
    out, weights = attend(original, True, self, query, key, value, attention_mask, **arguments)
    return out.transpose(1, 2).to(dtype), weights


def forward(self, *args, **kwargs):
    """As the forward of its class."""
    given = _arguments(type(self), args, kwargs)
    if is_ours(self, given.get("attention_mask")):
        return _known(self, "forward").ours(self, **given)
    return type(self).forward(self, *args, **kwargs)


def _arguments(kind, args, kwargs):
    """The arguments of a forward by name."""
    return dict(zip(_parameters(kind), args)) | kwargs


@cache
def _parameters(kind):
    return list(inspect.signature(kind.forward).parameters)[1:]


def _within(mask, window):
    """The mask with a sliding window."""
    if window is None or not isinstance(mask, PackedMask):  # in the others, the module hides what is outside of it
        return mask
    return replace(mask, window=window if mask.window is None else min(window, mask.window))


def _probability(dropout):
    if type(dropout) is not nn.Dropout:
        raise UnsupportedAttention(f"attention weights go through a {type(dropout).__name__}")
    return dropout.p if dropout.training else 0.0


# What the known methods compute.


def _gptj(self):
    return dict(scaling=1 / self.scale_attn, dropout=_probability(self.attn_dropout))


def _gpt_neo(self):
    window = self.config.window_size if self.attention_type == "local" else None
    return dict(scaling=1.0, dropout=_probability(self.attn_dropout), window=window)


def _gpt_neox_japanese(self):
    return dict(scaling=1 / self.norm_factor, dropout=_probability(self.attention_dropout))


def _falcon(self, hidden_states, alibi, attention_mask, layer_past=None, position_embeddings=None, **_):
    if alibi is not None:
        raise UnsupportedAttention("Falcon's ALiBi is rounded to bfloat16 or not by the dtype of the attention mask")
    query, key, value = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
    query, key = _of_module(self, "apply_rotary_pos_emb")(query, key, *position_embeddings)
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    out, _ = attend(ALL_ATTENTION_FUNCTIONS["sdpa"], True, self, query, key, value, attention_mask)
    return self.dense(out.flatten(2)), None


def _bloom(self, hidden_states, residual, alibi, attention_mask, layer_past=None, **_):
    if self.pretraining_tp > 1 and self.slow_but_exact:
        raise UnsupportedAttention("BloomAttention computes its output in slices")
    query, key, value = self._reshape(self.query_key_value(hidden_states))
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)

    def slopes():
        row = torch.ones(1, 2, dtype=torch.int64, device=query.device)
        of_distances = _of_module(self, "build_alibi_tensor")(row, self.num_heads, torch.float32)
        return self.beta * of_distances.view(-1, 2)[:, 1]

    arguments = dict(scaling=self.inv_norm_factor, dropout=_probability(self.attention_dropout))
    # It counts tokens alone, so that there are no gaps.
    out = _with_alibi(_dense_alibi_of_tokens, self, query, key, value, _without_gaps(attention_mask), slopes, arguments)
    add = _of_module(self, "dropout_add")
    return add(self.dense(out.flatten(2)), residual, self.hidden_dropout, self.training), None


def _mpt(self, hidden_states, position_bias, past_key_values=None, cache=None, attention_mask=None, **_):
    projected = self.Wqkv(hidden_states)
    if self.clip_qkv:
        projected = projected.clamp(-self.clip_qkv, self.clip_qkv)
    query, key, value = (
        x.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2) for x in projected.chunk(3, dim=-1)
    )
    cache = past_key_values if cache is None else cache
    if cache is not None:
        key, value = cache.update(key, value, self.layer_idx)

    def slopes():
        return -_of_module(self, "build_mpt_alibi_tensor")(self.n_heads, 2, device=query.device)[:, 0, 0]

    dropout = self.attn_dropout_p if self.training else 0.0
    arguments = dict(scaling=self.softmax_scale, dropout=dropout)
    out = _with_alibi(_dense_alibi_of_columns, self, query, key, value, attention_mask, slopes, arguments)
    return self.out_proj(out.flatten(2)), None


def _with_alibi(original, self, query, key, value, mask, slopes, arguments):
    """Attention ``[B, S, H, Dv]`` with ``slopes()``, ``[H]``; behind a cache it is that of ``original``."""
    of_batch = (
        mask.seq.cached(("alibi", query.dtype, query.device), slopes) if isinstance(mask, PackedMask) else slopes()
    )
    return attend(original, True, self, query, key, value, mask, alibi_slopes=of_batch, **arguments)[0]


def _dense_alibi_of_tokens(module, query, key, value, mask, *, alibi_slopes, **arguments):
    seen = mask if mask.dtype == torch.bool else mask == 0
    position = seen[:, :, -1].cumsum(-1)  # of keys: those that the last query does not see are padding
    return _dense_alibi(module, query, key, value, seen, position, alibi_slopes, **arguments)


def _dense_alibi_of_columns(module, query, key, value, mask, *, alibi_slopes, **arguments):
    seen = mask if mask.dtype == torch.bool else mask == 0
    position = torch.arange(key.shape[2], device=key.device)
    return _dense_alibi(module, query, key, value, seen, position, alibi_slopes, **arguments)


def _dense_alibi(module, query, key, value, seen, position, slopes, *, scaling, dropout):
    """Attention under ``seen [B, 1, S, K]`` of keys at ``position [B, 1, K]`` or ``[K]``."""
    bias = slopes[:, None, None] * position[..., None, :]  # [B, H, 1, K]
    bias = bias.to(query.dtype).masked_fill(~seen, torch.finfo(query.dtype).min)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, bias, scaling=scaling, dropout=dropout)


def _without_gaps(mask):
    if not isinstance(mask, PackedMask) or mask.seq.gaps is None:
        return mask
    return replace(mask, seq=mask.seq.cached(("without gaps",), lambda: replace(mask.seq, gaps=None)))


def _of_module(self, name):
    """A function of the file that the forward of ``self`` stands in."""
    return type(self).forward.__globals__[name]


# Class and method -> what is known of it.
_KNOWN = {
    "GPTJAttention._attn": _Known(
        "attn_dropout dtype float32 functional matmul nn scale_attn softmax to torch transpose", _gptj
    ),
    "CodeGenAttention._attn": _Known(
        "Softmax attn_dropout dtype float32 matmul nn scale_attn to torch transpose", _gptj
    ),
    "GPTNeoSelfAttention._attn": _Known(
        "attn_dropout bias device dtype finfo float32 functional matmul min nn size softmax tensor to torch transpose "
        "where",
        _gpt_neo,
    ),
    "GPTNeoXJapaneseAttention._attn": _Known(
        "attention_dropout baddbmm device dtype functional matmul nn norm_factor size softmax to torch transpose view "
        "zeros",
        _gpt_neox_japanese,
    ),
    "FalconAttention.forward": _Known(
        "F _attn_implementation _merge_heads _split_heads apply_rotary_pos_emb attention_dropout bfloat16 config dense "
        "dtype flatten float16 float32 functional head_dim inv_norm_factor is_causal layer_idx math "
        "new_decoder_architecture nn num_heads num_kv_heads p permute query_key_value reshape "
        "scaled_dot_product_attention shape softmax sqrt to torch training transpose update view",
        _falcon,
    ),
    "BloomAttention.forward": _Known(
        "F _merge_heads _reshape attention_dropout baddbmm beta bmm dense dropout_add dtype float32 head_dim "
        "hidden_dropout hidden_size int inv_norm_factor layer_idx linear num_heads pretraining_tp query_key_value range "
        "reshape shape slow_but_exact softmax to torch training transpose update view weight zeros_like",
        _bloom,
    ),
    "MptAttention.forward": _Known(
        "ValueError Wqkv attn_dropout_p chunk clamp clip_qkv contiguous dropout dtype finfo float functional "
        "get_seq_length head_dim layer_idx len masked_fill matmul max min n_heads nn out_proj permute reshape shape size "
        "softmax softmax_scale to torch training transpose update view",
        _mpt,
    ),
}
