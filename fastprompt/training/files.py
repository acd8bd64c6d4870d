"""Files and folders that are either complete or not there, whenever the process is killed."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError

RUN_FILE = "run.json"  # the configuration; marks a folder as the output of a run
STAGING = ".incomplete"  # under a run's folder: what is being written, or being deleted


def write_json(path: Path, value: object) -> None:
    """Replace ``path`` by ``value`` as JSON in one step."""
    with replacing(path) as aside:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        aside.write_text(text + "\n", encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write aside, which on leaving takes the place of ``path`` in one step. After an error it does not."""
    aside = path.with_name(f".{path.name}.incomplete")
    yield aside
    _sync(aside)
    os.replace(aside, path)
    _sync(path.parent)


def read_record(folder: Path, argument: str = "adapter") -> dict:
    """What ``run.json`` in a run's folder holds: ``config``, ``verbaliser``, ``tasks``, ``data_sha256``, ``versions``.

    ``argument`` is the name that errors give the folder.
    """
    try:
        record = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(argument, f"{str(folder)!r} holds no {RUN_FILE}; expected the output of a run") from None
    except (OSError, ValueError) as error:
        raise InputError(argument, f"{RUN_FILE} in {str(folder)!r} cannot be read: {error}") from None
    if not isinstance(record, dict) or not {"config", "verbaliser", "data_sha256"} <= record.keys():
        raise InputError(argument, f"{RUN_FILE} in {str(folder)!r} is not that of a run")
    return record


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """An empty folder to write into. On leaving, all that it holds is on the disk, then moves into ``folder``.

    A folder moves as a whole and must not exist there yet; a file replaces its namesake. After an error nothing moves.
    """
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    for path in [*staging.rglob("*"), staging]:
        _sync(path)
    for path in sorted(staging.iterdir(), reverse=True):
        os.replace(path, folder / path.name)
    _sync(folder)
    staging.rmdir()


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint; killed half-way, none by its name is left."""
    staging = path.parent / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    os.replace(path, staging)
    shutil.rmtree(staging)


def _sync(path: Path) -> None:
    # A folder's entry for a file reaches the disk with the folder, not with the file. Windows can't open folders.
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
