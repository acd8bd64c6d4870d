"""How a batch is cut up for the C++ kernel; see ``csrc/cpu/prefix_attention.h`` for what the parts are.

Nothing here depends on the number of threads, so neither do the results.
"""

import torch

_TILE_ROWS = 192  # queries of a tile, all heads of a group counted: its operands stay in the second-level cache
_CHUNK_ROWS = 1024  # of a chunk, so that the sums it leaves for the prefix cost little
_ITEMS = 8  # at least so many items for the threads, where there are rows enough
_FEWEST_ROWS = 48  # of a tile
_PAIRS = 1 << 14  # of a query and a key, in all heads: what an item is worth being cut off for, about 20 microseconds
_ALIGNMENT = 32


def plan_of(seq, *, causal, window, room, heads, kv_heads):
    """The seven int64 tensors that the kernel takes, worked out once a batch; all layers share them.

    Args:
        seq: the :class:`fastprompt.Sequences`.
        causal, window: of prefix_attention.
        room: P, 0 without a prefix.
        heads, kv_heads: H and Hkv.
    """

    def make():
        limit = None if window is None or window >= seq.span(room) else window
        return _Planner(seq, causal, limit, room, heads // kv_heads, kv_heads).tensors()

    return seq.cached(("cpu", causal, window, room, heads, kv_heads), make)


class _Planner:
    def __init__(self, seq, causal, window, room, group, kv_heads):
        self.decode, self.causal, self.window = seq.kind == "decode", causal, window
        self.prefix_of = {}  # prefix id -> its place in prefixes
        self.prefixes, self.slots, self.prefix_slots, self.prefix_parts, self.split_parts = [], 0, 0, 0, 0
        readers = {}  # prefix id -> sequences
        for index, (start, length, prefix_id, gap) in enumerate(seq.host):
            if length:
                used = prefix_id if seq.prefix_length(prefix_id, room) else -1
                readers.setdefault(used, []).append((index, start, length, gap))
        queries = pairs = 0
        for prefix_id, sequences in readers.items():
            for _, _, length, _ in sequences:
                rows = 1 if self.decode else length
                queries += rows
                pairs += rows * (seq.prefix_length(prefix_id, room) + length)
        items = min(_ITEMS, pairs * group * kv_heads // _PAIRS + 1)
        wanted = -(-items // kv_heads)  # chunks
        self.tile_rows = max(1, min(_TILE_ROWS, max(_FEWEST_ROWS, -(-queries * group // wanted))) // group)
        self.chunk_rows = max(1, min(_CHUNK_ROWS, -(-queries * group // wanted)) // group)
        chunks = []
        for prefix_id, sequences in sorted(readers.items()):
            length = seq.prefix_length(prefix_id, room)
            number = self._add_prefix(prefix_id, length) if length else -1
            for tiles in self._chunks(self._tiles(sequences)):
                chunks.append((self._cost(tiles, length), number, length, tiles))
        chunks.sort(key=lambda chunk: -chunk[0])
        self._write(chunks)

    def _add_prefix(self, prefix_id, length):
        self.prefixes.append((prefix_id, length, self.prefix_slots))
        self.prefix_slots += _aligned(length)
        return len(self.prefixes) - 1

    def _tiles(self, sequences):
        """Lists of ``(sequence, first query, queries)``: short sequences together, long ones in slices of one size."""
        tiles, room = [], 0
        for sequence in sequences:
            queries = 1 if self.decode else sequence[2]
            offset = sequence[2] - queries
            if queries > self.tile_rows:
                size = -(-queries // -(-queries // self.tile_rows))
                tiles += [[(sequence, i, min(size, queries - i))] for i in range(0, queries, size)]
                room = 0
            elif queries <= room:
                tiles[-1].append((sequence, offset, queries))
                room -= queries
            else:
                tiles.append([(sequence, offset, queries)])
                room = self.tile_rows - queries
        return tiles

    def _chunks(self, tiles):
        total = sum(_rows(tile) for tile in tiles)
        size = total / max(1, round(total / self.chunk_rows))
        chunks, done = [], 0
        for tile in tiles:
            if not chunks or done >= size * len(chunks):
                chunks.append([])
            chunks[-1].append(tile)
            done += _rows(tile)
        return chunks

    def _keys(self, sequence, first, end):
        """The own keys that queries ``first`` to ``end`` see."""
        begin, stop = 0, end if self.causal else sequence[2]
        if self.window is not None:
            begin, stop = max(0, first - self.window + 1), min(stop, end - 1 + self.window)
        return begin, stop

    def _cost(self, tiles, prefix_length):
        cost = 0
        for sequence, first, queries in (segment for tile in tiles for segment in tile):
            begin, end = self._keys(sequence, first, first + queries)
            cost += queries * (prefix_length + (end - begin) / (2 if self.causal and not self.decode else 1))
        return cost

    def _write(self, chunks):
        self.tiles, self.segments, self.chunks, self.rows = [], [], [], 0
        parts = {}  # sequence -> its (begin, end, chunk)
        for number, (_, _, _, tiles) in enumerate(chunks):
            for sequence, (first, end) in _spans(tiles).items():
                parts.setdefault(sequence, []).append((*self._keys(sequence, first, end), number))
        place = {}  # (sequence, chunk) -> slot of its part
        self.splits, self.parts = [], []
        for sequence, found in parts.items():
            if len(found) > 1:
                self.splits.append((self._base(sequence), sequence[2], len(self.parts), len(self.parts) + len(found)))
                for begin, end, number in sorted(found, key=lambda part: part[1]):
                    place[sequence, number] = self.split_parts
                    self.parts.append((begin, end, self.split_parts))
                    self.split_parts += end - begin
        for number, (_, prefix, prefix_length, tiles) in enumerate(chunks):
            spans, begun = _spans(tiles), len(self.tiles)
            for tile in tiles:
                self._write_tile(tile, spans, {s: place.get((s, number), -1) for s, _, _ in tile})
            self.chunks.append((begun, len(self.tiles), prefix, self.prefix_parts))
            self.prefix_parts += prefix_length

    def _write_tile(self, tile, spans, place):
        begun, slot = len(self.segments), 0
        for sequence, first, queries in tile:
            index, start, length, gap = sequence
            span_first, span_end = spans[sequence]
            begin, end = self._keys(sequence, span_first, span_end)
            row = start if self.decode else start + first
            load, store = first == span_first, first + queries == span_end
            self.segments.append(
                (row, queries, first, self._base(sequence), begin, end, slot, gap, load, store, place[sequence])
            )
            slot += _aligned(end - begin)
        self.tiles.append((begun, len(self.segments)))
        self.rows, self.slots = max(self.rows, _rows(tile)), max(self.slots, slot)

    def _base(self, sequence):
        return sequence[0] if self.decode else sequence[1]

    def tensors(self):
        sizes = [self.rows, self.slots, self.prefix_slots, self.prefix_parts, self.split_parts]
        lists = self.segments, self.tiles, self.chunks, self.prefixes, self.splits, self.parts, sizes
        return [torch.tensor(values, dtype=torch.int64) for values in lists]


def _spans(tiles):
    """Sequence -> the queries of it that stand in these tiles, ``(first, end)``."""
    spans = {}
    for sequence, first, queries in (segment for tile in tiles for segment in tile):
        spans[sequence] = spans.get(sequence, (first,))[0], first + queries
    return spans


def _rows(tile):
    return sum(queries for _, _, queries in tile)


def _aligned(keys):
    return -(-keys // _ALIGNMENT) * _ALIGNMENT
