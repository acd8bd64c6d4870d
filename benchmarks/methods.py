"""The training steps of Prefix-Tuning, P-Tuning and Multitask Prompt Tuning, as in :mod:`benchmarks.step`."""

from functools import partial

from . import models, step
from .workloads import uneven_workloads

# How many distinct prompts stand in a batch and take rows: the learned keys and values of Prefix-Tuning take none.
PROMPTS = {"Prefix-Tuning": 0, "P-Tuning": 1, "Multitask Prompt Tuning": models.TASKS}


def run(out, quick=False, sizes=models.SIZES):
    """Run, print, and write a CSV and a plot for each method into ``out``; False if a result was wrong."""
    right = []
    for method, prompts in PROMPTS.items():
        steps_of = partial(step.providers, sizes=sizes, method=method)
        file = out / f"step_{method.lower().replace(' ', '_')}"
        right.append(step.compare(method, uneven_workloads(prompts, quick), steps_of, file, quick))
    return all(right)
