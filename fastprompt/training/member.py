"""One of the runs that train side by side."""

import math
from dataclasses import dataclass, field
from typing import Any

from .config import TrainingConfig
from .run_data import Data


@dataclass
class Progress:
    """How far a run is; what a checkpoint keeps of it beside its tensors.

    Attributes:
        losses, grad_norms: of every step.
        evaluations: ``step`` and the results, as in the log of a run of its own.
        left: why it trains no more: "finished", "stopped early", "dropped" by a sweep, or "diverged"; None: it trains.
        best_step, best_loss: the evaluation with the lowest loss.
        waited: the evaluations since then.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    left: str | None = None
    best_step: int | None = None
    best_loss: float = math.inf
    waited: int = 0


@dataclass(eq=False)
class Member:
    """A run among others: what it trains on, and how far it is.

    Attributes:
        name: what tells it from the others.
        config: the run of its own that it is equal to.
        data: its rows, encoded.
        progress: how far it is.
    """

    name: str
    config: TrainingConfig
    data: Data
    progress: Progress = field(default_factory=Progress)

    @property
    def step(self) -> int:
        """How many steps it has taken."""
        return len(self.progress.losses)

    def rows(self, step: int) -> list[dict]:
        """The rows of a step, from 0."""
        return [self.data.features[row] for row in self.data.batches[step]]

    def packed_rows(self, step: int) -> int:
        """How many rows the model runs for a step, from 0: those of the prompt and of the tokens."""
        prompt = 0 if self.config.method == "prefix-tuning" else self.config.num_virtual_tokens
        return prompt + sum(len(row["input_ids"]) for row in self.rows(step))

    def learning_rate(self, step: int) -> float:
        """That of a step, from 0, as transformers' schedules have it."""
        config, steps = self.config, self.data.steps
        if step < config.warmup:
            return config.learning_rate * step / config.warmup
        done = (step - config.warmup) / max(1, steps - config.warmup)
        factors = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        return config.learning_rate * max(0.0, factors[config.schedule])

    def evaluates_at(self, step: int) -> bool:
        """Does a run of its own evaluate after so many steps?"""
        if not self.data.held_out:
            return False
        return step == self.data.steps or (self.config.eval_steps is not None and step % self.config.eval_steps == 0)

    def note(self, evaluation: dict[str, Any]) -> bool:
        """Keep an evaluation; is it the best so far?"""
        progress = self.progress
        progress.evaluations.append(evaluation)
        if evaluation["eval_loss"] < progress.best_loss:
            progress.best_step, progress.best_loss, progress.waited = evaluation["step"], evaluation["eval_loss"], 0
            return True
        progress.waited += 1
        return False

    @property
    def history(self) -> list[dict[str, Any]]:
        """The log, as that of a run of its own: the steps, and each evaluation behind its step."""
        progress = self.progress
        steps: list[dict[str, Any]] = [
            {"loss": loss, "grad_norm": norm, "learning_rate": self.learning_rate(step), "step": step + 1}
            for step, (loss, norm) in enumerate(zip(progress.losses, progress.grad_norms))
        ]
        return sorted([*steps, *progress.evaluations], key=lambda entry: entry["step"])  # stable
