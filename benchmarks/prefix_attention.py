"""prefix_attention alone, forward and backward, against what PyTorch offers on a CPU and against its matrix products.

* ``SDPA``: torch's scaled_dot_product_attention on the padded batch, the prefix expanded and concatenated in front of
  the keys, a mask, grouped heads. Concatenation is part of the step, building the mask is not.
* ``composed``: the backend of that name, torch's flash attention on packed rows.
* ``FlexAttention`` has no backward on a CPU (torch 2.13 raises NotImplementedError), so it is not here.

All run interleaved in one process on the same numbers, after a check of results and gradients against float64; batches
of more than ``CHECKED`` GFLOP are checked on their first sequences. GFLOP count what the maths needs, ``14 H Dh`` for
every visible pair of a query and a key: two products forward, five backward. The GEMM rate is that of ``torch.mm`` on
two 1024 x 1024 fp32 matrices, interleaved with the rest. A sample is as many calls as take a few milliseconds, their
mean.
"""

from dataclasses import dataclass
from itertools import product
from statistics import geometric_mean, median

import torch
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from fastprompt import Sequences, prefix_attention

from . import report
from .timing import Gemm, interleaved, write

SHAPES = ((9, 3, 64), (32, 8, 128))  # H, Hkv, Dh
LONG, LARGE, CHECKED = 512, 5, 4  # equal length; GFLOP from which the GEMM rate is a bar; GFLOP that are checked
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # relative, by norm
MOST_ROUNDS, SECONDS = 15, 0.5  # of a case
HUGE = 100  # GFLOP: one round is enough


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int]
    dtype: torch.dtype
    prefix: int
    lengths: tuple[int, ...]

    @property
    def kind(self):
        return "equal" if self.lengths[0] == LONG else "short"

    @property
    def gflop(self):
        heads, _, head_dim = self.shape
        return 14e-9 * heads * head_dim * sum(n * self.prefix + n * (n + 1) / 2 for n in self.lengths)

    @property
    def checked(self):
        """The case with as many of its sequences as are checked."""
        case = self
        while case.gflop > CHECKED and len(case.lengths) > 1:
            case = Case(self.shape, self.dtype, self.prefix, case.lengths[: len(case.lengths) // 2])
        return case


def all_cases(quick=False):
    """The grid of the issue: uneven lengths from 10 to 64, and equal ones."""
    prefixes, batches = ((20, 500), (1, 8)) if quick else ((20, 100, 500), (1, 8, 32))
    cases = []
    for shape, dtype, prefix, batch in product(SHAPES, TOLERANCE, prefixes, batches):
        uneven = [10 + int(54 * (i + 0.5) / batch) for i in range(batch)]  # the middles of equal steps from 10 to 64
        uneven = [uneven[i] for i in torch.randperm(batch, generator=torch.Generator().manual_seed(0))]
        cases += [Case(shape, dtype, prefix, tuple(lengths)) for lengths in (uneven, [LONG] * batch)]
    return cases


class Numbers:
    """The inputs of a case in float64: packed rows, a prefix, and the gradient of the output."""

    def __init__(self, case):
        heads, kv_heads, head_dim = case.shape
        rows, generator = sum(case.lengths), torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator).to(case.dtype)

        self.q, self.grad = draw(rows, heads, head_dim), draw(rows, heads, head_dim)
        self.k, self.v = draw(rows, kv_heads, head_dim), draw(rows, kv_heads, head_dim)
        self.prefix = [draw(1, case.prefix, kv_heads, head_dim) for _ in range(2)]


class Packed:
    """A backend of prefix_attention; a call returns the output and the gradients."""

    def __init__(self, case, numbers, backend, dtype=None):
        dtype = dtype or case.dtype
        self.inputs = [x.to(dtype).requires_grad_() for x in (numbers.q, numbers.k, numbers.v, *numbers.prefix)]
        self.grad, self.backend = numbers.grad.to(dtype), backend
        self.seq = Sequences.packed(torch.tensor([0, *case.lengths]).cumsum(0))

    def __call__(self):
        out, _ = prefix_attention(*self.inputs, self.seq, backend=self.backend)
        return [out.detach(), *torch.autograd.grad(out, self.inputs, self.grad)]


class Padded:
    """SDPA; packs what it returns like :class:`Packed` only for the check."""

    def __init__(self, case, numbers):
        self.lengths, width = case.lengths, max(case.lengths)
        self.inputs = [self.pad(x, width).requires_grad_() for x in (numbers.q, numbers.k, numbers.v)]
        self.inputs += [x.clone().requires_grad_() for x in numbers.prefix]
        self.grad = self.pad(numbers.grad, width)
        own = torch.arange(width)
        real = own < torch.tensor(case.lengths)[:, None, None]  # [B, 1, width]
        causal = (own[None, :] <= own[:, None]) & (real | (own[None, :] == own[:, None]))  # padding sees itself: no nan
        self.mask = torch.cat([torch.ones(len(case.lengths), width, case.prefix, dtype=torch.bool), causal], -1)[
            :, None
        ]

    def pad(self, x, width):
        """``[R, H, Dh]`` -> ``[B, H, width, Dh]``."""
        parts = x.split(list(self.lengths))
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).transpose(1, 2).contiguous()

    def pack(self, x):
        return torch.cat([rows[:, :n].transpose(0, 1) for rows, n in zip(x, self.lengths)])

    def __call__(self):
        q, k, v, *prefix = self.inputs
        keys, values = (torch.cat([p.transpose(1, 2).expand(len(q), -1, -1, -1), x], 2) for p, x in zip(prefix, (k, v)))
        out = scaled_dot_product_attention(q, keys, values, attn_mask=self.mask, enable_gqa=True)
        return [out.detach(), *torch.autograd.grad(out, self.inputs, self.grad)]

    def packed(self):
        results = self()
        return [self.pack(x) for x in results[:4]] + results[4:]


