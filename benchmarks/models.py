"""The model of the benchmarks: a Llama of the shape of SmolLM2-135M, with 6 layers and random weights, in fp32."""

import torch
from peft import (
    LoraConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = dict(
    vocab_size=32768,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=6,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)


def llama(sizes=SIZES):
    """The frozen base model; every call gives the same weights in a model of its own."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes)).requires_grad_(False)


# What PEFT's configuration of each method gets beside the length of the prompt.
METHODS = {
    "Prompt Tuning": (PromptTuningConfig, {}),
    "Prefix-Tuning": (PrefixTuningConfig, {}),
    "P-Tuning": (
        PromptEncoderConfig,
        dict(encoder_reparameterization_type="LSTM", encoder_hidden_size=128, encoder_dropout=0.0),
    ),
    "Multitask Prompt Tuning": (MultitaskPromptTuningConfig, dict(num_tasks=4)),
}
TASKS = 4


def soft_prompt(base, length, method="Prompt Tuning"):
    """PEFT's model of a method; every call draws the same prompt."""
    config, arguments = METHODS[method]
    torch.manual_seed(1)
    return get_peft_model(base, config(task_type="CAUSAL_LM", num_virtual_tokens=length, **arguments))


def lora(base):
    """PEFT LoRA of rank 32 on the query and value projections: what most people pick instead of a soft prompt."""
    torch.manual_seed(1)
    return get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    )
