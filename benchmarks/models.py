"""The model of the benchmarks: a Llama of the shape of SmolLM2-135M, with 6 layers and random weights, in fp32."""

import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = dict(
    vocab_size=32768, hidden_size=576, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
)


def llama(sizes=SIZES):
    """The frozen base model; every call gives the same weights in a model of its own."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes)).requires_grad_(False)


def prompt_tuning(base, length):
    """PEFT Prompt Tuning (Lester et al. 2021, arXiv 2104.08691); every call draws the same prompt."""
    torch.manual_seed(1)
    return get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length))


def lora(base):
    """PEFT LoRA of rank 32 on the query and value projections: what most people pick instead of a soft prompt."""
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=32, target_modules=["q_proj", "v_proj"]))
