"""``python -m benchmarks.gpu.launch_cost``: microseconds of Python that a launch costs on the host.

Measured without a GPU. Included: everything from the call of the kernel to the call of Triton's launcher in C, with the
real signature, arguments and compiled handle. Replaced by stubs that do nothing, and therefore not included: packing
the arguments and ``cuLaunchKernelEx`` in C, ``torch.cuda.current_device`` and the query of the current stream. The
tensors are on the CPU. Beside it, with the same stubs: Triton's own ``function[grid](...)``, and a whole call of the
operator's launcher, allocation of outputs included.
"""

import argparse
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from fastprompt.kernels import launch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from fastprompt import Sequences

from .. import report
from . import output
from .chips import CHIPS

OUT = Path(__file__).parent / "launch_cost.csv"
TARGET = CHIPS["sm_90"].target
INCLUDED = "host time without a GPU; C launcher, driver and stream query are stubs and not included"


def _nothing(*arguments):
    return None


class _Driver:
    """Just enough of Triton's driver; what it launches does nothing."""

    launcher_cls = nvidia.CudaLauncher

    def __init__(self):
        self.launches = 0
        self.utils = SimpleNamespace(
            launch=self._count,
            build_signature_metadata=_nothing,
            unload_module=_nothing,
            load_binary=lambda *arguments: (None, 0, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": CHIPS["sm_90"].shared},
        )

    def _count(self, *arguments):
        self.launches += 1

    def get_current_device(self):
        return None  # the device index of a CPU tensor

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return TARGET

    def allocate_default_profile_scratch(self, size, align, stream):
        return None


@contextmanager
def stubbed():
    """Within it kernels compile for sm_90, and a launch of them counts and does nothing."""
    stub = _Driver()
    with (
        mock.patch.object(driver, "_active", stub),
        mock.patch.object(torch.cuda, "current_device", lambda: None),
        mock.patch.object(nvidia, "PyKernelArg", lambda **fields: None),
    ):
        yield stub


def seconds(call, rounds=9, calls=2000):
    """Of one call, a value a round."""
    call()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls)
    return found


def through_triton(kernel, grid, options, *arguments, **constants):
    """The same launch by Triton's own path."""
    kernel.function[grid](*arguments, **constants, num_warps=options.num_warps, num_stages=options.num_stages)


def launches_of(call):
    """The arguments of ``Kernel.__call__`` for every launch that ``call`` makes."""
    found = []

    def record(kernel, *arguments, **constants):
        found.append((kernel, arguments, constants))

    with mock.patch.object(launch.Kernel, "__call__", record):
        call()
    return found


def attention_call(direction, rows=322):
    """One call of prefix_attention's launcher: 9 query and 3 key heads of 64, P = 100."""
    from fastprompt.ops.prefix_attention import triton as launcher

    new = partial(torch.empty, dtype=torch.bfloat16)
    bank, seq = new(1, 100, 3, 64), Sequences.packed([0, rows])
    q, k, v = new(rows, 9, 64), new(rows, 3, 64), new(rows, 3, 64)
    options = dict(causal=True, window=None, softcap=None, sinks=None, scale=0.125)
    if direction == "forward":
        return lambda: launcher.forward(q, k, v, bank, bank, seq, **options)
    lse = torch.empty(9, rows)
    return lambda: launcher.backward(q, q, k, v, bank, bank, q, lse, seq, **options)


def measure(rounds=9, calls=2000):
    rows = []

    def add(what, arguments, call):
        times = seconds(call, rounds, calls)
        spread = {"us": median(times), "min us": min(times), "max us": max(times)}
        rows.append(
            {"call": what, "arguments": arguments} | {name: f"{value * 1e6:.2f}" for name, value in spread.items()}
        )

    with stubbed():
        for direction in ("forward", "backward"):
            whole = attention_call(direction)
            for kernel, arguments, constants in launches_of(whole):
                name, count = kernel.name.strip("_"), len(kernel.arguments) + len(kernel.constants)
                add(f"{name}: fastprompt's Kernel", count, partial(kernel, *arguments, **constants))
                if direction == "forward":  # Triton types an integer by its value, and the backward needs int64 strides
                    add(
                        f"{name}: Triton's function[grid]",
                        count,
                        partial(through_triton, kernel, *arguments, **constants),
                    )
            add(f"prefix_attention {direction}: the operator's launcher, whole", "", whole)
    return rows


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.launch_cost", description="Host cost of a launch. Needs no GPU."
    )
    parser.add_argument("--out", type=Path, default=OUT, help="CSV")
    options = parser.parse_args(arguments)
    if launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: kernels are interpreted, there is no launch to measure")
    rows = measure()
    table = Table(title=f"Python cost of a launch: {INCLUDED}", box=None, header_style="bold", pad_edge=False)
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "call" else "right")
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    output.write_csv(options.out, rows, [f"Triton {triton.__version__}; {INCLUDED}", *report.header().splitlines()])
    return 0


if __name__ == "__main__":
    sys.exit(main())
