"""Tiny random models of every causal language model that transformers knows, by one table of small sizes.

The tests take theirs with states from here, too.
"""

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS = 97, 64, 4, 4, 2
LARGEST = 20_000_000  # parameters; a family with more has sizes that the table does not know

_SAME = [
    (VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    (WIDTH, "hidden_size d_model n_embd model_dim dim embedding_size emb_dim d_embed lru_width hidden_size_global"),
    (
        96,
        "intermediate_size ffn_dim d_ff n_inner ffn_hidden_size encoder_ffn_dim decoder_ffn_dim dff feed_forward_size",
    ),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers"),
    (2, "encoder_layers decoder_layers"),
    (HEADS, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"),
    (KV_HEADS, "num_key_value_heads n_kv_heads num_kv_heads multi_query_group_num"),
    (WIDTH // HEADS, "head_dim d_kv attention_head_dim dim_head mamba_d_head mamba_head_dim q_lora_rank kv_lora_rank"),
    (16, "linear_key_head_dim linear_value_head_dim linear_head_dim attention_window_size"),
    (256, "max_position_embeddings n_positions max_seq_len n_ctx max_target_positions max_source_positions"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts mamba_dt_rank hidden_size_per_layer_input"),
    (4, "laurel_rank linear_conv_kernel_dim linear_num_value_heads linear_num_heads"),
    (32, "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size"),
    (12, "v_head_dim"),
    (8, "qk_rope_head_dim qk_nope_head_dim mamba_n_heads mamba_num_heads"),
    (12, "mamba_d_state ssm_state_size state_size"),
    (8, "mamba_chunk_size chunk_size sliding_window rotary_dim index_head_dim"),
    (1, "n_group num_expert_group topk_group first_k_dense_replace n_groups mamba_n_groups mamba_ngroups"),
]
_SIZES: dict[str, int] = {name: size for size, names in _SAME for name in names.split()}
_SIZES |= dict(
    num_experts_per_tok=2,
    num_experts_per_token=2,
    moe_k=2,
    mamba_expand=2,
    mamba_d_ssm=128,
    n_mamba_heads=2,
    linear_num_key_heads=2,
)
_SIZES |= dict(index_n_heads=2, index_topk=64, altup_num_inputs=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_OPTIONAL = ("head_dim", "num_key_value_heads", "pad_token_id")  # set where the default is None, too
_RANDOM = ("dropout", "pdrop", "drop_prob", "layerdrop", "jitter")

_LATENT = dict(num_key_value_heads=HEADS, head_dim=8)
_DELTA = dict(num_hidden_layers=3, layer_types=["linear_attention", "full_attention", "linear_attention"])
_CONVOLUTIONS = dict(num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"])
_MAMBA = dict(num_hidden_layers=2, num_attention_heads=1)  # it has none, but PEFT asks
# What a family needs beside small sizes.
_CHANGES: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bailing_hybrid": dict(_LATENT, layer_group_size=2, num_local_experts=4),
    "bamba": dict(num_hidden_layers=3, attn_layer_indices=[1]),
    "blt": dict(use_cache=False, encoder_hash_byte_group_vocab=31),
    "codegen": dict(n_head=4),
    "cohere_compass_text": dict(
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters=dict(
            sliding_attention=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 2, 2]),
            full_attention=None,
        ),
    ),
    "cpmant": dict(dim_ff=96, prompt_types=3, prompt_length=4),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=KV_HEADS, clip_qkv=1.0, rope_theta=10000.0),
        ffn_config=dict(ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2),
    ),
    "deepseek_v2": dict(_LATENT, num_experts_per_tok=2),
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "deepseek_v4": dict(
        num_key_value_heads=1,
        partial_rotary_factor=0.5,
        o_groups=2,
        o_lora_rank=16,
        compress_rates=dict(compressed_sparse_attention=4, heavily_compressed_attention=8),
    ),
    "dots1": dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1),
    "dots3_note_text": dict(
        num_key_value_heads=HEADS,
        shared_experts_intermediate_size=32,
        sliding_window=8,
        swa_num_attention_heads=HEADS,
        swa_num_key_value_heads=HEADS,
        swa_q_lora_rank=16,
        swa_kv_lora_rank=16,
        swa_head_dim=16,
        swa_qk_nope_head_dim=8,
        swa_v_head_dim=12,
    ),
    "falcon_h1": dict(num_hidden_layers=3),
    "falcon_mamba": _MAMBA,
    "gemma3n_text": dict(layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=0),
    "gemma4_text": dict(hidden_size_per_layer_input=0),  # before the E models, PEFT searches for virtual tokens' ids
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "granitemoehybrid": dict(num_hidden_layers=3, layer_types=["mamba", "attention", "mamba"]),
    "jamba": dict(num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2),
    "kimi_linear": dict(_LATENT, **_DELTA, num_local_experts=4),
    "lfm2": _CONVOLUTIONS,
    "lfm2_moe": dict(_CONVOLUTIONS, num_dense_layers=1),
    "lfm3": _CONVOLUTIONS,
    "longcat_flash": _LATENT,
    "mamba": _MAMBA,
    "mamba2": dict(num_hidden_layers=2, num_heads=8, head_dim=16),
    "minicpm3": _LATENT,
    "minimax": dict(num_hidden_layers=2, num_experts_per_tok=1),
    "nemotron_h": dict(layers_block_type=["mamba", "attention", "mlp", "mamba"]),
    "olmo_hybrid": dict(_DELTA, linear_num_key_heads=4),
    "qwen3_5_moe_text": _DELTA,
    "qwen3_5_text": _DELTA,
    "qwen3_next": _DELTA,
    "qwen4_exp_text": dict(
        num_hidden_layers=3,
        layer_types=["linear_attention", "indexed_attention", "linear_attention"],
        hc_lowrank=8,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=8,
        indexer_compress_ratio=4,
    ),
    "reformer": dict(attention_head_size=16, axial_pos_embds=False),
    "xlstm": dict(use_cache=False, qk_dim_factor=1.0),
    "xmod": dict(default_language="en_XX"),
    "youtu": _LATENT,
    "zamba": dict(layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], attention_hidden_size=128),
    "zamba2": dict(
        num_hidden_layers=3,
        layers_block_type=["mamba", "hybrid", "mamba"],
        hybrid_layer_ids=[1],
        num_mem_blocks=1,
        adapter_rank=4,
        use_mem_rope=True,
    ),
    "zaya": dict(num_hidden_layers=2, num_experts_per_tok=1),
}
# What a model takes that no batch of text has.
NEEDS: dict[str, str] = {
    "gemma4_assistant": "it drafts for another model, whose hidden states and keys and values it takes",
    "gemma4_unified_assistant": "it drafts for another model, whose hidden states and keys and values it takes",
    "git": "its loss is that of a text behind an image",
    "musicgen": "its tokens are those of music, of several codebooks at a time",
    "musicgen_melody": "its tokens are those of music, of several codebooks at a time",
}


