"""A training run, from its configuration to the adapter on the disk."""

import hashlib
import math
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState

from fastprompt import accelerate

from . import adapters
from .config import TrainingConfig
from .data import Example, Task, read_rows, split_rows
from .encoding import Encoded, collate, encode_examples, features, plan_batches
from .errors import InputError
from .evaluation import evaluate
from .files import RUN_FILE, checkpoints, read_record, staged, write_json
from .identity import fingerprint
from .trainer import Loss, SoftPromptTrainer, deterministic

# What a run may change when it is resumed: nothing here reaches the weights.
FREE_ON_RESUME = {"output", "resume", "save_steps", "keep_checkpoints", "eval_steps", "eval_rows"}


class Data:
    """The rows of a run, as text (``train``, ``held_out``) and as token ids (``train_ids``, ``held_out_ids``).

    ``held_out`` is empty where the configuration asks for no evaluation. ``task`` has its verbaliser and its tasks.
    """

    def __init__(self, config: TrainingConfig) -> None:
        rows = read_rows(config.data)
        self.task: Task = config.task.with_words_of(rows).with_tasks_of(rows)
        self.train: list[Example] = self.task.examples(rows)
        self.held_out: list[Example] = []
        if config.eval_data is not None:
            self.held_out = self.task.examples(read_rows(config.eval_data, "eval_data"), "eval_data")
        elif config.eval_fraction is not None:
            self.train, self.held_out = split_rows(self.train, config.eval_fraction, config.seed)

    def encode(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
        """Fill in the token ids."""
        self.train_ids: list[Encoded] = encode_examples(tokenizer, self.train, max_length)
        self.held_out_ids: list[Encoded] = encode_examples(tokenizer, self.held_out, max_length)


class TrainingRun:
    """Everything a run needs, read and checked; only `train` writes.

    ``model`` is a PEFT model that `fastprompt.accelerate` has made fast (``accelerated=False``: plain PEFT),
    ``batches`` the row numbers of every step, ``data`` the rows. Raises `InputError`.
    """

    def __init__(self, config: TrainingConfig, accelerated: bool = True) -> None:
        self.config = config
        self.folder = Path(config.output)
        self.record: dict[str, Any] = {
            "config": config.to_dict(),
            "data_sha256": data_sha256(config),
        }
        self._check_output()
        self.data = Data(config)
        self.tokenizer = adapters.load_tokenizer(config.model, config.gguf_file)
        self.data.encode(self.tokenizer, config.max_length)
        if config.tokens_per_batch is not None:
            self._check_lengths("tokens_per_batch", 0, config.tokens_per_batch, "a batch")
        tasks = [self.data.task.task_id(example.task) for example in self.data.train]
        self.features = features(self.data.train_ids, tasks if config.method == "multitask" else None)
        self.batches = plan_batches(
            [len(row["input_ids"]) for row in self.features],
            seed=config.seed,
            batch_size=config.batch_size or (None if config.tokens_per_batch else 16),
            tokens_per_batch=config.tokens_per_batch,
            epochs=config.epochs,
            steps=config.steps and config.steps * _world_size(),
        )
        self.steps = math.ceil(len(self.batches) / _world_size())
        if config.warmup > self.steps:
            raise InputError("warmup", f"expected at most the run's {self.steps} steps, got {config.warmup}")
        base = adapters.load_base(config.model, config.gguf_file, config.precision)
        context = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        if context is not None:
            self._check_lengths("max_length", config.num_virtual_tokens, context, "the model")
        self.record["base"] = fingerprint(base)
        self.model = adapters.new_adapter(base, config, self.tokenizer, len(self.data.task.tasks or [None]))
        if config.gradient_checkpointing:
            # After the adapter is made: PEFT refuses Prefix-Tuning otherwise, rightly where its own forward runs.
            if config.method == "prefix-tuning" and not accelerated:
                raise InputError("gradient_checkpointing", "plain PEFT cannot use it with Prefix-Tuning")
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if accelerated:
            accelerate(self.model)

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """What step ``step`` (from 0) trains on: ``input_ids``, ``attention_mask``, ``labels`` ``[B, S]``, and
        ``task_ids`` ``[B]`` for multitask."""
        return collate([self.features[row] for row in self.batches[step]])

    def evaluate(self, rows: int | None = None) -> dict:
        """`evaluation.evaluate` of the model as it is now, on all held-out rows or on the first ``rows``."""
        data = self.data
        return evaluate(self.model, self.tokenizer, data.task, data.held_out[:rows], data.held_out_ids[:rows])

    def train(self, callbacks: Sequence[TrainerCallback] = (), loss: Loss | None = None) -> list[dict]:
        """Train, and leave in ``config.output`` the adapter (PEFT's format), ``run.json`` and ``log.json``.

        Returns the log: a dict for each step (``step``, ``loss``, ``grad_norm``, ``learning_rate``) and each
        evaluation (``step``, ``eval_loss``, ``eval_accuracy``). ``callbacks`` are `transformers.TrainerCallback`.
        ``loss(model, batch, step)`` is what to minimise in place of the model's own loss of the batch.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        found = checkpoints(self.folder)
        with deterministic():
            trainer = SoftPromptTrainer(self, callbacks, loss)
            trainer.accelerator.wait_for_everyone()  # until all processes have looked at the folder
            if trainer.args.should_save:
                task = self.data.task
                filled_in = {"verbaliser": task.verbaliser, "tasks": task.tasks, "versions": _versions()}
                write_json(self.folder / RUN_FILE, {**self.record, **filled_in})
            trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
            if self.data.held_out and not _evaluated(trainer.state):
                trainer.evaluate()
        if trainer.args.should_save:
            with staged(self.folder) as staging:
                self.model.save_pretrained(str(staging), save_embedding_layers=False)
            trainer.write_log(finished=True)
        return trainer.state.log_history

    def _check_output(self) -> None:
        folder = self.folder
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise InputError("output", f"{str(there)!r} is a file; expected a folder, which may be missing")
        if not os.access(there, os.W_OK | os.X_OK):
            raise InputError("output", f"{str(there)!r} cannot be written into")
        # What starts with a dot may be left of a run that was killed before it wrote anything else.
        if not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir()):
            return
        if not (folder / RUN_FILE).is_file():
            raise InputError(
                "output", f"{str(folder)!r} holds other files; expected an empty folder or a run to resume"
            )
        if not self.config.resume:
            raise InputError("output", f"{str(folder)!r} already holds a run; expected another folder, or resume")
        before = read_record(folder)
        mine = self.record["config"]
        for name in mine:
            if name not in FREE_ON_RESUME and mine[name] != before["config"].get(name):
                raise InputError(
                    name, f"the run to resume in {str(folder)!r} has {before['config'].get(name)!r}, got {mine[name]!r}"
                )
        if self.record["data_sha256"] != before["data_sha256"]:
            raise InputError("data", "its contents changed since the run to resume began")

    def _check_lengths(self, argument: str, virtual_tokens: int, limit: int, where: str) -> None:
        data = self.data
        for example, ids in zip(data.train + data.held_out, data.train_ids + data.held_out_ids):
            length = virtual_tokens + len(ids.prompt) + len(ids.completion)
            if length > limit:
                tokens = f"{length} tokens with {virtual_tokens} virtual ones"
                raise InputError(argument, f"{example.row} has {tokens}; {where} takes {limit}")


def train(config: TrainingConfig) -> list[dict]:
    """Train as ``config`` says; see `TrainingRun.train`."""
    return TrainingRun(config).train()


def data_sha256(config: TrainingConfig) -> list[str]:
    """Of the files that a run reads."""
    return [_sha256(path) for path in (config.data, config.eval_data) if path is not None]


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else ""


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "peft")}


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _evaluated(state: TrainerState) -> bool:
    return any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)
