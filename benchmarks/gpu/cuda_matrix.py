"""``python -m benchmarks.gpu.cuda_matrix``: compile csrc/cuda with nvcc for every target, and read what ptxas says.

Needs nvcc and no GPU; without nvcc it says so and succeeds. Exits with 1 and names the kernels where one spills, has a
stack, or has more registers than its threads leave it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import output

OUT = Path(__file__).parent / "cuda_matrix.csv"
CUDA = Path(__file__).parents[2] / "csrc/cuda"
REGISTERS = 65536  # of a multiprocessor, on all targets
THREADS = 256  # of a block, csrc/cuda/prompt_lstm.h

_KERNEL = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for '(?P<target>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
_DTYPES = {"f": "fp32", "13__nv_bfloat16": "bf16", "6__half": "fp16"}
_NAME = re.compile(
    r"10recurrenceI.*?(?P<pass>Forward|Backward)E(?P<dtype>f|13__nv_bfloat16|6__half)"
    r"NS\w+?(?P<exchange>Cluster|Grid)Exchange"
)


def compiled():
    """What ptxas writes about csrc/cuda/prompt_lstm.cu, for one target after the other."""
    flags = (CUDA / "nvcc.txt").read_text().split()
    targets = [flag for flag in flags if flag.startswith("-gencode")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return "".join(
            pool.map(compile_for, [[flag for flag in flags if flag not in targets or flag == one] for one in targets])
        )


def compile_for(flags):
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *flags, "-Xptxas=-v", "-c", CUDA / "prompt_lstm.cu", "-o", Path(folder, "prompt_lstm.o")]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"csrc/cuda does not compile:\n{done.stderr}")
    return done.stderr


def records(text):
    """One row a kernel and target."""
    rows = []
    for found in _KERNEL.finditer(text):
        name = _NAME.search(found["symbol"])
        if name is None:
            raise ValueError(f"unknown kernel {found['symbol']}")
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        spills = int(found["stores"]) + int(found["loads"])
        registers = int(found["registers"])
        bad = [f"spills {spills} bytes"] if spills else []
        bad += [f"has a stack of {found['stack']} bytes"] if int(found["stack"]) else []
        bad += [f"needs {registers} registers a thread"] if -(-registers // 8) * 8 * THREADS > REGISTERS else []
        rows.append({
            "op": "prompt_lstm", "direction": name["pass"].lower(), "dtype": _DTYPES[name["dtype"]],
            "exchange": name["exchange"].lower(), "target": found["target"], "threads": THREADS, "registers": registers,
            "spills": spills, "stack": int(found["stack"]), "static shared bytes": int(shared[1]) if shared else 0,
            "verdict": "; ".join(bad) or "ok",
        })  # fmt: skip
    order = sorted({row["target"] for row in rows}, key=lambda name: int(re.search(r"\d+", name)[0]))
    return sorted(rows, key=lambda row: (*list(row.values())[:4], order.index(row["target"])))


def show(rows, console):
    """Registers of every kernel, a column a target."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    table = Table(title="registers of a thread", box=None, header_style="bold", pad_edge=False)
    for name in ("direction", "dtype", "exchange", *targets):
        table.add_column(name, justify="right" if name in targets else "left")
    kernels = {}
    for row in rows:
        key = row["direction"], row["dtype"], row["exchange"]
        kernels.setdefault(key, {})[row["target"]] = row["registers"]
    for key, registers in kernels.items():
        table.add_row(*key, *(str(registers[target]) for target in targets))
    console.print(table)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.cuda_matrix",
        description="Compile the CUDA kernels for every target. Needs nvcc, no GPU.",
    )
    parser.add_argument("--out", type=Path, default=OUT, help="CSV")
    options = parser.parse_args(arguments)
    if not shutil.which("nvcc"):
        print("The CUDA kernels are not compiled: there is no nvcc on PATH.")
        return 0
    start = time.perf_counter()
    rows = records(compiled())
    version = re.search(
        r"release [\d.]+, V([\d.]+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    )
    output.write_csv(
        options.out,
        rows,
        [
            f"nvcc {version[1]}, compiled without a GPU: no kernel ran.",
            "The cluster kernels of sm_80 are empty of clusters and never chosen. "
            "Dynamic shared memory depends on the hidden size:",
            "lstm_predictions.csv has it.",
        ],
    )
    console = Console(width=None if sys.stdout.isatty() else 120)
    show(rows, console)
    wrong = [row for row in rows if row["verdict"] != "ok"]
    for row in wrong:
        console.print(
            f"FAILED {' '.join(str(value) for value in list(row.values())[:5])}: {row['verdict']}", style="red"
        )
    console.print(f"{len(rows)} kernels, {len(wrong)} failed, {time.perf_counter() - start:.0f} s")
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
