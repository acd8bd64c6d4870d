"""A prompt for each value of a column, all of them trained side by side."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import adapters
from .config import TrainingConfig
from .data import read_rows, rows_by_task
from .errors import InputError
from .member import Member
from .output import check_output
from .run_data import Data, data_sha256
from .side_by_side import SideBySide, check_side_by_side
from .tables import write_table

ADAPTERS = "adapters"  # under a run's folder: those of its prompts
_LONGEST_NAME = 60
# Names that Windows keeps for devices, with any extension.
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class TrainedPrompt:
    """What became of one of the prompts that were trained side by side.

    Attributes:
        name: the value of the task column, or of a sweep the candidate.
        folder: where its adapter is; None if it has none.
        ended: "finished", "stopped early", "dropped" or "diverged".
        steps: how many it took.
        kept_step: the one whose prompt was kept.
        eval_loss, eval_accuracy: of that prompt on the held-out rows, if there are any, and if they are labelled.
        history: its log, as of a run of its own.
    """

    name: str
    folder: str | None
    ended: str
    steps: int
    kept_step: int
    eval_loss: float | None
    eval_accuracy: float | None
    history: list[dict[str, Any]]

    @classmethod
    def of(cls, member: Member, folder: str | None) -> "TrainedPrompt":
        """That of a member that has ended."""
        progress = member.progress
        last = progress.evaluations[-1] if progress.evaluations else {}
        kept = last.get("kept_step", member.step)
        scores = last.get("eval_loss"), last.get("eval_accuracy")
        return cls(member.name, folder, progress.left or "", member.step, kept, *scores, member.history)

    def record(self) -> dict[str, Any]:
        """Its line in a table: all but the log."""
        return {name: value for name, value in vars(self).items() if name != "history"}


def train_tasks(config: TrainingConfig) -> list[TrainedPrompt]:
    """Train a prompt for each value of ``config.task_column``, side by side in the same batches.

    Each ends as a run of its own with ``only_task`` would: from the same start, on the same rows in the same order, its
    learning rate by its own number of steps. ``config.output`` gets ``adapters/NAME`` for each (PEFT's adapter,
    ``run.json`` and ``log.json``; a value with characters that make no folder's name has others in their place) and
    ``adapters.csv``, which says whose is where.

    Raises:
        InputError: the configuration, the rows or the model cannot be used, before anything is written; at the end, if
            the loss of some diverged. The others have their adapters then.
    """
    if config.task_column is None or config.only_task is not None:
        raise InputError("task_column", "expected the column whose values have a prompt each, and no only_task")
    check_side_by_side(config)
    folder = Path(config.output)
    record: dict[str, Any] = {"config": config.to_dict(), "data_sha256": data_sha256(config)}
    check_output(folder, record, config.resume)
    members = _members(config, folder)
    tokenizer = adapters.load_tokenizer(config.model, config.gguf_file)
    for member in members:
        _of_task(member.name, member.data.encode, tokenizer)
    run = SideBySide(config, members, tokenizer, folder)
    folders = {member.name: f"{ADAPTERS}/{Path(member.config.output).name}" for member in members}
    run.train({**record, "adapters": folders})
    trained = []
    for i, member in enumerate(members):
        diverged = member.progress.left == "diverged"
        if not diverged:
            run.save_adapter(i, Path(member.config.output), {"data_sha256": record["data_sha256"]})
        trained.append(TrainedPrompt.of(member, None if diverged else folders[member.name]))
    write_table(folder / "adapters.csv", [prompt.record() for prompt in trained])
    if lost := [member.name for member in members if member.progress.left == "diverged"]:
        raise InputError("lr", f"the loss diverged of {_some(lost)}; expected a smaller one. The others are written")
    return trained


def train_keeping_best(config: TrainingConfig) -> list[dict[str, Any]]:
    """Train one prompt, and leave that of its best evaluation in ``config.output``, as `TrainingRun.train` the last.

    Returns the log. Raises `InputError`.
    """
    if config.task_column is not None and config.only_task is None:
        raise InputError("task_column", "its values have a prompt each; expected only_task, or train_tasks for all")
    if config.prompts_per_step is not None:
        raise InputError("prompts_per_step", f"one prompt trains here, got {config.prompts_per_step}")
    check_side_by_side(config)
    folder = Path(config.output)
    record: dict[str, Any] = {"config": config.to_dict(), "data_sha256": data_sha256(config)}
    check_output(folder, record, config.resume)
    data = Data(config)
    tokenizer = adapters.load_tokenizer(config.model, config.gguf_file)
    data.encode(tokenizer)
    member = Member("the run", config, data)
    run = SideBySide(config, [member], tokenizer, folder)
    run.train(record)
    if member.progress.left == "diverged":
        raise InputError("lr", f"the loss diverged at step {member.step + 1}; expected a smaller one")
    run.save_adapter(0, folder, record)
    return member.history


def _members(config: TrainingConfig, folder: Path) -> list[Member]:
    """The runs of all values, their rows as text."""
    column = str(config.task_column)
    rows = rows_by_task(read_rows(config.data), column)
    held_out = None if config.eval_data is None else rows_by_task(read_rows(config.eval_data, "eval_data"), column)
    if config.eval_fraction is not None and (few := [task for task, own in rows.items() if len(own) < 2]):
        raise InputError("eval_fraction", f"expected at least 2 rows of each task to split, got 1 of {_some(few)}")
    if held_out is not None and (missing := [task for task in rows if task not in held_out]):
        raise InputError("eval_data", f"expected rows of each task, got none of {_some(missing)}")
    members = []
    for task, name in folder_names(rows).items():
        own = replace(config, only_task=task, output=str(folder / ADAPTERS / name), resume=False, prompts_per_step=None)
        data = _of_task(task, Data, own, rows[task], None if held_out is None else held_out[task])
        members.append(Member(task, own, data))
    return members


def _of_task(task, function, *arguments):
    """What ``function`` gives; an error of it says which task it is of."""
    try:
        return function(*arguments)
    except InputError as error:
        if repr(task) in error.message:
            raise
        raise InputError(error.argument, f"task {task!r}: {error.message}") from None


def _some(names: Sequence[str]) -> str:
    """The first few of some names."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more


def folder_names(values: Iterable[str]) -> dict[str, str]:
    """For each value the name of a folder, on any file system, no two of them the same.

    Letters of any script, digits, ``.``, ``-`` and ``_`` stay, everything else becomes ``_``; at most 60 characters. Of
    values that would have one name, or names that differ in case only, the second ends in ``-2``, and so on.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for value in values:
        clean = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", value)).strip("._")[:_LONGEST_NAME] or "task"
        if _RESERVED.fullmatch(clean):
            clean += "_"
        name, number = clean, 1
        while _folded(name) in taken:
            number += 1
            name = f"{clean}-{number}"
        taken.add(_folded(name))
        names[value] = name
    return names


def _folded(name: str) -> str:
    """The same for names that some file systems take for one."""
    return unicodedata.normalize("NFKD", name).casefold()
