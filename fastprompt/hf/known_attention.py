"""What attention modules compute that do not ask transformers' attention interface: by the methods that are known."""

import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..backends import is_eager
from .attention import attend
from .indexers import ATTENTION, INDEXERS, attend_to_all, choose_of_none
from .masks import PackedMask, UnsupportedAttention
from .structure import is_relative_attention, undecorated


@dataclass(frozen=True)
class Known:
    """A method of an attention module.

    Attributes:
        uses: the names in its code.
        ours: what it is under a mask of ours: for ``_attn`` the arguments of attention, for ``forward`` all of it.
    """

    uses: str
    ours: Callable[..., Any]


def _probability(dropout):
    if type(dropout) is not nn.Dropout:
        raise UnsupportedAttention(f"attention weights go through a {type(dropout).__name__}")
    return dropout.p if dropout.training else 0.0


def _gptj(self):
    return dict(scaling=1 / self.scale_attn, dropout=_probability(self.attn_dropout))


def _gpt_neo(self):
    window = self.config.window_size if self.attention_type == "local" else None
    return dict(scaling=1.0, dropout=_probability(self.attn_dropout), window=window)


def _gpt_neox_japanese(self):
    return dict(scaling=1 / self.norm_factor, dropout=_probability(self.attention_dropout))


def _falcon(self, hidden_states, alibi, attention_mask, layer_past=None, position_embeddings=None, **_):
    if alibi is not None:
        raise UnsupportedAttention("Falcon rounds ALiBi or not, by the dtype of the mask")
    query, key, value = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
    query, key = _of_module(self, "apply_rotary_pos_emb")(query, key, *position_embeddings)
    key, value = _updated(self, key, value, layer_past)
    return self.dense(_attend(self, query, key, value, attention_mask).flatten(2)), None


def _bloom(self, hidden_states, residual, alibi, attention_mask, layer_past=None, **_):
    if self.pretraining_tp > 1 and self.slow_but_exact:
        raise UnsupportedAttention("BloomAttention computes its output in slices")
    query, key, value = self._reshape(self.query_key_value(hidden_states))
    key, value = _updated(self, key, value, layer_past)

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
    key, value = _updated(self, key, value, past_key_values if cache is None else cache)

    def slopes():
        return -_of_module(self, "build_mpt_alibi_tensor")(self.n_heads, 2, device=query.device)[:, 0, 0]

    dropout = self.attn_dropout_p if self.training else 0.0
    arguments = dict(scaling=self.softmax_scale, dropout=dropout)
    out = _with_alibi(_dense_alibi_of_columns, self, query, key, value, attention_mask, slopes, arguments)
    return self.out_proj(out.flatten(2)), None


def _with_alibi(original, self, query, key, value, mask, slopes, arguments):
    """Attention ``[B, S, H, Dv]`` with ``slopes()``, ``[H]``; behind a cache it is that of ``original``."""
    if isinstance(mask, PackedMask) and is_eager(query):
        found = mask.seq.cached(("alibi", query.dtype, query.device), slopes)
    else:
        found = slopes()
    return attend(original, True, self, query, key, value, mask, alibi_slopes=found, **arguments)[0]


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
    if mask.of_tokens is not None:
        return mask.of_tokens
    seq = mask.seq.cached(("without gaps",), lambda: replace(mask.seq, gaps=None))
    return replace(mask, seq=seq, schedules={})  # which count them


def _of_module(self, name):
    """A function of the file that the forward of ``self`` stands in."""
    return undecorated(type(self).forward).__globals__[name]


def _bert(
    self,
    hidden_states,
    attention_mask=None,
    sinusoidal_pos=None,
    encoder_hidden_states=None,
    past_key_values=None,
    cache=None,
    **_,
):
    if encoder_hidden_states is not None:
        raise UnsupportedAttention("cross-attention has no form for packed rows")
    query, key, value = (
        project(hidden_states).unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)
        for project in (self.query, self.key, self.value)
    )
    if sinusoidal_pos is not None:  # RoFormer
        rotated = (query, key, value) if self.rotary_value else (query, key)
        query, key, value = (*self.apply_rotary_position_embeddings(sinusoidal_pos, *rotated), value)[:3]
    key, value = _updated(self, key, value, past_key_values if cache is None else cache)
    arguments = dict(scaling=self.attention_head_size**-0.5, dropout=_probability(self.dropout))
    return _attend(self, query, key, value, attention_mask, **arguments).flatten(2), None


