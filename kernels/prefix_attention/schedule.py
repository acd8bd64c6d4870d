"""Which program does what: a batch in virtual order, and tables of tiles. Plain numpy on the host, made once a batch.

Every table row is 8 int32, the unused ones 0.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

QUERIES, KEYS, PREFIX = 0, 1, 2  # roles of backward items
_COLUMNS = 8


class Groups(NamedTuple):
    """Queries that read one prefix, side by side. ``[G]`` each."""

    first: np.ndarray
    last: np.ndarray
    prefix: np.ndarray  # -1: none
    prefix_length: np.ndarray


@dataclass(eq=False)
class Batch:
    """The sequences of a batch in virtual order; see the package's docstring.

    Attributes:
        cache: whether the keys stand in a cache.
        prefixes, prefix_lengths: ``[Q]`` the prefix that each query reads (-1: none), and its keys.
        query_rows, key_rows: ``[Q]``, ``[K]`` the row of each virtual query and key; for column j of row or page b of
            a cache ``b * room + j``.
        spans: ``[4, Q]`` of each query: first and last own key of its sequence, the position of an own key minus its
            number, and the query's own key.
        low, high, prefix_low: ``[Q]`` the intervals of keys it sees.
    """

    cache: bool
    prefixes: np.ndarray
    prefix_lengths: np.ndarray
    query_rows: np.ndarray
    key_rows: np.ndarray
    spans: np.ndarray
    low: np.ndarray
    high: np.ndarray
    prefix_low: np.ndarray

    @property
    def queries(self):
        return len(self.query_rows)

    @property
    def keys(self):
        return len(self.key_rows)

    @cached_property
    def in_order(self):
        """Whether virtual rows are the rows in memory, those of a cache apart."""
        rows = [self.query_rows] if self.cache or self.key_rows is self.query_rows else [self.query_rows, self.key_rows]
        return all((x == np.arange(len(x))).all() for x in rows)

    @cached_property
    def groups(self):
        edges = np.flatnonzero(np.diff(self.prefixes)) + 1
        first = np.append(np.zeros(min(self.queries, 1), np.int64), edges)
        last = np.append(edges, self.queries)[: len(first)]
        return Groups(first, last, self.prefixes[first], self.prefix_lengths[first])


class Cache(NamedTuple):
    """Where the keys of a decoding batch are, and which of them are queries.

    Attributes:
        room: columns of a row of the cache, or of a page.
        queries: ``[B]`` how many of the last keys of each sequence are queries.
        starts: ``[B]`` the column in which its keys begin.
        pages: ``[B, M]`` the pages of each sequence; None: row b of the cache is that of sequence b.
    """

    room: int
    queries: np.ndarray
    starts: np.ndarray
    pages: np.ndarray | None = None

    def rows(self, sequence, key):
        """``page * room + column`` of keys."""
        column = self.starts[sequence] + key
        if self.pages is None:
            return sequence * self.room + column
        return self.pages[sequence, column // self.room] * self.room + column % self.room


def make_batch(sequences, prefix_lengths, *, causal, window, cache=None, key_sequences=None):
    """
    Args:
        sequences: ``[B, 4]`` ints: first row, length, prefix (-1: none), gap.
        prefix_lengths: ``[B]`` the keys of the prefix that each reads.
        cache: of a decoding batch.
        key_sequences: ``[B, 2]`` first row and length of each sequence's keys in cross-attention; None: its own rows.
    """
    table, used = np.asarray(sequences, np.int64).reshape(-1, 4), np.asarray(prefix_lengths, np.int64)
    keys = table[:, :2] if key_sequences is None else np.asarray(key_sequences, np.int64).reshape(-1, 2)
    asked = table[:, 1] if cache is None else cache.queries
    index = np.flatnonzero((asked > 0) & (keys[:, 1] + used > 0))
    prefix = np.where(used > 0, table[:, 2], -1)
    index = index[np.lexsort((table[index, 0], prefix[index]))]
    start, _, _, gap = table[index].T
    key_start, length = keys[index].T
    prefix, used, asked = prefix[index], used[index], asked[index]

    first = np.cumsum(length) - length  # the first virtual key
    in_sequence = np.arange(length.sum()) - np.repeat(first, length)
    of, number = _repeat(asked)
    rows, own = start[of] + number, np.arange(len(of))
    if cache is not None:
        key_rows = cache.rows(np.repeat(index, length), in_sequence)
        if len(key_rows) and key_rows.max() >= 2**31:
            raise ValueError(f"k must hold less than 2**31 keys, got {key_rows.max() + 1}")
        own = (first + length - asked)[of] + number
    elif key_sequences is None:
        key_rows = rows
    else:
        key_rows = np.repeat(key_start, length) + in_sequence
    spans = np.stack([first[of], (first + length)[of], (used + gap - first)[of], own])
    low, high, prefix_low = spans[0], spans[1], np.zeros_like(own)
    if window is not None:
        low, prefix_low = np.maximum(low, own - window + 1), np.maximum(own + spans[2] - window + 1, 0)
        high = high if causal else np.minimum(high, own + window)
    if causal:
        high = own + 1
    return Batch(cache is not None, prefix[of], used[of], rows, key_rows, spans, low, high, prefix_low)


def query_tiles(batch, rows):
    """``[T, 8]``: queries [q0, q1), own keys [k0, k1), prefix, its keys [p0, p1), at most ``rows`` queries a tile."""
    first, last, *_ = batch.groups
    group, number = _repeat(-(-(last - first) // rows))
    if not len(group):
        return _table()
    q0 = first[group] + number * rows
    q1 = np.minimum(q0 + rows, last[group])
    p1 = batch.prefix_lengths[q0]
    p0 = np.minimum(np.minimum.reduceat(batch.prefix_low, q0), p1)
    return _table(q0, q1, batch.low[q0], batch.high[q1 - 1], np.maximum(batch.prefixes[q0], 0), p0, p1)


def backward_items(batch, *, query_rows, key_block, chunk_rows, dq, dkv, dprefix):
    """Items of the backward kernel and, for the reduction, where partial sums of each prefix block stand.

    Args:
        query_rows: queries of a query item.
        key_block: keys of a key item.
        chunk_rows: queries of a prefix item; the items of a chunk are launched side by side.
        dq, dkv, dprefix: which gradients are asked for.

    Returns:
        items: ``[W, 8]``: role, queries [q0, q1), keys [k0, k1), prefix, then [p0, p1) or the slot of the partial sum.
        slots: ``[E, 5]`` prefix, block of its keys, first slot, last slot, keys of the prefix.
        number of slots.
    """
    parts, slots, count = [_table()], np.zeros((0, 5), np.int64), 0
    if dq:
        tiles = query_tiles(batch, query_rows)
        parts.append(_table(QUERIES, *tiles[:, :7].T))
    if dkv and batch.keys:
        k0 = np.arange(0, batch.keys, key_block)
        k1 = np.minimum(k0 + key_block, batch.keys)
        q0 = np.searchsorted(batch.high, k0, "right")  # the first query that sees so far
        q1 = np.searchsorted(batch.low, k1 - 1, "right")
        parts.append(_table(KEYS, q0, q1, k0, k1))
    if dprefix:
        first, last, prefix, length = batch.groups
        chunks = -(-(last - first) // chunk_rows)
        reader, block = _repeat(-(-length // key_block))  # of every block of keys of every prefix
        entry, number = _repeat(chunks[reader])  # of every prefix item
        count = len(entry)
        slot = np.cumsum(chunks[reader])
        slots = np.stack([prefix[reader], block, slot - chunks[reader], slot, length[reader]], 1)
        group = reader[entry]
        q0, p0 = first[group] + number * chunk_rows, block[entry] * key_block
        q1, p1 = np.minimum(q0 + chunk_rows, last[group]), np.minimum(p0 + key_block, length[group])
        parts.append(_table(PREFIX, q0, q1, p0, p1, prefix[group], np.arange(count)))
    items = np.concatenate(parts)
    return items[np.lexsort((items[:, 0], items[:, 1] // chunk_rows))], slots, count


def slot_table(slots, prefixes, length, key_block):
    """``[N, blocks, 3]`` of :func:`backward_items`'s slots for a bank of ``prefixes`` with room for ``length`` keys."""
    table = np.zeros((prefixes, -(-length // key_block), 3), np.int64)
    table[slots[:, 0], slots[:, 1]] = slots[:, 2:]
    return table


def piece_tiles(row, length, begin, end, rows):
    """``[T, 8]``: the first row of a tile in the gradients, its keys, how many of its piece are before it, and the
    links [begin, end) of the piece; at most ``rows`` keys a tile."""
    piece, number = _repeat(-(-length // rows))
    if not len(piece):
        return _table()
    before = number * rows
    return _table(row[piece] + before, np.minimum(length[piece] - before, rows), before, begin[piece], end[piece])


def decode_items(batch, *, rows, prefix_split, own_split):
    """Work items of the decode kernel and, for the merge, the partial results of each query.

    Returns:
        items: ``[W, 8]``: queries [q0, q1), keys [k0, k1), prefix or -1 for the own keys of the queries, which are of
            one sequence, number among its queries' parts.
        parts: ``[Q + 1]`` the first part of each query, and the total.
    """
    tiles = query_tiles(batch, rows)
    q0, q1, _, _, prefix, p0, p1, _ = tiles.T
    of_tile = -(-(p1 - p0) // prefix_split)
    tile, number = _repeat(of_tile)
    k0 = p0[tile] + number * prefix_split
    k1 = np.minimum(k0 + prefix_split, p1[tile])
    shared = _table(q0[tile], q1[tile], k0, k1, prefix[tile], number)

    before = np.repeat(of_tile, q1 - q0)  # parts of each query; with a window, fewer of those further on
    run_begins = np.diff([batch.spans[0], before], prepend=-1).any(0)  # of one sequence and with as many parts before
    begins = np.flatnonzero(run_begins)
    ends = np.append(begins[1:], batch.queries)[: len(begins)]
    run, number = _repeat(-(-(ends - begins) // rows))
    q0 = begins[run] + number * rows
    q1 = np.minimum(q0 + rows, ends[run])
    low, high = batch.low[q0], batch.high[q1 - 1]
    splits = -(-(high - low) // own_split)
    tile, number = _repeat(splits)
    k0 = low[tile] + number * own_split
    k1 = np.minimum(k0 + own_split, high[tile])
    own = _table(q0[tile], q1[tile], k0, k1, -1, before[q0][tile] + number)
    of_query = before + np.repeat(splits, q1 - q0)
    return np.concatenate([shared, own]), np.append(0, np.cumsum(of_query))


def _repeat(counts):
    """Each index as often as ``counts`` says, and how many times it came before."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - (np.cumsum(counts) - counts)[index]


def _table(*columns):
    """``[n, 8]`` from columns, scalars repeated."""
    rows = max((len(c) for c in columns if isinstance(c, np.ndarray)), default=0)
    table = np.zeros((rows, _COLUMNS), np.int64)
    for i, column in enumerate(columns):
        table[:, i] = column
    return table
