"""How layers with a recurrent state run packed rows: shared rows first, then the sequences in a few padded buckets.

A recurrence runs over the columns of a padded batch. Padding behind a sequence changes nothing of it, but costs as much
as a row does, so sequences of like length stand in a bucket of their own.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .plan import RowPlan
from .sequences import Sequences

_BUCKET = 64  # what running one more bucket costs, in rows
_LEAST = 2  # columns of a bucket that continues: one would be taken for a step of generation, which writes in place


@dataclass(frozen=True, eq=False)
class Bucket:
    """Sequences side by side: n of them in W columns.

    Attributes:
        rows: ``[n, W]`` int64, the packed row of each cell, -1 at padding.
        parents: ``[n]`` int64, the shared rows whose state each continues; None: all start from nothing.
        mask: ``[n, W]`` int64, 0 at padding, for buckets with padding in front of a sequence: there a model zeroes
            what it reads, but lets its state decay. None: there is none.
    """

    rows: torch.Tensor
    parents: torch.Tensor | None = None
    mask: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class RecurrentSchedule:
    """The buckets of a batch.

    Attributes:
        shared: of shared rows, without padding: the state behind their last column is what ``parents`` count.
        own: of sequences; they may continue any of the shared ones.
        places: ``[R]`` int64, for each packed row its cell among those of all buckets, one after the other.
    """

    shared: tuple[Bucket, ...]
    own: tuple[Bucket, ...]
    places: torch.Tensor


def recurrent_schedule(sequences: Sequences, shared: int) -> RecurrentSchedule:
    """The schedule of packed sequences of which the first ``shared`` are the shared rows of the others, by prompt."""
    host, device = sequences.host, sequences.starts.device
    starts, lengths, gaps = host.starts, host.lengths, host.gaps
    common, states = [], _state_numbers(lengths[:shared])
    for length in np.unique(lengths[:shared][lengths[:shared] > 0]):
        members = np.flatnonzero(lengths[:shared] == length)
        common.append(_bucket(starts[members], lengths[members], None, None, int(length)))
    own, (starts, lengths, gaps) = [], (x[shared:] for x in (starts, lengths, gaps))
    parents = states[host.prefix_ids[shared:] % shared] if shared else np.full(len(starts), -1)
    for continues in (False, True):
        some = np.flatnonzero((lengths > 0) & ((parents >= 0) == continues))
        for members in _by_width(some, (gaps + lengths)[some]):
            width = max(int((gaps + lengths)[members].max()), _LEAST if continues else 1)
            of = parents[members] if continues else None
            own.append(_bucket(starts[members], lengths[members], gaps[members], of, width))
    cells = np.concatenate([rows.ravel() for rows, _, _ in (*common, *own)] or [np.zeros(0, np.int64)])
    places, real = np.zeros(sequences.rows, np.int64), cells >= 0
    places[cells[real]] = np.flatnonzero(real)

    def on_device(bucket):
        return Bucket(*(None if x is None else torch.from_numpy(x).to(device) for x in bucket))

    return RecurrentSchedule(
        tuple(map(on_device, common)), tuple(map(on_device, own)), torch.from_numpy(places).to(device)
    )


def final_buckets(plan: RowPlan) -> tuple[list[torch.Tensor], list[Bucket]]:
    """Buckets that end in the last column of a padded batch, padding included, as the model's own forward does.

    Returns:
        For each bucket the rows of the batch in it, and the bucket: of the columns behind the shared rows, maybe none.
    """
    sequences: Any = plan.sequences
    shared, grid = len(plan.shared), plan.grid
    prompts = sequences.host.prefix_ids[shared:] % shared if shared else np.zeros(len(grid), np.int64)
    lengths = np.array([length for _, length in plan.shared] or [0])
    states = _state_numbers(lengths)
    members, buckets = [], []
    for length in np.unique(lengths[prompts]):
        some = np.flatnonzero(lengths[prompts] == length)
        members.append(torch.from_numpy(some).to(grid.device))
        rows = grid[members[-1], length:]
        parents = torch.from_numpy(states[prompts[some]]).to(grid.device) if length else None
        buckets.append(Bucket(rows, parents, (rows >= 0).long()))
    return members, buckets


def _state_numbers(lengths):
    """``[N]`` where the state of each prompt's shared rows stands, which are run by length; -1 without rows."""
    numbers = np.full(len(lengths), -1)
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    numbers[order] = np.arange(len(order))
    return numbers


def _bucket(starts, lengths, gaps, parents, width):
    """The arrays of a :class:`Bucket`."""
    column = np.arange(width)
    first = 0 if gaps is None else gaps[:, None]
    real = (column >= first) & (column < first + lengths[:, None])
    rows = np.where(real, starts[:, None] + column - first, -1)
    mask = real.astype(np.int64) if gaps is not None and gaps.any() else None
    return rows, parents, mask


def _by_width(members, widths):
    """Sequences in buckets, so that padding and buckets cost least together."""
    order = np.argsort(widths, kind="stable")
    sizes, ends = np.unique(widths[order], return_index=True)
    ends = np.append(ends[1:], len(order))  # how many are not wider
    # The least cost of all up to each width, by the first width of the last bucket.
    before, cost, opens = np.append(0, ends[:-1]), np.zeros(len(sizes) + 1), np.zeros(len(sizes), np.int64)
    for last, (width, end) in enumerate(zip(sizes, ends)):
        costs = cost[: last + 1] + _BUCKET + (end - before[: last + 1]) * width
        opens[last] = costs.argmin()
        cost[last + 1] = costs[opens[last]]
    last = len(sizes) - 1
    while last >= 0:
        yield members[order[before[opens[last]] : ends[last]]]
        last = opens[last] - 1
