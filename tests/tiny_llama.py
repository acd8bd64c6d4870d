"""A Llama of a few thousand random weights with its own tokenizer, and a data set that it can learn."""

import csv
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.gguf_file import write_gguf

ANIMALS = ["cat", "dog", "horse", "cow", "sheep", "goat"]
PLANTS = ["oak", "fern", "rose", "moss", "pine", "ivy"]


def save_model(folder):
    """Write model and tokenizer into ``folder``; returns it as text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [f"Word: {word} kind: animal plant" for word in ANIMALS + PLANTS] * 10
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def save_words(file, rows=64):
    """Write a ``.csv`` of words (``text``) and their kinds (``label``: A or P); returns its name."""
    generator = random.Random(0)
    with open(file, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        for _ in range(rows):
            label, words = generator.choice([("A", ANIMALS), ("P", PLANTS)])
            writer.writerow([" ".join(generator.sample(words, generator.randint(1, 3))), label])
    return str(file)


def save_gguf(model_folder, file):
    """Write the model and tokenizer of ``model_folder`` as one GGUF file."""
    tokenizer = json.loads(Path(model_folder, "tokenizer.json").read_text())["model"]
    write_gguf(LlamaForCausalLM.from_pretrained(model_folder), file, tokenizer=tokenizer)
