"""``python -m benchmarks.gpu.tune``: tiles of prefix_attention that beat the rule on this GPU, into a table.

The table overrides the rule. For each role, precision and head dim it climbs from the rule's tiles: to the fastest
neighbour, which differs in one size, while that is 3% faster. Neighbours that spill, take more shared memory than there
is, or differ from the float64 reference by more than the budget are left out. The fastest is timed once more beside the
rule, and an entry is written only if it is 3% faster then. Exits with 1 where there is no GPU. The table is to be made
anew after a change to the kernels, or of Triton.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, product
from math import prod
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from fastprompt.kernels import launch
from fastprompt.kernels.prefix_attention import config, tuned
from tqdm import tqdm
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from fastprompt import Sequences
from fastprompt.ops.prefix_attention import reference
from fastprompt.ops.prefix_attention import triton as launcher

from .. import report
from ..budget import FEW, Budget
from . import binary, compile_matrix
from .chips import CHIPS
from .rivals import uneven

MARGIN = 1.03
DTYPES = {16: torch.bfloat16, 32: torch.float32}  # one dtype of a size: the rule depends on the size alone
PREFIX = 100


@dataclass(frozen=True)
class Call:
    """A call that launches the kernels of a role, and what it may give."""

    run: Callable
    budget: Budget

    @property
    def right(self):
        return self.budget.ratio(self.run()) <= 1  # False for nan


def calls(role, head_dim, dtype, device="cuda", rows=8192):
    """What tiles are chosen by: short sequences with heads in groups, long ones without, one with every flag set."""
    short, long, flags = uneven(rows), (rows // 16,) * 16, dict(prefixes=3, window=48, softcap=30.0, sinks=True)
    if role == "decode":  # lengths of caches
        short, long = ([max(1, rows // 8 * (i + 8) // (batch + 8)) for i in range(batch)] for batch in (64, 16))
    new = partial(_call, role, head_dim, dtype, device)
    return [new(32, 8, short), new(16, 16, long), new(8, 2, short[: len(short) // 2], **flags)]


def _call(
    role, head_dim, dtype, device, heads, kv_heads, lengths, *, prefixes=1, window=None, softcap=None, sinks=False
):
    bank = {}
    if prefixes > 1:
        ids = [b % (prefixes + 1) - 1 for b in range(len(lengths))]
        bank = dict(prefix_ids=ids, prefix_lens=[PREFIX - p for p in range(prefixes)])
    seq, own = Sequences.packed([0, *accumulate(lengths)], **bank), (sum(lengths), kv_heads, head_dim)
    if role == "decode":
        seq, own = Sequences.decode(lengths, **bank), (len(lengths), kv_heads, max(lengths), head_dim)
    new = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype)
    q, grad = (new(seq.rows, heads, head_dim) for _ in range(2))
    given = [
        q,
        new(own),
        new(own),
        *(new(prefixes, PREFIX, kv_heads, head_dim) for _ in range(2)),
        new(heads) if sinks else None,
    ]
    options = dict(causal=True, window=window, softcap=softcap, scale=head_dim**-0.5)

    def run():
        *inputs, sinks = given
        if role != "backward":
            return list(launcher.forward(*inputs, seq, sinks=sinks, **options))
        return [x for x in launcher.backward(grad, *inputs, *saved, seq, sinks=sinks, **options) if x is not None]

    def exactly(stored):
        *inputs, sinks = (None if x is None else x.double() for x in given)
        out, lse = reference.forward(*inputs, seq, sinks=sinks, **options)
        if role != "backward":
            return [out, lse]
        grads = reference.backward(grad.double(), *inputs, stored(out), lse, seq, sinks=sinks, **options)
        return [x for x in grads if x is not None]

    *inputs, sinks = given
    saved = reference.forward(*inputs, seq, sinks=sinks, **options) if role == "backward" else None
    return Call(run, Budget.of(exactly, dtype, draws=FEW))


def entry_of(rule, role):
    """The tiles of a rule as an entry of the table."""
    values = vars(rule) | vars(rule.options)
    return {name: values[name] for name in tuned.FIELDS[role]}


def neighbours(entry):
    """Half and double of each size, a stage more and less."""
    for name, value in entry.items():
        if name != "registers":
            for other in (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2):
                if tuned.expected(name, other) is None:
                    yield entry | {name: other}


@contextmanager
def tiled_by(role, entry):
    """Within it the kernels of a role have the tiles of an entry, whatever the rule and the table say."""
    name = f"{role}_tiles"
    rule = getattr(config, name)

    def tiles(head_dim, element_size, target, device=None, **options):
        return replace(rule(head_dim, element_size, target, **options), **tuned.overrides(entry))

    with mock.patch.object(config, name, tiles):
        yield


def unfit(run, chip):
    """Why what a call launches must not run on a chip, read from the binaries; None if it may."""
    with launch.capture(chip.target) as launches:
        run()
    for one in launches:
        try:
            found = compile_matrix.problems(binary.inspect(one.compile(chip.target)), chip)
        except Exception as error:  # whatever a compiler raises: the other candidates are tried all the same
            return f"does not compile: {error}"
        if found:
            return found[0]
    return None


def eligible(role, entry, calls, unfit):
    """Whether all calls run with these tiles, and right."""
    with tiled_by(role, entry):
        try:
            return all(unfit(call.run) is None for call in calls) and all(call.right for call in calls)
        except OutOfResources:  # of a resource that the binary does not tell
            return False


def speeds(role, entries, calls, timer, rounds):
    """How many times as fast as the first each entry is: the geometric mean of the calls' ratios of medians."""
    times = [[[] for _ in calls] for _ in entries]
    for _ in range(rounds):
        for entry, of_entry in zip(entries, times):
            with tiled_by(role, entry):
                for call, of_call in zip(calls, of_entry):
                    of_call.append(timer(call.run))
    medians = [[median(of_call) for of_call in of_entry] for of_entry in times]
    return [prod(a / b for a, b in zip(medians[0], others)) ** (1 / len(calls)) for others in medians]


