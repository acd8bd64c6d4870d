"""Tiny random-init causal LMs, one per architecture that must agree with PEFT, in the shapes that tell mistakes apart.

Weights are drawn large enough that attention is far from uniform: with the usual 0.02 a wrong mask or a shifted
position would hide below the tolerance.
"""

import torch
import transformers as hf

from benchmarks.tiny_families import VOCABULARY, drawn

_COMMON = dict(vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=3, num_attention_heads=6)
_GQA = dict(_COMMON, num_key_value_heads=2, intermediate_size=80)
_NO_DROPOUT = dict(attention_dropout=0.0)

# What the configs of GPT's kind call the sizes.
GPT = dict(
    vocab_size=VOCABULARY,
    n_embd=48,
    n_layer=3,
    n_head=6,
    n_positions=64,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
)

# name -> (config class, arguments, does the packed path run?)
MODELS = {
    "llama": (hf.LlamaConfig, _GQA, True),
    "gpt2": (
        hf.GPT2Config,
        GPT,
        True,
    ),
    "mistral_window": (hf.MistralConfig, dict(_GQA, sliding_window=6), True),
    "qwen2": (hf.Qwen2Config, _GQA, True),
    "qwen3": (hf.Qwen3Config, dict(_GQA, head_dim=8), True),
    "gemma2": (
        hf.Gemma2Config,
        dict(
            _GQA,
            head_dim=8,
            sliding_window=6,
            query_pre_attn_scalar=8,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            attn_implementation="eager",  # older transformers choose sdpa, and then leave the soft cap out
        ),
        True,
    ),
    "gemma3": (hf.Gemma3TextConfig, dict(_GQA, head_dim=8, sliding_window=6, query_pre_attn_scalar=8), True),
    "phi3": (hf.Phi3Config, dict(_GQA, pad_token_id=0), True),
    "gpt_neox": (
        hf.GPTNeoXConfig,
        dict(_COMMON, intermediate_size=80, attention_dropout=0.0, hidden_dropout=0.0),
        True,
    ),
    "opt": (
        hf.OPTConfig,
        dict(_COMMON, ffn_dim=80, word_embed_proj_dim=48, max_position_embeddings=64, dropout=0.0),
        True,
    ),
    "olmo2": (hf.Olmo2Config, _GQA, True),
    "roberta": (  # its positions begin behind the id of padding
        hf.RobertaConfig,
        dict(
            _COMMON,
            intermediate_size=80,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            is_decoder=True,
        ),
        True,
    ),
    "granite": (
        hf.GraniteConfig,
        dict(_GQA, embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.2),
        True,
    ),
    "starcoder2": (
        hf.Starcoder2Config,
        dict(_GQA, residual_dropout=0.0, embedding_dropout=0.0, sliding_window=None),
        True,
    ),
    "stablelm": (hf.StableLmConfig, dict(_GQA, hidden_dropout=0.0), True),
    "gpt_oss": (
        hf.GptOssConfig,
        dict(_GQA, head_dim=8, sliding_window=6, num_local_experts=4, num_experts_per_tok=2),
        True,
    ),
    "mixtral": (hf.MixtralConfig, dict(_GQA, num_local_experts=4, num_experts_per_tok=2), True),
    "bloom": (
        hf.BloomConfig,
        dict(vocab_size=VOCABULARY, hidden_size=48, n_layer=3, n_head=6, hidden_dropout=0.0, attention_dropout=0.0),
        True,
    ),
    "falcon": (
        hf.FalconConfig,
        dict(
            _COMMON,
            num_kv_heads=2,
            new_decoder_architecture=True,
            alibi=False,
            attention_dropout=0.0,
            hidden_dropout=0.0,
        ),
        True,
    ),
    "openai_gpt": (
        hf.OpenAIGPTConfig,
        GPT,
        False,
    ),
}


# Of configs that tests complete.
T5 = dict(
    vocab_size=VOCABULARY,
    d_model=48,
    d_kv=8,
    d_ff=80,
    num_layers=2,
    num_heads=6,
    dropout_rate=0.0,
    decoder_start_token_id=0,
)
GEMMA3N = dict(
    vocab_size=VOCABULARY,
    vocab_size_per_layer_input=VOCABULARY,
    hidden_size=16,
    intermediate_size=32,
    hidden_size_per_layer_input=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    laurel_rank=2,
)
GEMMA4_E = dict(  # of four layers the last two use the keys and values of the first two
    vocab_size=VOCABULARY,
    vocab_size_per_layer_input=VOCABULARY,
    hidden_size=48,
    hidden_size_per_layer_input=4,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    global_head_dim=8,
    intermediate_size=80,
    num_kv_shared_layers=2,
    sliding_window=64,
    layer_types=["sliding_attention", "full_attention"] * 2,
)


def build(name, dtype=torch.float32, seed=0, **changes):
    """A model of :data:`MODELS` in training mode, its parameters frozen by nobody yet."""
    config_class, arguments, _ = MODELS[name]
    config = config_class(**{**arguments, **changes})
    torch.manual_seed(seed)
    return drawn(hf.AutoModelForCausalLM.from_config(config), seed).to(dtype).train()
