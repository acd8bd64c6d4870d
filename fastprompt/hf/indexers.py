"""Attention to the keys that an indexer chooses (DeepSeek V3.2, GLM-5), while it leaves none of them out.

An indexer scores the keys that a query may see, and attention reads the ``index_topk`` best of them. Where there are no
more it reads them all, whatever the scores are, and nothing else depends on these: no gradient passes an indexer. So
packed rows, of batches without a longer row (``Abilities.key_limit``), run as plain causal attention. The indexer still
makes its keys of them, which a cache holds, and its queries, which hooks may watch; it is given no keys to score.
"""

from typing import Any

import torch

from .cache_names import CACHE_NAME, CACHE_NAMES
from .masks import PackedMask, UnsupportedAttention


def attend_to_all(self: Any, attention_mask: Any, **given: Any) -> Any:
    """The forward of an attention module whose keys an indexer chooses, on packed rows.

    It is that of its class, which hands on what was chosen to an attention function that it does not know.

    Raises:
        UnsupportedAttention: the mask is one of padded rows, of which the indexer has to choose.
    """
    if not isinstance(attention_mask, PackedMask) or attention_mask.dense is not None:
        raise UnsupportedAttention(f"an indexer chooses the keys of {type(self).__name__}")
    told, self.config = self.config, self.config.switched
    try:
        return type(self).forward(self, attention_mask=attention_mask, **given)
    finally:
        self.config = told


def choose_of_none(self: Any, attention_mask: Any, **given: Any) -> torch.Tensor:
    """The forward of an indexer on packed rows: its choice among no keys, ``[1, R, 0]`` int32."""
    name = next((name for name in CACHE_NAMES if name in given), CACHE_NAME)
    if given.get(name) is None:
        given[name] = _Nowhere()
    no_keys = torch.ones(1, 1, 0, dtype=torch.bool, device=given["hidden_states"].device)
    return type(self).forward(self, attention_mask=no_keys, **given)


class _Nowhere:
    """In place of a cache that nobody wants."""

    def update_indexer(self, indexer_key_states, layer_idx):
        return indexer_key_states[:, :0]


_INDEXER = (
    "F bool cat dtype float head_dim index_topk indices int32 k_norm layer_idx masked_fill matmul min n_heads "
    "qk_rope_head_dim relu shape softmax_scale split squeeze to topk torch transpose unsqueeze update_indexer view "
    "weight weights_proj wk wq_b"
)
_LATENT = (
    "ALL_ATTENTION_FUNCTIONS _attn_implementation attention_dropout bool cat config contiguous dtype "
    "eager_attention_forward expand_kv finfo get_interface indexer kv_a_layernorm kv_a_proj_with_mqa kv_lora_rank "
    "layer_idx long masked_fill min new_ones o_proj q_a_layernorm q_a_proj qk_head_dim qk_nope_head_dim "
    "qk_rope_head_dim reshape scaling scatter shape split torch training transpose unsqueeze update view"
)
# The forwards that are known, and the names that they use.
INDEXERS = {
    "DeepseekV32Indexer.forward": f"{_INDEXER} apply_rotary_pos_emb",
    "GlmMoeDsaIndexer.forward": f"{_INDEXER} apply_rotary_pos_emb_interleave",
    "AXK2Indexer.forward": f"{_INDEXER} apply_rotary_pos_emb",
    "HYV4Indexer.forward": f"{_INDEXER} apply_rotary_pos_emb",
    "Dots3NoteTextIndexer.forward": f"{_INDEXER} apply_rotary_pos_emb_interleave",
}
ATTENTION = {
    "DeepseekV32Attention.forward": f"{_LATENT} apply_rotary_pos_emb_interleave q_b_proj",
    "GlmMoeDsaAttention.forward": f"{_LATENT} ValueError apply_rotary_pos_emb_interleave q_b_proj",
    "AXK2Attention.forward": f"{_LATENT} apply_rotary_pos_emb_interleave float q_gate_proj sigmoid to v_head_dim",
    "HYV4Attention.forward": (
        f"{_LATENT} ValueError apply_rotary_pos_emb gate_proj gate_projection_size q_b_proj sigmoid sinks"
    ),
    "Dots3NoteTextAttention.forward": (
        f"{_LATENT} apply_rotary_pos_emb_interleave g_proj k_rope_only_layernorm kv_lora_scale q_b_proj q_lora_scale "
        "sigmoid sliding_window to"
    ),
}
