"""``python -m benchmarks [NAME ...] [--quick] [--out DIR] [--threads N]``: run them, all that measure by default.

``--help`` has the names. compiled needs a C++ compiler, trainers needs trl. By their names alone run serve_load,
which loads a server for two minutes, and families and integrations, which try what runs packed and write
docs/families.md and docs/integrations.md.

Exits with 1 if a result was wrong; its speed-up is then not printed.
"""

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

# A thread that waits for the others spins, by default for milliseconds: one busy neighbour on a core then makes every
# small operator last a time slice. A few microseconds are enough where there is none. GNU OpenMP, which torch uses.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch  # noqa: E402 - OpenMP reads the variable once, when torch loads it

from . import (  # noqa: E402
    common,
    decode,
    many_prompts,
    memory,
    methods,
    prefix_attention,
    prompt_lstm,
    report,
    small_ops,
    step,
    trees,
)


def imported_late(name):
    """The ``run`` of a module that needs more than the others do, or takes longer to import."""

    def run(out, quick):
        return import_module(f"{__package__}.{name}").run(out, quick)

    return run


BENCHMARKS = {
    "memory": memory.run,
    "step": step.run,
    "methods": methods.run,
    "hybrids": imported_late("hybrids"),
    "encoder_decoder": imported_late("encoder_decoder"),
    "common": common.run,
    "many_prompts": many_prompts.run,
    "small_ops": small_ops.run,
    "prefix_attention": prefix_attention.run,
    "decode": decode.run,
    "prompt_lstm": prompt_lstm.run,
    "compiled": imported_late("compiled"),
    "serve": imported_late("serve"),
    "trees": trees.run,
    "trainers": imported_late("trainers"),
    "serve_load": imported_late("serve_load"),
    "families": imported_late("families"),
    "integrations": imported_late("integrations"),
}
BY_NAME = ("serve_load", "families", "integrations")


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of fastprompt.")
    parser.add_argument(
        "benchmarks",
        nargs="*",
        metavar="benchmark",
        help=f"of {', '.join(BENCHMARKS)}; all but the last three by default",
    )
    parser.add_argument("--quick", action="store_true", help="fewer workloads and rounds: a look, not a measurement")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR", help="for CSV and plots")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    options = parser.parse_args(arguments)
    if unknown := set(options.benchmarks) - set(BENCHMARKS):
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    print(report.header(), flush=True)
    chosen = options.benchmarks or [name for name in BENCHMARKS if name not in BY_NAME]
    right = [run(options.out, options.quick) for name, run in BENCHMARKS.items() if name in chosen]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
