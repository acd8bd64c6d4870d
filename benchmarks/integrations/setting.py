"""What every row of the table is tried on: a random Llama of two layers, its tokenizer, and a few short texts."""

import random
from functools import cached_property
from pathlib import Path

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

from ..gguf_file import write_gguf

PROMPT, ROWS, STEPS = 4, 4, 3  # virtual tokens, rows of a batch, steps of a run
ANIMALS, PLANTS = ["cat", "dog", "horse", "cow"], ["oak", "fern", "rose", "moss"]
METHODS = {
    "Prompt Tuning": (PromptTuningConfig, {}),
    "Prefix-Tuning": (PrefixTuningConfig, {}),
    "P-Tuning": (PromptEncoderConfig, dict(encoder_reparameterization_type="LSTM", encoder_hidden_size=16)),
    "Multitask Prompt Tuning": (MultitaskPromptTuningConfig, dict(num_tasks=2, num_ranks=2)),
}


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
            write_gguf(self.base(), file, eight_bits=True)
        return self.base(gguf_file=file.name)

    def peft_model(self, method, base=None, get=get_peft_model):
        """The model of a method that ``get`` makes; every call draws the same prompt."""
        config, options = METHODS[method]
        base = self.base() if base is None else base
        torch.manual_seed(1)
        return get(base, config(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT, **options))

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
