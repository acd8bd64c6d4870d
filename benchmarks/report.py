"""What every benchmark prints and writes: the machine, a table, CSV, a picture."""

import csv
import os
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch


@cache
def header():
    """One line on the machine, one on the versions, one on how it ran; the load is that of the first call."""
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    spin = f", GOMP_SPINCOUNT {os.environ['GOMP_SPINCOUNT']}" if "GOMP_SPINCOUNT" in os.environ else ""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return (
        f"{_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}\n"
        f"Python {platform.python_version()}, {packages}\n"
        f"{torch.get_num_threads()} threads{spin}{load}"
    )


def _processor():
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(columns, rows):
    """Rows of strings under ``columns`` as aligned text; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    lines = [columns, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def figure(width, height, title=None):
    """An empty matplotlib Figure under a title or the header; None, and a word, where matplotlib is not installed.

    Not pyplot, which would choose a window system for the whole process.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return None
    empty = Figure(figsize=(width, height), layout="constrained")
    empty.suptitle(title or header().replace("\n", " · "), fontsize=10 if title else 6)
    return empty


def write_csv(file, rows):
    """Dictionaries with the same keys, under comment lines with the header."""
    with open(file, "w", newline="") as stream:
        stream.writelines(f"# {line}\n" for line in header().splitlines())
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
