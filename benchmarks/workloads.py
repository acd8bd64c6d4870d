"""The batches of the benchmarks."""

from dataclasses import dataclass
from statistics import NormalDist

import torch

IGNORE = -100


@dataclass(frozen=True)
class Workload:
    """P prompt vectors and a batch of rows.

    Attributes:
        prompt: P.
        lengths: the tokens of every row.
        all_labels: every token has a label, or only the last one of a row.
        uneven: one of those that the geometric mean is over.
        prompts: how many distinct prompts the batch has, row by row in turn; 0 where the prompt takes no rows.
        common: how many tokens all rows have in front beside their own.
    """

    prompt: int
    lengths: tuple[int, ...]
    all_labels: bool
    uneven: bool = False
    prompts: int = 1
    common: int = 0

    @property
    def name(self):
        return f"({self.prompt}, {len(self.lengths)}, {max(self.lengths)})"

    @property
    def tokens(self):
        return sum(self.lengths)

    @property
    def rows(self):
        """The least rows a model has to run: distinct prompts and common tokens once, and the real tokens."""
        return self.prompts * self.prompt + self.common + self.tokens

    @property
    def labels(self):
        return self.tokens if self.all_labels else len(self.lengths)

    def batch(self, vocabulary):
        """input_ids, attention_mask, labels ``[B, S]``, padded on the right, and ``task_ids`` if there are several."""
        lengths = torch.tensor(self.lengths)[:, None]
        column = torch.arange(max(self.lengths))
        real = column < lengths
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, real.shape, generator=generator).masked_fill(~real, 0)
        labelled = real if self.all_labels else column == lengths - 1
        labels = ids.masked_fill(~labelled, IGNORE)
        if self.common:
            front = torch.randint(vocabulary, (1, self.common), generator=generator).expand(len(ids), -1)
            ids, real = torch.cat([front, ids], 1), torch.cat([torch.ones_like(front).bool(), real], 1)
            labels = torch.cat([torch.full_like(front, IGNORE), labels], 1)
        batch = {"input_ids": ids, "attention_mask": real.long(), "labels": labels}
        return batch | {"task_ids": torch.arange(len(ids)) % self.prompts} if self.prompts > 1 else batch


def uneven_lengths(prompt, batch, longest):
    """Lengths as in real text: quantiles of a log-normal, in random order, trimmed so that B divides prompt + T."""
    quantiles = [NormalDist(0, 0.55).inv_cdf((i + 0.5) / batch) for i in range(batch)]
    lengths = (torch.tensor(quantiles) - quantiles[-1]).exp().mul(longest).round().long()
    surplus = (prompt + int(lengths.sum())) % batch  # < B, so it is one token off some of the longer rows
    lengths[batch - 1 - surplus : -1] -= 1
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(0))
    return tuple(lengths[order].tolist())


def uneven_workloads(prompts=1, quick=False):
    shapes = [(100, 16, 48), (20, 16, 64), (50, 32, 24)]
    uneven = [
        Workload(p, uneven_lengths(prompts * p, b, s), labels, uneven=True, prompts=prompts)
        for labels in (False, True)
        for p, b, s in shapes
    ]
    return [uneven[0], uneven[4]] if quick else uneven


def all_workloads(quick=False):
    if quick:
        return uneven_workloads(quick=True)
    equal = Workload(20, (256,) * 8, True)
    method_comparison = Workload(200, (233, 180, 260, 207), True)  # the shape of PEFT's own method comparison
    return [*uneven_workloads(), equal, method_comparison]
