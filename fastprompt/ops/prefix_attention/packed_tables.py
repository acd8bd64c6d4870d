"""The schedule of the Triton kernels in one tensor, whose size depends on the shape of a call alone."""

from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from ...kernels import launch
from ...kernels.prefix_attention import config, schedule


class _Cuts(NamedTuple):
    """Into what a batch is cut whose schedule is packed, whatever dropout there is.

    Attributes:
        tile: queries of a tile of the forward.
        fold: of the backward.
        item: queries of an item of the backward.
        block: keys of one.
        chunk: queries that an item with keys of a prefix runs over.
    """

    tile: int
    fold: int
    item: int
    block: int
    chunk: int

    @classmethod
    def of(cls, heads, kv_heads, head_dim, value_dim, element_size, room, device):
        group, by = heads // kv_heads, (head_dim, element_size, launch.target_of(device), launch.name_of(device))
        options = dict(value_dim=value_dim, group=group)
        forward_queries = config.forward_tiles(*by, gather=True, **options).queries
        tiles = config.backward_tiles(*by, dropout=True, **options)
        fold = config.fold(group, tiles.queries, tiles.key_queries)
        item = tiles.queries // fold
        tile = forward_queries // config.fold(group, forward_queries)
        return cls(tile, fold, item, tiles.key_keys, config.chunk_rows(room, tiles.queries, item))

    def slots(self, rows, prefixes, room):
        """The most partial sums that there can be of the gradients of prefixes."""
        return -(-room // self.block) * (rows // self.chunk + prefixes)

    def shapes(self, rows, prefixes, room):
        """Those of a packed schedule's tables, with room for every batch of such a shape: rows of queries and of keys,
        spans, tiles, items, slots. What reads no prefix, or one of them, ends with a tile of its own."""
        groups, blocks = prefixes + 1, -(-room // self.block)
        items = rows // self.item + groups + -(-rows // self.block) + self.slots(rows, prefixes, room)
        tables = (rows // self.tile + groups, 8), (items, 8), (prefixes, blocks, 3)
        return [(rows,), (rows,), (4, rows), *tables]


def pack(seq, shape, *, causal, window, prefixes, room, element_size, device):
    """A batch as one tensor; see :func:`fastprompt.ops.prefix_attention.scheduled.make_schedule`.

    The tables are as long as any of such a shape can be: programs beyond the end of theirs find no queries.
    """
    table = np.stack(seq.host[:4], 1)
    batch = schedule.make_batch(table, seq.prefix_lengths(room), causal=causal, window=window)
    cuts = _Cuts.of(*shape, element_size, room, device)
    items, slots, _ = schedule.backward_items(
        batch, query_rows=cuts.item, key_block=cuts.block, chunk_rows=cuts.chunk, dq=True, dkv=True, dprefix=room > 0
    )
    tiles, slots = schedule.query_tiles(batch, cuts.tile), schedule.slot_table(slots, prefixes, room, cuts.block)
    arrays = []
    made = batch.query_rows, batch.key_rows, batch.spans, tiles, items, slots
    for array, extents in zip(made, cuts.shapes(seq.rows, prefixes, room), strict=True):
        arrays.append(np.pad(array, [(0, n - m) for n, m in zip(extents, array.shape, strict=True)]))
    return _joined(arrays, device)


def unpack(packed):
    """What stands in place of sequences in calls whose schedule was packed."""
    return Packed(packed)


@dataclass(frozen=True)
class Packed:
    """A schedule of :func:`pack`."""

    tensor: torch.Tensor
    kind: str = "padded"
    chains: None = None
    pages: None = None

    def room(self, learned):
        """As of sequences without chains."""
        return learned

    def tables(self, call):
        """The tables for a call of the shape that it was made for."""
        prefixes = 0 if call.prefix_k is None else len(call.prefix_k)
        widths = call.heads, call.kv_heads, call.head_dim, call.value_dim, call.q.element_size()
        cuts = _Cuts.of(*widths, call.prefix_room, call.q.device)
        return _Unpacked(self.tensor, cuts, call.rows, prefixes, call.prefix_room)


class _Unpacked:
    """As :class:`_Schedule`, of a tensor. Nothing that it holds is known on the host."""

    in_order = False

    def __init__(self, tensor, cuts, rows, prefixes, room):
        self.queries, self.fold = rows, cuts.fold
        *self.tensors, self._tiles, self._items, self._slots = _parts(tensor, cuts.shapes(rows, prefixes, room))
        self._count = cuts.slots(rows, prefixes, room)

    def writes_all_of(self, rows):
        return False

    writes_all_keys_of = writes_all_of

    def query_tiles(self, rows):
        return self._tiles

    def backward_items(self, **options):
        return self._items, self._slots, self._count


def put(device, *arrays):
    """int32 tensors on a device, by one copy; None stays None."""
    there = [array for array in arrays if array is not None]
    whole = iter(_parts(_joined(there, device), [array.shape for array in there]))
    return [None if array is None else next(whole) for array in arrays]


def _joined(arrays, device):
    """Arrays as one int32 tensor, in which each starts aligned."""
    places = _places([array.shape for array in arrays])
    host = torch.zeros(places[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
    for array, place in zip(arrays, places):
        host[place : place + array.size] = torch.from_numpy(array.reshape(-1))
    return host.to(device, non_blocking=True)


def _parts(whole, shapes):
    """The inverse of :func:`_joined`, as views."""
    return [whole[place : place + prod(shape)].view(shape) for shape, place in zip(shapes, _places(shapes))]


def _places(shapes):
    """Where arrays of these shapes start, and where the last ends."""
    return [0, *accumulate(-(-prod(shape) // 32) * 32 for shape in shapes)]
