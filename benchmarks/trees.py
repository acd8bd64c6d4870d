"""Text that groups of rows begin with: steps that run it once a group, and steps of batches without any.

Eight groups of eight rows, as eight prompts of GRPO with eight completions each: 200 shared tokens, 24 own ones with
labels. Prompt Tuning by PEFT, by fastprompt with what all rows begin with run once ("rows": what there was before
trees), and by fastprompt; LoRA by PEFT and behind ``share_prefixes``. Then the same steps where no two rows begin
alike, padded as batches are: what looking for trees costs. Loss and gradients are compared before any ratio is printed.
"""

from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from tqdm import tqdm

import fastprompt
from fastprompt.peft.state import engine_of

from . import models, report, step
from .workloads import IGNORE

PROMPT = 20
# A pair of steps -> which is timed over which, and what it has to be at least.
RATIOS = {
    "groups": {("rows", "trees"): 3.0, ("PEFT", "trees"): 7.0, ("LoRA", "LoRA trees"): 2.0},
    "nothing shared": {("rows", "trees"): 0.98, ("LoRA", "LoRA trees"): 0.98},
}


@dataclass(frozen=True)
class Groups:
    """Groups of rows: ``shared`` tokens that all rows of a group begin with, ``own`` ones behind them, with labels."""

    groups: int
    members: int
    shared: int
    own: int

    def batch(self, vocabulary, alike):
        """input_ids, attention_mask and labels; ``alike``: do the rows of a group begin alike?"""
        rows, width = self.groups * self.members, self.shared + self.own
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (rows, width), generator=generator)
        mask = torch.ones_like(ids)
        if alike:
            ids[:, : self.shared] = ids[:: self.members, : self.shared].repeat_interleave(self.members, 0)
        labels = ids.masked_fill(torch.arange(width) < self.shared, IGNORE)
        return dict(input_ids=ids, attention_mask=mask, labels=labels)


def steps_of(batch, sizes, peft=True):
    """Name -> step."""

    def soft():
        return models.soft_prompt(models.llama(sizes), PROMPT)

    without = fastprompt.accelerate(soft())
    engine_of(without).node_cost = None
    steps = {"PEFT": step.Training(soft(), batch)} if peft else {}
    return steps | {
        "rows": step.Training(without, batch),
        "trees": step.Training(fastprompt.accelerate(soft()), batch),
        "LoRA": step.Training(trained_lora(sizes), batch),
        "LoRA trees": step.Training(fastprompt.share_prefixes(trained_lora(sizes)), batch),
    }


def trained_lora(sizes):
    """LoRA whose second matrices are not the zeros that it begins with: all of its gradients count."""
    model = models.lora(models.llama(sizes))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def run(out, quick=False, sizes=models.SIZES, groups=Groups(8, 8, 200, 24)):
    """Run, print, and write ``trees.csv`` into ``out``; False if a result differs from PEFT's."""
    records = []
    for kind, ratios in RATIOS.items():
        alike = kind == "groups"
        workload = groups if alike else Groups(groups.groups, groups.members // 4 or 1, groups.shared, groups.own)
        batch = workload.batch(sizes["vocab_size"], alike)
        records += _measure(kind, steps_of(batch, sizes, peft=alike), ratios, 1 if quick else 5)
    print(report.table(list(records[0]), [list(record.values()) for record in records]))
    report.write_csv(out / "trees.csv", records)
    return all(record["ratio"] != "WRONG" for record in records)


def _measure(kind, steps, ratios, rounds):
    """A record for each ratio."""
    losses = {name: float(one()) for name, one in steps.items()}  # warms up, too
    errors = {
        (slow, fast): (abs(losses[fast] - losses[slow]) / abs(losses[slow]), _distance(steps[fast], steps[slow]))
        for slow, fast in ratios
    }
    times = {name: [] for name in steps}
    names = list(steps)
    for _ in tqdm(range(rounds), desc=kind, unit="round"):
        for name in names:
            start = perf_counter()
            steps[name]()
            times[name].append(perf_counter() - start)
        names = names[1:] + names[:1]
    records = []
    for (slow, fast), least in ratios.items():
        loss, gradient = errors[slow, fast]
        right = loss <= step.LOSS_TOLERANCE and gradient <= step.GRAD_TOLERANCE  # False for nan
        ratio = median(a / b for a, b in zip(times[slow], times[fast]))
        rows = [fastprompt.stats(steps[name].model) if "PEFT" != name != "LoRA" else None for name in (slow, fast)]
        records.append(
            {
                "batch": kind,
                "step": fast,
                "over": slow,
                "over ms": f"{median(times[slow]) * 1e3:.0f}",
                "ms": f"{median(times[fast]) * 1e3:.0f}",
                "ratio": f"{ratio:.2f}" if right else "WRONG",
                "at least": f"{least}",
                "rows": " ".join(str(x.rows // x.packed) for x in rows if x is not None),
                "loss diff": f"{loss:.0e}",
                "grad diff": f"{gradient:.0e}",
            }
        )
    return records


def _distance(ours, theirs):
    """How far apart two gradients are, relative to their norm: the largest of all parameters'."""
    pairs = [(a.grad, b.grad) for a, b in zip(ours.parameters, theirs.parameters, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)
