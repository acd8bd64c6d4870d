"""What every row of the table is tried on: a random Llama of two layers, its tokenizer, and a few short texts."""

import random
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from peft import (
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PROMPT, ROWS, STEPS = 4, 4, 3  # virtual tokens, rows of a batch, steps of a run
ANIMALS, PLANTS = ["cat", "dog", "horse", "cow"], ["oak", "fern", "rose", "moss"]
METHODS = {
    "Prompt Tuning": (PromptTuningConfig, {}),
    "Prefix-Tuning": (PrefixTuningConfig, {}),
    "P-Tuning": (PromptEncoderConfig, dict(encoder_reparameterization_type="LSTM", encoder_hidden_size=16)),
    "Multitask Prompt Tuning": (MultitaskPromptTuningConfig, dict(num_tasks=2, num_ranks=2)),
}
_GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.layers": "blk", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


class Setting:
    """Written into a folder and read from there by every run, so that all start from the same weights."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            _write(self.folder)

    @cached_property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.folder)

    def base(self, *, kind=AutoModelForCausalLM, dtype=torch.float32, **options):
        """The model, with the options of ``from_pretrained``."""
        return kind.from_pretrained(self.folder, dtype=dtype, **options)

    def gguf(self):
        """The model from a GGUF file of 8-bit weights, which transformers widen when they load it."""
        file = self.folder / "model.gguf"
        if not file.is_file():
            _write_gguf(self.base(), file)
        return self.base(gguf_file=file.name)

    def peft_model(self, method, base=None):
        """PEFT's model of a method; every call draws the same prompt."""
        config, options = METHODS[method]
        base = self.base() if base is None else base
        torch.manual_seed(1)
        return get_peft_model(base, config(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT, **options))

    def texts(self):
        """``{"prompt", "completion"}`` of uneven lengths, for every step."""
        words = [(word, "animal") for word in ANIMALS] + [(word, "plant") for word in PLANTS]
        random.Random(0).shuffle(words)
        many = (words * STEPS)[: ROWS * STEPS]
        return [
            {"prompt": " ".join(["word", *[w] * (1 + i % 4)]), "completion": f" {k}"} for i, (w, k) in enumerate(many)
        ]

    def tokens(self):
        """``{"input_ids", "labels"}`` of the texts, labels on the completions."""
        rows = []
        for text in self.texts():
            prompt, answer = self.tokenizer(text["prompt"]).input_ids, self.tokenizer(text["completion"]).input_ids
            rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
        return rows

    def batches(self, side="right"):
        """The texts as padded batches."""
        rows = self.tokens()
        return [self._padded(rows[i : i + ROWS], side) for i in range(0, len(rows), ROWS)]

    def _padded(self, rows, side):
        width = max(len(row["input_ids"]) for row in rows)
        batch = {"input_ids": [], "labels": [], "attention_mask": []}
        for row in rows:
            length = len(row["input_ids"])
            for name, values, filling in (
                ("input_ids", row["input_ids"], self.tokenizer.pad_token_id),
                ("labels", row["labels"], -100),
                ("attention_mask", [1] * length, 0),
            ):
                padding = [filling] * (width - length)
                batch[name].append(values + padding if side == "right" else padding + values)
        return {name: torch.tensor(values) for name, values in batch.items()}


def _write(folder):
    words = ["<pad>", "</s>", "word", "animal", "plant", *ANIMALS, *PLANTS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _write_gguf(model, file):
    """In llama.cpp's names and order of rows, matrices in 8 bits."""
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
    for name, weight in model.state_dict().items():
        weight = weight.numpy()
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if projection in name:  # rotary pairs stand side by side
                weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        for ours, theirs in _GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        weight, kind = np.ascontiguousarray(weight), None
        if weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            weight = gguf.quants.quantize(weight, kind)
        writer.add_tensor(name, weight, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
