"""One training step, end to end: a method of PEFT's, the same accelerated, PEFT's LoRA, and the floor.

A step is zero_grad, forward and backward, eager, fp32. The optimizer's step is left out for all of them. All run
interleaved in one process, in an order that turns with every round, each on a model of its own with the same weights,
on the same right-padded batch with the same labels. Times are medians over the rounds; a ratio is the median of the
rounds' ratios, so that a machine that is slow for a while does not count for one side only.

The **floor** is the least work that the method leaves: the bare frozen model, forward and gradient of inputs_embeds, on
R rows (those of every distinct prompt once, none for Prefix-Tuning, and the T real tokens), head and loss on as many
rows as there are labels. It runs the R rows as one ``[b, R / b]`` batch: equal lengths, no mask, no padding, the
model's own attention, b the divisor of R next to B (the lengths of the workloads are trimmed so that it is B, except
those that are equal by intention). The loss is the faster one of torch's. Its rows attend to R / b keys at most, where
a real token attends to P more: a bound that cannot be reached quite, not an implementation.

**Products** are the matrix products of those rows alone (:class:`benchmarks.products.Products`), and "of bound" is
their time over fastprompt's. They count all R rows in every layer, those too that fastprompt leaves out.
"""

from dataclasses import dataclass
from functools import partial
from statistics import geometric_mean, median
from time import perf_counter

import torch
from torch import nn
from tqdm import tqdm

import fastprompt

from . import models, report
from .products import Products
from .workloads import Workload, all_workloads

LOSS_TOLERANCE, GRAD_TOLERANCE = 1e-5, 1e-4  # relative; the gradient's by norm


class Training:
    """The step of a PEFT model, accelerated or not."""

    def __init__(self, model, batch):
        self.model, self.batch = model.train(), batch
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    @property
    def gradient(self):
        """Of everything that trains, as one vector."""
        return torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])

    def __call__(self):
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.model(**self.batch).loss
        loss.backward()
        return loss.detach()


class Floor:
    """The step of the bare model on the rows that have to be run; see the module's docstring."""

    def __init__(self, model, workload):
        rows = workload.rows
        batch = min((b for b in range(1, rows + 1) if rows % b == 0), key=lambda b: abs(b - len(workload.lengths)))
        self.model = model.train()
        self.inputs = torch.randn(batch, rows // batch, model.config.hidden_size).requires_grad_()
        self.labels = torch.randint(model.config.vocab_size, (workload.labels,))

    def __call__(self):
        self.inputs.grad = None
        hidden = self.model.model(inputs_embeds=self.inputs, use_cache=False).last_hidden_state
        loss = _head_and_loss(hidden.flatten(0, 1)[: len(self.labels)], self.model.lm_head.weight, self.labels)
        loss.backward()
        return loss.detach()


def _head_and_loss(hidden, weight, labels):
    if not hasattr(nn.functional, "linear_cross_entropy"):  # torch < 2.13
        return nn.functional.cross_entropy(nn.functional.linear(hidden, weight), labels)
    options = nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=256)
    return nn.functional.linear_cross_entropy(hidden, weight, labels, options=options)


def peft_and_ours(build, batch):
    """PEFT's step and the same accelerated, each on a model of its own that ``build`` makes."""
    return {"PEFT": Training(build(), batch), "fastprompt": Training(fastprompt.accelerate(build()), batch)}


def providers(workload, sizes=models.SIZES, method="Prompt Tuning"):
    """Name -> step."""
    batch = workload.batch(sizes["vocab_size"])
    steps = peft_and_ours(lambda: models.soft_prompt(models.llama(sizes), workload.prompt, method), batch)
    if workload.prompts <= 1:
        steps["LoRA"] = Training(models.lora(models.llama(sizes)), batch)
    bare = models.llama(sizes)
    return steps | {"floor": Floor(bare, workload), "products": Products(bare, workload)}


@dataclass
class Result:
    """Seconds of every round by provider, and how far fastprompt's loss and prompt gradient are from PEFT's.

    Attributes:
        flop: of the products, None where they are not among the providers.
    """

    workload: Workload
    times: dict[str, list[float]]
    loss_error: float
    grad_error: float
    flop: int | None = None

    @property
    def right(self):
        return self.loss_error <= LOSS_TOLERANCE and self.grad_error <= GRAD_TOLERANCE  # False for nan

    def seconds(self, name):
        return median(self.times[name])

    def ratio(self, slow, fast):
        return median(a / b for a, b in zip(self.times[slow], self.times[fast]))


def measure(workload, rounds, steps, progress=None, of=("fastprompt", "PEFT")):
    """Compare the result of the first of two steps with the second's, which also warms up, then time every step
    ``rounds`` times."""
    ours, reference = of
    losses = {name: step() for name, step in steps.items()}
    grads = {name: steps[name].gradient for name in of}
    loss_error = abs(float(losses[ours]) - float(losses[reference])) / abs(float(losses[reference]))
    grad_error = float((grads[ours] - grads[reference]).norm() / grads[reference].norm())
    times = {name: [] for name in steps}
    names = list(steps)
    for _ in range(rounds + 1):
        for name in names:
            start = perf_counter()
            steps[name]()
            times[name].append(perf_counter() - start)
            if progress is not None:
                progress.update()
        names = names[1:] + names[:1]
    times = {name: t[1:] for name, t in times.items()}  # the first: warm-up
    return Result(workload, times, loss_error, grad_error, getattr(steps.get("products"), "flop", None))


