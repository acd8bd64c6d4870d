"""Peak memory of one training step, PEFT and fastprompt, each in a process of its own.

The peak is that of the resident set; the resident set right after the model was built shows how much of it is Python,
libraries and weights, which no method can save.
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

import fastprompt

from . import models, report, step
from .workloads import Workload, uneven_lengths

WORKLOAD = Workload(50, uneven_lengths(50, 16, 64), True)
METHODS = ("Prompt Tuning", "Prefix-Tuning")
MIB = 2**20


def run(out, quick=False, sizes=models.SIZES):
    """Run, print, and write ``memory.csv`` into ``out``; False if the results differ."""
    jobs = [(method, name) for method in METHODS for name in ("PEFT", "fastprompt")]
    with tempfile.TemporaryDirectory() as folder:
        found = {job: _in_own_process(*job, sizes, Path(folder, "-".join(job))) for job in tqdm(jobs, desc="memory")}
        grads = {job: torch.load(Path(folder, "-".join(job))) for job in jobs}
    records = []
    for method in METHODS:
        peft, ours = (found[method, name] for name in ("PEFT", "fastprompt"))
        expected = grads[method, "PEFT"]
        loss_error = abs(ours["loss"] - peft["loss"]) / abs(peft["loss"])
        grad_error = float((grads[method, "fastprompt"] - expected).norm() / expected.norm())
        right = loss_error <= step.LOSS_TOLERANCE and grad_error <= step.GRAD_TOLERANCE
        step_only = (ours["peak"] - ours["built"]) / (peft["peak"] - peft["built"])
        records.append({
            "method": method, **{f"{name} {what} MiB": f"{x[what] / MIB:.0f}" for name, x in (("PEFT", peft), ("fastprompt", ours))
                                 for what in ("built", "peak")},
            "of PEFT's peak": f"{ours['peak'] / peft['peak']:.2f}" if right else "WRONG",
            "of what its step adds": f"{step_only:.2f}" if right else "WRONG",
            "loss diff": f"{loss_error:.0e}", "grad diff": f"{grad_error:.0e}",
        })
    print(f"peak memory of a step, {WORKLOAD.name}, {WORKLOAD.tokens} tokens, labels on all")
    print(report.table(list(records[0]), [list(record.values()) for record in records]), flush=True)
    report.write_csv(out / "memory.csv", records)
    return all(record["of PEFT's peak"] != "WRONG" for record in records)


def _in_own_process(method, name, sizes, file):
    command = [sys.executable, "-m", "benchmarks.memory", method, name, json.dumps(sizes), str(torch.get_num_threads()), str(file)]
    here = Path(__file__).parents[1]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=here).stdout)


def _resident(field):
    """Bytes of VmRSS, the resident set now, or VmHWM, its peak.

    getrusage's ru_maxrss would do for the peak where there is no /proc, but on Linux it starts from the peak of the
    process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split(f"{field}:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _measure_here(method, name, sizes, threads, file):
    torch.set_num_threads(threads)
    model = models.soft_prompt(models.llama(sizes), WORKLOAD.prompt, method)
    if name == "fastprompt":
        fastprompt.accelerate(model)
    one_step = step.Training(model, WORKLOAD.batch(sizes["vocab_size"]))
    built = _resident("VmRSS")
    loss = float(one_step())
    torch.save(one_step.gradient, file)
    print(json.dumps({"built": built, "peak": _resident("VmHWM"), "loss": loss}))


if __name__ == "__main__":
    _measure_here(*sys.argv[1:3], json.loads(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
