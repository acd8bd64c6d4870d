"""``python -m benchmarks.gpu.model``: bytes, FLOPs, launches and waves of prefix attention, and the time they predict.

PREDICTION: no GPU ran. Ours is counted from the launches that the operator makes on these shapes, item by item of its
tables; the others are written down as the launches that they need, with every choice in their favour:

PEFT + SDPA: rows padded to the longest, the prefix copied for every row, keys concatenated, heads repeated, a mask, and
    therefore the memory-efficient kernel. Making the copies of the prefix itself is not counted.
FlashAttention: varlen, without padding; prefix and own keys of every sequence are gathered into one packed tensor.
FlexAttention packed: one sequence, prefix first, with a document mask that skips 128 x 128 blocks nobody sees.
FlexAttention Bkv=1: padded queries; one call on the shared prefix, whose gradient is [B, ...] and summed after, one on
    the own keys, merged by their log-sum-exp.

See :mod:`benchmarks.gpu.traffic` for caches and time. Not counted: what is made once a batch (our tables, block masks,
cu_seqlens), allocation, and Python. bf16.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from .. import report
from . import output
from .chips import DEVICES
from .counts import Workload, ours
from .rival_counts import flash, flex_packed, flex_shared, peft
from .rivals import uneven
from .traffic import costs

OUT = Path(__file__).parent / "predictions.csv"
PREDICTION = "PREDICTION, no GPU ran"
LAUNCH_SECONDS = 3e-6
BAR = 1.3

IMPLEMENTATIONS = {
    "fastprompt": ours, "PEFT + SDPA": peft, "FlashAttention": flash,
    "FlexAttention packed": flex_packed, "FlexAttention Bkv=1": flex_shared,
}  # fmt: skip
OURS, PEFT = "fastprompt", "PEFT + SDPA"


def workloads(direction):
    batches = (
        {"decode 64": tuple(128 + 14 * i for i in range(64))}
        if direction == "decode"
        else {"uneven 10-64": uneven(8192), "equal 512": (512,) * 16}
    )
    return [
        Workload(name, *sizes, prefix, lengths)
        for sizes in ((9, 3, 64), (32, 8, 128))
        for prefix in (20, 100, 500)
        for name, lengths in batches.items()
    ]


def predict(name, workload, direction, device_name):
    """One row of the table."""
    device = DEVICES[device_name]
    if name != OURS and len(set(workload.widths)) > 1:
        raise ValueError(f"{name} is counted with values as wide as keys, got widths {workload.widths}")
    launches = IMPLEMENTATIONS[name](workload, direction, device.chip)
    found = costs(launches, device, LAUNCH_SECONDS)
    memory, floor = sum(c.memory_bytes for c in found), workload.floor(direction)
    flops = sum(c.flops for c in found)
    longest = max(found, key=lambda c: c.seconds)
    return {
        "device": device_name, "direction": direction, "H": workload.heads, "Hkv": workload.kv_heads,
        "Dh": workload.head_dim, "P": workload.prefix, "batch": workload.name, "implementation": name,
        "launches": len(launches),
        "waves": f"{longest.waves:.2f}", "balance": f"{longest.balance:.2f}", "GFLOP": f"{flops / 1e9:.2f}",
        "useful": f"{workload.useful_flops(direction) / flops:.2f}",
        "L2 MB": f"{sum(c.l2_bytes for c in found) / 1e6:.1f}",
        "memory MB": f"{memory / 1e6:.1f}", "floor MB": f"{floor / 1e6:.1f}", "memory / floor": f"{memory / floor:.2f}",
        "us": f"{sum(c.seconds for c in found) * 1e6:.1f}",
    }  # fmt: skip


def predict_all(progress=True):
    jobs = [
        (name, w, direction, device)
        for device in DEVICES
        for direction in ("forward", "backward", "decode")
        for w in workloads(direction)
        for name in IMPLEMENTATIONS
        if direction != "decode" or not name.startswith("FlexAttention")
    ]
    return [predict(*job) for job in track(jobs, "counting", transient=True, disable=not progress)]


def bar(rows):
    """Our backward at P = 100 on 8192 packed rows on each device, and whether bytes and launches are within the bar."""
    return [
        (r, float(r["memory / floor"]) <= BAR and r["launches"] <= 4)
        for r in rows
        if (r["direction"], r["P"], r["batch"], r["implementation"]) == ("backward", 100, "uneven 10-64", OURS)
    ]


def show(rows, console):
    table = Table(
        title=f"{PREDICTION}: P = 100, H100 SXM; all in {OUT.name}", box=None, header_style="bold", pad_edge=False
    )
    names = [name for name in rows[0] if name not in ("device", "P")]
    for name in names:
        table.add_column(
            name, justify="left" if name in ("direction", "batch", "implementation") else "right", no_wrap=True
        )
    previous = None
    for row in rows:
        if row["P"] == 100 and row["device"] == "H100 SXM":
            group = row["direction"], row["Dh"], row["batch"]
            if previous not in (None, group):
                table.add_section()
            previous = group
            table.add_row(*(str(row[name]) for name in names), style="green" if row["implementation"] == OURS else None)
    console.print(table)
    for row, met in bar(rows):
        same = ("device", "direction", "Dh", "P", "batch")
        rival = next(r for r in rows if r["implementation"] == PEFT and all(r[x] == row[x] for x in same))
        console.print(
            f"{PREDICTION}: backward, P = 100, 8192 packed rows, {row['H']}/{row['Hkv']} heads of {row['Dh']}, "
            f"{row['device']}: {row['memory / floor']} times the bytes of inputs, saved tensors and outputs "
            f"(bar {BAR}), {row['launches']} launches (bar 4), {'met' if met else 'NOT MET'}; "
            f"{PEFT}: {rival['memory / floor']} times, {rival['launches']} launches",
            soft_wrap=True,
            highlight=False,
            style=None if met else "red",
        )


def plot(rows, file):
    """Predicted time of forward and backward, a panel a device, for P = 100."""
    title = f"{PREDICTION}: prefix attention, P = 100, 8192 rows, bf16, by counted bytes, FLOPs and launches"
    if (figure := report.figure(14, 4.5, title)) is None:
        return
    groups = [(9, 64, "uneven 10-64"), (9, 64, "equal 512"), (32, 128, "uneven 10-64"), (32, 128, "equal 512")]
    panels = figure.subplots(1, len(DEVICES), sharey=True)
    for axes, device in zip(panels, DEVICES):
        for i, name in enumerate(IMPLEMENTATIONS):
            times = [
                sum(
                    float(r["us"])
                    for r in rows
                    if r["implementation"] == name
                    and r["device"] == device
                    and r["P"] == 100
                    and (r["H"], r["Dh"], r["batch"]) == group
                )
                for group in groups
            ]
            bars = axes.bar([x + (i - 2) * 0.17 for x in range(len(groups))], times, 0.16, label=name)
            axes.bar_label(bars, fmt="%.0f", fontsize=6)
        axes.set_xticks(range(len(groups)), [f"{h} heads of {d}\n{batch}" for h, d, batch in groups], fontsize=7)
        axes.set_yscale("log")
        axes.set_title(device, fontsize=9)
    panels[0].set_ylabel("predicted us, forward and backward of one layer")
    panels[0].legend(fontsize=7)
    figure.savefig(file, dpi=130)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.model", description="Predicted cost of prefix attention. No GPU runs."
    )
    parser.add_argument("--out", type=Path, default=OUT, help="CSV; a picture is written beside it")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    rows = predict_all()
    output.write_csv(
        options.out,
        rows,
        [
            f"{PREDICTION}. Counted bytes, FLOPs and launches; see benchmarks/gpu/model.py. bf16, one layer.",
            "time of a launch = the slower of memory bytes / bandwidth and FLOPs / peak "
            "(less what the last wave and long programs leave idle), "
            f"+ {LAUNCH_SECONDS * 1e6:.0f} us; waves and balance are those of the longest launch",
        ],
    )
    plot(rows, options.out.with_suffix(".png"))
    show(rows, console)
    return 0 if all(met for _, met in bar(rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
