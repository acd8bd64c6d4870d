"""From text to token ids and batches."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .data import Example
from .errors import InputError

IGNORED = -100  # the label that PyTorch's cross-entropy skips


class Encoded(NamedTuple):
    """Token ids of a prompt and of its completion."""

    prompt: list[int]
    completion: list[int]


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], completions: Sequence[str], end: bool = False
) -> list[Encoded]:
    """Token ids of each prompt and of the completion that follows it.

    A completion is tokenised behind its prompt, since its first token may depend on what stands before it. ``end``
    adds the end-of-text token, so that a model trained on free text learns where to stop.
    """
    if not prompts:
        return []
    heads = tokenizer(list(prompts))["input_ids"]
    wholes = tokenizer([p + c for p, c in zip(prompts, completions)])["input_ids"]
    tail = [tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else []
    encoded = []
    for head, whole, completion in zip(heads, wholes, completions):
        # Where the tokenizer joins the two into one token there is no boundary to cut at.
        joined = whole[: len(head)] != head
        ids = tokenizer(completion, add_special_tokens=False)["input_ids"] if joined else whole[len(head) :]
        encoded.append(Encoded(head, ids + tail))
    return encoded


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int | None = None
) -> list[Encoded]:
    """Token ids of examples, of which none is empty. Rows longer than ``max_length`` tokens (virtual tokens not
    counted) lose tokens at the start of their prompt."""
    free_text = bool(examples) and examples[0].label is None
    encoded = encode(tokenizer, [e.prompt for e in examples], [e.completion for e in examples], end=free_text)
    for i, (prompt, completion) in enumerate(encoded):
        row = examples[i].row
        if not prompt or not completion:
            raise InputError("data", f"{row}: expected a prompt and a completion of at least one token each")
        if max_length is not None and len(prompt) + len(completion) > max_length:
            if len(completion) >= max_length:
                raise InputError("max_length", f"{row} has a completion of {len(completion)} tokens, got {max_length}")
            encoded[i] = Encoded(prompt[len(completion) - max_length :], completion)
    return encoded


def features(encoded: Sequence[Encoded], task_ids: Sequence[int] | None = None) -> list[dict]:
    """Rows for a causal language model: labels stand on the completion only. ``task_ids`` are those of the rows."""
    rows = [
        {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}
        for prompt, completion in encoded
    ]
    return rows if task_ids is None else [{**row, "task_ids": task} for row, task in zip(rows, task_ids)]


def collate(rows: Sequence[dict]) -> dict[str, torch.Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels`` ``[B, S]``, padded on the right to the longest row, and
    ``task_ids`` ``[B]`` where rows have them."""

    def pad(columns: list[list[int]], value: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(column) for column in columns], batch_first=True, padding_value=value)

    batch = {
        "input_ids": pad([row["input_ids"] for row in rows], 0),
        "attention_mask": pad([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": pad([row["labels"] for row in rows], IGNORED),
    }
    if "task_ids" in rows[0]:
        batch["task_ids"] = torch.tensor([row["task_ids"] for row in rows])
    return batch


def plan_batches(
    lengths: Sequence[int],
    *,
    seed: int,
    batch_size: int | None = None,
    tokens_per_batch: int | None = None,
    epochs: float | None = None,
    steps: int | None = None,
) -> list[list[int]]:
    """Row numbers of every batch of a whole run, known before it starts.

    Rows are shuffled anew in each epoch. A batch holds ``batch_size`` rows, or as many as fit into
    ``tokens_per_batch`` real tokens and at least one; it never reaches over the end of an epoch. The plan ends after
    ``epochs`` passes over the rows (a fraction ends after that part of a pass) or after ``steps`` batches. It depends
    on its arguments alone, so a resumed run finds the place where it stopped.
    """
    generator = random.Random(seed)
    rows_left = None if epochs is None else max(round(epochs * len(lengths)), 1)
    batches: list[list[int]] = []
    while True:
        order = generator.sample(range(len(lengths)), len(lengths))
        batch, tokens = [], 0
        for position, row in enumerate(order):
            if rows_left == 0 or (steps is not None and len(batches) == steps):
                return batches
            batch.append(row)
            tokens += lengths[row]
            if rows_left is not None:
                rows_left -= 1
            last = position + 1 == len(order) or rows_left == 0
            if tokens_per_batch is not None:
                full = last or tokens + lengths[order[position + 1]] > tokens_per_batch
            else:
                full = last or len(batch) == batch_size
            if full:
                batches.append(batch)
                batch, tokens = [], 0
