"""A training run, from its configuration to the adapter on the disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState

from fastprompt import accelerate

from . import adapters
from .config import TrainingConfig
from .encoding import collate
from .errors import InputError
from .evaluation import evaluate
from .files import RUN_FILE, checkpoints, staged, write_json
from .identity import fingerprint
from .output import check_output, versions
from .run_data import Data, data_sha256
from .tasks import train_keeping_best
from .trainer import Loss, SoftPromptTrainer, deterministic


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
        if config.task_column is not None and config.method != "multitask" and config.only_task is None:
            raise InputError("task_column", "its values have a prompt each; expected only_task, or train_tasks for all")
        if config.keeps_best:
            raise InputError("keep_best" if config.keep_best else "patience", "only train() can keep the best prompt")
        if config.prompts_per_step is not None:
            raise InputError("prompts_per_step", f"one prompt trains here, got {config.prompts_per_step}")
        check_output(self.folder, self.record, config.resume)
        self.data = Data(config)
        self.tokenizer = adapters.load_tokenizer(config.model, config.gguf_file)
        self.data.encode(self.tokenizer)
        self.features, self.batches, self.steps = self.data.features, self.data.batches, self.data.steps
        base = adapters.load_base(config.model, config.gguf_file, config.precision)
        self.data.check_context(base)
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
                filled_in = {"verbaliser": task.verbaliser, "tasks": task.tasks, "versions": versions()}
                write_json(self.folder / RUN_FILE, {**self.record, **filled_in})
            trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
            if self.data.held_out and not _evaluated(trainer.state):
                trainer.evaluate()
        if trainer.args.should_save:
            with staged(self.folder) as staging:
                self.model.save_pretrained(str(staging), save_embedding_layers=False)
            trainer.write_log(finished=True)
        return trainer.state.log_history


def train(config: TrainingConfig) -> list[dict]:
    """Train as ``config`` says; see `TrainingRun.train`."""
    return train_keeping_best(config) if config.keeps_best else TrainingRun(config).train()


def _evaluated(state: TrainerState) -> bool:
    return any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)
