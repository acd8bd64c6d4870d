"""How layers with a recurrent state run packed rows: shared rows first, node by node from the roots on, then the
sequences in a few padded buckets.

A recurrence runs over the columns of a padded batch. Padding behind a sequence changes nothing of it, but costs as much
as a row does, so sequences of like length stand in a bucket of their own.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .plan import RowPlan

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
        shared: of shared rows, without padding behind them: the state behind their last column is what ``parents``
            count, bucket by bucket. A list of buckets for each level of the tree, that continue those of levels before.
        own: of sequences; they may continue any of the shared ones.
        places: ``[R]`` int64, for each packed row its cell among those of all buckets, one after the other.
    """

    shared: tuple[tuple[Bucket, ...], ...]
    own: tuple[Bucket, ...]
    places: torch.Tensor


def recurrent_schedule(plan: RowPlan) -> RecurrentSchedule:
    """The schedule of a plan's sequences."""
    sequences: Any = plan.sequences
    host, device, nodes = sequences.host, sequences.starts.device, len(plan.shared.nodes)
    starts, lengths, gaps = host.starts, host.lengths, host.gaps
    levels, states = _levels(plan.shared, gaps)
    parents = np.append(states, -1)[plan.shared.parents] if nodes else np.full(len(starts), -1)

    def bucket(members, width):
        of = parents[members]
        return _bucket(starts[members], lengths[members], gaps[members], None if of[0] < 0 else of, width)

    shared = [[bucket(members, int((gaps + lengths)[members[0]])) for members in level] for level in levels]
    own = []
    number = np.arange(len(starts))
    for continues in (False, True):
        some = np.flatnonzero((number >= nodes) & (lengths > 0) & ((parents >= 0) == continues))
        for members in _by_width(some, (gaps + lengths)[some]):
            own.append(bucket(members, max(int((gaps + lengths)[members].max()), _LEAST if continues else 1)))
    every = [*(bucket for level in shared for bucket in level), *own]
    cells = np.concatenate([rows.ravel() for rows, _, _ in every] or [np.zeros(0, np.int64)])
    places, real = np.zeros(sequences.rows, np.int64), cells >= 0
    places[cells[real]] = np.flatnonzero(real)

    def on_device(buckets):
        return tuple(Bucket(*(None if x is None else torch.from_numpy(x).to(device) for x in each)) for each in buckets)

    return RecurrentSchedule(tuple(map(on_device, shared)), on_device(own), torch.from_numpy(places).to(device))


def final_buckets(plan: RowPlan) -> tuple[list[torch.Tensor], list[Bucket]]:
    """Buckets that end in the last column of a padded batch, padding included, as the model's own forward does.

    Returns:
        For each bucket the rows of the batch in it, and the bucket: of the columns behind the shared rows, maybe none.
    """
    tree, grid = plan.shared, plan.grid
    sequences: Any = plan.sequences
    roots = tree.roots if tree.nodes else np.full(len(grid), -1)
    # What stands behind padding is run again with the rest, from the first column on.
    counted = np.array([0 if node.gap else node.length for node in tree.nodes] + [0], np.int64)
    lengths, states = counted[roots], np.append(_levels(tree, sequences.host.gaps)[1], -1)[roots]
    members, buckets = [], []
    for length in np.unique(lengths):
        some = np.flatnonzero(lengths == length)
        members.append(torch.from_numpy(some).to(grid.device))
        rows = grid[members[-1], length:]
        parents = torch.from_numpy(states[some]).to(grid.device) if length else None
        buckets.append(Bucket(rows, parents, (rows >= 0).long()))
    return members, buckets


def _levels(tree, gaps):
    """The nodes with rows in the order in which they run, by level and width, and ``[J]`` the number of each's state.

    A node without rows, a root, has no state: -1.
    """
    states, level = np.full(len(tree.nodes), -1), np.zeros(len(tree.nodes), np.int64)
    for number, node in enumerate(tree.nodes):
        if node.parent >= 0:
            level[number] = level[node.parent] + (tree.nodes[node.parent].length > 0)
    levels, width, count = [], gaps[: len(states)] + tree.lengths, 0
    for depth in range(int(level.max(initial=-1)) + 1):
        some = np.flatnonzero((level == depth) & (tree.lengths > 0))
        levels.append([some[width[some] == each] for each in np.unique(width[some])])
        for members in levels[-1]:
            states[members] = count + np.arange(len(members))
            count += len(members)
    return levels, states


def _bucket(starts, lengths, gaps, parents, width):
    """The arrays of a :class:`Bucket`."""
    column = np.arange(width)
    first = gaps[:, None]
    real = (column >= first) & (column < first + lengths[:, None])
    rows = np.where(real, starts[:, None] + column - first, -1)
    mask = real.astype(np.int64) if gaps.any() else None
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