def run(out, quick=False, sizes=models.SIZES):
    """Run, print, and write ``step.csv`` and ``step.png`` into ``out``; False if a result was wrong."""
    method = "Prompt Tuning"
    return compare(method, all_workloads(quick), partial(providers, sizes=sizes, method=method), out / "step", quick)


def compare(title, workloads, steps_of, file, quick):
    """Measure the steps that a function gives for each workload, print, and write CSV and a plot beside it.

    Returns:
        False if a result was wrong.
    """
    rounds = 2 if quick else 5
    results = []
    with tqdm(desc=title, unit="step") as progress:
        for workload in workloads:
            steps = steps_of(workload)
            progress.total = len(workloads) * len(steps) * (rounds + 1)
            results.append(measure(workload, rounds, steps, progress))
    print(f"{title}\n{summary(results)}", flush=True)
    report.write_csv(file.with_suffix(".csv"), [_record(result) for result in results])
    if all(result.right for result in results):
        plot(results, title, file.with_suffix(".png"))
    return all(result.right for result in results)


def summary(results):
    """The table; a wrong result has its differences in place of speed-ups, and then there is no mean either."""
    names = list(results[0].times)
    columns = [
        "(P, B, longest)",
        "tokens",
        "labels",
        *(f"{name} ms" if name == "PEFT" else name for name in names),
        *_ratios(names),
        "loss diff",
        "grad diff",
    ]
    text = report.table(columns, [_row(result, names) for result in results])
    if not all(result.right for result in results):
        return text + (
            f"\nWRONG: loss or gradient is not PEFT's (at most {LOSS_TOLERANCE:.0e} and "
            f"{GRAD_TOLERANCE:.0e} are allowed), so no speed-up is given"
        )
    uneven = [result for result in results if result.workload.uneven]
    means = ", ".join(
        f"{title} {geometric_mean(r.ratio(*pair) for r in uneven):.3f}" for title, pair in _ratios(names).items()
    )
    return text + f"\ngeometric means of the {len(uneven)} uneven workloads: {means}"


def _row(result, names):
    """The cells of the table for one workload."""
    w = result.workload
    return [
        w.name,
        str(w.tokens),
        "all" if w.all_labels else "one a row",
        *(f"{result.seconds(name) * 1e3:.0f}" for name in names),
        *(_ratio(result, title, pair) for title, pair in _ratios(names).items()),
        f"{result.loss_error:.0e}",
        f"{result.grad_error:.0e}",
    ]


def _ratio(result, title, pair):
    if not result.right:
        return "WRONG"
    return f"{result.ratio(*pair):.2f}x" if title.startswith("over ") else f"{result.ratio(*pair):.3f}"


def _ratios(names):
    """The title of each ratio and the two providers it is of."""
    ratios = {
        "over PEFT": ("PEFT", "fastprompt"),
        "over LoRA": ("LoRA", "fastprompt"),
        "overhead": ("fastprompt", "floor"),
        "of bound": ("products", "fastprompt"),
    }
    return {title: pair for title, pair in ratios.items() if set(pair) <= set(names)}


def _record(result):
    w = result.workload
    record = {"P": w.prompt, "B": len(w.lengths), "longest": max(w.lengths), "tokens": w.tokens, "labels": w.labels}
    for name, times in result.times.items():
        record |= {
            f"{name} ms": f"{median(times) * 1e3:.1f}",
            f"{name} min": f"{min(times) * 1e3:.1f}",
            f"{name} max": f"{max(times) * 1e3:.1f}",
        }
    if result.flop is not None:
        record["products GFLOP/s"] = f"{1e-9 * result.flop / result.seconds('products'):.1f}"
    for column, pair in _ratios(result.times).items():
        record[column] = f"{result.ratio(*pair):.3f}" if result.right else "wrong"
    return record | {"loss difference": result.loss_error, "gradient difference": result.grad_error}


def plot(results, title, file):
    """How much faster than PEFT's own step each provider is, a group of bars a workload."""
    if (figure := report.figure(10, 4.5)) is None:
        return
    axes = figure.subplots()
    colours = {"LoRA": "tab:gray", "fastprompt": "tab:blue", "floor": "lightsteelblue"}
    for i, (name, colour) in enumerate((n, c) for n, c in colours.items() if n in results[0].times):
        ratios = [result.ratio("PEFT", name) for result in results]
        bars = axes.bar([x + (i - 1) * 0.28 for x in range(len(results))], ratios, 0.26, label=name, color=colour)
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(
        range(len(results)),
        [f"{r.workload.name}\n{'all labels' if r.workload.all_labels else 'one a row'}" for r in results],
        fontsize=8,
    )
    axes.set_ylabel(f"times faster than PEFT: {title}")
    axes.set_xlabel("(prompt vectors, rows, longest row)")
    axes.legend()
    figure.savefig(file, dpi=150)
