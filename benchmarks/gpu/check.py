"""``python -m benchmarks.gpu.check``: everything that only a GPU can tell, in under ten minutes.

Every operator at real sizes against the float64 reference, with times beside SDPA, FlexAttention, flash-attn, nn.LSTM
(cuDNN) and PyTorch's own operations; every feature of attention; whole training steps beside PEFT, with their peak
memory. A speed-up is printed only next to a passed check. Then the Triton tests on the GPU, as many as there is time
for, and compute-sanitizer where it is installed. Last, tiles are tuned for the most used head dim, into a table of its
own beside the results. Each part is a process of its own: a kernel that writes where it must not breaks all later calls
of its process, and one that hangs is killed. One JSON and one markdown table with the device's name are written into
``benchmarks/gpu/results/`` after every part, so that what was found is there whatever a later part does. Exits with 1
if a check failed, with 2 where there is no GPU.
"""

import argparse
import shutil
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import torch

from .. import report
from . import operators, record
from .apart import apart
from .features import caches, features
from .layers import layers, loss
from .record import Row
from .rivals import ours
from .steps import steps

HERE = Path(__file__).parent
# No part is started after this many seconds, and none takes longer than the other, so all end in ten minutes.
TIME_LIMIT, LONGEST = 420, 180
ON_GPU = (operators.attention, features, operators.decoding, caches, operators.plans, operators.rows_and_prompts,
          layers, loss, operators.lstm, steps)  # fmt: skip
WHAT_TO_DO = """
What to do with a failure. "Triton tests": python -m pytest -x tests/gpu shows the first call that is wrong. An operator
or a step: its backend is wrong on this GPU; backend="reference" computes the same without it. compute-sanitizer: run it
on python -m benchmarks.gpu.check --small by hand for the lines concerned. Please report the JSON file of
benchmarks/gpu/results with it: it names the device and all versions."""


def on_gpu(part):
    """What ``part("cuda")`` gives with products of fp32 that are exact, as they are compared with float64."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return part("cuda")


def outside(name, command, timeout):
    """One row for a program that checks: its exit status, and the last line it wrote. One that has not ended in time,
    though it ends with the first failure, has found none and says so."""
    try:
        done = subprocess.run(
            command, cwd=HERE.parents[1], timeout=timeout, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except subprocess.TimeoutExpired:
        return Row("checks", name, "fastprompt", note=f"no failure in {timeout} s, and not finished")
    error = 0.0 if done.returncode == 0 else float("inf")
    lines = done.stdout.strip().splitlines()
    return Row("checks", name, "fastprompt", error, note=lines[-1][:160] if lines else "")


def tests():
    """One row of the Triton tests on the GPU, which compile hundreds of small variants."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "logical", "--maxprocesses", "8", "tests/gpu"]
    return [outside("Triton tests", command, LONGEST)]


def sanitizer():
    """Rows of compute-sanitizer over small calls of every kernel."""
    tool = shutil.which("compute-sanitizer")
    if not tool:
        return [Row("checks", "compute-sanitizer", "fastprompt", note="not installed, not run")]
    small = [sys.executable, "-m", "benchmarks.gpu.check", "--small"]
    rows = []
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "1", *small]
        rows.append(outside(f"compute-sanitizer {kind}", command, LONGEST // 2))
    return rows


def tuning(out):
    """One row: tiles of the most used head dim, tuned into a table of their own."""
    command = [sys.executable, "-m", "benchmarks.gpu.tune", "--head-dim", "128", "--rounds", "3"]
    row = outside("tuning", [*command, "--out", str(out / "tuned.json")], 150)
    if row.right:
        row.note = "found tiles are in tuned.json; python -m benchmarks.gpu.tune writes them where they are used"
    return [row]


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
    if options.small:
        # Not the compilation of a rival.
        rows = on_gpu(partial(operators.small, chosen=lambda problem: {"fastprompt": ours(problem)}))
    else:
        rows = _everything(options.out)
    failed = record.failures(rows)
    for row in failed:
        print(f"FAILED {row.section}: {row.case}, error {row.error:.2g} of its budget {row.note}", file=sys.stderr)
    if failed:
        print(WHAT_TO_DO, file=sys.stderr)
    return 1 if failed else 0


def _everything(out):
    """Run all parts, print and write their rows."""
    parts = {part.__name__: partial(apart, partial(on_gpu, part), LONGEST) for part in ON_GPU}
    parts |= {"tests": tests, "sanitizer": sanitizer, "tuning": partial(tuning, out)}
    header = {
        "device": torch.cuda.get_device_name(),
        **record.versions(),
        "CUDA": torch.version.cuda,
        "host": report.header().splitlines()[0],
    }
    rows = run_parts(parts, lambda rows, took: record.write(rows, {**header, "took": f"{took:.0f} s"}, out))
    print(record.markdown(rows, header))
    return rows


def run_parts(parts, write, limit=TIME_LIMIT):
    """The rows of all parts. One that raises is a failed row, one that would start too late a row that says so.

    Args:
        parts: functions that give rows, by name.
        write: called with all rows so far and the seconds so far, after every part.
        limit: seconds after which no part is started any more.
    """
    start, rows = time.perf_counter(), []
    for name, part in parts.items():
        took = time.perf_counter() - start
        if took > limit:
            rows.append(Row("checks", name, "fastprompt", note=f"not run: {took:.0f} s were over before it"))
        else:
            try:
                rows += part()
            except Exception as error:  # whatever it is, the other parts are wanted
                traceback.print_exc()
                rows.append(Row("checks", name, "fastprompt", float("inf"), note=f"{type(error).__name__}: {error}"))
        took = time.perf_counter() - start
        write(rows, took)
        print(f"{name}: {len(rows)} results after {took:.0f} s", file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