def families() -> set[str]:
    """The model types of all causal language models; of models with images, the text model only."""
    found = {config_class.model_type for config_class in MODEL_FOR_CAUSAL_LM_MAPPING.keys()}
    return {name for name in found if f"{name}_text" not in found}


def tiny_config(config_class: type[PretrainedConfig], **changes: Any) -> PretrainedConfig:
    """A small config without anything random."""
    default = config_class()
    given: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        if name in _SIZES and not isinstance(value, (dict, list)) and (value is not None or name in _OPTIONAL):
            given[name] = _SIZES[name]
        elif name == "is_decoder":
            given[name] = True
        elif isinstance(value, float) and any(part in name for part in _RANDOM):
            given[name] = 0.0
    for name in getattr(config_class, "sub_configs", None) or {}:
        part = getattr(default, name, None)
        if isinstance(part, PretrainedConfig):
            given[name] = tiny_config(type(part))
    return config_class(**{**given, **_CHANGES.get(config_class.model_type, {}), **changes})


def classes_of(name: str) -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
    """The config and the causal language model of one family, without a look at the others.

    Of models with images or sound, the config of the part that is a language model, where it takes that one.
    """
    config_class = CONFIG_MAPPING[name]
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    if model_class.config_class in (getattr(config_class, "sub_configs", None) or {}).values():
        config_class = model_class.config_class
    return config_class, model_class


def check_size(name: str, **changes: Any) -> None:
    """Raises ValueError if the sizes of a family are others than the table knows."""
    config_class, model_class = classes_of(name)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class._from_config(tiny_config(config_class, **changes)).parameters())
    if size > LARGEST:
        raise ValueError(f"{name} must have at most {LARGEST} parameters, got {size}")


def tiny_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of the family, with changes of its config, in evaluation mode.

    Raises:
        Exception: whatever a family raises that the table does not fit.
    """
    config_class, model_class = classes_of(name)
    torch.manual_seed(seed)
    return drawn(model_class._from_config(tiny_config(config_class, **changes)).float(), seed).eval()


def drawn(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The model with weights so large that a mistake shows, and states that neither vanish nor drown the rest."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("A_log", "dt_bias")):
                parameter.copy_(0.5 * noise - 1)
            elif parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * noise)
    return model
