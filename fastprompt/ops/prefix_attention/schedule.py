"""How a batch is cut up for the C++ kernel; ``csrc/cpu/prefix_attention.h`` says what the tables mean.

Nothing here depends on the number of threads, so neither do the results. All of it is array arithmetic: a batch of
thousands of short sequences is cut up in less time than its first layer takes.
"""

from typing import NamedTuple

import numpy as np
import torch

from ...layout import Sequences
from .common import Pieces, pieces_of

_TILE_ROWS = 192  # queries of a tile, all heads of a group counted: its operands stay in the second-level cache
_CHUNK_ROWS = 1024  # of a chunk, so that the sums it leaves for the prefix cost little
_ITEMS = 8  # at least so many items for the threads, where there are rows enough
_FEWEST_ROWS = 48  # of a tile
_PAIRS = 1 << 14  # of a query and a key, in all heads: what an item is worth being cut off for, about 20 microseconds
_ALIGNMENT = 32
_ENDLESS = 1 << 62  # rows follow one another without an end


class CpuSchedule(NamedTuple):
    """What the kernel takes, int64: a row of a table is a struct of ``prefix_attention.h``, a column its member."""

    segments: torch.Tensor  # [S, 11] row, rows, first, base, begin, end, slot, gap, load, store, part
    tiles: torch.Tensor  # [T, 2] begin, end
    chunks: torch.Tensor  # [C, 4] begin, end, prefix, part
    prefixes: torch.Tensor  # [N, 3] begin, end, length
    links: torch.Tensor  # [L, 2] piece, offset
    pieces: torch.Tensor  # [M, 7] learned, base, row, length, slot, begin, end
    readers: torch.Tensor  # [K, 1] part
    splits: torch.Tensor  # [X, 4] base, length, begin, end
    parts: torch.Tensor  # [Y, 3] begin, end, slot
    pages: torch.Tensor  # [B, M] the blocks of keys of each sequence; empty: those of the cache in order
    sizes: torch.Tensor  # [8] rows, slots, prefix_slots, prefix_parts, split_parts, span, block, learned


