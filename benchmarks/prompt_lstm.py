"""prompt_lstm alone on a CPU, forward and backward, against nn.LSTM and against its matrix products.

P-Tuning's encoder: two layers, both directions, ``INPUTS`` inputs, fp32, gradients of the input and of all weights.
``nn.LSTM`` is torch's own code (the backend "torch", oneDNN). torch.compile is not here: it unrolls the steps of an
LSTM written in PyTorch, and compiling 10 of them alone takes 40 s (see NOTES.md).

All run interleaved in one process on the same numbers, after a check of results and gradients against float64. The
bound is the larger of two times: of the FLOPs, ``48 P H (INPUTS + 4 H)``, at the rate of ``torch.mm`` on two 1024 x
1024 matrices, and of the bytes of the weights, read forward, read backward and written as gradients, at the rate of
torch's sum over a gigabyte of floats. It leaves out that each of the P steps has to read the recurrent weights anew,
from the cache they fit in.
"""

from itertools import product
from statistics import geometric_mean, median

import torch
from torch import nn
from tqdm import tqdm

from fastprompt import native, prompt_lstm

from . import report
from .timing import Gemm, interleaved, seconds_of, write

INPUTS = 1024
HIDDEN, STEPS = (128, 256, 512, 1024), (10, 20, 50, 100, 200)
TOLERANCE = 1e-5  # relative, by norm
MOST_ROUNDS, SECONDS = 9, 0.5  # of a case


class Encoder:
    """The LSTM by a backend; a call returns the output and the gradients."""

    def __init__(self, hidden, steps, backend, dtype=torch.float32):
        torch.manual_seed(0)
        lstm = nn.LSTM(INPUTS, hidden, 2, bidirectional=True)
        x, grad = torch.randn(steps, INPUTS), torch.randn(steps, 2 * hidden)
        self.inputs = [t.detach().to(dtype).requires_grad_() for t in (x, *lstm.parameters())]
        self.grad, self.backend = grad.to(dtype), backend

    def __call__(self):
        x, *weights = self.inputs
        out = prompt_lstm(x, weights, backend=self.backend)
        return [out.detach(), *torch.autograd.grad(out, self.inputs, self.grad)]


class Read:
    """A sum over more than any cache holds."""

    size = 1 << 28

    def __init__(self):
        self.numbers = torch.ones(self.size)

    def __call__(self):
        return self.numbers.sum()

    def rate(self, seconds):
        return 4 * self.numbers.numel() / seconds


def error(hidden, steps):
    """How far output and gradients are from float64, the largest, relative by norm."""
    exact = Encoder(hidden, steps, "reference", torch.float64)()
    return max(
        float((x.double() - y).norm() / y.norm()) for x, y in zip(Encoder(hidden, steps, "cpu")(), exact, strict=True)
    )


def measure(hidden, steps, threads, bandwidth):
    """One record a number of threads, for the CSV; ``bandwidth`` is in bytes a second, by number of threads."""
    difference = error(hidden, steps)
    right = difference <= TOLERANCE  # False for nan
    gemm = Gemm()
    encoders = {"fastprompt": Encoder(hidden, steps, "cpu"), "nn.LSTM": Encoder(hidden, steps, "torch"), "GEMM": gemm}
    gflop = 48e-9 * steps * hidden * (INPUTS + 4 * hidden)
    moved = 3 * 4 * sum(w.numel() for w in encoders["fastprompt"].inputs[1:])
    for count in threads:
        torch.set_num_threads(count)
        times = interleaved(encoders, fewest=3, most=MOST_ROUNDS, seconds=SECONDS)
        seconds = {name: median(values) for name, values in times.items()}
        computing, moving = gflop / gemm.rate(seconds["GEMM"]), moved / bandwidth[count]
        yield {
            "threads": count,
            "H": hidden,
            "P": steps,
            "GFLOP": float(f"{gflop:.4g}"),
            "MB": round(moved / 1e6, 1),
            **{f"{name} ms": round(seconds[name] * 1e3, 3) for name in ("fastprompt", "nn.LSTM")},
            "speed-up": round(median(a / b for a, b in zip(times["nn.LSTM"], times["fastprompt"])), 3)
            if right
            else "WRONG",
            "GEMM GFLOP/s": round(gemm.rate(seconds["GEMM"]), 1),
            "GB/s": round(bandwidth[count] / 1e9, 1),
            "bound": "FLOP" if computing >= moving else "bytes",
            "of bound": round(max(computing, moving) / seconds["fastprompt"], 3) if right else "WRONG",
            "error": f"{difference:.1e}",
        }


def _bandwidth():
    read = Read()
    return read.rate(median(seconds_of(read) for _ in range(5)))


def run(out, quick=False, sizes=None):
    """Run, print, and write ``prompt_lstm.csv`` and ``.png`` into ``out``; False if a result was wrong."""
    if native.missing:
        print(f"prompt_lstm left out: {native.missing}")
        return True
    most = torch.get_num_threads()
    threads, bandwidth, records = sorted({1, most}), {}, []
    sizes = sizes or list(product(HIDDEN[:2], STEPS[:2]) if quick else product(HIDDEN, STEPS))
    try:
        for count in threads:
            torch.set_num_threads(count)
            bandwidth[count] = _bandwidth()
        for hidden, steps in tqdm(sizes, desc="prompt_lstm", unit="case"):
            torch.set_num_threads(most)
            records += measure(hidden, steps, threads, bandwidth)
    finally:
        torch.set_num_threads(most)
    return write(out / "prompt_lstm.csv", sorted(records, key=lambda record: record["threads"]), summary, plot)


def summary(records):
    lines = []
    for threads in sorted({record["threads"] for record in records}):
        group = [record for record in records if record["threads"] == threads]
        ratios, shares = ([record[name] for record in group] for name in ("speed-up", "of bound"))
        lines.append(
            f"{threads} thread{'s' * (threads > 1)}: {geometric_mean(ratios):.2f}x the speed of nn.LSTM in the "
            f"geometric mean, {min(ratios):.2f}x at least; {median(shares):.2f} of the bound in the median"
        )
    return "\n".join(lines)


def plot(records, file):
    """Heat maps of the times faster than nn.LSTM."""
    threads, hidden, steps = (sorted({record[name] for record in records}) for name in ("threads", "H", "P"))
    if (figure := report.figure(5 * len(threads), 4)) is None:
        return
    axes = figure.subplots(1, len(threads), squeeze=False)
    for axis, count in zip(axes[0], threads):
        ratios = {(r["H"], r["P"]): r["speed-up"] for r in records if r["threads"] == count}
        axis.imshow([[ratios.get((h, p), float("nan")) for p in steps] for h in hidden], cmap="Greens", vmin=0, vmax=9)
        for (h, p), ratio in ratios.items():
            axis.text(steps.index(p), hidden.index(h), f"{ratio:.2f}", ha="center", va="center")
        axis.set(xlabel="P", ylabel="H", title=f"times faster than nn.LSTM, {count} thread{'s' * (count > 1)}")
        axis.set_xticks(range(len(steps)), steps)
        axis.set_yticks(range(len(hidden)), hidden)
    figure.savefig(file, dpi=150)
