"""From a file of rows to prompts and completions, in text."""

import csv
import json
import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .errors import InputError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LONGEST_FIELD = 2**30  # characters; the csv module's own limit is 128 KiB


def read_rows(path: str, argument: str = "data") -> list[dict[str, str]]:
    """Rows of a ``.csv``, ``.tsv`` (both with a header line) or ``.jsonl`` file (one object a line), UTF-8.

    Values come back as text, and a null as a missing column. ``argument`` is the name that errors give the path.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix not in (*DELIMITERS, ".jsonl"):
        raise InputError(argument, f"{path!r} ends in {suffix!r}; expected .csv, .tsv or .jsonl")
    if not file.is_file():
        raise InputError(argument, f"{path!r} is not a file")
    try:
        rows = _read_jsonl(file, argument) if suffix == ".jsonl" else _read_table(file, DELIMITERS[suffix], argument)
    except UnicodeDecodeError as error:
        raise InputError(argument, f"{path!r} is not UTF-8: {error}") from error
    if not rows:
        raise InputError(argument, f"{path!r} holds no rows")
    return rows


def _read_table(file: Path, delimiter: str, argument: str) -> list[dict[str, str]]:
    # utf-8-sig: spreadsheets write a byte-order mark, which would otherwise become part of the first column's name.
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, delimiter=delimiter)
            names = list(reader.fieldnames or ())
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise InputError(argument, f"{str(file)!r} has several columns named {', '.join(map(repr, twice))}")
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    expected = f"expected {len(names)} fields as in the header"
                    raise InputError(argument, f"{str(file)!r}, line {reader.line_num}: {expected}")
                rows.append(row)
    except csv.Error as error:
        raise InputError(argument, f"{str(file)!r}, line {reader.line_num + 1}: {error}") from None
    finally:
        csv.field_size_limit(before)
    return rows


def _read_jsonl(file: Path, argument: str) -> list[dict[str, str]]:
    rows = []
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, parse_constant=_no_constant, object_pairs_hook=_no_name_twice)
            except (ValueError, RecursionError) as error:
                raise InputError(argument, f"{str(file)!r}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise InputError(
                    argument, f"{str(file)!r}, line {number}: expected an object, got {line.strip()[:40]!r}"
                )
            rows.append({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items() if v is not None})
    return rows


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no value; a missing one is null")


def _no_name_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"a name stands twice among {names}")
    return dict(pairs)


def rows_by_task(rows: Sequence[dict[str, str]], column: str, source: str = "data") -> dict[str, list[dict[str, str]]]:
    """The rows of each value of a column, the values sorted. ``source`` is what errors call the rows."""
    found: dict[str, list[dict[str, str]]] = {}
    for name, row in _named(rows, source):
        found.setdefault(_name(row, column, "task_column", name), []).append(row)
    return {task: found[task] for task in sorted(found)}


def split_rows(rows: Sequence, fraction: float, seed: int) -> tuple[list, list]:
    """``(train, held_out)``: a seeded shuffle, then ``fraction`` of the rows held out (at least one of each)."""
    if len(rows) < 2:
        raise InputError("eval_fraction", f"expected at least 2 rows to split, got {len(rows)}")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    cut = len(rows) - min(max(round(fraction * len(rows)), 1), len(rows) - 1)
    return [rows[i] for i in order[:cut]], [rows[i] for i in order[cut:]]


@dataclass(frozen=True)
class Example:
    """One row as text. ``label`` is the row's class, or None where completions are free text; ``task`` is the task it
    belongs to, or None where there is only one; ``row`` says which row of which file it was."""

    prompt: str
    completion: str
    label: str | None = None
    task: str | None = None
    row: str = field(default="row", compare=False)


@dataclass(frozen=True)
class Task:
    """How a row becomes an `Example`.

    Either ``text_column`` and ``label_column``: the prompt is ``template`` with ``{text}`` (and any other
    ``{column}``) filled in, the completion is the label's word. Or ``prompt_column`` and ``completion_column``: both
    are used as they stand. ``verbaliser`` maps a label to its word; without one a label is its own word.
    ``task_column`` names the task of each row where a file mixes several; ``tasks`` are the labels of each of them.
    """

    text_column: str | None = None
    label_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    template: str = "{text}"
    verbaliser: dict[str, str] | None = None
    task_column: str | None = None
    tasks: dict[str, list[str]] | None = None

    def __post_init__(self) -> None:
        classify = (self.text_column, self.label_column)
        complete = (self.prompt_column, self.completion_column)
        if not (all(classify) and not any(complete)) and not (all(complete) and not any(classify)):
            given = [f"{name}={getattr(self, name)!r}" for name in COLUMNS if getattr(self, name)]
            raise InputError(
                "text_column",
                "expected text_column and label_column, or prompt_column and completion_column; "
                f"got {', '.join(given) or 'none of them'}",
            )
        try:
            fields = [field for _, field, _, _ in string.Formatter().parse(self.template) if field is not None]
        except ValueError as error:
            raise InputError("template", f"{self.template!r}: {error}") from error
        if not fields:
            raise InputError("template", f"{self.template!r} has no field; expected {{text}} or another {{column}}")
        if self.verbaliser is not None:
            if not self.is_classification:
                raise InputError("verbaliser", "only labels have words; expected text_column and label_column")
            words = list(self.verbaliser.values())
            if len(set(words)) < len(words) or not all(word.strip() for word in words):
                raise InputError("verbaliser", f"expected a different, non-empty word for each label, got {words}")

    @property
    def is_classification(self) -> bool:
        return self.label_column is not None

    @property
    def _words(self) -> dict[str, str]:
        """The verbaliser; empty before `with_words_of`."""
        return self.verbaliser or {}

    def with_words_of(self, rows: Sequence[dict[str, str]], source: str = "data") -> "Task":
        """This task with its verbaliser filled in: each distinct label of ``rows`` is its own word."""
        if self.verbaliser is not None or not self.is_classification:
            return self
        labels = {_name(row, self.label_column, "label_column", name) for name, row in _named(rows, source)}
        return replace(self, verbaliser={label: label for label in sorted(labels)})

    def with_tasks_of(self, rows: Sequence[dict[str, str]], source: str = "data") -> "Task":
        """This task with ``tasks`` filled in: the sorted tasks of ``rows``, with the sorted labels of each."""
        if self.task_column is None:
            return self
        labels: dict[str, set[str]] = {}
        for name, row in _named(rows, source):
            seen = labels.setdefault(_name(row, self.task_column, "task_column", name), set())
            if self.is_classification:
                seen.add(_name(row, self.label_column, "label_column", name))
        return replace(self, tasks={task: sorted(labels[task]) for task in sorted(labels)})

    def task_id(self, task: str | None) -> int:
        """The number of a task among ``tasks``; 0 where there is only one."""
        return 0 if self.tasks is None or task is None else list(self.tasks).index(task)

    def labels(self, task: str | None) -> list[str]:
        """The labels to choose from in a task."""
        return list(self._words) if self.tasks is None or task is None else self.tasks[task]

    def examples(self, rows: Sequence[dict[str, str]], source: str = "data") -> list[Example]:
        """The rows as text. The verbaliser and the tasks must be known (`with_words_of`, `with_tasks_of`); ``source``
        is what errors call the rows."""
        make = self._classification if self.is_classification else self._completion
        return [make(row, name) for name, row in _named(rows, source)]

    def prompt(self, text: str, row: dict[str, str] | None = None) -> str:
        """The prompt of a text. Spaces at its end are left to the word that follows, where tokenizers expect them."""
        try:
            return self.template.format(**{**(row or {}), "text": text}).rstrip(" ")
        except (KeyError, IndexError) as error:
            columns = ["text", *(row or {})]
            raise InputError("template", f"{self.template!r} asks for {error}; expected fields of {columns}") from error

    def completion(self, prompt: str, label: str) -> str:
        """The text that a label adds to its prompt."""
        return ("" if prompt.endswith("\n") else " ") + self._words[label]

    def _classification(self, row: dict[str, str], name: str) -> Example:
        prompt = self.prompt(_value(row, self.text_column, "text_column", name), row)
        label = _name(row, self.label_column, "label_column", name)
        if label not in self._words:
            raise InputError("verbaliser", f"{name} has label {label!r}; expected one of {list(self._words)}")
        task = self._task(row, name)
        if task is not None and label not in self.labels(task):
            raise InputError("label_column", f"{name} has label {label!r}; task {task!r} has {self.labels(task)}")
        return Example(prompt, self.completion(prompt, label), label, task, name)

    def _completion(self, row: dict[str, str], name: str) -> Example:
        prompt = _value(row, self.prompt_column, "prompt_column", name)
        completion = _value(row, self.completion_column, "completion_column", name)
        return Example(prompt, completion, task=self._task(row, name), row=name)

    def _task(self, row: dict[str, str], name: str) -> str | None:
        if self.task_column is None:
            return None
        task = _name(row, self.task_column, "task_column", name)
        tasks = list(self.tasks or ())
        if task not in tasks:
            raise InputError("task_column", f"{name} has task {task!r}; expected one of {tasks}")
        return task


COLUMNS = ("text_column", "label_column", "prompt_column", "completion_column")


def _named(rows: Sequence[dict[str, str]], source: str) -> Iterator[tuple[str, dict[str, str]]]:
    return ((f"row {number} of {source}", row) for number, row in enumerate(rows, start=1))


def _value(row: dict[str, str], column: str | None, argument: str, name: str) -> str:
    if column not in row:
        raise InputError(argument, f"{name} has no column {column!r}; expected one of {list(row)}")
    if not row[column].strip():
        raise InputError(argument, f"{name}: column {column!r} is empty")
    return row[column]


def _name(row: dict[str, str], column: str | None, argument: str, name: str) -> str:
    """A label or a task, which spaces around it make no other one."""
    return _value(row, column, argument, name).strip()
