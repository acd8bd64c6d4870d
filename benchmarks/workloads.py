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
    """

    prompt: int
    lengths: tuple[int, ...]
    all_labels: bool
    uneven: bool = False

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
        lengths = torch.tensor(self.lengths)[:, None]
        column = torch.arange(max(self.lengths))
        real = column < lengths
        ids = torch.randint(vocabulary, real.shape, generator=torch.Generator().manual_seed(0)).masked_fill(~real, 0)
        labelled = real if self.all_labels else column == lengths - 1
        return {"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~labelled, IGNORE)}


def uneven_lengths(prompt, batch, longest):
    """Lengths as in real text: the quantiles of a log-normal, in random order, trimmed so that B divides P + T."""
    quantiles = [NormalDist(0, 0.55).inv_cdf((i + 0.5) / batch) for i in range(batch)]
    lengths = (torch.tensor(quantiles) - quantiles[-1]).exp().mul(longest).round().long()
    surplus = (prompt + int(lengths.sum())) % batch  # < B, so it is one token off some of the longer rows
    lengths[batch - 1 - surplus : -1] -= 1
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(0))
    return tuple(lengths[order].tolist())


def all_workloads(quick=False):
    shapes = [(100, 16, 48), (20, 16, 64), (50, 32, 24)]
    uneven = [Workload(p, uneven_lengths(p, b, s), labels, uneven=True) for labels in (False, True) for p, b, s in shapes]
    if quick:
        return [uneven[0], uneven[4]]
    equal = Workload(20, (256,) * 8, True)
    method_comparison = Workload(200, (233, 180, 260, 207), True)  # the shape of PEFT's own method comparison
    return [*uneven, equal, method_comparison]
