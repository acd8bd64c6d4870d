"""Whole training steps on a device: PEFT, accelerated, LoRA, the floor, with their peak memory."""

from dataclasses import replace

import torch

from .. import models, step
from ..workloads import Workload, uneven_lengths
from .measure import peak_mib
from .record import Row

# A step of a one-billion-parameter Llama's shape, with half its layers.
STEP_SIZES = dict(models.SIZES, hidden_size=2048, intermediate_size=8192, num_hidden_layers=8, num_attention_heads=32,
                  num_key_value_heads=8)  # fmt: skip


class _Synchronised:
    """A step of :mod:`benchmarks.step` on a device, finished when it returns."""

    def __init__(self, one, device, dtype):
        one.model.to(device, dtype)
        if isinstance(one, step.Training):
            one.batch = {name: x.to(device) for name, x in one.batch.items()}
        else:
            one.inputs = one.inputs.detach().to(device, dtype).requires_grad_()
            one.labels = one.labels.to(device)
        self.step, self.device = one, device

    @property
    def gradient(self):
        return self.step.gradient.float()

    def __call__(self):
        loss = self.step()
        if self.device != "cpu":
            torch.cuda.synchronize()
        return loss


def steps(
    device,
    workloads=None,
    sizes=STEP_SIZES,
    methods=("Prompt Tuning", "Prefix-Tuning"),
    dtypes=(torch.float32, torch.bfloat16),
    rounds=5,
):
    """Rows of whole training steps: PEFT, accelerated, LoRA, the floor.

    Checked against PEFT's own step in fp32: fp32 by the limits of :mod:`benchmarks.step`, lower precisions may be twice
    as far from it as PEFT's own in that precision is for any of several orders of the batch's rows.
    """
    if not workloads:
        workloads = [Workload(100, uneven_lengths(100, 64, 128), all_labels) for all_labels in (False, True)]
    rows = []
    for method in methods:
        prompts = 0 if method == "Prefix-Tuning" else 1
        for workload in workloads:
            rows += _steps_of(method, replace(workload, prompts=prompts), device, sizes, dtypes, rounds)
    return rows


def _steps_of(method, workload, device, sizes, dtypes, rounds):
    """Rows of one method and batch; the first dtype's step of PEFT is what all are compared with."""
    rows, exact = [], None
    labels = "all tokens" if workload.all_labels else "one a row"
    for dtype in dtypes:
        providers = step.providers(workload, sizes, method)
        del providers["products"]  # of a CPU's threads
        built = {name: _Synchronised(one, device, dtype) for name, one in providers.items()}
        found = {name: (float(built[name]()), built[name].gradient) for name in ("PEFT", "fastprompt")}
        exact = exact or found["PEFT"]
        errors = {name: _errors(got, exact) for name, got in found.items()}
        limits = (step.LOSS_TOLERANCE, step.GRAD_TOLERANCE)
        if dtype != torch.float32:
            limits = [2 * (error + torch.finfo(dtype).eps) for error in _largest_errors(built["PEFT"], exact)]
        result = step.measure(workload, rounds, built)
        case = f"{method}, {workload.name}, labels on {labels}, {str(dtype)[6:]}"
        for name, times in result.times.items():
            error = None
            if name in errors:
                error = max(e / limit for e, limit in zip(errors[name], limits))
            rows.append(Row("step", case, name, error, [1e3 * s for s in times], peak_mib(built[name], device)))
        del built
    return rows


def _largest_errors(peft, exact, orders=4):
    """The largest errors of PEFT's own step, which rounds otherwise when the batch's rows come in another order."""
    batch, found = peft.step.batch, []
    generator = torch.Generator().manual_seed(0)
    for _ in range(orders):
        rows = torch.randperm(len(next(iter(batch.values()))), generator=generator)
        peft.step.batch = {name: x[rows.to(x.device)] for name, x in batch.items()}
        found.append(_errors((float(peft()), peft.gradient), exact))
    peft.step.batch = batch
    return [max(errors) for errors in zip(*found)]


def _errors(got, exact):
    """How far loss and gradient are from the exact ones, relative; the gradient by norm."""
    (loss, gradient), (expected, reference) = got, exact
    return abs(loss - expected) / abs(expected), float((gradient - reference).norm() / reference.norm())
