"""``python -m benchmarks.gpu.check``: everything that only a GPU can tell, in under ten minutes.

Correctness first: the Triton tests on the GPU, compute-sanitizer where it is installed, and every operator at real
sizes against the float64 reference. Then times: the operators beside SDPA, FlexAttention, flash-attn and nn.LSTM
(cuDNN), and whole training steps beside PEFT, with their peak memory. A speed-up is printed only next to a passed
check. Writes one JSON and one markdown table with the device's name into ``benchmarks/gpu/results/``. Exits with 1 if a
check failed, with 2 where there is no GPU.
"""

import argparse
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from .. import report
from . import operators, record
from .record import Row
from .rivals import ours
from .steps import steps

HERE = Path(__file__).parent


def outside(name, command, timeout):
    """One row for a program that checks: its exit status, and the last line it wrote."""
    try:
        done = subprocess.run(
            command, cwd=HERE.parents[1], timeout=timeout, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except subprocess.TimeoutExpired:
        return Row("checks", name, "fastprompt", float("inf"), note=f"not finished after {timeout} s")
    error = 0.0 if done.returncode == 0 else float("inf")
    lines = done.stdout.strip().splitlines()
    return Row("checks", name, "fastprompt", error, note=lines[-1][:160] if lines else "")


def programs():
    """Rows of the Triton tests on the GPU, and of compute-sanitizer over small calls of every kernel."""
    rows = [outside("Triton tests", [sys.executable, "-m", "pytest", "-q", "tests/gpu"], 180)]
    tool = shutil.which("compute-sanitizer")
    if not tool:
        return [*rows, Row("checks", "compute-sanitizer", "fastprompt", note="not installed, not run")]
    small = [sys.executable, "-m", "benchmarks.gpu.check", "--small"]
    for kind in ("memcheck", "racecheck"):
        rows.append(outside(f"compute-sanitizer {kind}", [tool, "--tool", kind, "--error-exitcode", "1", *small], 90))
    return rows


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.check", description="Correctness and speed on a GPU."
    )
    parser.add_argument("--small", action="store_true", help="only small calls of every operator, nothing is written")
    parser.add_argument("--out", type=Path, default=HERE / "results", metavar="DIR")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "This check needs a GPU that torch can use, and there is none here. Without one: make gpu-evidence.",
            file=sys.stderr,
        )
        return 2
    # fp32 is compared with float64.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if options.small:
        # Not the compilation of a rival.
        rows = operators.small("cuda", lambda problem: {"fastprompt": ours(problem)})
    else:
        rows = _everything(options.out)
    failed = record.failures(rows)
    for row in failed:
        print(f"FAILED {row.section}: {row.case}, error {row.error:.2g} of its budget {row.note}", file=sys.stderr)
    return 1 if failed else 0


def _everything(out):
    """Run all parts, print and write their rows."""
    start = time.perf_counter()
    on_gpu = (operators.attention, operators.decoding, operators.rows_and_prompts, operators.lstm, steps)
    rows = []
    for part in (programs, *(partial(function, "cuda") for function in on_gpu)):
        rows += part()
        print(f"{len(rows)} results after {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    header = {
        "device": torch.cuda.get_device_name(),
        **record.versions(),
        "CUDA": torch.version.cuda,
        "host": report.header().splitlines()[0],
        "took": f"{time.perf_counter() - start:.0f} s",
    }
    print(record.write(rows, header, out))
    return rows


if __name__ == "__main__":
    sys.exit(main())