def _bart(
    self,
    hidden_states,
    key_value_states=None,
    past_key_values=None,
    attention_mask=None,
    attn_prompt=None,
    cache=None,
    **_,
):
    if key_value_states is not None or attn_prompt is not None:
        raise UnsupportedAttention("keys of other states than the queries have no form for packed rows")
    query, key, value = (
        project(hidden_states).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    key, value = _updated(self, key, value, past_key_values if cache is None else cache)
    arguments = dict(scaling=self.scaling, dropout=self.dropout if self.training else 0.0)
    return self.out_proj(_attend(self, query, key, value, attention_mask, **arguments).flatten(2)), None


def _attend(self, query, key, value, mask, **arguments):
    return attend(ALL_ATTENTION_FUNCTIONS["sdpa"], True, self, query, key, value, mask, **arguments)[0]


def _updated(self, key, value, cache):
    """Keys and values behind those of the cache."""
    if cache is None:
        return key, value
    return getattr(cache, "self_attention_cache", cache).update(key, value, self.layer_idx)


_OF_BERT = (
    "EncoderDecoderCache all_head_size attention_head_size contiguous cross_attention_cache dropout functional get "
    "is_updated isinstance key keys layer_idx layers math matmul nn permute query self_attention_cache shape size "
    "softmax sqrt torch transpose update value values view"
)
_OF_BART = (
    "EncoderDecoderCache ValueError bmm cross_attention_cache dropout functional get head_dim is_updated isinstance "
    "k_proj keys layer_idx layers nn num_heads out_proj q_proj reshape scaling self_attention_cache size softmax torch "
    "training transpose update v_proj values view"
)
# Class and method -> what is known of it.
KNOWN = {
    "GPTJAttention._attn": Known(
        "attn_dropout dtype float32 functional matmul nn scale_attn softmax to torch transpose", _gptj
    ),
    "CodeGenAttention._attn": Known(
        "Softmax attn_dropout dtype float32 matmul nn scale_attn to torch transpose", _gptj
    ),
    "GPTNeoSelfAttention._attn": Known(
        "attn_dropout bias device dtype finfo float32 functional matmul min nn size softmax tensor to torch transpose "
        "where",
        _gpt_neo,
    ),
    "GPTNeoXJapaneseAttention._attn": Known(
        "attention_dropout baddbmm device dtype functional matmul nn norm_factor size softmax to torch transpose view "
        "zeros",
        _gpt_neox_japanese,
    ),
    "FalconAttention.forward": Known(
        "F _attn_implementation _merge_heads _split_heads apply_rotary_pos_emb attention_dropout bfloat16 config dense "
        "dtype flatten float16 float32 functional head_dim inv_norm_factor is_causal layer_idx math "
        "new_decoder_architecture nn num_heads num_kv_heads p permute query_key_value reshape "
        "scaled_dot_product_attention shape softmax sqrt to torch training transpose update view",
        _falcon,
    ),
    "BloomAttention.forward": Known(
        "F _merge_heads _reshape attention_dropout baddbmm beta bmm dense dropout_add dtype float32 head_dim "
        "hidden_dropout hidden_size int inv_norm_factor layer_idx linear num_heads pretraining_tp query_key_value "
        "range reshape shape slow_but_exact softmax to torch training transpose update view weight zeros_like",
        _bloom,
    ),
    "MptAttention.forward": Known(
        "ValueError Wqkv attn_dropout_p chunk clamp clip_qkv contiguous dropout dtype finfo float functional "
        "get_seq_length head_dim layer_idx len masked_fill matmul max min n_heads nn out_proj permute reshape shape "
        "size softmax softmax_scale to torch training transpose update view",
        _mpt,
    ),
    "MegatronBertSelfAttention.forward": Known(_OF_BERT, _bert),
    "RemBertSelfAttention.forward": Known(_OF_BERT, _bert),
    "RoFormerSelfAttention.forward": Known(f"{_OF_BERT} apply_rotary_position_embeddings rotary_value", _bert),
    "TrOCRAttention.forward": Known(_OF_BART, _bart),
    "MvpAttention.forward": Known(f"{_OF_BART} cat device embed_dim expand to zeros", _bart),
    "XGLMAttention.forward": Known(
        f"{_OF_BART} device dtype embed_dim finfo float16 float32 full max min shape to", _bart
    ),
    **{name: Known(uses, attend_to_all) for name, uses in ATTENTION.items()},
    **{name: Known(uses, choose_of_none) for name, uses in INDEXERS.items()},
}


@cache
def known_method(method: Any) -> Known | None:
    """What is known of a method of a class, or None.

    By its name in transformers and by the names that its code uses: neither another class's, nor one that another
    transformers writes in another way.
    """
    known = KNOWN.get(getattr(method, "__qualname__", ""))
    if known is None or not isinstance(method, types.FunctionType):
        return None
    in_transformers = method.__module__.startswith("transformers.models.")
    names = set(undecorated(method).__code__.co_names)
    return known if in_transformers and names == set(known.uses.split()) else None


def sees_distances(model: nn.Module) -> bool:
    """Is there attention whose scores are known to depend on distances (ALiBi, T5's bias), and on no positions?"""
    return any(is_relative_attention(module) or _adds_alibi(module) for module in model.modules())


def _adds_alibi(module):
    return _is_known(module, _bloom) or _is_known(module, _mpt)


def key_limit(model: nn.Module) -> int | None:
    """The fewest keys that an indexer of a known kind chooses; None: there is no such indexer."""
    modules: list[Any] = list(model.modules())
    return min((module.index_topk for module in modules if _is_known(module, choose_of_none)), default=None)


def why_not_indexed(model: nn.Module) -> str | None:
    """The first module that chooses keys, or attends to those that are chosen, in a way that is not known; or None."""
    modules: list[Any] = list(model.modules())
    unknown = [module for module in modules if hasattr(module, "index_topk") and not _is_known(module, choose_of_none)]
    asking = [module for module in modules if hasattr(module, "indexer")]
    if any(module.indexer is not None for module in asking):
        unknown += [module for module in asking if not _is_known(module, attend_to_all)]
    if not unknown:
        return None
    return f"{type(unknown[0]).__name__} attends to keys that are chosen in a way that is not known"


def _is_known(module, as_what):
    known = known_method(type(module).forward)
    return known is not None and known.ours is as_what
