"""A training run, from its configuration to the adapter on the disk."""

import hashlib
import json
import math
import os
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from . import adapters
from .config import SCHEDULES, TrainingConfig
from .data import Example, Task, read_rows, split_rows
from .encoding import Encoded, collate, encode_examples, features, plan_batches
from .errors import InputError
from .evaluation import evaluate
from .files import STAGING, checkpoints, delete_checkpoint, staged, write_json
from .progress import ProgressBar

RUN_FILE = "run.json"  # the configuration; marks a folder as the output of a run
LOG_FILE = "log.json"

# What a run may change when it is resumed: nothing here reaches the weights.
FREE_ON_RESUME = {"output", "resume", "save_steps", "keep_checkpoints", "eval_steps"}


def read_split(config: TrainingConfig) -> tuple[list[dict], list[dict]]:
    """``(train, held_out)`` rows of a run; nothing is held out where it asks for no evaluation."""
    rows = read_rows(config.data)
    if config.eval_data is not None:
        return rows, read_rows(config.eval_data, "eval_data")
    if config.eval_fraction is not None:
        return split_rows(rows, config.eval_fraction, config.seed)
    return rows, []


class Data:
    """The rows of a run as text and as token ids: ``train``, ``train_ids``, ``held_out``, ``held_out_ids``.

    ``held_out`` is empty where the configuration asks for no evaluation. ``task`` has its verbaliser filled in.
    """

    def __init__(self, config: TrainingConfig, tokenizer):
        rows, held_out = read_split(config)
        source = "data" if config.eval_data is None else "eval_data"
        self.task: Task = config.task.with_words_of(rows)
        self.train: list[Example] = self.task.examples(rows)
        self.held_out: list[Example] = self.task.examples(held_out)
        self.train_ids: list[Encoded] = encode_examples(tokenizer, self.train, config.max_length)
        self.held_out_ids: list[Encoded] = encode_examples(tokenizer, self.held_out, config.max_length, source)


class TrainingRun:
    """Everything a run needs, read and checked; only `train` writes.

    ``model`` is a PEFT model that `fastprompt.accelerate` has made fast (``accelerated=False``: plain PEFT),
    ``batches`` the row numbers of every step, ``data`` the rows. Raises `InputError`.
    """

    def __init__(self, config: TrainingConfig, accelerated: bool = True):
        self.config = config
        self.folder = Path(config.output)
        self.record = {
            "config": config.to_dict(),
            "data_sha256": [_sha256(path) for path in (config.data, config.eval_data) if path is not None],
        }
        self._check_output()
        self.tokenizer = adapters.load_tokenizer(config.model, config.gguf_file)
        self.data = Data(config, self.tokenizer)
        self.features = features(self.data.train_ids)
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
        self._check_context(base.config)
        if config.gradient_checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model = adapters.new_adapter(base, config)
        if accelerated:
            accelerate(self.model)

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """What step ``step`` (from 0) trains on: ``input_ids``, ``attention_mask``, ``labels`` ``[B, S]``."""
        return collate([self.features[row] for row in self.batches[step]])

    def evaluate(self) -> dict:
        """`evaluation.evaluate` of the model as it is now on the held-out rows."""
        return evaluate(self.model, self.tokenizer, self.data.task, self.data.held_out, self.data.held_out_ids)

    def train(self, callbacks=()) -> list[dict]:
        """Train, and leave in ``config.output`` the adapter (PEFT's format), ``run.json`` and ``log.json``.

        Returns the log: a dict for each step (``step``, ``loss``, ``grad_norm``, ``learning_rate``) and each
        evaluation (``step``, ``eval_loss``, ``eval_accuracy``). ``callbacks`` are `transformers.TrainerCallback`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        found = checkpoints(self.folder)
        with _deterministic():
            trainer = _Trainer(self, callbacks)
            trainer.accelerator.wait_for_everyone()  # until all processes have looked at the folder
            if trainer.args.should_save:
                record = {**self.record, "verbaliser": self.data.task.verbaliser, "versions": _versions()}
                write_json(self.folder / RUN_FILE, record)
            trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
            if self.data.held_out and not _evaluated(trainer.state):
                trainer.evaluate()
        if trainer.args.should_save:
            with staged(self.folder) as staging:
                self.model.save_pretrained(staging, save_embedding_layers=False)
            trainer.write_log(finished=True)
        return trainer.state.log_history

    def _check_output(self):
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise InputError("output", f"{str(folder)!r} is a file; expected a folder, which may be missing")
        if not folder.exists() or not any(folder.iterdir()):
            return
        if not (folder / RUN_FILE).is_file():
            raise InputError("output", f"{str(folder)!r} holds other files; expected an empty folder or a run to resume")
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

    def _check_context(self, model_config):
        limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
        for name, rows in (("data", self.data.train_ids), ("eval_data", self.data.held_out_ids)):
            for number, row in enumerate(rows, start=1):
                total = self.config.num_virtual_tokens + len(row.prompt) + len(row.completion)
                if limit is not None and total > limit:
                    raise InputError(
                        name,
                        f"row {number} has {total} tokens, virtual ones included, and the model takes {limit}; "
                        "expected shorter rows, or max_length",
                    )


class _Trainer(Trainer):
    """Hugging Face's Trainer with planned batches, checkpoints that are complete or absent, and our evaluation."""

    def __init__(self, run: TrainingRun, callbacks):
        config = run.config
        evaluates = bool(config.eval_steps and run.data.held_out)
        super().__init__(
            model=run.model,
            args=TrainingArguments(
                output_dir=str(run.folder),
                max_steps=run.steps,
                learning_rate=config.lr,
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
                dataloader_pin_memory=adapters.device().type == "cuda",
            ),
            train_dataset=run.features,
            eval_dataset=run.data.held_out or None,
            data_collator=collate,
            callbacks=[ProgressBar(), *callbacks],
        )
        self.remove_callback(PrinterCallback)
        self.run = run
        self.saving_to = None

    def _save(self, output_dir=None, state_dict=None):
        # Left to itself PEFT asks the hub whether the vocabulary grew.
        self.run.model.save_pretrained(output_dir, save_embedding_layers=False)

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
        metrics = {f"eval_{name}": value for name, value in self.run.evaluate().items()}
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


def accelerate(peft_model):
    try:
        from fastprompt import accelerate as fast
    except ImportError:
        return peft_model
    return fast(peft_model)


def train(config: TrainingConfig) -> list[dict]:
    """Train as ``config`` says; see `TrainingRun.train`."""
    return TrainingRun(config).train()


def read_record(folder: Path) -> dict:
    """What ``run.json`` in a run's folder holds: ``config``, ``verbaliser``, ``data_sha256``, ``versions``."""
    try:
        return json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("adapter", f"{str(folder)!r} holds no {RUN_FILE}; expected the output of a run") from None


@contextmanager
def _deterministic():
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


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else ""


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "peft")}


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _evaluated(state) -> bool:
    return any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)