def steps_of(case):
    """Name -> step."""
    numbers = Numbers(case)
    ours, composed = (Packed(case, numbers, backend) for backend in ("cpu", "composed"))
    return {"fastprompt": ours, "SDPA": Padded(case, numbers), "composed": composed}


def errors(case):
    """How far each provider is from float64, the largest of output and gradients, relative by norm."""
    case = case.checked
    exact = Packed(case, Numbers(case), "composed", torch.float64)()
    results = {name: step.packed() if isinstance(step, Padded) else step() for name, step in steps_of(case).items()}
    return {
        name: max(float((x.double() - y).norm() / y.norm()) for x, y in zip(got, exact))
        for name, got in results.items()
    }


def measure(case, gemm=None):
    """One record for the CSV."""
    error, gemm = errors(case), gemm or Gemm()
    steps = {**steps_of(case), "GEMM": gemm}
    times = interleaved(steps, fewest=1 if case.gflop > HUGE else 3, most=MOST_ROUNDS, seconds=SECONDS)
    seconds = {name: median(values) for name, values in times.items()}
    right = all(value <= TOLERANCE[case.dtype] for value in error.values())  # False for nan
    rival = min(("SDPA", "composed"), key=seconds.get)
    heads, kv_heads, head_dim = case.shape
    return {
        "threads": torch.get_num_threads(),
        "dtype": str(case.dtype).removeprefix("torch."),
        "heads": f"{heads}/{kv_heads} x {head_dim}",
        "P": case.prefix,
        "B": len(case.lengths),
        "lengths": case.kind,
        "GFLOP": float(f"{case.gflop:.4g}"),
        **{f"{name} ms": round(seconds[name] * 1e3, 3) for name in steps if name != "GEMM"},
        "best rival": rival,
        "speed-up": round(median(a / b for a, b in zip(times[rival], times["fastprompt"])), 3) if right else "WRONG",
        "GEMM GFLOP/s": round(gemm.rate(seconds["GEMM"]), 1),
        "of GEMM": round(case.gflop / seconds["fastprompt"] / gemm.rate(seconds["GEMM"]), 3) if right else "WRONG",
        "error": f"{error['fastprompt']:.1e}",
    }


def run(out, quick=False, cases=None):
    """Run, print, and write ``prefix_attention.csv`` and ``.png`` into ``out``; False if a result was wrong."""
    cases, most = cases or all_cases(quick), torch.get_num_threads()
    records = []
    try:
        for threads in sorted({1, most}):
            torch.set_num_threads(threads)
            records += [measure(case) for case in tqdm(cases, desc=f"prefix_attention, {threads} threads", unit="case")]
    finally:
        torch.set_num_threads(most)
    return write(out / "prefix_attention.csv", records, summary, plot)


def summary(records):
    lines = []
    for kind in ("short", "equal"):
        if ratios := [record["speed-up"] for record in records if record["lengths"] == kind]:
            lines.append(
                f"{kind} lengths: {geometric_mean(ratios):.2f}x the best rival's speed in the geometric mean, "
                f"{min(ratios):.2f}x at least"
            )
    if large := [r["of GEMM"] for r in records if r["dtype"] == "float32" and r["GFLOP"] >= LARGE]:
        lines.append(
            f"fp32 from {LARGE} GFLOP on: {min(large):.2f} of the GEMM rate at least, {median(large):.2f} in the median"
        )
    return "\n".join(lines)


def plot(records, file):
    """Times faster than the best rival, by the work in a call."""
    if (figure := report.figure(10, 4.5)) is None:
        return
    axes = figure.subplots(1, 2, sharey=True)
    for axis, dtype in zip(axes, ("float32", "bfloat16")):
        for kind, colour in (("short", "tab:blue"), ("equal", "tab:orange")):
            for threads, marker in zip(sorted({record["threads"] for record in records}), "ox"):
                group = [r for r in records if (r["dtype"], r["lengths"], r["threads"]) == (dtype, kind, threads)]
                axis.plot(
                    [r["GFLOP"] for r in group],
                    [r["speed-up"] for r in group],
                    marker,
                    color=colour,
                    label=f"{kind} lengths, {threads} thread{'s' * (threads > 1)}",
                )
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="GFLOP of a forward and backward", title=dtype)
        axis.set_yticks([1, 2, 3, 5, 10], ["1", "2", "3", "5", "10"])
    axes[0].set_ylabel("times faster than the best of torch")
    axes[1].legend(fontsize=8)
    figure.savefig(file, dpi=150)
