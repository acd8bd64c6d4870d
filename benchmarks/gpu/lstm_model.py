"""``python -m benchmarks.gpu.lstm_model``: the time of P-Tuning's LSTM by the CUDA kernels and by cuDNN, predicted.

PREDICTION: no GPU ran. Which kernel runs, with how many blocks and how much of the weights in each, is computed by the
rule of csrc/cuda/prompt_lstm.h itself; what it costs, by the few figures below. They are what decides, so they are
listed:

Step of a cluster: a write into another block's shared memory and a barrier, each one trip over the network between
    multiprocessors, 180 cycles on H100 (arXiv 2402.13499); taken for B200 too.
Step of a grid: a word is written to the L2 cache and read from there; 1.5 reads, because whoever asks does so at any
    time. A trip takes 265 cycles (the same source: 180 are 32% less); more on B200, where half of the cache is on the
    other die (ASSUMED).
Step, whatever the kernel: 300 cycles for the sums over a warp's lanes and the gates' functions one after the other
(ASSUMED). Weights of a step: from registers at 128 multiply-adds a cycle and multiprocessor, from shared memory at 128
bytes a
    cycle and multiprocessor (CUDA's programming guide), from the L2 cache at ASSUMED 4, 5.5 and 10 TB/s.
Products around the recurrence: bytes of weights and states over the bandwidth of memory or FLOPs over the peak of fp32
    without tensor cores, whichever is slower, and 3 us a launch.
Small launches of ours, 3 us each: zeros for a grid's words, sums of biases; backward also the transposed weights (read
    and written once), hidden states from cells, the gradients of the biases and the sum over directions.
cuDNN: where a direction's recurrent weights fit into the registers and shared memory of the device, as many steps in a
    row, 2 us each: 2.01 ms for nn.LSTM at H = 768 are in the plots of FlashRNN's repository, ASSUMED to be of 1024
    steps. Elsewhere two launches a step, each ASSUMED to begin 2.5 us after the other, and all weights through the L2
    cache. Directions run side by side where both fit, else one after the other. Its products are as ours, and it is
    given small launches for nothing.

Two layers, two directions, input as wide as 2H, fp32; forward, and backward with all gradients. Not counted: Python,
allocation.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import lstm_plan, output
from .chips import CHIPS, DEVICES
from .lstm_plan import CLUSTER, Chip, Problem
from .model import LAUNCH_SECONDS, PREDICTION

OUT = Path(__file__).parent / "lstm_predictions.csv"
LAYERS = DIRECTIONS = 2
ELEMENT = 4
STEP_CYCLES = 300
CLUSTER_CYCLES, CACHE_CYCLES = 180, 265
CUDNN_STEP, CUDNN_LAUNCH = 2e-6, 2.5e-6


@dataclass(frozen=True)
class Speed:
    """Of a card: Hz, FLOP/s of fp32, bytes/s of the L2 cache, and how much longer a trip to it takes than on H100."""

    clock: float
    flops: float
    cache: float
    far: float = 1.0


SPEEDS = {
    "A100 SXM 80 GB": Speed(1.41e9, 19.5e12, 4e12),
    "H100 SXM": Speed(1.75e9, 67e12, 5.5e12),
    "B200": Speed(1.85e9, 75e12, 10e12, 1.5),
}
VARIANTS = ("cluster", "grid", "streaming")


def plans(library, device_name, hidden, backward):
    """The plan of each variant that can run: the first two have all weights in registers and shared memory."""
    device, problem = DEVICES[device_name], Problem(hidden, DIRECTIONS, ELEMENT, backward)
    shared, found = CHIPS[device.chip].shared, {}
    cluster = lstm_plan.choose(library, Chip(device.processors, shared, 16), problem)
    if cluster.exchange == CLUSTER and device.chip != "sm_80":
        found["cluster"] = cluster
    grid = lstm_plan.choose(library, Chip(device.processors, shared, 0), problem)
    if grid.held + grid.kept == lstm_plan.chunks(problem):
        found["grid"] = grid
        blocks = min(-(-hidden // 4), device.processors // DIRECTIONS)
        grid = lstm_plan.make(library, problem, False, blocks, 0, registers=False)  # what would run if nothing fitted
    found["streaming"] = grid
    return found


def recurrence_seconds(device_name, plan, hidden, backward, count):
    """Of one layer, both directions at once."""
    speed, columns = SPEEDS[device_name], (4 if backward else 1) * hidden
    trip = CLUSTER_CYCLES * 2 if plan.exchange == CLUSTER else CACHE_CYCLES * 2.5 * speed.far
    rows = plan.tiles * 4 * (1 if backward else 4)  # of a block
    held, kept = (chunks * 16 // ELEMENT for chunks in (plan.held, plan.kept))
    weights = rows * (held + kept * ELEMENT) / 128
    from_cache = DIRECTIONS * plan.blocks * rows * (columns - held - kept) * ELEMENT
    if plan.exchange != CLUSTER:
        from_cache += DIRECTIONS * plan.blocks * columns * 8  # the words of the vector, by every block
    return LAUNCH_SECONDS + count * ((trip + STEP_CYCLES + weights) / speed.clock + from_cache / speed.cache)


def product_seconds(device_name, m, n, k):
    """Of [m, k] times [k, n], everything from memory."""
    moved = ELEMENT * (m * k + k * n + m * n)
    return LAUNCH_SECONDS + max(moved / DEVICES[device_name].bandwidth, 2 * m * n * k / SPEEDS[device_name].flops)


def products_seconds(device_name, hidden, count, backward):
    """Of one layer: the input's projection; or the gradients of both weights and of the input."""
    wide, gates = DIRECTIONS * hidden, 4 * hidden
    if not backward:
        return DIRECTIONS * product_seconds(device_name, count, gates, wide)
    each = [(gates, wide, count), (gates, hidden, count), (count, wide, gates)]
    return DIRECTIONS * sum(product_seconds(device_name, *shape) for shape in each)


