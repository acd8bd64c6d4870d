"""The rows of a run, from its files to the batches that it takes."""

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import TrainingConfig
from .data import Example, Task, read_rows, rows_by_task, split_rows
from .encoding import Encoded, encode_examples, features, plan_batches
from .errors import InputError

Rows = Sequence[dict[str, str]]


class Data:
    """The rows of a run, as text (``train``, ``held_out``) and, after :meth:`encode`, as token ids.

    ``held_out`` is empty where the configuration asks for no evaluation. ``task`` has its verbaliser and its tasks.

    Args:
        config: the run.
        rows, held_out: what its files hold, of its task if it has only one; None: they are read.

    Attributes:
        train_ids, held_out_ids: the token ids.
        features: the rows to train on, as a model takes them.
        batches: the numbers of the rows of every batch, for all processes in turn.
        steps: how many batches a process takes.
    """

    def __init__(self, config: TrainingConfig, rows: Rows | None = None, held_out: Rows | None = None) -> None:
        self.config = config
        rows = read_task_rows(config, config.data) if rows is None else rows
        source = "data" if config.only_task is None else f"{config.only_task!r} in data"
        self.task: Task = config.task.with_words_of(rows, source).with_tasks_of(rows, source)
        self.train: list[Example] = self.task.examples(rows, source)
        self.held_out: list[Example] = []
        if config.eval_data is not None:
            held_out = read_task_rows(config, config.eval_data, "eval_data") if held_out is None else held_out
            self.held_out = self.task.examples(held_out, source.replace("data", "eval_data"))
        elif config.eval_fraction is not None:
            self.train, self.held_out = split_rows(self.train, config.eval_fraction, config.rows_seed)

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Fill in the token ids and the batches."""
        config = self.config
        self.train_ids: list[Encoded] = encode_examples(tokenizer, self.train, config.max_length)
        self.held_out_ids: list[Encoded] = encode_examples(tokenizer, self.held_out, config.max_length)
        if config.tokens_per_batch is not None:
            self._check_lengths("tokens_per_batch", 0, config.tokens_per_batch, "a batch")
        tasks = [self.task.task_id(example.task) for example in self.train]
        self.features = features(self.train_ids, tasks if config.method == "multitask" else None)
        self.batches = plan_batches(
            [len(row["input_ids"]) for row in self.features],
            seed=config.rows_seed,
            batch_size=config.batch_size or (None if config.tokens_per_batch else 16),
            tokens_per_batch=config.tokens_per_batch,
            epochs=config.epochs,
            steps=config.steps and config.steps * world_size(),
        )
        self.steps = math.ceil(len(self.batches) / world_size())
        if config.warmup > self.steps:
            raise InputError("warmup", f"expected at most the run's {self.steps} steps, got {config.warmup}")

    def check_context(self, base: PreTrainedModel) -> None:
        """Raise an `InputError` if a row is longer than the model takes."""
        context = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        if context is not None:
            self._check_lengths("max_length", self.config.num_virtual_tokens, context, "the model")

    def _check_lengths(self, argument: str, virtual_tokens: int, limit: int, where: str) -> None:
        for example, ids in zip(self.train + self.held_out, self.train_ids + self.held_out_ids):
            length = virtual_tokens + len(ids.prompt) + len(ids.completion)
            if length > limit:
                tokens = f"{length} tokens with {virtual_tokens} virtual ones"
                raise InputError(argument, f"{example.row} has {tokens}; {where} takes {limit}")


def read_task_rows(config: TrainingConfig, path: str, argument: str = "data") -> Rows:
    """The rows of a file; of a run of one task those of this task."""
    rows = read_rows(path, argument)
    if config.only_task is None or config.task_column is None:
        return rows
    tasks = rows_by_task(rows, config.task_column, argument)
    if config.only_task not in tasks:
        known = ", ".join(map(repr, list(tasks)[:10])) + (", ..." if len(tasks) > 10 else "")
        raise InputError("only_task", f"no row of {argument} has {config.only_task!r}; expected one of {known}")
    return tasks[config.only_task]


def data_sha256(config: TrainingConfig) -> list[str]:
    """Of the files that a run reads."""
    return [_sha256(path) for path in (config.data, config.eval_data) if path is not None]


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else ""
