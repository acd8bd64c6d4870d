"""prompt_concat and multitask_prompt on the CPU: forward and backward, against plain PyTorch and a copy.

Every provider is first checked against float64. Then all run in turn, each once untimed and once timed, so that all
find the same in the caches; times are medians over the rounds and ratios the medians of the rounds' ratios. **copy**
moves as many bytes as the operator has to, between existing memory, with torch's ``copy_``. **kernel** is the operator
without checks, autograd and allocation. prompt_concat stands against ``torch.cat`` and ``F.embedding``, with the prompt
in front of every row, as PEFT has it, and in front of the whole batch, as the engine here has it; there cat's gradient
is a view, for nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from torch.nn import functional
from tqdm import tqdm

from fastprompt import native
from fastprompt.ops import multitask_prompt, prompt_concat

from . import report
from .budget import FEW, Budget

VOCABULARY = 32768
CONCAT = [(400, 576, 20, 16), (1600, 576, 20, 32), (2000, 2048, 50, 20), (8000, 576, 100, 32), (8000, 4096, 100, 16)]
MULTITASK = [(4, 20, 1, 576), (8, 100, 1, 2048), (8, 100, 4, 2048), (8, 100, 8, 2048), (4, 100, 16, 2048)]


@dataclass
class Case:
    """One direction of an operator at one size: name -> call, and what each result is compared with."""

    operator: str
    direction: str
    size: str
    dtype: torch.dtype
    calls: dict[str, Callable]
    exactly: Callable  # the results in float64

    def right(self):
        """Whether "fastprompt" is within its budget."""
        budget = Budget.of(lambda _: _list(self.exactly()), self.dtype, draws=FEW)
        return budget.ratio(_list(self.calls["fastprompt"]())) <= 1  # False for nan

    def measure(self, rounds):
        """Name -> seconds of every round."""
        times, names = {name: [] for name in self.calls}, list(self.calls)
        for _ in range(rounds + 1):
            for name in names:
                self.calls[name]()
                start = perf_counter()
                self.calls[name]()
                times[name].append(perf_counter() - start)
            names = names[1:] + names[:1]
        return {name: seconds[1:] for name, seconds in times.items()}  # the first: warm-up


def concat_cases(rows, width, length, batch, dtype, once):
    """The prompt once and then all tokens, or in front of every row of the batch."""
    tokens = torch.randint(VOCABULARY, (1, rows - length) if once else (batch, rows // batch - length))
    table = torch.randn(VOCABULARY, width).to(dtype)
    prompt = torch.randn(length, width).to(dtype).requires_grad_()
    source = torch.cat([(-1 - torch.arange(length)).expand(len(tokens), -1), tokens], 1).flatten()
    grad = torch.randn(rows, width).to(dtype)
    into, start = torch.empty(rows, width, dtype=dtype), int(torch.randint(VOCABULARY - rows, ()))

    def plain():
        return torch.cat([prompt.expand(len(tokens), -1, -1), functional.embedding(tokens, table)], 1).flatten(0, 1)

    size = f"R {rows}, D {width}, P {length}, {'once' if once else f'B {batch}'}"
    forward = {
        "fastprompt": lambda: prompt_concat(source, table, prompt),
        "kernel": lambda: torch.ops.fastprompt.prompt_concat_cpu(source, table, prompt, 1.0, into),
        "reference": lambda: prompt_concat(source, table, prompt, backend="reference"),
        "PyTorch": plain,
        "copy": lambda: into.copy_(table[start : start + rows]),
    }

    def in_float64():
        return torch.cat([prompt.detach().expand(len(tokens), -1, -1), table[tokens]], 1).flatten(0, 1).double()

    yield Case("prompt_concat", "forward", size, dtype, forward, in_float64)

    outs = {name: forward[name]() for name in ("fastprompt", "reference", "PyTorch")}
    dprompt, halves = torch.empty_like(prompt), (len(tokens) + 1) * length // 2  # rows read and written
    backward = {name: _gradient(out, [prompt], grad) for name, out in outs.items()}
    backward["kernel"] = lambda: torch.ops.fastprompt.prompt_concat_backward_cpu(
        grad, source, 1.0, None, dprompt, VOCABULARY, length
    )
    backward["copy"] = lambda: into[:halves].copy_(grad[:halves])

    def sums():
        return grad.double().unflatten(0, (len(tokens), -1))[:, :length].sum(0)

    yield Case("prompt_concat", "backward", size, dtype, {name: backward[name] for name in forward}, sums)


def multitask_cases(prompts, length, rank, width, dtype):
    """Of twice as many tasks, all gradients."""
    shapes = (length, width), (2 * prompts, length, rank), (2 * prompts, rank, width)
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    tasks, grad = torch.randperm(2 * prompts)[:prompts], torch.randn(prompts, length, width).to(dtype)
    into = torch.empty_like(grad)

    def plain(shared, rows, cols):
        return shared * (rows[tasks] @ cols[tasks])

    leaves, exact_leaves = [x.requires_grad_() for x in inputs], [x.detach().double().requires_grad_() for x in inputs]
    forward = {
        "fastprompt": lambda: multitask_prompt(*leaves, tasks, backend="cpu"),
        "kernel": lambda: torch.ops.fastprompt.multitask_prompt_cpu(*leaves, tasks, into),
        "reference": lambda: multitask_prompt(*leaves, tasks, backend="reference"),
        "PyTorch": lambda: plain(*leaves),
        "copy": lambda: into.copy_(grad),
    }
    size = f"N {prompts}, P {length}, r {rank}, D {width}"
    yield Case("multitask_prompt", "forward", size, dtype, forward, lambda: plain(*exact_leaves).detach())

    outs = {name: forward[name]() for name in ("fastprompt", "reference", "PyTorch")}
    grads = [torch.zeros_like(x) for x in inputs]
    backward = {name: _gradient(out, leaves, grad) for name, out in outs.items()}
    backward["kernel"] = lambda: torch.ops.fastprompt.multitask_prompt_backward_cpu(grad, *leaves, tasks, *grads)
    backward["copy"] = lambda: into.copy_(grad)

    def gradients():
        return torch.autograd.grad(plain(*exact_leaves), exact_leaves, grad.double())

    yield Case("multitask_prompt", "backward", size, dtype, {name: backward[name] for name in forward}, gradients)


def cases(quick):
    """One after the other, for the memory that each holds."""
    for dtype in (torch.float32, torch.bfloat16):
        for size in CONCAT[:2] if quick else CONCAT:
            for once in (False, True):
                yield from concat_cases(*size, dtype, once)
        for size in MULTITASK[:2] if quick else MULTITASK:
            yield from multitask_cases(*size, dtype)


def run(out, quick=False):
    """Run, print, and write ``small_ops.csv`` and ``.png`` into ``out``; False if a result was wrong."""
    if native.missing:
        print(f"small_ops left out: {native.missing}")
        return True
    records, threads = [], torch.get_num_threads()
    torch.manual_seed(0)
    try:
        for case in tqdm(cases(quick), unit="case"):
            for count in sorted({1, threads}):
                torch.set_num_threads(count)
                records.append(_record(case, count, 3 if quick else 7))
    finally:
        torch.set_num_threads(threads)
    print(report.table(list(records[0]), [list(record.values()) for record in records]))
    report.write_csv(out / "small_ops.csv", records)
    if any(record["over PyTorch"] == "WRONG" for record in records):
        return False
    plot(records, out / "small_ops.png")
    return True


def plot(records, file):
    """Share of a copy and times faster than PyTorch, by the time of the copy."""
    if (figure := report.figure(10, 4.5)) is None:
        return
    for axes, column in zip(figure.subplots(1, 2), ("of copy", "over PyTorch")):
        for operator, colour in (("prompt_concat", "tab:blue"), ("multitask_prompt", "tab:orange")):
            for direction, marker in (("forward", "o"), ("backward", "x")):
                group = [r for r in records if (r["operator"], r["direction"]) == (operator, direction)]
                axes.plot(
                    [float(r["copy us"]) for r in group],
                    [float(r[column]) for r in group],
                    marker,
                    color=colour,
                    label=f"{operator}, {direction}",
                )
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", xlabel="us of a copy of the bytes to move", title=column)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)


def _record(case, threads, rounds):
    right, times = case.right(), case.measure(rounds)

    def ratio(slow, fast):
        return f"{median(a / b for a, b in zip(times[slow], times[fast])):.2f}" if right else "WRONG"

    return {
        "operator": case.operator,
        "direction": case.direction,
        "size": case.size,
        "dtype": str(case.dtype).removeprefix("torch."),
        "threads": str(threads),
        **{f"{name} us": f"{median(seconds) * 1e6:.0f}" for name, seconds in times.items()},
        "over PyTorch": ratio("PyTorch", "fastprompt"),
        "over reference": ratio("reference", "fastprompt"),
        "of copy": ratio("copy", "fastprompt"),
        "kernel of copy": ratio("copy", "kernel"),
    }


def _gradient(out, leaves, grad):
    return lambda: torch.autograd.grad(out, leaves, grad.view_as(out), retain_graph=True)


def _list(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)
