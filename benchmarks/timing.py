"""How operators are timed beside one another, the rate of matrix products, and what is made of the records."""

from time import perf_counter

import torch

from . import report

SAMPLE = 4e-3  # seconds, at least, of a sample


class Gemm:
    """The matrix product whose rate is the yardstick."""

    size = 1024

    def __init__(self):
        self.a, self.b = torch.randn(2, self.size, self.size)

    def __call__(self):
        return self.a @ self.b

    def rate(self, seconds):
        """GFLOP a second."""
        return 2e-9 * self.size**3 / seconds


def seconds_of(step, calls=1, clock=perf_counter):
    """Of a call, the mean of so many."""
    start = clock()
    for _ in range(calls):
        step()
    return (clock() - start) / calls


def interleaved(steps, *, fewest, most, seconds, clock=perf_counter):
    """Name -> seconds of the samples, in rounds whose order turns.

    There are at least ``fewest`` rounds, then more until ``seconds`` or ``most``. A sample is as many calls as take
    ``SAMPLE``, their mean. ``clock`` may be that of the process, for steps of one thread.
    """
    calls = {name: max(1, round(SAMPLE / seconds_of(step))) for name, step in steps.items()}  # warms up, too
    names, times, start = list(steps), {name: [] for name in steps}, perf_counter()
    while len(times[names[0]]) < fewest or (perf_counter() - start < seconds and len(times[names[0]]) < most):
        for name in names:
            times[name].append(seconds_of(steps[name], calls[name], clock))
        names = names[1:] + names[:1]
    return times


def write(file, records, summary, plot):
    """Print and write records to ``file`` and, if all of them are right, a picture beside it; False if one is not."""
    print(report.table(list(records[0]), [[str(value) for value in record.values()] for record in records]))
    report.write_csv(file, records)
    if any(record["speed-up"] == "WRONG" for record in records):
        print("WRONG: a result is not that of float64, so no speed-up is given")
        return False
    print(summary(records), flush=True)
    plot(records, file.with_suffix(".png"))
    return True