def cpu_schedule(
    seq: Sequences,
    *,
    causal: bool,
    window: int | None,
    room: int,
    heads: int,
    kv_heads: int,
    key_seq: Sequences | None = None,
    block: int | None = None,
) -> CpuSchedule:
    """The schedule of a batch.

    Args:
        seq: the :class:`fastprompt.Sequences`.
        causal, window: of prefix_attention.
        room: P of the learned prefixes, 0 without.
        heads, kv_heads: H and Hkv.
        key_seq: the rows of k and v that each sequence of queries sees, in cross-attention.
        block: the columns of a row of the cache, or of a page; None but in decode.
    """

    limit = None if window is None or window >= seq.span(room) else window
    batch = _Batch.of(seq, room, key_seq, block)
    tile_rows, chunk_rows = _sizes(batch, heads // kv_heads, kv_heads)
    slices = _slices(batch, tile_rows, causal, limit)
    chunk_starts = _chunk_starts(batch, slices, chunk_rows)
    has_prefix = batch.prefix >= 0
    pieces = pieces_of(seq, batch.prefix[has_prefix], batch.prefix_length[has_prefix], room)
    return _tables(batch, pieces, slices, chunk_starts, causal, limit)


class _Batch(NamedTuple):
    """The sequences that have queries and keys, ``[B]`` each; those that read one prefix are a group and stand side by
    side."""

    block: int  # columns of a row of the cache, or of a page; _ENDLESS where the keys are rows
    pages: np.ndarray  # of CpuSchedule
    group: np.ndarray  # of each sequence; those without a prefix, if there are any, are group 0
    first_of_group: np.ndarray  # [G]
    prefix: np.ndarray  # [G] -1: none
    prefix_length: np.ndarray  # [G]
    start: np.ndarray  # the first row
    length: np.ndarray  # own keys
    queries: np.ndarray
    first: np.ndarray  # the number of the first query in the sequence
    base: np.ndarray  # where the first key is: a row of k, or a column of the cache, block by block
    gap: np.ndarray

    @classmethod
    def of(cls, seq: Sequences, room: int, key_seq: Sequences | None, block: int | None) -> "_Batch":
        host, prefix_length = seq.host, seq.prefix_lengths(room)
        prefix = np.where(prefix_length > 0, host.prefix_ids, -1)
        keys = host if key_seq is None else key_seq.host
        order = np.argsort(prefix, kind="stable")
        order = order[((host.queries > 0) & (keys.lengths + prefix_length > 0))[order]]
        start, length, base = host.starts[order], keys.lengths[order], keys.starts[order]
        queries, number = host.queries[order], np.zeros_like(length)
        pages = np.zeros((0, 1), np.int64) if host.pages is None else np.ascontiguousarray(host.pages)
        if block is not None:
            number, base = length - queries, order * pages.shape[1] * block + host.key_starts[order]
        first, group = _runs(prefix[order])
        readers = order[first]
        return cls(
            _ENDLESS if block is None else block,
            pages,
            group,
            first,
            prefix[readers],
            prefix_length[readers],
            start,
            length,
            queries,
            number,
            base,
            host.gaps[order],
        )

    def keys(
        self, sequence: np.ndarray, first: np.ndarray, end: np.ndarray, causal: bool, window: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The own keys that queries ``first`` to ``end`` of a sequence see, arrays all: the first one and the end."""
        length = self.length[sequence]
        stop = end if causal else length
        if window is None:
            return np.zeros_like(first), stop
        return np.maximum(0, first - window + 1), np.minimum(stop, end - 1 + window)


class _Slices(NamedTuple):
    """Queries of one sequence that stand side by side in one tile. ``[S]`` each, tile by tile."""

    sequence: np.ndarray
    first: np.ndarray  # the number of the first query in the sequence
    queries: np.ndarray
    opens: np.ndarray  # whether it is the first of its tile
    cost: np.ndarray  # pairs of a query and a key that it sees, twice: whole numbers


def _sizes(batch: _Batch, group: int, kv_heads: int) -> tuple[int, int]:
    """Queries of a tile and of a chunk, at most."""
    queries = int(batch.queries.sum())
    pairs = int(batch.queries @ (batch.prefix_length[batch.group] + batch.length))
    items = min(_ITEMS, pairs * group * kv_heads // _PAIRS + 1)
    wanted = -(-items // kv_heads)  # chunks
    share = -(-queries * group // wanted)
    tile_rows = max(1, min(_TILE_ROWS, max(_FEWEST_ROWS, share)) // group)
    return tile_rows, max(1, min(_CHUNK_ROWS, share) // group)


def _slices(batch: _Batch, tile_rows: int, causal: bool, window: int | None) -> _Slices:
    """Long sequences in slices of one size, each a tile; short ones together, in order, as long as they fit."""
    size = -(-batch.queries // -(-batch.queries // tile_rows))
    count = -(-batch.queries // size)
    sequence = np.repeat(np.arange(len(count)), count)
    offset = (np.arange(len(sequence)) - (count.cumsum() - count)[sequence]) * size[sequence]
    queries = np.minimum(size[sequence], batch.queries[sequence] - offset)
    opens = (_tile_starts(batch, tile_rows) | (count > 1))[sequence]
    first = batch.first[sequence] + offset
    begin, end = batch.keys(sequence, first, first + queries, causal, window)
    keys = (end - begin) * (1 if causal and batch.block == _ENDLESS else 2)
    cost = queries * (2 * batch.prefix_length[batch.group[sequence]] + keys)
    return _Slices(sequence, first, queries, opens, cost)


def _tile_starts(batch: _Batch, tile_rows: int) -> np.ndarray:
    """``[B]`` whether a tile begins with the sequence: its group does, or the tile before has no room for it."""
    start = batch.queries.cumsum() - batch.queries + batch.group * tile_rows  # no tile reaches into the next group
    number = np.arange(len(start))
    following = np.maximum(np.searchsorted(start + batch.queries, start + tile_rows, "right"), number + 1)
    return _visited(following)


def _visited(following: np.ndarray) -> np.ndarray:
    """``[n]`` whether a place is met on the way from 0 to ``following[0]`` and on, until n.

    ``ahead`` leads 1, 2, 4, ... steps on: the places met in fewer steps lead to as many again.
    """
    ahead = np.concatenate([following, [len(following)]])
    met = np.zeros(len(ahead), bool)
    met[0] = True
    while not met[-1]:
        met[ahead[met]] = True
        ahead = ahead[ahead]
    return met[:-1]


def _chunk_starts(batch: _Batch, slices: _Slices, chunk_rows: int) -> np.ndarray:
    """``[S]`` whether a chunk begins with the slice: the tiles of a group are dealt out to chunks of about one size."""
    tile = slices.opens.nonzero()[0]  # the first slice of each
    rows = _sums(slices.queries, tile)
    first, group = _runs(batch.group[slices.sequence[tile]])
    total = _sums(rows, first)
    chunks = np.maximum(1, np.rint(total / chunk_rows).astype(np.int64))
    before = rows.cumsum() - rows
    before -= before[first][group]  # in tiles of the group before this one
    tiles = np.arange(len(rows)) - first[group]
    # Chunk n of a group has the rows from n * total / chunks on. A tile goes where its first row is, but at most one
    # chunk further than the tile before it: none is left out.
    wanted = before * chunks[group] // total[group]
    apart = len(rows) * group
    number = np.minimum.accumulate(wanted - tiles - apart) + tiles + apart
    starts = np.zeros(len(slices.queries), bool)
    starts[tile] = _changes(number, group)
    return starts


def _tables(
    batch: _Batch, pieces: Pieces, slices: _Slices, chunk_starts: np.ndarray, causal: bool, window: int | None
) -> CpuSchedule:
    """The schedule: chunks in order of their cost, the most expensive first."""
    chunk = chunk_starts.cumsum() - 1
    place = np.argsort(np.argsort(-_sums(slices.cost, chunk_starts.nonzero()[0]), kind="stable"))
    chunk = place[chunk]
    order = np.argsort(chunk, kind="stable")
    sequence, first, queries, opens, chunk = (x[order] for x in (*slices[:4], chunk))
    tile_begins, tile = opens.nonzero()[0], opens.cumsum() - 1

    # Slices of a sequence in one chunk share their packed keys: a span, with the keys that one of its queries sees.
    span_begins, span = _runs(sequence, chunk)
    span_last = _ends(span_begins, len(span)) - 1
    owner = sequence[span_begins]
    begin, end = batch.keys(owner, first[span_begins], (first + queries)[span_last], causal, window)
    part, splits, parts = _splits(batch, owner, begin, end)

    slots = _aligned(end - begin)[span]
    slot = slots.cumsum() - slots
    slot -= slot[tile_begins][tile]
    number = np.arange(len(order))
    segments = _table(
        row=batch.start[sequence] + first - batch.first[sequence],
        rows=queries,
        first=first,
        base=batch.base[sequence],
        begin=begin[span],
        end=end[span],
        slot=slot,
        gap=batch.gap[sequence],
        load=number == span_begins[span],
        store=number == span_last[span],
        part=part[span],
    )
    tiles = _table(begin=tile_begins, end=_ends(tile_begins, len(order)))

    chunk_begins, _ = _runs(chunk)
    group = batch.group[sequence[chunk_begins]]
    prefix_parts = batch.prefix_length[group]
    first_tile = tile[chunk_begins]
    without = int((batch.prefix < 0).sum())  # groups without a prefix: group 0, or none
    chunks = _table(
        begin=first_tile,
        end=_ends(first_tile, len(tile_begins)),
        prefix=group - without,
        part=prefix_parts.cumsum() - prefix_parts,
    )
    chunk_part = chunks[:, 3]
    prefixes = _table(begin=pieces.begin, end=pieces.end, length=batch.prefix_length[without:])
    # A link of a prefix is read by all chunks of the prefix.
    reading = (group >= without).nonzero()[0]
    number = group[reading] - without
    count = (pieces.end - pieces.begin)[number]
    reader = np.repeat(reading, count)
    link = np.repeat(pieces.begin[number] - count.cumsum() + count, count) + np.arange(len(reader))
    order = np.argsort(pieces.link[link], kind="stable")  # piece by piece, in the order of chunks
    readers = _table(part=(chunk_part[reader] + pieces.offset[link])[order])
    bounds = np.searchsorted(pieces.link[link][order], np.arange(len(pieces.length) + 1))
    slots_of_piece = _aligned(pieces.length)
    table_of_pieces = _table(
        learned=pieces.learned,
        base=pieces.base,
        row=pieces.row,
        length=pieces.length,
        slot=slots_of_piece.cumsum() - slots_of_piece,
        begin=bounds[:-1],
        end=bounds[1:],
    )
    sizes = _table(
        rows=[_sums(queries, tile_begins).max(initial=0)],
        slots=[(slot + slots).max(initial=0)],
        prefix_slots=[slots_of_piece.sum()],
        prefix_parts=[prefix_parts.sum()],
        split_parts=[(parts[:, 1] - parts[:, 0]).sum()],
        span=[slots.max(initial=0)],
        block=[batch.block],
        learned=[pieces.length @ pieces.learned],
    )
    links = _table(piece=pieces.link, offset=pieces.offset)
    of_prefixes = prefixes, links, table_of_pieces, readers
    tables = segments, tiles, chunks, *of_prefixes, splits, parts, batch.pages, sizes[0]
    return CpuSchedule(*map(torch.from_numpy, tables))


def _splits(
    batch: _Batch, owner: np.ndarray, begin: np.ndarray, end: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For sequences with spans in several chunks: the slot of each span's part (-1: whole), splits and parts."""
    part = np.full(len(owner), -1)
    if len(owner) == len(batch.length):
        return part, np.zeros((0, 4), np.int64), np.zeros((0, 3), np.int64)
    _, met, count = np.unique(owner, return_index=True, return_counts=True)  # met: the first span of each sequence
    spans = (count[owner] > 1).nonzero()[0]
    spans = spans[np.lexsort((end[spans], met[owner[spans]]))]
    keys = end[spans] - begin[spans]
    slot = keys.cumsum() - keys
    part[spans] = slot
    split = (count > 1).nonzero()[0]
    split = split[np.argsort(met[split])]
    last = count[split].cumsum()
    splits = _table(base=batch.base[split], length=batch.length[split], begin=last - count[split], end=last)
    return part, splits, _table(begin=begin[spans], end=end[spans], slot=slot)


def _table(**columns: np.ndarray | list[int]) -> np.ndarray:
    """``[n, columns]`` int64."""
    table = np.empty((len(next(iter(columns.values()))), len(columns)), np.int64)
    for i, column in enumerate(columns.values()):
        table[:, i] = column
    return table


def _changes(*keys: np.ndarray) -> np.ndarray:
    """``[n]`` whether one of the keys differs from that before it; the first always does."""
    changes = np.ones(len(keys[0]), bool)
    np.not_equal(keys[0][1:], keys[0][:-1], out=changes[1:])
    for key in keys[1:]:
        changes[1:] |= key[1:] != key[:-1]
    return changes


def _runs(*keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the runs of equal keys begin, and of which run each is part."""
    changes = _changes(*keys)
    return changes.nonzero()[0], changes.cumsum() - 1


def _ends(begins: np.ndarray, count: int) -> np.ndarray:
    """Where runs end, the last of them at ``count``."""
    return np.concatenate([begins[1:], [count]]) if len(begins) else begins


def _sums(values: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """The sum of each run."""
    return np.add.reduceat(values, begins) if len(begins) else values


def _aligned(keys: np.ndarray) -> np.ndarray:
    return -(-keys // _ALIGNMENT) * _ALIGNMENT