def climb(role, rule, calls, unfit, timer, rounds=7, show=iter):
    """The best entry and how many times as fast as the rule it is; the rule itself and 1.0 where nothing wins.

    Args:
        unfit: of a function that launches: why it must not, or None.
        timer: of the same: seconds of a call.
        show: wraps the candidates of a step, for a progress bar.

    Raises:
        RuntimeError: the rule's own result is wrong.
    """
    with tiled_by(role, rule):
        if not all(call.right for call in calls):
            raise RuntimeError(f"{role}: the rule's own result is wrong; run python -m benchmarks.gpu.check")
    best, seen = rule, [rule]
    while candidates := [entry for entry in neighbours(best) if entry not in seen]:
        seen += candidates
        entries = [best, *(entry for entry in show(candidates) if eligible(role, entry, calls, unfit))]
        found = speeds(role, entries, calls, timer, rounds)
        if max(found) <= MARGIN:
            break
        best = entries[found.index(max(found))]
    if best == rule:
        return rule, 1.0
    speed = speeds(role, [rule, best], calls, timer, rounds)[1]  # anew: the fastest of many was lucky too
    return (best, speed) if speed > MARGIN else (rule, 1.0)


def save(file, device, key, entry):
    """Put an entry into the table of a device, or take it out where it is None."""
    devices = tuned.read(file)
    table = devices.pop(device, {})
    table.pop(key, None)
    if entry:
        table[key] = entry
    if table:
        devices[device] = table
    if devices or file.exists():
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(devices, indent=1) + "\n")
        os.replace(temporary, file)


def seconds(run, repeats=20):
    """Seconds of a call on the GPU, of several that follow one another."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def this_chip():
    """The target and the shared memory of this GPU, all that :func:`unfit` asks; the rest is of another."""
    shared = driver.active.utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"]
    return replace(CHIPS["sm_80"], target=driver.active.get_current_target(), shared=shared)


def brief(entry):
    return " ".join(f"{name}={value}" for name, value in entry.items() if value is not None)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.tune", description="Tune the tiles of prefix_attention."
    )
    parser.add_argument("--role", nargs="+", choices=tuned.FIELDS, default=list(tuned.FIELDS))
    parser.add_argument("--bits", nargs="+", type=int, choices=DTYPES, default=[16], help="of an element")
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128], metavar="N")
    parser.add_argument(
        "--rounds", type=int, default=7, metavar="N", help="timings of each candidate, whose median counts"
    )
    parser.add_argument(
        "--out", type=Path, default=tuned.FILE, metavar="FILE", help="the table; by default the one that is used"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() or launch.INTERPRETED:
        print(
            "Tuning needs a GPU that torch can use, and Triton not interpreted. Without one the rule holds.",
            file=sys.stderr,
        )
        return 1
    torch.backends.cuda.matmul.allow_tf32 = False  # fp32 is compared with float64
    device, chip, rows = torch.cuda.get_device_name(), this_chip(), []
    work = list(product(options.role, options.bits, options.head_dim))
    for number, (role, bits, head_dim) in enumerate(work, 1):
        key = tuned.key(role, bits // 8, head_dim)
        shape = dict(fold=1, sharing=1) if role == "decode" else {}
        rule = entry_of(getattr(config, f"{role}_tiles")(head_dim, bits // 8, chip.target, **shape), role)
        show = partial(tqdm, desc=f"{number}/{len(work)} {key}", unit="tiles", leave=False)
        given = calls(role, head_dim, DTYPES[bits])
        best, speed = climb(role, rule, given, partial(unfit, chip=chip), seconds, options.rounds, show)
        save(options.out, device, key, None if best == rule else best)
        rows.append([key, brief(rule), "the rule" if best == rule else brief(best), f"{speed:.2f}x"])
    print(report.table([device, "rule", "best", "speed-up"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