def others_seconds(device_name, hidden, backward):
    """Of one layer: what the backend launches beside products and recurrence."""
    if not backward:
        return (1 + DIRECTIONS) * LAUNCH_SECONDS
    launches = 1 + DIRECTIONS + 4 + 2 * DIRECTIONS + DIRECTIONS
    return launches * LAUNCH_SECONDS + 2 * DIRECTIONS * 4 * hidden**2 * ELEMENT / DEVICES[device_name].bandwidth


def cudnn_seconds(device_name, hidden, count):
    """The recurrence of one layer; backward is taken for as long as forward."""
    device, bytes_ = DEVICES[device_name], 4 * hidden * hidden * ELEMENT
    room = device.processors * (CHIPS[device.chip].shared + 128 * 1024)  # half of the registers
    if bytes_ <= room:
        turns = 1 if DIRECTIONS * bytes_ <= room else DIRECTIONS
        return turns * (LAUNCH_SECONDS + count * CUDNN_STEP)
    return count * max(2 * CUDNN_LAUNCH * DIRECTIONS, DIRECTIONS * bytes_ / SPEEDS[device_name].cache)


def predict(library, device_name, hidden, count):
    """Rows of the table: forward and backward, each variant and cuDNN."""
    rows = []
    for backward in (False, True):
        around = LAYERS * products_seconds(device_name, hidden, count, backward)
        others = LAYERS * others_seconds(device_name, hidden, backward)
        base = {"device": device_name, "direction": "backward" if backward else "forward", "H": hidden, "P": count}
        found = plans(library, device_name, hidden, backward)
        chosen = next(iter(found))
        blank = dict.fromkeys(("blocks", "in registers", "in shared memory", "streamed", "shared KiB"), "")
        for name, plan in found.items():
            all_chunks = lstm_plan.chunks(Problem(hidden, DIRECTIONS, ELEMENT, backward))
            held, kept = plan.held / all_chunks, plan.kept / all_chunks
            inner = LAYERS * recurrence_seconds(device_name, plan, hidden, backward, count)
            rows.append(base | {
                "implementation": name, "chosen": "yes" if name == chosen else "", "blocks": plan.blocks,
                "in registers": f"{held:.2f}", "in shared memory": f"{kept:.2f}", "streamed": f"{1 - held - kept:.2f}",
                "shared KiB": f"{plan.shared / 1024:.1f}", "steps us": f"{inner * 1e6:.0f}",
                "products us": f"{around * 1e6:.0f}", "others us": f"{others * 1e6:.0f}",
                "us": f"{(inner + around + others) * 1e6:.0f}",
            })  # fmt: skip
        inner = LAYERS * cudnn_seconds(device_name, hidden, count)
        rows.append(
            base
            | {"implementation": "cuDNN", "chosen": ""}
            | blank
            | {
                "steps us": f"{inner * 1e6:.0f}",
                "products us": f"{around * 1e6:.0f}",
                "others us": "0",
                "us": f"{(inner + around) * 1e6:.0f}",
            }
        )
    return rows


def predict_all():
    with tempfile.TemporaryDirectory() as folder:
        library = lstm_plan.build(Path(folder, "plan.so"), "plan.cpp")
        return [
            row
            for device in DEVICES
            for hidden in (128, 256, 512, 1024)
            for count in (20, 100)
            for row in predict(library, device, hidden, count)
        ]


def show(rows, console):
    table = Table(
        title=f"{PREDICTION}: us of forward + backward, two layers, two directions, fp32; all in {OUT.name}",
        box=None,
        header_style="bold",
        pad_edge=False,
    )
    for name in ("device", "H", "P", *VARIANTS, "cuDNN", "cuDNN / chosen"):
        table.add_column(name, justify="left" if name == "device" else "right")
    cells = {}
    for row in rows:
        cell = cells.setdefault((row["device"], row["H"], row["P"]), {})
        both = cell.setdefault(row["implementation"], [])
        both.append(float(row["us"]))
        if row["chosen"]:
            cell.setdefault("chosen", []).append(float(row["us"]))
    for key, cell in cells.items():
        whole = {name: sum(us) for name, us in cell.items() if len(us) == 2}
        times = (f"{whole[name]:.0f}" if name in whole else "-" for name in (*VARIANTS, "cuDNN"))
        table.add_row(*(str(x) for x in key), *times, f"{whole['cuDNN'] / whole['chosen']:.2f}")
    console.print(table)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.lstm_model",
        description="Predicted time of the prompt encoder's LSTM. No GPU runs.",
    )
    parser.add_argument("--out", type=Path, default=OUT, help="CSV")
    options = parser.parse_args(arguments)
    if not lstm_plan.COMPILER:
        print("The LSTM is not predicted: there is no C++ compiler for the rule that picks its kernels.")
        return 0
    rows = predict_all()
    output.write_csv(
        options.out,
        rows,
        [
            f"{PREDICTION}. Two layers, two directions, fp32; "
            "see benchmarks/gpu/lstm_model.py for the figures it assumes.",
            "chosen: what the rule picks for this device; blocks: of a direction; "
            "where the parts of the weights stand, streamed: in the L2 cache.",
            "us = steps us (the recurrence) + products us (matrix products around it, the same for all) "
            "+ others us (small launches)",
        ],
    )
    show(rows, Console(width=None if sys.stdout.isatty() else 120))
    return 0


if __name__ == "__main__":
    sys.exit(main())
