"""The rows that predict labels, each once: worked out on the host, beside the device, so that nobody waits for it."""

from typing import NamedTuple

import numpy as np

from .cells import IGNORE, Batch


class Labelled(NamedTuple):
    """Rows that predict labels.

    Attributes:
        rows: ``[K]`` int64, each once and in ascending order.
        places: ``[M]`` int64, which of them predicts each label.
    """

    rows: np.ndarray
    places: np.ndarray


def labelled(
    batch: Batch,
    labels: np.ndarray,
    starts: np.ndarray,
    entries: dict[str, np.ndarray],
    shared: int,
    moved_to: np.ndarray | None,
) -> Labelled:
    """The rows of the labels of a batch.

    Args:
        labels: ``[T]``, those of the batch.
        starts: ``[B]``, where its sequences begin in them.
        entries: the columns of the table for ``cells.fill``.
        shared: how many rows are shared. They stand in front, and only they predict several labels.
        moved_to: ``[R + 1]`` the row that each row of ``entries`` has become; None: it stayed.
    """
    place = np.flatnonzero(labels != IGNORE)
    sequence = np.searchsorted(starts, place, side="right") - 1
    before = place - starts[sequence] - 1
    if not batch.front:  # nothing stands before the first token
        sequence, before = sequence[before >= 0], before[before >= 0]
    in_front = entries["prompt_row"][sequence] + batch.front
    rows = before + np.where(before < entries["own_column"][sequence], in_front, entries["own_row"][sequence])
    if moved_to is not None:
        rows = moved_to[rows]
    several = rows < shared
    once, places = np.unique(rows[several], return_inverse=True)
    single = rows[~several]
    of_label = np.empty(len(rows), np.int64)
    of_label[several], of_label[~several] = places, len(once) + np.arange(len(single))
    return Labelled(np.concatenate([once, single]), of_label)
