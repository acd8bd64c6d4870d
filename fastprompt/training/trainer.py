"""Hugging Face's Trainer, where a run needs it to be something else."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from . import adapters
from .config import SCHEDULES, TrainingConfig
from .encoding import collate
from .errors import InputError
from .files import STAGING, checkpoints, delete_checkpoint, staged, write_json
from .progress import ProgressBar

# The loss of a batch, from the model, the batch and the number of the step.
Loss = Callable[[nn.Module, dict[str, torch.Tensor], int], torch.Tensor]

LOG_FILE = "log.json"
# What is trained, in a checkpoint. PEFT's own file holds only what the encoder of P-Tuning or Prefix-Tuning puts out.
TRAINED_FILE = "trained.safetensors"


class Run(Protocol):
    """What is asked of a `TrainingRun`.

    Attributes:
        config, model, folder: its configuration, its model, and where it writes.
        features: the rows to train on.
        batches: their numbers in every batch, for all processes in turn.
        steps: how many batches this process takes.
        data: ``held_out`` holds the rows to evaluate on.
    """

    config: TrainingConfig
    model: PeftModel
    folder: Path
    features: list[dict]
    batches: list[list[int]]
    steps: int
    data: Any

    def evaluate(self, rows: int | None = None) -> dict:
        """Loss and accuracy on all held-out rows or on the first ``rows``."""


class SoftPromptTrainer(Trainer):
    """Trains a `TrainingRun` on its planned batches, with its own evaluation; checkpoints are complete or absent."""

    def __init__(self, run: Run, callbacks: Sequence[TrainerCallback], loss: Loss | None = None) -> None:
        config = run.config
        evaluates = bool(config.eval_steps and run.data.held_out)
        super().__init__(
            model=run.model,
            args=TrainingArguments(
                output_dir=str(run.folder),
                max_steps=run.steps,
                learning_rate=config.learning_rate,
                lr_scheduler_type=SCHEDULES[config.schedule],
                warmup_steps=config.warmup,
                weight_decay=config.weight_decay,
                max_grad_norm=config.max_grad_norm,
                optim="adamw_torch",
                # bf16 needs no autocast: the frozen weights are bf16 already. fp16 needs its loss scaling.
                fp16=config.precision == "fp16",
                seed=config.seed,
                logging_steps=1,
                logging_nan_inf_filter=False,  # a diverged loss must show
                save_strategy="steps",
                save_steps=config.save_steps,
                eval_strategy="steps" if evaluates else "no",
                eval_steps=config.eval_steps,
                report_to="none",
                disable_tqdm=True,
                ddp_find_unused_parameters=False,
                use_cpu=adapters.device().type == "cpu",
                dataloader_pin_memory=adapters.device().type == "cuda",
            ),
            train_dataset=run.features,
            eval_dataset=run.data.held_out or None,
            data_collator=collate,
            callbacks=[ProgressBar(), *callbacks],
        )
        self.remove_callback(PrinterCallback)
        self.run, self.own_loss = run, loss
        self.saving_to: Path | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The run's own loss, where it has one."""
        if self.own_loss is not None:
            return self.own_loss(model, inputs, self.state.global_step)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = output_dir or str(self.run.folder)
        if self.args.should_save:
            # Left to itself PEFT asks the hub whether the vocabulary grew.
            self.run.model.save_pretrained(folder, save_embedding_layers=False)
            save_file(self._trained(), os.path.join(folder, TRAINED_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = load_file(os.path.join(resume_from_checkpoint, TRAINED_FILE))
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(saved[name])

    def _trained(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.run.model.named_parameters() if p.requires_grad}

    def get_train_dataloader(self) -> DataLoader:
        """The planned batches."""
        # One epoch of the Trainer is our whole run: the plan crosses the real epochs.
        loader: DataLoader = DataLoader(
            self.run.features,  # type: ignore[arg-type]  # a list of rows is a data set
            batch_sampler=self.run.batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The run's own evaluation."""
        at_end = self.state.global_step >= self.state.max_steps
        result = self.run.evaluate(None if at_end else self.run.config.eval_rows)
        metrics = {f"eval_{name}": value for name, value in result.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict, start_time: float | None = None) -> None:
        """Log a step or an evaluation."""
        if "train_runtime" in logs:  # the Trainer's summary: it counts padding, and never repeats
            return
        for name in ("loss", "grad_norm", "eval_loss"):
            if not math.isfinite(logs.get(name) or 0.0):
                raise InputError(
                    "lr", f"{name} is {logs[name]} at step {self.state.global_step}; expected a smaller one"
                )
        super().log(logs, start_time)
        self.state.log_history[-1].pop("epoch", None)  # the Trainer's epoch is our whole run

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.saving_to or self.run.folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = self.run.folder
        with staged(folder) if self.args.should_save else nullcontext():
            self.saving_to = folder / STAGING
            self.accelerator.wait_for_everyone()  # until the folder is there
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # until each process has saved its random state
            self.saving_to = None
        if self.args.should_save:
            for old in checkpoints(folder)[: -self.run.config.keep_checkpoints]:
                delete_checkpoint(old)
            self.write_log(finished=False)

    def write_log(self, finished: bool) -> None:
        """Replace ``log.json`` by what is logged so far."""
        write_json(self.run.folder / LOG_FILE, {"finished": finished, "history": self.state.log_history})


@contextmanager
def deterministic() -> Iterator[None]:
    """The same numbers in every run. An operator that can't promise it warns."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with a fixed workspace
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # finds bugs, at the price of a write per tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fill
