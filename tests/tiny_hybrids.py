"""Tiny causal LMs with recurrent or convolution layers, one per family, in the shapes that tell mistakes apart."""

import torch
import transformers as hf
from tiny_models import VOCABULARY

_COMMON = dict(vocab_size=VOCABULARY, hidden_size=48, pad_token_id=0)
_GQA = dict(_COMMON, num_attention_heads=6, num_key_value_heads=2, intermediate_size=80)
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
_DELTA = dict(
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, head_dim=8
)
_TYPES = ["linear_attention", "full_attention", "linear_attention"]
_CONVOLUTIONS = dict(num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"])
_MAMBA2 = dict(
    mamba_n_heads=4, mamba_d_head=24, mamba_d_state=16, mamba_n_groups=1, mamba_chunk_size=16, num_hidden_layers=3
)
_MLA = dict(
    num_attention_heads=4,
    num_key_value_heads=4,
    num_hidden_layers=3,
    layer_types=_TYPES,
    kv_lora_rank=16,
    q_lora_rank=None,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=12,
)

# Families whose layers start from the state that they are given: model type -> arguments of its config.
PACKED = {
    "qwen3_5_text": dict(_GQA, **_DELTA, num_hidden_layers=3, layer_types=_TYPES),
    "qwen3_5_moe_text": dict(
        _GQA, **_DELTA, **_EXPERTS, num_hidden_layers=3, layer_types=_TYPES, shared_expert_intermediate_size=16
    ),
    "qwen3_next": dict(
        _GQA, **_DELTA, **_EXPERTS, num_hidden_layers=3, layer_types=_TYPES, shared_expert_intermediate_size=16
    ),
    "olmo_hybrid": dict(
        _GQA,
        linear_num_value_heads=4,
        linear_num_key_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_hidden_layers=3,
        layer_types=_TYPES,
    ),
    "kimi_linear": dict(
        _COMMON,
        **_MLA,
        intermediate_size=80,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        num_local_experts=4,
        n_shared_experts=1,
        linear_head_dim=8,
        linear_num_heads=2,
    ),
    "lfm2": dict(_GQA, **_CONVOLUTIONS),
    "lfm2_moe": dict(_GQA, **_CONVOLUTIONS, **_EXPERTS, num_dense_layers=1),
    "lfm3": dict(_GQA, **_CONVOLUTIONS),
    "granitemoehybrid": dict(
        _GQA,
        **_MAMBA2,
        layer_types=["mamba", "attention", "mamba"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=32,
    ),
    "bamba": dict(_GQA, **_MAMBA2, attn_layer_indices=[1]),
    "falcon_h1": dict(_GQA, **_MAMBA2, mamba_d_ssm=96),
    "nemotron_h": dict(
        _GQA,
        head_dim=8,
        num_hidden_layers=4,
        layers_block_type=["mamba", "attention", "mlp", "mamba"],
        mamba_num_heads=4,
        mamba_head_dim=24,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=16,
    ),
    "zamba2": dict(
        _GQA,
        num_hidden_layers=3,
        layers_block_type=["mamba", "hybrid", "mamba"],
        hybrid_layer_ids=[1],
        num_mem_blocks=1,
        mamba_d_state=16,
        mamba_ngroups=1,
        n_mamba_heads=4,
        mamba_headdim=24,
        chunk_size=16,
        adapter_rank=4,
        use_mem_rope=True,
    ),
    "mamba2": dict(
        _COMMON, num_hidden_layers=2, num_heads=4, head_dim=24, state_size=16, n_groups=1, chunk_size=16, expand=2
    ),
    "zaya": dict(_GQA, head_dim=8, num_hidden_layers=2),
}
# Those whose layers do not: model type -> arguments, and the reason.
REFUSED = {
    "jamba": (
        dict(
            _GQA,
            num_hidden_layers=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            num_experts=2,
            mamba_d_state=8,
        ),
        "JambaMambaMixer does not start from the recurrent state that it is given",
    ),
    "mamba": (
        dict(_COMMON, num_hidden_layers=2, state_size=8, num_attention_heads=1),
        "MambaMixer does not start from the recurrent state that it is given",
    ),
    "falcon_mamba": (
        dict(_COMMON, num_hidden_layers=2, state_size=8, num_attention_heads=1),
        "FalconMambaMixer does not start from the recurrent state that it is given",
    ),
    "minimax": (
        dict(_GQA, head_dim=8, num_hidden_layers=2, num_local_experts=2, num_experts_per_tok=1),
        "layers of type linear_attention, through which one sequence would reach into the next",
    ),
}


def build_hybrid(name, dtype=torch.float32, seed=0, **changes):
    """A model of :data:`PACKED` or :data:`REFUSED`, drawn so that its states neither vanish nor drown the rest."""
    arguments = PACKED[name] if name in PACKED else REFUSED[name][0]
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(name, **{**arguments, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "conv" in parameter_name:
                parameter.copy_(0.5 * noise)
            elif parameter_name.endswith(("A_log", "dt_bias")):
                parameter.copy_(0.5 * noise - 1)
            elif parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.to(dtype).train()
