"""One prompt with several learning rates and seeds, side by side in the same batches; the best is kept."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import adapters
from .config import TrainingConfig
from .errors import InputError
from .files import replacing
from .member import Member
from .output import check_output
from .run_data import Data, data_sha256
from .side_by_side import SideBySide, check_side_by_side
from .tables import write_table
from .tasks import TrainedPrompt

BEST = "best"  # under a sweep's folder: the adapter that is kept


@dataclass(frozen=True)
class Candidate:
    """A candidate of a sweep: what it was tried with, and what became of it."""

    lr: float
    seed: int
    trained: TrainedPrompt

    def record(self) -> dict[str, Any]:
        """Its line in the table."""
        own = self.trained.record()
        return {"lr": self.lr, "seed": self.seed, **{name: own[name] for name in own if name not in ("name", "folder")}}


def sweep(
    config: TrainingConfig, lrs: Sequence[float], seeds: int = 1, halve_at: Sequence[int] | None = None
) -> list[Candidate]:
    """Train a prompt with each learning rate and each of several seeds, and keep the best.

    All candidates train side by side on the same rows in the same order, those of ``config`` with its ``data_seed``, or
    else its ``seed``. Each is equal to a run of its own that has its learning rate, its seed and that ``data_seed``,
    but for those that are dropped: after each step of ``halve_at`` the half with the higher held-out loss (successive
    halving). The best is that with the lowest held-out loss at its end. ``config.output`` gets its adapter, ``best``,
    and all candidates in ``candidates.csv`` and, where matplotlib is installed, ``candidates.png``.

    Args:
        config: the run; its ``lr`` is not read.
        lrs: the learning rates.
        seeds: how many, from ``config.seed`` on.
        halve_at: ascending numbers of steps; none: all candidates train to their end. None: so often that one is left,
            at equal distances.

    Returns:
        The candidates, the best first, those that did not reach their end last.

    Raises:
        InputError: an argument, the rows or the model cannot be used, before anything is written; at the end, if the
            loss of all candidates diverged.
    """
    halve_at = _checked(config, lrs, seeds, halve_at)
    folder = Path(config.output)
    config = replace(config, lr=None, data_seed=config.rows_seed)
    of_sweep = {"lr": list(lrs), "seeds": seeds, "halve_at": None if halve_at is None else list(halve_at)}
    record: dict[str, Any] = {"config": config.to_dict(), "data_sha256": data_sha256(config), "sweep": of_sweep}
    check_output(folder, record, config.resume)
    data = Data(config)
    tokenizer = adapters.load_tokenizer(config.model, config.gguf_file)
    data.encode(tokenizer)
    steps = _halvings(len(lrs) * seeds, data.steps) if halve_at is None else halve_at
    if steps and steps[-1] >= data.steps:
        raise InputError("halve_at", f"expected steps before the last of {data.steps}, got {steps[-1]}")
    members = [
        Member(f"lr {lr:g}, seed {seed}", _own(config, folder, lr, seed), data)
        for lr in lrs
        for seed in range(config.seed, config.seed + seeds)
    ]
    run = SideBySide(config, members, tokenizer, folder, steps)
    run.train({**record, "adapters": {BEST: BEST}})
    order = sorted(range(len(members)), key=lambda i: _rank(members[i]))
    found = members[order[0]].progress.left not in ("diverged", "dropped")
    candidates = []
    for place, i in enumerate(order):
        own = members[i].config
        trained = TrainedPrompt.of(members[i], BEST if found and place == 0 else None)
        candidates.append(Candidate(own.learning_rate, own.seed, trained))
    if found:
        run.save_adapter(order[0], folder / BEST, {"data_sha256": record["data_sha256"]})
    write_table(folder / "candidates.csv", [candidate.record() for candidate in candidates])
    if not found:
        raise InputError("lr", f"the loss diverged with all of {list(lrs)}; expected smaller ones")
    _plot(candidates, folder / "candidates.png")
    return candidates


def _checked(config, lrs, seeds, halve_at):
    """``halve_at`` as a tuple, or None; an argument that cannot be used raises."""
    check_side_by_side(config)
    if config.task_column is not None and config.only_task is None:
        raise InputError("task_column", "a sweep trains candidates for one prompt; expected only_task, or one lr")
    if config.eval_data is None and config.eval_fraction is None:
        raise InputError("eval_fraction", "candidates are compared on held-out rows; expected it or eval_data")
    if not lrs or len(set(lrs)) < len(lrs):
        raise InputError("lr", f"expected learning rates that differ, got {list(lrs)}")
    if seeds < 1:
        raise InputError("seeds", f"expected at least 1, got {seeds}")
    if halve_at is None:
        return None
    if list(halve_at) != sorted(set(halve_at)) or min(halve_at, default=1) < 1:
        raise InputError("halve_at", f"expected ascending steps from 1 on, got {list(halve_at)}")
    return tuple(halve_at)


def _own(config, folder, lr, seed):
    """The run of its own that a candidate is equal to."""
    return replace(config, lr=lr, seed=seed, output=str(folder / BEST), resume=False, prompts_per_step=None)


def _halvings(candidates: int, steps: int) -> tuple[int, ...]:
    """The steps after which to drop half, so often that one is left, at equal distances."""
    times = math.ceil(math.log2(candidates))
    return tuple(sorted({steps * k // (times + 1) for k in range(1, times + 1)} - {0}))


def _rank(member: Member) -> tuple[int, float]:
    """What candidates are sorted by: who came further, then the held-out loss."""
    progress = member.progress
    loss = progress.evaluations[-1]["eval_loss"] if progress.evaluations else math.inf
    if progress.left == "diverged":
        return member.data.steps + 1, loss
    return (member.data.steps - member.step if progress.left == "dropped" else 0), loss


def _plot(candidates: Sequence[Candidate], path: Path) -> None:
    """The losses of all candidates: smoothed in training, and at every evaluation."""
    if find_spec("matplotlib") is None:
        return
    # Not pyplot, which would choose a window system for the whole process.
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    lrs = sorted({candidate.lr for candidate in candidates})
    for candidate in reversed(candidates):
        best = candidate.trained.folder is not None
        style = {
            "color": f"C{lrs.index(candidate.lr) % 10}",
            "linewidth": 2.5 if best else 1,
            "alpha": 1 if best else 0.6,
        }
        history = candidate.trained.history
        losses = [entry["loss"] for entry in history if "loss" in entry]
        evaluations = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
        left.plot(range(1, len(losses) + 1), _smoothed(losses), **style)
        if evaluations:
            right.plot(*zip(*evaluations), "o-", markersize=3, **style)
    for lr in lrs:
        left.plot([], [], color=f"C{lrs.index(lr) % 10}", label=f"{lr:g}")
    left.set(xlabel="step", ylabel="training loss, smoothed")
    left.legend(title="lr")
    right.set(xlabel="step", ylabel="held-out loss", title=f"best: {candidates[0].trained.name}")
    with replacing(path) as aside:
        figure.savefig(aside, format="png", dpi=150)


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Running means that forget at a rate of 0.1."""
    means, mean, weight = [], 0.0, 0.0
    for loss in losses:
        mean, weight = 0.9 * mean + 0.1 * loss, 0.9 * weight + 0.1
        means.append(mean / weight)
    return means
