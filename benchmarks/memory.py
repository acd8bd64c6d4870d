"""Peak memory of one training step, PEFT Prompt Tuning and fastprompt, each in a process of its own.

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
MIB = 2**20


def run(out, quick=False, sizes=models.SIZES):
    """Run, print, and write ``memory.csv`` into ``out``; False if the results differ."""
    with tempfile.TemporaryDirectory() as folder:
        found = {name: _in_own_process(name, sizes, Path(folder, name)) for name in tqdm(["PEFT", "fastprompt"], desc="memory")}
        grads = [torch.load(Path(folder, name)) for name in found]
    peft, ours = found.values()
    loss_error = abs(ours["loss"] - peft["loss"]) / abs(peft["loss"])
    grad_error = float((grads[1] - grads[0]).norm() / grads[0].norm())
    rows = [{"provider": name, "model built MiB": f"{x['built'] / MIB:.0f}", "peak of a step MiB": f"{x['peak'] / MIB:.0f}",
             "loss difference": loss_error, "gradient difference": grad_error} for name, x in found.items()]
    print(report.table(list(rows[0])[:3], [list(row.values())[:3] for row in rows]))
    report.write_csv(out / "memory.csv", rows)
    if not (loss_error <= step.LOSS_TOLERANCE and grad_error <= step.GRAD_TOLERANCE):
        print(f"WRONG: loss differs by {loss_error:.0e}, prompt gradient by {grad_error:.0e}, so no ratio is given")
        return False
    step_only = (ours["peak"] - ours["built"]) / (peft["peak"] - peft["built"])
    print(f"{WORKLOAD.name}, {WORKLOAD.tokens} tokens, labels on all: {ours['peak'] / peft['peak']:.2f} of PEFT's peak, "
          f"{step_only:.2f} of what PEFT's step adds to the model", flush=True)
    return True


def _in_own_process(name, sizes, file):
    command = [sys.executable, "-m", "benchmarks.memory", name, json.dumps(sizes), str(torch.get_num_threads()), str(file)]
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


def _measure_here(name, sizes, threads, file):
    torch.set_num_threads(threads)
    model = models.prompt_tuning(models.llama(sizes), WORKLOAD.prompt)
    if name == "fastprompt":
        fastprompt.accelerate(model)
    one_step = step.Training(model, WORKLOAD.batch(sizes["vocab_size"]))
    built = _resident("VmRSS")
    loss = float(one_step())
    torch.save(one_step.parameters[0].grad, file)
    print(json.dumps({"built": built, "peak": _resident("VmHWM"), "loss": loss}))


if __name__ == "__main__":
    _measure_here(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
