"""Hugging Face's Trainer, where a run needs it to be something else."""

import os
from contextlib import contextmanager, nullcontext

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from . import adapters
from .config import SCHEDULES
from .encoding import collate
from .files import STAGING, checkpoints, delete_checkpoint, staged, write_json
from .progress import ProgressBar

LOG_FILE = "log.json"
# What is trained, in a checkpoint. PEFT's own file holds only what the encoder of P-Tuning or Prefix-Tuning puts out.
TRAINED_FILE = "trained.safetensors"


class SoftPromptTrainer(Trainer):
    """Trains a `TrainingRun` on its planned batches. Checkpoints are complete or absent; evaluation is the run's own."""

    def __init__(self, run, callbacks, loss=None):
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
        self.saving_to = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.own_loss is not None:
            return self.own_loss(model, inputs, self.state.global_step)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _save(self, output_dir=None, state_dict=None):
        if self.args.should_save:
            # Left to itself PEFT asks the hub whether the vocabulary grew.
            self.run.model.save_pretrained(output_dir, save_embedding_layers=False)
            save_file(self._trained(), os.path.join(output_dir, TRAINED_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        saved = load_file(os.path.join(resume_from_checkpoint, TRAINED_FILE))
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(saved[name])

    def _trained(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.run.model.named_parameters() if p.requires_grad}

    def get_train_dataloader(self) -> DataLoader:
        # One epoch of the Trainer is our whole run: the plan crosses the real epochs.
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.run.batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def evaluate(self, *args, **kwargs) -> dict:
        at_end = self.state.global_step >= self.state.max_steps
        result = self.run.evaluate(None if at_end else self.run.config.eval_rows)
        metrics = {f"eval_{name}": value for name, value in result.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict, start_time: float | None = None):
        if "train_runtime" in logs:  # the Trainer's summary: it counts padding, and never repeats
            return
        super().log(logs, start_time)
        self.state.log_history[-1].pop("epoch", None)  # the Trainer's epoch is our whole run

    def _get_output_dir(self, trial) -> str:
        return str(self.saving_to or self.run.folder)

    def _save_checkpoint(self, model, trial):
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

    def write_log(self, finished: bool):
        write_json(self.run.folder / LOG_FILE, {"finished": finished, "history": self.state.log_history})


@contextmanager
def deterministic():
    """The same numbers in every run. An operator that can't promise it warns."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with a fixed workspace
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # finds bugs, at the price of a write per tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
