"""``python -m benchmarks.gpu.compile_matrix``: compile every kernel variant for every target, and read the binaries.

Needs Triton and no GPU. Exits with 1 and names the variants where one spills, takes more shared memory than the chip
gives a program, makes a half-precision matrix product of plain multiply-adds, does not compile, or, in a forward or
backward with full tiles, does not use the chip's own matrix instructions.
"""

import argparse
import hashlib
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import triton
from fastprompt.kernels import launch
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table
from triton._C.libtriton import ir
from triton.compiler.compiler import make_backend

from . import binary, cases, output
from .chips import CHIPS, KIB

OUT = Path(__file__).parent / "compile_matrix.csv"
COMMENTS = [
    f"Triton {triton.__version__}, compiled without a GPU: no kernel ran.",
    "Counts are of instructions in the code. Wide: 16 bytes a thread or whole tiles, of all accesses to global memory.",
    "spills: bytes of local memory; lanes: scalars in lanes of vector registers (AMD), which take no memory.",
    "resident: programs that a multiprocessor holds at once, by registers, shared memory and threads.",
    "seconds: of the compiler when the row was made; code: what the row is of, see compile_matrix.py.",
]


@dataclass(frozen=True)
class Job:
    """A variant to compile for a target, and the first case that launches it."""

    case: cases.Case
    chip: str
    launch: launch.Launch

    @property
    def constants(self):
        names = launch.by_field(dict(zip(self.launch.kernel.constants, self.launch.constants)))
        return " ".join(f"{name}={int(value) if isinstance(value, bool) else value}" for name, value in names.items())

    @property
    def name(self):
        kernel = self.launch.kernel.name.strip("_")
        return f"{self.case.op} {kernel} [{self.case.direction} {self.case.label}] on {self.chip}"


@dataclass(frozen=True)
class Result:
    """What a job gave: the binary's contents or an error, and the seconds it took (None: it was in Triton's cache)."""

    contents: binary.Contents | None
    seconds: float | None
    error: str = ""


def code_of(job):
    """What the compiler is given, as a hash; the same gives the same binary. Empty for what does not get so far."""
    target = CHIPS[job.chip].target
    try:
        source, options = job.launch.source()
        backend, context, stages = make_backend(target), ir.context(), {}
        chosen = backend.parse_options({**options, **source.parse_options()})
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions = backend.get_codegen_implementation(chosen), backend.get_module_map()
        module = source.make_ir(target, chosen, *functions, context)
        backend.add_stages(stages, chosen, source.language)
        text = stages["ttir"](module, {}).str_nodebug()
    except Exception:  # whatever a compiler raises: compile_job says it
        return ""
    return hashlib.sha256((text + repr(sorted(options.items()))).encode()).hexdigest()[:12]


def rows_to_keep(file):
    """The rows of an earlier table, each by what tells it from others; they stand as long as their code does."""
    comments, rows = output.read_csv(file)
    if comments[:1] != COMMENTS[:1]:  # of another Triton
        return {}
    return {_identity(row): row for row in rows if row.get("code") and row["verdict"] == "ok"}


def _identity(row):
    return tuple(row[name] for name in ("op", "kernel", "target", "case", "aligned", "constants", "code"))


def problems(contents, chip, native=False):
    """Why a binary must not be shipped for a chip; an empty list if it may."""
    found = []
    if contents.spills:
        found.append(f"spills {contents.spills} bytes")
    if contents.shared > chip.shared:
        found.append(f"needs {contents.shared} bytes of shared memory, the chip has {chip.shared}")
    if contents.half_dots_without_matrix:
        found.append("makes a half-precision matrix product of multiply-adds")
    elif native and contents.half_dots and chip.matrix not in contents.matrix:
        found.append(f"uses {', '.join(contents.matrix)}, not {chip.matrix}")
    return found


def select(all_cases, chips, everywhere=True):
    """The jobs of some cases, each variant once a target; not ``everywhere``: to one target each, in turn."""
    jobs, turn = {}, 0
    for case in all_cases:
        if everywhere or case.everywhere:
            wanted = chips
        else:
            wanted, turn = [chips[turn % len(chips)]], turn + 1
        for chip in wanted:
            with launch.capture(CHIPS[chip].target) as launches:
                case.run()
            for one in launches:
                key = chip, one.kernel, one.types, one.aligned, one.constants, one.options
                if key not in jobs or case.native and not jobs[key].case.native:
                    jobs[key] = Job(case, chip, one)
    return list(jobs.values())


def compile_job(job):
    """Compile and inspect; a failure of the compiler is a result too."""
    took = []

    def listen(*, times, cache_hit, **_):
        took.append(None if cache_hit else times.total / 1e6)

    triton.knobs.compilation.listener = listen
    try:
        contents = binary.inspect(job.launch.compile(CHIPS[job.chip].target))
    except Exception as error:  # whatever a compiler raises: the other variants are compiled all the same
        said = str(error).strip() or type(error).__name__
        return Result(None, None, f"does not compile: {said.splitlines()[-1]}")
    finally:
        triton.knobs.compilation.listener = None
    return Result(contents, took[0])


def compile_all(jobs, processes, console):
    """The results in the order of the jobs."""
    if processes == 1:
        return [compile_job(job) for job in track(jobs, "compiling", console=console, transient=True)]
    global _jobs
    _jobs = jobs  # inherited by the forked workers: a kernel holds a compiled function and cannot be sent
    results = [None] * len(jobs)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        running = {
            pool.submit(_compile_number, i): i for i in range(len(jobs))
        }  # forks, before Progress starts a thread
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("compiling", total=len(jobs))
            for future in as_completed(running):
                results[running[future]] = future.result()
                progress.advance(task)
    return results


