"""What the backends of prefix_attention share: prefixes as lists of pieces that are read where they lie."""

from typing import NamedTuple

import numpy as np

from ...layout import Sequences


class Pieces(NamedTuple):
    """G prefixes as lists of M pieces: keys that stand side by side, each in one piece alone.

    Attributes:
        begin, end: ``[G]`` the links of each prefix.
        link, offset: ``[L]`` a piece, and where it stands in the prefix.
        learned, base, row: ``[M]`` whether its keys are learned ones, and where the first is: a prefix of the bank and
            a key of it, or a row of k and 0.
        length: ``[M]``.
    """

    begin: np.ndarray
    end: np.ndarray
    link: np.ndarray
    offset: np.ndarray
    learned: np.ndarray
    base: np.ndarray
    row: np.ndarray
    length: np.ndarray


def pieces_of(seq: Sequences, prefix: np.ndarray, length: np.ndarray, room: int) -> Pieces:
    """Some prefixes in pieces: a piece ends where one of them leaves it, or another begins to share it.

    Args:
        seq: the sequences.
        prefix: ``[G]`` the numbers of the prefixes, each once.
        length: ``[G]`` how many keys of each are used, at least one.
        room: P of the learned prefixes, 0 without.
    """
    chains, room = seq.host.chains, max(room, 1)
    if chains is None or not len(prefix):
        number, zero = np.arange(len(prefix)), np.zeros(len(prefix), np.int64)
        return Pieces(number, number + 1, number, zero, zero == 0, prefix, zero, length)
    group, place = (np.arange(chains.shape[1]) < length[:, None]).nonzero()
    source = chains[prefix[group], place]
    rows = source.max(initial=-1) + 1
    key = np.where(source < 0, rows - 1 - source, source)  # learned keys have the numbers behind those of rows
    begins = np.append(True, (np.diff(group) != 0) | (np.diff(key) != 1))  # a run of numbers
    cuts = np.zeros(key.max() + 2, bool)
    cuts[key[begins]] = True
    cuts[key[np.append(begins[1:], True)] + 1] = True
    cuts[rows::room] = True  # learned keys stand side by side in one prefix of the bank
    links = cuts[key].nonzero()[0]
    first, link = np.unique(key[links], return_inverse=True)
    bounds = cuts.nonzero()[0]
    learned = first >= rows
    base, row = np.divmod(first - rows, room)
    begin = np.searchsorted(group[links], np.arange(len(prefix) + 1))
    return Pieces(
        begin[:-1],
        begin[1:],
        link,
        place[links],
        learned,
        np.where(learned, base, first),
        np.where(learned, row, 0),
        bounds[np.searchsorted(bounds, first, "right")] - first,
    )
