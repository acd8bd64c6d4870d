"""A step that trains several prompts in one batch, beside the bare model on the rows that have to be run.

Of 16 prompts some meet in a batch. A step is everything: their values gathered, forward and backward, each one's
gradient norm and clipping, and AdamW. The floor (:class:`benchmarks.step.Floor`) is forward and backward of the bare
model on P rows of each prompt in the batch and the real tokens. Losses and gradients of the first and the last prompt
are compared with plain PEFT's on their own rows.
"""

from statistics import median
from time import perf_counter

import torch
from tqdm import tqdm

import fastprompt
from fastprompt.peft.stack import AdapterStack, values_of
from fastprompt.training.stacked_adamw import StackedAdamW, gradient_norms

from . import models, report, step
from .workloads import Workload, uneven_lengths

# The shape of the quickstart's model.
SIZES = {**models.SIZES, "vocab_size": 49152, "num_hidden_layers": 30}
PROMPTS, LENGTH, LONGEST = 16, 20, 24
# The method, how many prompts meet, and the rows of each.
CASES = [
    ("Prompt Tuning", 1, 16),
    ("Prompt Tuning", 2, 16),
    ("Prompt Tuning", 4, 16),
    ("Prompt Tuning", 16, 4),
    ("Prefix-Tuning", 4, 16),
    ("P-Tuning", 4, 16),
]


class Mixed:
    """A step of the prompts that meet."""

    def __init__(self, model, starts, batch, owners):
        self.batch, self.owners, self.ids = batch, owners, torch.arange(int(owners.max()) + 1)
        self.stack = AdapterStack(model.train(), starts)
        self.optimizer = StackedAdamW(self.stack.values, max_grad_norm=1.0)

    def gradients(self):
        """The losses ``[n]``, and ``{name: [n, ...]}``."""
        leaves = self.stack.leaves(self.ids)
        losses = self.stack.losses(leaves, self.batch, self.owners)
        return losses.detach(), dict(zip(leaves, torch.autograd.grad(losses.sum(), list(leaves.values()))))

    def __call__(self):
        _, gradients = self.gradients()
        rates = [1e-3] * len(self.ids)
        self.optimizer.step(self.ids.tolist(), gradients, gradient_norms(gradients), rates)


def run(out, quick=False, sizes=None):
    """Run, print, and write ``many_prompts.csv`` into ``out``; False if a result differs from PEFT's."""
    sizes = sizes or (models.SIZES if quick else SIZES)
    cases = [CASES[1], CASES[3]] if quick else CASES
    records = [measure(*case, sizes, 2 if quick else 7) for case in cases]
    print(report.table(list(records[0]), [list(record.values()) for record in records]))
    report.write_csv(out / "many_prompts.csv", records)
    return all(record["overhead"] != "WRONG" for record in records)


def measure(method, prompts, rows, sizes, rounds):
    """A line of the table."""
    in_batch = 0 if method == "Prefix-Tuning" else prompts  # learned keys and values take no rows
    lengths = uneven_lengths(in_batch * LENGTH, prompts * rows, LONGEST)
    workload = Workload(LENGTH, lengths, False, prompts=in_batch)
    batch = workload.batch(sizes["vocab_size"])
    batch.pop("task_ids", None)
    owners = torch.arange(prompts).repeat_interleave(rows)
    base = models.llama(sizes)
    model = models.soft_prompt(base, LENGTH, method)
    starts = _starts(model)
    expected = [_peft(model, starts[i], batch, owners == i) for i in (0, prompts - 1)]
    mixed = Mixed(fastprompt.accelerate(model), starts, batch, owners)
    losses, gradients = mixed.gradients()
    loss_error = grad_error = 0.0
    for i, (loss, gradient) in zip((0, prompts - 1), expected):
        ours = torch.cat([x[i].flatten() for x in gradients.values()])
        loss_error = max(loss_error, abs(float(losses[i] - loss)) / float(loss))
        grad_error = max(grad_error, float((ours - gradient).norm() / gradient.norm()))
    steps = {"step": mixed, "floor": step.Floor(models.llama(sizes), workload)}
    times = {name: [] for name in steps}
    names = list(steps)
    for _ in tqdm(range(rounds + 1), desc=f"{method}, {prompts} prompts", unit="round"):
        for name in names:
            start = perf_counter()
            steps[name]()
            times[name].append(perf_counter() - start)
        names.reverse()
    times = {name: seconds[1:] for name, seconds in times.items()}  # the first: warm-up
    right = loss_error <= step.LOSS_TOLERANCE and grad_error <= step.GRAD_TOLERANCE
    ratio = median(a / b for a, b in zip(times["step"], times["floor"]))
    return {
        "method": method,
        "prompts": str(prompts),
        "rows of text": str(len(lengths)),
        "packed rows": str(workload.rows),
        **{f"{name} ms": f"{median(seconds) * 1e3:.0f}" for name, seconds in times.items()},
        "overhead": f"{ratio:.3f}" if right else "WRONG",
        "loss diff": f"{loss_error:.0e}",
        "grad diff": f"{grad_error:.0e}",
    }


def _starts(model):
    """Values of 16 prompts that differ."""
    start, generator = values_of(model), torch.Generator().manual_seed(0)
    return [
        {name: x + 0.1 * torch.randn(x.shape, generator=generator) * x.std() for name, x in start.items()}
        for _ in range(PROMPTS)
    ]


def _peft(model, values, batch, mine):
    """Loss and gradient of one prompt on its own rows, by plain PEFT."""
    own = step.Training(model, {name: x[mine] for name, x in batch.items()})
    with torch.no_grad():
        for name, parameter in model.prompt_encoder["default"].named_parameters():
            parameter.copy_(values[name])
    return own(), own.gradient
