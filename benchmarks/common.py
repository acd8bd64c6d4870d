"""Text that all rows of a batch begin with: what it adds to a training step.

The floor of what it adds is the bare model, forward and gradient of inputs_embeds, on those tokens as one row.
"""

from statistics import median
from time import perf_counter

import torch
from tqdm import tqdm

import fastprompt

from . import models, report, step
from .workloads import Workload, uneven_lengths

COMMON = 60


class Rows(step.Floor):
    """The bare model on some rows, without a head."""

    def __init__(self, model, rows):
        self.model, self.inputs = model.train(), torch.randn(1, rows, model.config.hidden_size).requires_grad_()

    def __call__(self):
        self.inputs.grad = None
        self.model.model(inputs_embeds=self.inputs, use_cache=False).last_hidden_state.sum().backward()


def run(out, quick=False, sizes=models.SIZES):
    """Run, print, and write ``common.csv`` into ``out``; False if a result differs from PEFT's."""
    lengths = uneven_lengths(20, 16, 48)
    records = []
    for method in models.METHODS:
        prompts = models.TASKS if method == "Multitask Prompt Tuning" else 1
        without, with_it = (Workload(20, lengths, False, prompts=prompts, common=common) for common in (0, COMMON))
        steps = {
            "without": _training(without, method, sizes),
            "with": _training(with_it, method, sizes),
            "its rows": Rows(models.llama(sizes), COMMON * prompts),
        }
        peft = step.Training(models.soft_prompt(models.llama(sizes), 20, method), with_it.batch(sizes["vocab_size"]))
        records.append(_measure(method, steps, peft, 2 if quick else 7))
    print(report.table(list(records[0]), [list(record.values()) for record in records]))
    report.write_csv(out / "common.csv", records)
    return all(record["over the sum"] != "WRONG" for record in records)


def _training(workload, method, sizes):
    model = models.soft_prompt(models.llama(sizes), workload.prompt, method)
    return step.Training(fastprompt.accelerate(model), workload.batch(sizes["vocab_size"]))


def _measure(method, steps, peft, rounds):
    expected, loss = float(peft()), float(steps["with"]())
    loss_error = abs(loss - expected) / abs(expected)
    grad_error = float((steps["with"].gradient - peft.gradient).norm() / peft.gradient.norm())
    times = {name: [] for name in steps}
    for _ in tqdm(range(rounds + 1), desc=method, unit="round"):
        for name, one in steps.items():
            start = perf_counter()
            one()
            times[name].append(perf_counter() - start)
    times = {name: seconds[1:] for name, seconds in times.items()}  # the first: warm-up
    right = loss_error <= step.LOSS_TOLERANCE and grad_error <= step.GRAD_TOLERANCE
    ratio = median(a / (b + c) for a, b, c in zip(times["with"], times["without"], times["its rows"]))
    return {
        "method": method,
        **{f"{name} ms": f"{median(seconds) * 1e3:.0f}" for name, seconds in times.items()},
        "over the sum": f"{ratio:.3f}" if right else "WRONG",
        "loss diff": f"{loss_error:.0e}",
        "grad diff": f"{grad_error:.0e}",
    }
