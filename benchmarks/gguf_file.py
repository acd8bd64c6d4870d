"""Tiny Llamas as GGUF files, in llama.cpp's names and order of rows: what the tests and `integrations` read back."""

from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlamaForCausalLM

_NAMES = {
    "model.embed_tokens": "token_embd", "model.layers": "blk", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(
    model: LlamaForCausalLM, file: str | Path, *, tokenizer: dict[str, Any] | None = None, eight_bits: bool = False
) -> None:
    """Write a model into one file.

    Args:
        model: the model, in fp32.
        file: where to.
        tokenizer: the "model" of a byte-pair tokenizer.json, to be written along; its first token is control.
        eight_bits: are matrices quantised to 8 bits?
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if tokenizer is not None:
        words = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(words)
        writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(words) - 1)])
        writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)
    for name, weight in model.state_dict().items():
        weight = weight.numpy()
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if projection in name:  # rotary pairs stand side by side
                weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        for ours, theirs in _NAMES.items():
            name = name.replace(ours, theirs)
        weight, kind = np.ascontiguousarray(weight), None
        if eight_bits and weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            weight = gguf.quants.quantize(weight, kind)
        writer.add_tensor(name, weight, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