def _compile_number(i):
    return compile_job(_jobs[i])


def record(job, result, code):
    """One row of the table and of the CSV."""
    c, chip, warps = result.contents, CHIPS[job.chip], job.launch.options.num_warps
    found = dict.fromkeys(_COUNTS, "")
    if c is not None:
        bad = problems(c, chip, job.case.native)
        found |= {
            "registers": c.registers,
            "shared KiB": f"{c.shared / KIB:.1f}",
            "spills": c.spills,
            "lanes": c.lanes,
            "resident": chip.resident(c.registers, c.shared, warps),
            "matrix": " ".join(f"{family}:{count}" for family, count in c.matrix.items()) or "-",
            "FMA": c.fma,
            "wide loads": f"{c.wide_loads}/{c.loads}",
            "wide stores": f"{c.wide_stores}/{c.stores}",
            "code KiB": f"{c.code / KIB:.1f}",
            "seconds": "cached" if result.seconds is None else f"{result.seconds:.1f}",
        }
    else:
        bad = [result.error]
    head, tail = _described(job, code)
    return head | found | tail | {"verdict": "; ".join(bad) or "ok"}


_COUNTS = ("registers", "shared KiB", "spills", "lanes", "resident", "matrix", "FMA", "wide loads", "wide stores",
           "code KiB", "seconds")  # fmt: skip


def _described(job, code):
    """What stands before the counts of a row and behind them."""
    one = job.launch
    head = {"op": job.case.op, "kernel": one.kernel.name.strip("_"), "target": job.chip, "case": job.case.label}
    tail = {
        "warps": one.options.num_warps,
        "stages": one.options.num_stages,
        "aligned": "yes" if one.aligned else "no",
        "constants": job.constants,
        "code": code,
    }
    return head, tail


def show(records, console):
    hidden = ("constants", "op", "stages", "code", "verdict")
    columns = [name for name in records[0] if name not in hidden]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        table.add_column(
            name,
            justify="left" if name in ("kernel", "target", "case", "matrix") else "right",
            overflow="fold",
            no_wrap=name != "case",
        )
    for row in records:
        table.add_row(*(str(row[name]) for name in columns), style=None if row["verdict"] == "ok" else "red")
    console.print(table)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.compile_matrix",
        description="Compile every kernel variant for every target. Needs no GPU.",
    )
    parser.add_argument("--complete", action="store_true", help="every head dim, dtype and flag, not a sample")
    parser.add_argument("--op", help="only this operator")
    parser.add_argument("--direction", help="only forward, backward or decode")
    parser.add_argument(
        "--match",
        default="",
        type=re.compile,
        metavar="REGEX",
        help="only cases in whose label this regular expression is found, such as bf16 or 'x(64|128)( |$)'",
    )
    parser.add_argument(
        "--target", nargs="+", default=list(CHIPS), metavar="T", help="of " + ", ".join(CHIPS) + "; 90 for sm_90"
    )
    parser.add_argument("--anew", action="store_true", help="compile also what the table has already")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, help=f"CSV; {OUT.name} beside this module, if nothing is left out")
    options = parser.parse_args(arguments)
    if launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: kernels are interpreted, there is nothing to compile")
    chips = [name if name in CHIPS else f"sm_{name}" for name in options.target]
    if unknown := set(chips) - set(CHIPS):
        parser.error(f"unknown target {', '.join(sorted(unknown))}; there are {', '.join(CHIPS)}")
    chosen = [
        case
        for case in (cases.complete() if options.complete else cases.sample())
        if options.op in (None, case.op)
        and options.direction in (None, case.direction)
        and options.match.search(case.label)
    ]
    if not chosen:
        parser.error("no case is left")
    filtered = chips != list(CHIPS) or options.op or options.direction or options.match.pattern

    console = Console(width=None if sys.stdout.isatty() else 190)
    start = time.perf_counter()
    jobs = select(chosen, chips, everywhere=options.complete or filtered)
    file = options.out or (None if filtered else OUT)
    kept = rows_to_keep(file) if file and not options.anew else {}
    codes = [code_of(job) for job in track(jobs, "reading", console=console, transient=True)]
    rows = {}
    for i, (job, code) in enumerate(zip(jobs, codes)):
        head, tail = _described(job, code)
        if row := kept.get(_identity(head | tail)):
            rows[i] = row
    left = [i for i in range(len(jobs)) if i not in rows]
    for i, result in zip(left, compile_all([jobs[i] for i in left], options.jobs, console)):
        rows[i] = record(jobs[i], result, codes[i])
    order = list(CHIPS)
    records = sorted(rows.values(), key=lambda r: (r["op"], r["kernel"], r["case"], order.index(r["target"])))
    show(records, console)
    if file:
        output.write_csv(file, records, COMMENTS)
    wrong = [(jobs[i], row) for i, row in rows.items() if row["verdict"] != "ok"]
    for job, row in wrong:
        console.print(
            f"FAILED {job.name}: {row['verdict']} ({row['constants']})", style="red", markup=False, soft_wrap=True
        )
    console.print(
        f"{len(jobs)} variants of {len(chosen)} cases for {', '.join(chips)}, "
        f"{len(jobs) - len(left)} kept, {len(wrong)} failed, "
        f"{time.perf_counter() - start:.0f} s"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
