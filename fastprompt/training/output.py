"""The folder that a run writes into, and what it must not change when it goes on there."""

import os
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import RUN_FILE, read_record

# What a run may change when it is resumed: nothing here reaches the weights.
FREE_ON_RESUME = {"output", "resume", "save_steps", "keep_checkpoints", "eval_steps", "eval_rows"}


def check_output(folder: Path, record: dict[str, Any], resume: bool) -> None:
    """Raise an `InputError` unless ``folder`` can be written into, and is empty or holds the run ``record`` to resume.

    ``record`` is what will stand in ``run.json`` there: ``config``, ``data_sha256``, and others that must be the same.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError("output", f"{str(there)!r} is a file; expected a folder, which may be missing")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError("output", f"{str(there)!r} cannot be written into")
    # What starts with a dot may be left of a run that was killed before it wrote anything else.
    if not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir()):
        return
    if not (folder / RUN_FILE).is_file():
        raise InputError("output", f"{str(folder)!r} holds other files; expected an empty folder or a run to resume")
    if not resume:
        raise InputError("output", f"{str(folder)!r} already holds a run; expected another folder, or resume")
    before = read_record(folder, "output")
    mine, theirs = record["config"], before["config"]
    free = FREE_ON_RESUME
    if mine["keep_best"] or mine["patience"] is not None:  # then the evaluations choose the weights
        free = free - {"eval_steps", "eval_rows"}
    for name in mine:
        if name not in free and mine[name] != theirs.get(name, False if name == "keep_best" else None):
            raise InputError(name, f"the run to resume in {str(folder)!r} has {theirs.get(name)!r}, got {mine[name]!r}")
    if record.get("sweep") != before.get("sweep"):
        raise InputError("lr", f"the run to resume has the sweep {before.get('sweep')}, got {record.get('sweep')}")
    if record["data_sha256"] != before["data_sha256"]:
        raise InputError("data", "its contents changed since the run to resume began")


@cache
def versions() -> dict[str, str]:
    """Of what a run's numbers depend on."""
    return {name: version(name) for name in ("torch", "transformers", "peft")}
