"""One training step, end to end: PEFT Prompt Tuning, fastprompt, PEFT's LoRA, and the floor.

A step is zero_grad, forward and backward, eager fp32; the optimizer's step is excluded for all, it touches a few
thousand numbers. All run interleaved in one process, each on a model of its own with the same weights, on the same
right-padded batch with the same labels.

The **floor** is the least work that the method allows: the bare frozen model, forward and gradient of inputs_embeds, on
R = P + T rows (the prompt's once, the T real tokens), and head and loss on as many rows as there are labels. It runs
them as one ``[b, R / b]`` batch of equal lengths, without mask or padding, on the model's own attention, b being the
divisor of R next to the workload's B. (The lengths of the workloads are trimmed so that b is B, except with equal rows.)
Its rows attend to R / b keys at most, where the real job attends to P more: the floor is a bound and not an
implementation.
"""

from dataclasses import dataclass
from statistics import NormalDist, geometric_mean, median
from time import perf_counter

import torch
from torch import nn
from tqdm import tqdm

import fastprompt

from . import models

LOSS_TOLERANCE, GRAD_TOLERANCE = 1e-5, 1e-4  # relative; the gradient's by norm
IGNORE = -100


@dataclass(frozen=True)
class Workload:
    """A batch: P prompt vectors, the lengths of its rows, and whether every token has a label or the last one only."""

    prompt: int
    lengths: tuple[int, ...]
    all_labels: bool
    uneven: bool = False  # one of the workloads that the geometric mean is over

    @property
    def name(self):
        return f"({self.prompt}, {len(self.lengths)}, {max(self.lengths)})"

    @property
    def tokens(self):
        return sum(self.lengths)

    @property
    def labels(self):
        return self.tokens if self.all_labels else len(self.lengths)

    def batch(self, vocabulary):
        """input_ids, attention_mask and labels ``[B, S]``, padded on the right."""
        generator = torch.Generator().manual_seed(len(self.lengths))
        lengths = torch.tensor(self.lengths)[:, None]
        column = torch.arange(max(self.lengths))[None]
        real = column < lengths
        ids = torch.randint(vocabulary, real.shape, generator=generator).masked_fill(~real, 0)
        labelled = real if self.all_labels else column == lengths - 1
        return {"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~labelled, IGNORE)}


def uneven_lengths(prompt, batch, longest):
    """Lengths as in real text: the quantiles of a log-normal, in random order, trimmed so that B divides P + T."""
    spread = [NormalDist(0, 0.55).inv_cdf((i + 0.5) / batch) for i in range(batch)]
    lengths = (torch.tensor(spread) - spread[-1]).exp().mul(longest).round().long()
    surplus = (prompt + int(lengths.sum())) % batch
    lengths[-1 - surplus : -1] -= 1
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(0))
    return tuple(lengths[order].tolist())


def workloads(quick=False):
    shapes = [(100, 16, 48), (20, 16, 64), (50, 32, 24)]
    uneven = [Workload(p, uneven_lengths(p, b, s), labels, True) for labels in (False, True) for p, b, s in shapes]
    if quick:
        return uneven[::5]
    equal = Workload(20, (256,) * 8, True)
    method_comparison = Workload(200, (233, 180, 260, 207), True)  # the shape of PEFT's own method comparison
    return [*uneven, equal, method_comparison]


class Trained:
    """A step of a PEFT model, accelerated or not."""

    def __init__(self, model, batch):
        self.model, self.batch = model.train(), batch
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def __call__(self):
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.model(**self.batch).loss
        loss.backward()
        return loss.detach()

    def gradient(self):
        return self.parameters[0].grad


class Floor:
    """A step of the bare model on as many rows as have to be run; see the module's docstring."""

    def __init__(self, model, workload):
        rows = workload.prompt + workload.tokens
        batch = min((b for b in range(1, rows + 1) if rows % b == 0), key=lambda b: abs(b - len(workload.lengths)))
        self.model = model.train()
        self.inputs = torch.randn(batch, rows // batch, model.config.hidden_size).requires_grad_()
        self.labels = torch.randint(model.config.vocab_size, (workload.labels,))

    def __call__(self):
        self.inputs.grad = None
        hidden = self.model.model(inputs_embeds=self.inputs, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden.flatten(0, 1)[: len(self.labels)])
        loss = nn.functional.cross_entropy(logits, self.labels)
        loss.backward()
        return loss.detach()


def providers(workload, sizes):
    """Name -> step, and the models' vocabulary is in ``sizes`` or the default."""
    batch = workload.batch({**models.SIZES, **sizes}["vocab_size"])
    return {
        "PEFT": Trained(models.prompt_tuning(models.llama(**sizes), workload.prompt), batch),
        "fastprompt": Trained(fastprompt.accelerate(models.prompt_tuning(models.llama(**sizes), workload.prompt)), batch),
        "LoRA": Trained(models.lora(models.llama(**sizes)), batch),
        "floor": Floor(models.llama(**sizes), workload),
    }


def differences(expected, actual):
    """Relative difference of loss and of prompt gradient after one step each."""
    loss, other = float(expected()), float(actual())
    grad, other_grad = expected.gradient(), actual.gradient()
    return abs(other - loss) / abs(loss), float((other_grad - grad).norm() / grad.norm())


def measure(workload, rounds, sizes, progress):
    """Medians in seconds of every provider, and the differences between fastprompt and PEFT."""
    steps = providers(workload, sizes)
    loss, grad = differences(steps["PEFT"], steps["fastprompt"])  # and a warm-up
    for step in steps.values():
        step()
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = perf_counter()
            step()
            times[name].append(perf_counter() - start)
            progress.update()
    return {name: median(t) for name, t in times.items()}, loss, grad
