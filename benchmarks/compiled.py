"""A training step with compiled layers beside the same step eager, on the workloads of the step benchmark.

Both are accelerated PEFT models with the same weights. ``layer.compile()`` of every decoder layer, by torch's default
compiler; the time that compiling takes is not in a step's, and is printed. The results of both are compared.
"""

from time import perf_counter

import torch
from tqdm import tqdm

import fastprompt

from . import models, report
from .step import Training, measure
from .workloads import all_workloads


def run(out, quick=False, sizes=models.SIZES):
    """Run, print, and write ``compiled.csv`` into ``out``; False if a result was wrong."""
    torch._dynamo.reset()
    workloads = all_workloads(quick)
    records = [_record(workload, 2 if quick else 9, sizes) for workload in tqdm(workloads, desc="compiled layers")]
    print(report.table(list(records[0]), [[str(value) for value in record.values()] for record in records]))
    report.write_csv(out / "compiled.csv", records)
    return all(record["compiled / eager"] != "WRONG" for record in records)


def _record(workload, rounds, sizes):
    batch = workload.batch(sizes["vocab_size"])
    eager, compiled = (
        fastprompt.accelerate(models.soft_prompt(models.llama(sizes), workload.prompt)) for _ in range(2)
    )
    for layer in compiled.base_model.model.layers:
        layer.compile(fullgraph=True)
    steps = {"eager": Training(eager, batch), "compiled": Training(compiled, batch)}
    start = perf_counter()
    steps["compiled"]()
    compiling = perf_counter() - start
    result = measure(workload, rounds, steps, of=("compiled", "eager"))
    return {
        "(P, B, longest)": workload.name,
        "labels": workload.labels,
        "eager ms": f"{1e3 * result.seconds('eager'):.1f}",
        "compiled ms": f"{1e3 * result.seconds('compiled'):.1f}",
        "compiled / eager": f"{result.ratio('compiled', 'eager'):.3f}" if result.right else "WRONG",
        "first step s": f"{compiling:.1f}",
    }
