"""What a training run can be told."""

import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .data import Task
from .errors import InputError
from .methods import ENCODERS, METHODS, PRECISIONS, SOURCE_INITS

# Trainer's "constant" has no warm-up; this one does, and with a warm-up of 0 steps the two are the same.
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}

CHOICES: dict[str, tuple[str, ...]] = {
    "method": tuple(METHODS),
    "schedule": tuple(SCHEDULES),
    "precision": PRECISIONS,
    "encoder": ENCODERS,
    "source_init": SOURCE_INITS,
}

_LARGEST_LR = 1000  # AdamW moves every number by about this much
SEEDS = 2**32  # numpy takes no others

# Fields that are None or at least 1.
OPTIONAL_COUNTS = (
    "max_length",
    "steps",
    "batch_size",
    "tokens_per_batch",
    "eval_steps",
    "eval_rows",
    "encoder_hidden_size",
    "num_ranks",
    "patience",
    "prompts_per_step",
)


@dataclass(frozen=True)
class TrainingConfig:
    """A training run. Raises `InputError` on a value that cannot be used.

    Model: ``model`` is a folder or a hub name, ``gguf_file`` a GGUF file in it, ``precision`` that of the frozen
    weights (the prompt is always trained in fp32).
    Data: see `Task` for the columns, ``template`` and ``verbaliser``. Rows to evaluate on come from ``eval_data`` or
    are held out of ``data`` (``eval_fraction``, by a shuffle with ``data_seed``, which the order of the rows comes from
    too; None: ``seed``). ``max_length`` bounds a row's tokens. ``only_task``: the rows with this value in
    ``task_column``, and no others (multitask has all of them).
    Prompt: ``method``, ``num_virtual_tokens``, and ``init``: ``random``, ``vocab`` (embeddings of random tokens),
    ``text`` (what ``init_text``, cut or repeated to fit, is to the frozen model: embeddings, or keys and values) or
    ``zero`` (values that are zero). Which of these a method takes stands in `methods.METHODS`.
    ``prefix-tuning``: ``projection`` trains an MLP in front of the keys and values, ``encoder_hidden_size`` wide
    (default: as wide as the keys of a layer).
    ``p-tuning``: ``encoder`` (``lstm``, the default, or ``mlp``), ``encoder_hidden_size`` wide (default 128).
    Several prompts: `train_tasks` trains one for each value of ``task_column``, `sweep` one for each of several
    learning rates and seeds; ``prompts_per_step`` of them meet in a batch (None: few, that together have enough rows).
    ``multitask``: the task of each row stands in ``task_column`` (None: all rows are one task); each has factors of
    rank ``num_ranks`` (default 1). ``source`` is a finished multitask run to start from: with the ``average`` of its
    tasks (the default), with the ``exact`` factors of its task ``source_task``, or with its ``shared`` prompt alone
    (``source_init``).
    Optimisation: AdamW at ``lr`` (None: 0.02; for Prefix-Tuning 0.01, with a projection 0.001; for P-Tuning 0.001) with
    ``schedule`` after ``warmup`` steps, for ``steps`` or ``epochs``; a batch is ``batch_size`` rows (default 16) or up
    to ``tokens_per_batch`` real tokens, per device. ``max_grad_norm`` 0 never clips.
    Output: folder ``output``; a checkpoint each ``save_steps`` steps, of which the newest ``keep_checkpoints`` stay;
    an evaluation each ``eval_steps`` steps (None: only at the end), on the first ``eval_rows`` held-out rows (None: on
    all, as at the end). ``keep_best`` keeps the prompt of the evaluation with the lowest loss in place of the last one,
    and ``patience`` does, and ends the run after so many evaluations without a lower one. ``resume`` goes on from the
    newest checkpoint in ``output``, or starts if there is none.
    """

    model: str
    data: str
    output: str
    gguf_file: str | None = None
    precision: str = "fp32"
    text_column: str | None = None
    label_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    template: str = "{text}"
    verbaliser: dict[str, str] | None = None
    eval_data: str | None = None
    eval_fraction: float | None = None
    data_seed: int | None = None
    only_task: str | None = None
    max_length: int | None = None
    method: str = "prompt-tuning"
    num_virtual_tokens: int = 20
    init: str = "random"
    init_text: str | None = None
    projection: bool = False
    encoder: str | None = None
    encoder_hidden_size: int | None = None
    task_column: str | None = None
    num_ranks: int | None = None
    source: str | None = None
    source_init: str | None = None
    source_task: str | None = None
    lr: float | None = None
    schedule: str = "linear"
    warmup: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    steps: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    tokens_per_batch: int | None = None
    seed: int = 0
    gradient_checkpointing: bool = False
    save_steps: int = 100
    keep_checkpoints: int = 2
    eval_steps: int | None = None
    eval_rows: int | None = None
    keep_best: bool = False
    patience: int | None = None
    prompts_per_step: int | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("eval_fraction", "lr", "weight_decay", "max_grad_norm", "epochs"):
            value = getattr(self, name)
            self._expect(name, value is None or math.isfinite(value), "a finite number")
        for name in ("method", "schedule", "precision"):
            self._expect(name, getattr(self, name) in CHOICES[name], f"one of {', '.join(CHOICES[name])}")
        for name in ("encoder", "source_init"):
            value = getattr(self, name)
            self._expect(name, value is None or value in CHOICES[name], f"one of {', '.join(CHOICES[name])}")
        for name in ("num_virtual_tokens", "save_steps", "keep_checkpoints"):
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        for name in OPTIONAL_COUNTS:
            value = getattr(self, name)
            self._expect(name, value is None or value >= 1, "at least 1")
        for name in ("warmup", "weight_decay", "max_grad_norm", "seed"):
            self._expect(name, getattr(self, name) >= 0, "at least 0")
        self._expect("seed", self.seed < SEEDS, f"less than {SEEDS}")
        self._expect("data_seed", self.data_seed is None or self.data_seed >= 0, "at least 0")
        self._expect("lr", self.lr is None or 0 < self.lr <= _LARGEST_LR, f"more than 0 and at most {_LARGEST_LR}")
        self._expect("epochs", self.epochs is None or self.epochs > 0, "more than 0")
        self._expect("eval_fraction", self.eval_fraction is None or 0 < self.eval_fraction < 1, "between 0 and 1")
        self._check_method()
        has_text = self.init_text is not None
        self._expect("init_text", has_text == (self.init == "text"), "a text exactly if init='text'")
        self._expect("init_text", self.init_text is None or bool(self.init_text.strip()), "a text that is not empty")
        self._one_of("steps", "epochs")
        self._at_most_one_of("batch_size", "tokens_per_batch")
        self._at_most_one_of("eval_data", "eval_fraction")
        for name in ("eval_steps", "eval_rows"):
            if getattr(self, name) is not None and self.eval_data is None and self.eval_fraction is None:
                raise InputError(name, "nothing to evaluate on; expected eval_data or eval_fraction too")
        for name in ("keep_best", "patience"):
            self._expect(name, not getattr(self, name) or self.eval_steps is not None, "eval_steps too")
        self._make_task()  # checks the columns, the template and the verbaliser

    @property
    def task(self) -> Task:
        """What makes examples of this configuration's rows."""
        return self._make_task()

    def _make_task(self) -> Task:
        values = {field.name: getattr(self, field.name) for field in fields(Task) if hasattr(self, field.name)}
        if self.method != "multitask":  # each value has a prompt, and a run, of its own
            values["task_column"] = None
        return Task(**values)

    @property
    def learning_rate(self) -> float:
        """``lr``, or the method's own if that is None."""
        if self.lr is not None:
            return self.lr
        method = METHODS[self.method]
        return method.lr_projected if self.projection and method.lr_projected else method.lr

    @property
    def rows_seed(self) -> int:
        """What the held-out rows and the order of the others come from."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def keeps_best(self) -> bool:
        """Is the prompt kept that had the lowest held-out loss, and not the last one?"""
        return self.keep_best or self.patience is not None

    def to_dict(self) -> dict:
        """The fields as JSON values. Paths are absolute, so that they hold from another folder too."""
        values = {**asdict(self), "lr": self.learning_rate}
        for name in ("model", "data", "eval_data", "source"):
            if values[name] is not None and Path(values[name]).exists():
                values[name] = os.path.abspath(values[name])
        return values

    def _check_method(self) -> None:
        inits = METHODS[self.method].inits
        self._expect("init", self.init in inits, f"one of {', '.join(inits)} with method={self.method!r}")
        for name in sorted({option for method in METHODS.values() for option in method.options}):
            takers = [method for method in METHODS if name in METHODS[method].options]
            if getattr(self, name) and self.method not in takers:
                raise InputError(name, f"only {' and '.join(takers)} can use it, got method={self.method!r}")
        if self.only_task is not None:
            self._expect("only_task", self.task_column is not None, "a task_column too")
            self._expect("only_task", self.method != "multitask", "none with method='multitask', which has all tasks")
        if self.projection and self.init == "text":
            raise InputError("init", "a projection cannot be made to put out a text's keys and values; got projection")
        if self.encoder_hidden_size is not None and self.method == "prefix-tuning" and not self.projection:
            raise InputError("encoder_hidden_size", "it is the width of the projection; expected projection too")
        if self.source is None:
            for name in ("source_init", "source_task"):
                self._expect(name, getattr(self, name) is None, "a source too")
        else:
            self._expect("init", self.init == "random", "no init, since the prompt starts from source")
            has_task, exact = self.source_task is not None, self.source_init == "exact"
            self._expect("source_task", has_task == exact, "a task exactly if source_init='exact'")

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(name, f"expected {expected}, got {getattr(self, name)!r}")

    def _at_most_one_of(self, a: str, b: str) -> None:
        self._expect(a, getattr(self, a) is None or getattr(self, b) is None, f"only one of {a} and {b}")

    def _one_of(self, a: str, b: str) -> None:
        self._at_most_one_of(a, b)
        self._expect(a, getattr(self, a) is not None or getattr(self, b) is not None, f"{a} or {b}")
