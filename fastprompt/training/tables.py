"""Tables of runs that trained side by side: a file, and what the command line shows."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .files import replacing

LINES = 40  # that are shown


def write_table(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Replace ``path`` by a table (CSV) with a line for each record."""
    with replacing(path) as aside, aside.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def show_table(title: str, records: Sequence[dict[str, Any]]) -> None:
    """Show the first records on standard error, without columns in which nothing stands."""
    columns = [name for name in records[0] if any(record[name] is not None for record in records)]
    table = Table(title=title, title_justify="left")
    for name in columns:
        text = any(isinstance(record[name], str) for record in records)
        table.add_column(name.replace("_", " "), justify="left" if text else "right", overflow="fold")
    for record in records[:LINES]:
        table.add_row(*(_cell(record[name]) for name in columns))
    console = Console(stderr=True)
    console.print(table)
    if len(records) > LINES:
        console.print(f"and {len(records) - LINES} more")


def _cell(value):
    if value is None:
        return ""
    # Not markup: a task's name may hold brackets.
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("[", r"\[")
