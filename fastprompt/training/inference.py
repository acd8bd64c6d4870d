"""What a finished run is good for: evaluating its adapter and completing text with it."""

import dataclasses
import math
from pathlib import Path

import torch
from transformers import set_seed

from ..peft.renamed_cache import right_generation
from . import adapters
from .config import SEEDS, TrainingConfig
from .encoding import encode_examples
from .errors import InputError
from .evaluation import evaluate
from .files import read_record
from .identity import check_base
from .run_data import Data, data_sha256, read_task_rows


class TrainedAdapter:
    """The adapter that a run left in folder ``adapter``, on its model.

    ``model`` and ``gguf_file`` say where the model is now, if no longer where the run found it; ``precision`` is that
    of the weights (default: as in training). Raises `InputError`.
    """

    def __init__(
        self, adapter: str, model: str | None = None, gguf_file: str | None = None, precision: str | None = None
    ) -> None:
        record = read_record(Path(adapter))
        if folders := list(record.get("adapters", {}).values()):
            names = ", ".join(folders[:3]) + (", ..." if len(folders) > 3 else "")
            raise InputError("adapter", f"{adapter!r} holds several runs; expected the folder of one of them: {names}")
        moved = {"model": model, "gguf_file": gguf_file, "precision": precision}
        try:
            self.config = TrainingConfig(**{**record["config"], **{k: v for k, v in moved.items() if v is not None}})
        except TypeError as error:
            raise InputError("adapter", f"the run in {adapter!r} is of another version: {error}") from None
        self.task = dataclasses.replace(self.config.task, verbaliser=record["verbaliser"], tasks=record.get("tasks"))
        self.tokenizer = adapters.load_tokenizer(self.config.model, self.config.gguf_file)
        base = adapters.load_base(self.config.model, self.config.gguf_file, self.config.precision)
        check_base(base, record.get("base"), self.config.model)
        self._data_sha256 = record["data_sha256"]
        self.model = adapters.load_adapter(base, adapter)

    def evaluate(self, data: str | None = None, task: str | None = None) -> dict:
        """`evaluation.evaluate` on the rows of a file, by default on those that the run held out; of a multitask run's
        on those of one ``task`` or of all."""
        if task is not None:
            self._task_id(task)
        examples = self._held_out() if data is None else self._examples(data)
        examples = [example for example in examples if task in (None, example.task)]
        if not examples:
            raise InputError("task", f"there are no rows of {task!r}")
        encoded = encode_examples(self.tokenizer, examples, self.config.max_length)
        return evaluate(self.model, self.tokenizer, self.task, examples, encoded)

    def _held_out(self):
        """The rows that the run held out, if they can still be told."""
        config = self.config
        if config.eval_data is None and config.eval_fraction is None:
            raise InputError("data", "the run held nothing out; expected a file")
        if data_sha256(config) != self._data_sha256:
            files = " or ".join(repr(path) for path in (config.data, config.eval_data) if path is not None)
            raise InputError(
                "data", f"{files} changed since the run, so the rows it held out are not known; expected a file"
            )
        return Data(config).held_out

    def _examples(self, data):
        """The rows of a file; what is wrong with them is wrong with the file."""
        rows = read_task_rows(self.config, data)
        try:
            return self.task.examples(rows)
        except InputError as error:
            raise InputError("data", f"{data!r}: {error.message}") from None

    def generate(
        self, prompt: str, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0, task: str | None = None
    ) -> str:
        """The text that follows ``prompt``: the most probable token each time (``temperature`` 0), or sampled.

        ``task`` is the prompt's task, where the run has several.
        """
        if max_new_tokens < 1:
            raise InputError("max_new_tokens", f"expected at least 1, got {max_new_tokens}")
        if not 0 <= temperature < math.inf:
            raise InputError("temperature", f"expected a finite number of at least 0, got {temperature}")
        if not 0 <= seed < SEEDS:
            raise InputError("seed", f"expected 0 to {SEEDS - 1}, got {seed}")
        inputs = self.tokenizer(prompt, return_tensors="pt").to(adapters.device())
        if not inputs["input_ids"].numel():
            raise InputError("prompt", f"expected a text of at least one token, got {prompt!r}")
        if self.config.method == "multitask":
            inputs["task_ids"] = torch.tensor([self._task_id(task)], device=adapters.device())
        elif task is not None:
            self._task_id(task)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        set_seed(seed)
        with torch.no_grad(), right_generation(self.model):
            output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
        return str(self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    def _task_id(self, task: str | None) -> int:
        if self.task.tasks is None and task is not None:
            raise InputError("task", f"the run has no tasks, got {task!r}")
        if self.task.tasks is not None and task not in self.task.tasks:
            raise InputError("task", f"expected one of {list(self.task.tasks)}, got {task!r}")
        return self.task.task_id(task)
