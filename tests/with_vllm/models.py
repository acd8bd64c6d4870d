"""Small models with adapters of every method, their compiled prompts as files, and what PEFT answers with them."""

from pathlib import Path

import torch
from peft import (
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedTokenizerFast

VOCABULARY = 300
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<reply>{% endif %}"
)


# One token a byte, which is written as a character.
TOKENS = {character: i + 1 for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def save_tokenizer(folder):
    tokenizer = Tokenizer(models.BPE(vocab=TOKENS, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=CHAT)
    wrapped.save_pretrained(folder)


def save_model(folder, config=None):
    """A causal language model with random weights that say something, and its tokenizer. Returns the model."""
    torch.manual_seed(0)
    if config is None:
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=None,
        )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def load(folder):
    """The model of a folder, once more."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def adapters(count, lengths=(20, 5, 40, 70)):
    """Name -> PEFT config: every method with every length, some of which are longer than a block of vLLM's cache."""
    methods = [
        lambda n: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=n),
        lambda n: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=n),
        lambda n: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=n, encoder_hidden_size=32),
        lambda n: MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=n, num_tasks=2),
    ]
    return {f"task{i}": methods[i % 4](lengths[(i // 4 + i) % len(lengths)]) for i in range(count)}


def adapted(base, config, seed):
    """``base`` with an adapter of random values that matter."""
    torch.manual_seed(seed)
    model = get_peft_model(base, config).eval()
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return model


@torch.no_grad()
def keys_and_values(model):
    """What a prompt leaves in each layer: keys and values ``[P, Hkv, Dh]``."""
    kind = str(model.active_peft_config.peft_type.value)
    if kind == "PREFIX_TUNING":
        cache = model.get_prompt(batch_size=1)
    else:
        tasks = torch.zeros(1, dtype=torch.long) if kind == "MULTITASK_PROMPT_TUNING" else None
        prompt = model.get_prompt(batch_size=1, task_ids=tasks)
        cache = model.get_base_model()(inputs_embeds=prompt, past_key_values=DynamicCache()).past_key_values
    return [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in cache.layers]


def save_prompt(layers, file, method="prompt-tuning", **changes):
    """Write a compiled prompt, as a whole and then under its name, as a file that a server watches should be."""
    tensors = {}
    for i, (keys, values) in enumerate(layers):
        tensors |= {f"layers.{i}.keys": keys.contiguous(), f"layers.{i}.values": values.contiguous()}
    metadata = {
        "format": "fastprompt-compiled-prompt",
        "version": "1",
        "method": method,
        "length": str(layers[0][0].shape[0]),
        "dtype": str(layers[0][0].dtype).removeprefix("torch."),
        "fingerprint": "none",
        "base_model": "",
    }
    part = Path(file).with_suffix(".part")
    save_file(tensors, part, metadata={**metadata, **changes})
    part.rename(file)


@torch.no_grad()
def answer(model, token_ids, new_tokens, **options):
    """Greedy tokens of a PEFT model or of a base model behind one text."""
    ids = torch.tensor([token_ids])
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.peft_type.value == "MULTITASK_PROMPT_TUNING":
        options["task_ids"] = torch.zeros(1, dtype=torch.long)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return output[0, len(token_ids) :].tolist()
