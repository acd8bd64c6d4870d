"""What the check on a GPU finds: one row a measurement, its speed-ups, and the two files that are written of it."""

import json
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from statistics import median

OPPONENT = {"attention": "SDPA", "step": "PEFT"}
NO_RIVAL = ("floor", "LoRA")  # they do less or other work


@dataclass
class Row:
    """One measurement.

    Attributes:
        section, case, provider: what was measured.
        error: how far its worst result is from the float64 reference, over the budget; None: nothing to check.
        ms: milliseconds of every round; empty for a check alone.
        mib: peak memory in MiB, where it was measured.
        note: why it did not run, or anything to add.
    """

    section: str
    case: str
    provider: str
    error: float | None = None
    ms: list = field(default_factory=list)
    mib: float | None = None
    note: str = ""

    @property
    def right(self):
        return self.error is not None and self.error <= 1  # False for nan


def speed_ups(rows):
    """``{(section, case): (opponent, times faster)}`` where ours and the opponent are right.

    The opponent is the one that the section names, or the fastest.
    """
    found = {}
    for row in rows:
        if row.provider != "fastprompt" or not row.right or not row.ms:
            continue
        opponent = _opponent(row, rows)
        if opponent is not None:
            found[row.section, row.case] = opponent.provider, median(opponent.ms) / median(row.ms)
    return found


def _opponent(row, rows):
    """What a row is compared with; None if nothing else of its case is right and timed."""
    others = [
        other
        for other in rows
        if other is not row
        and (other.section, other.case) == (row.section, row.case)
        and other.right
        and other.ms
        and other.provider not in NO_RIVAL
    ]
    for other in others:
        if other.provider == OPPONENT.get(row.section):
            return other
    return min(others, key=lambda other: median(other.ms), default=None)


def failures(rows):
    """Our rows that were checked and are wrong."""
    return [row for row in rows if row.provider == "fastprompt" and row.error is not None and not row.right]


def markdown(rows, header):
    """All rows as a table under the device's name."""
    faster = speed_ups(rows)
    lines = [
        f"# {header['device']}",
        "",
        ", ".join(f"{name} {value}" for name, value in header.items() if name != "device"),
        "",
        "Error: of output and gradients against float64, over the budget; at most 1 is right. "
        "Speed-ups only where both are right.",
        "",
        "| section | case | provider | error / budget | ms (min to max) | peak MiB | speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (row.section, row.case, row.provider, _error(row), _times(row), _memory(row), _gain(row, faster))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _error(row):
    if row.error is None:
        return "not checked"
    return f"{row.error:.2f}" if row.right else f"WRONG {row.error:.2g}"


def _times(row):
    return f"{median(row.ms):.3f} ({min(row.ms):.3f} to {max(row.ms):.3f})" if row.ms else row.note


def _memory(row):
    return "" if row.mib is None else f"{row.mib:.0f}"


def _gain(row, faster):
    if row.provider != "fastprompt" or not row.ms:
        return ""
    if (row.section, row.case) not in faster:
        return "none given"
    opponent, ratio = faster[row.section, row.case]
    return f"{ratio:.2f}x over {opponent}"


def versions():
    """Python's and the packages' versions by name."""
    found = {"Python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "peft", "flash-attn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def write(rows, header, out):
    """``<device>.json`` and ``<device>.md``; returns the latter's text."""
    out.mkdir(parents=True, exist_ok=True)
    name = header["device"].replace(" ", "_").replace("/", "_")
    text = markdown(rows, header)
    records = [vars(row) | {"right": row.right} for row in rows]
    (out / f"{name}.json").write_text(json.dumps({"header": header, "rows": records}, indent=1))
    (out / f"{name}.md").write_text(text)
    return text
