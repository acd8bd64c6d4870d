"""Peak memory of one training step, PEFT and fastprompt, each in a process of its own.

The peak is that of the resident set. It holds Python and the libraries, whose size has nothing to do with the model or
the method and which were there before the model was built; the second ratio leaves them out on both sides, so that it
is of weights and step, what an accelerator's allocator would report. The resident set right after the model was built
shows the weights' part.
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
from .methods import PROMPTS
from .workloads import Workload, uneven_lengths, uneven_workloads

METHODS = ("Prompt Tuning", "Prefix-Tuning")
MIB = 2**20


def workloads(method, quick=False):
    """One between the others in size, with labels on all tokens, and those of the training steps."""
    rest = [] if quick else uneven_workloads(PROMPTS.get(method, 1))
    return [Workload(50, uneven_lengths(50, 16, 64), True), *rest]


def run(out, quick=False, sizes=models.SIZES):
    """Run, print, and write ``memory.csv`` into ``out``; False if the results differ."""
    jobs = [
        (method, number, name)
        for method in METHODS
        for number in range(len(workloads(method, quick)))
        for name in ("PEFT", "fastprompt")
    ]
    with tempfile.TemporaryDirectory() as folder:
        found = {job: _in_own_process(job, sizes, Path(folder, "grad")) for job in tqdm(jobs, desc="memory")}
    records = [
        _record(method, load, found[method, number, "PEFT"], found[method, number, "fastprompt"])
        for method in METHODS
        for number, load in enumerate(workloads(method, quick))
    ]
    print("peak memory of a step")
    print(report.table(list(records[0]), [list(record.values()) for record in records]), flush=True)
    report.write_csv(out / "memory.csv", records)
    return all(record["of PEFT's peak"] != "WRONG" for record in records)


def _record(method, workload, peft, ours):
    loss_error = abs(ours["loss"] - peft["loss"]) / abs(peft["loss"])
    expected = peft["gradient"]
    grad_error = float((ours["gradient"] - expected).norm() / expected.norm())
    right = loss_error <= step.LOSS_TOLERANCE and grad_error <= step.GRAD_TOLERANCE

    def ratio(without=None):
        mine, theirs = (x["peak"] - (x[without] if without else 0) for x in (ours, peft))
        return f"{mine / theirs:.2f}" if right else "WRONG"

    return {
        "method": method,
        "P, rows, longest": workload.name,
        "labels": "all tokens" if workload.all_labels else "one a row",
        **{
            f"{name} {what} MiB": f"{x[what] / MIB:.0f}"
            for name, x in (("PEFT", peft), ("fastprompt", ours))
            for what in ("libraries", "built", "peak")
        },
        "of PEFT's peak": ratio(),
        "without libraries": ratio("libraries"),
        "of what its step adds": ratio("built"),
        "loss diff": f"{loss_error:.0e}",
        "grad diff": f"{grad_error:.0e}",
    }


def _in_own_process(job, sizes, file):
    arguments = json.dumps([*job, sizes, torch.get_num_threads(), str(file)])
    command, here = [sys.executable, "-m", "benchmarks.memory", arguments], Path(__file__).parents[1]
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=here).stdout)
    return result | {"gradient": torch.load(file)}


def _resident(field):
    """Bytes of VmRSS, the resident set now, or VmHWM, its peak.

    getrusage's ru_maxrss would do for the peak where there is no /proc, but on Linux it starts from the peak of the
    process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split(f"{field}:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _measure_here(method, number, name, sizes, threads, file):
    torch.set_num_threads(threads)
    workload, libraries = workloads(method)[number], _resident("VmRSS")
    model = models.soft_prompt(models.llama(sizes), workload.prompt, method)
    if name == "fastprompt":
        fastprompt.accelerate(model)
    one_step = step.Training(model, workload.batch(sizes["vocab_size"]))
    built = _resident("VmRSS")
    loss = float(one_step())
    torch.save(one_step.gradient, file)
    print(json.dumps({"libraries": libraries, "built": built, "peak": _resident("VmHWM"), "loss": loss}))


if __name__ == "__main__":
    _measure_here(*json.loads(sys.argv[1]))
