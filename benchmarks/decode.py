"""One step of decoding, attention alone: 32 rows against caches behind a prefix that all of them share.

* ``fastprompt``: the C++ kernel, which reads the prefix once.
* ``SDPA``: torch's scaled_dot_product_attention on caches that hold the prefix too, expanded to every row and
  concatenated before the clock starts, with grouped heads.
* ``repeated``: the same with key heads repeated for the query heads of their group before the clock starts.

A step that copies the caches, as transformers' ``repeat_kv`` does, is left out: it takes 5 to 50 times as long, and
disturbs the step that is measured behind it.

All run interleaved in one process on the same numbers, after a check against float64. ``paged`` is fastprompt again, on
the same keys in pages of 16 whose order is drawn at random. Times are processor time of one thread, for a step takes a
few milliseconds, less than another process on the machine keeps a core.
"""

from dataclasses import dataclass
from itertools import product
from statistics import geometric_mean, median
from time import process_time

import torch
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from fastprompt import Sequences, prefix_attention

from . import report
from .timing import interleaved, write

ROWS, PAGE = 32, 16
SHAPE = 9, 3, 64  # H, Hkv, Dh
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # relative, by norm
ROUNDS = 15  # of a case
RIVALS = "SDPA", "repeated"


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    prefix: int
    cache: int
    """Keys of each row, its own included."""


def all_cases(quick=False):
    sizes = product((100, 500), (64, 1024) if quick else (64, 128, 256, 512, 1024))
    return [Case(dtype, *size) for dtype, size in product(TOLERANCE, sizes)]


class Numbers:
    """The inputs of a case: queries, prefix and own keys and values, and the steps on them."""

    def __init__(self, case):
        heads, kv_heads, width = SHAPE
        generator, self.group = torch.Generator().manual_seed(0), heads // kv_heads

        def draw(*shape):
            return torch.randn(*shape, generator=generator).to(case.dtype)

        self.q = draw(ROWS, heads, width)
        self.prefix = [draw(1, case.prefix, kv_heads, width) for _ in range(2)]
        self.own = [draw(ROWS, kv_heads, case.cache, width) for _ in range(2)]
        self.whole = [
            torch.cat([shared.transpose(1, 2).expand(ROWS, -1, -1, -1), own], 2)
            for shared, own in zip(self.prefix, self.own)
        ]
        self.repeated = [self._repeat(x) for x in self.whole]
        table = torch.randperm(ROWS * case.cache // PAGE, generator=generator).view(ROWS, -1)
        self.pages = [self._paged(x, table) for x in self.own]
        lengths = [case.cache] * ROWS
        self.seq, self.paged_seq = Sequences.decode(lengths), Sequences.decode(lengths, pages=table)

    def steps(self):
        """Name -> step, which returns ``[ROWS, H, Dh]``."""
        return {
            "fastprompt": lambda: self.ours(self.own, self.seq),
            "paged": lambda: self.ours(self.pages, self.paged_seq),
            "SDPA": lambda: self.sdpa(self.whole, enable_gqa=True),
            "repeated": lambda: self.sdpa(self.repeated),
        }

    def ours(self, keys, seq):
        return prefix_attention(self.q, *keys, *self.prefix, seq, backend="cpu")[0]

    def sdpa(self, keys, **options):
        return scaled_dot_product_attention(self.q[:, :, None], *keys, **options)[:, :, 0]

    def exact(self):
        return scaled_dot_product_attention(self.q[:, :, None].double(), *(x.double() for x in self.repeated))[:, :, 0]

    def _repeat(self, x):
        return x[:, :, None].expand(-1, -1, self.group, -1, -1).flatten(1, 2)

    def _paged(self, x, table):
        """``[B, Hkv, L, Dh]`` -> ``[pages, Hkv, PAGE, Dh]``, page ``table[b, n]`` the n-th of row b."""
        parts = x.unflatten(2, (-1, PAGE)).transpose(1, 2).flatten(0, 1)
        return torch.empty_like(parts).index_copy_(0, table.flatten(), parts)


@torch.no_grad()
def measure(case):
    """One record for the CSV."""
    numbers = Numbers(case)
    steps, exact = numbers.steps(), numbers.exact()
    error = {name: float((step().double() - exact).norm() / exact.norm()) for name, step in steps.items()}
    right = all(value <= TOLERANCE[case.dtype] for value in error.values())  # False for nan
    times = interleaved(steps, fewest=ROUNDS, most=ROUNDS, seconds=0, clock=process_time)

    def over(name, ours="fastprompt"):
        return round(median(a / b for a, b in zip(times[name], times[ours])), 3) if right else "WRONG"

    ratios = {name: over(name) for name in RIVALS}
    return {
        "dtype": str(case.dtype).removeprefix("torch."),
        "P": case.prefix,
        "cache": case.cache,
        **{f"{name} ms": round(median(values) * 1e3, 3) for name, values in times.items()},
        "speed-up": min(ratios.values()) if right else "WRONG",
        **{f"over {name}": ratio for name, ratio in ratios.items()},
        "paged over SDPA": over("SDPA", "paged"),
        "error": f"{max(error['fastprompt'], error['paged']):.1e}",
    }


def run(out, quick=False, cases=None):
    """Run, print, and write ``decode.csv`` and ``.png`` into ``out``; False if a result was wrong."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        records = [measure(case) for case in tqdm(cases or all_cases(quick), desc="decode", unit="case")]
    finally:
        torch.set_num_threads(threads)
    return write(out / "decode.csv", records, summary, plot)


def summary(records):
    lines = []
    for name in RIVALS:
        for dtype in dict.fromkeys(record["dtype"] for record in records):
            ratios = [record[f"over {name}"] for record in records if record["dtype"] == dtype]
            mean = geometric_mean(ratios)
            lines.append(f"{dtype}: {mean:.2f}x {name} in the geometric mean, {min(ratios):.2f}x at least")
    return "\n".join(lines)


def plot(records, file):
    """Times faster than SDPA, by the length of the caches."""
    if (figure := report.figure(5, 4)) is None:
        return
    axis = figure.subplots()
    for dtype, prefix in dict.fromkeys((record["dtype"], record["P"]) for record in records):
        group = [record for record in records if (record["dtype"], record["P"]) == (dtype, prefix)]
        axis.plot([r["cache"] for r in group], [r["over SDPA"] for r in group], "o-", label=f"{dtype}, P = {prefix}")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(xscale="log", xlabel="own keys of a row", ylabel="times faster than SDPA", ylim=0)
    axis.legend(fontsize="small")
    figure.savefig(file, dpi=150)
