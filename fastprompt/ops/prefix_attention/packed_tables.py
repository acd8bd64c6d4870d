"""The tables of the Triton kernels, and a schedule of them in one tensor, whose size a call's shape alone decides."""

from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from ...kernels import launch
from ...kernels.prefix_attention import config, schedule
from .common import pieces_of
from .scheduled import Shape

ROWS = 16  # of a program that adds up partial sums


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
    def of(cls, shape, element_size, room, device):
        heads, kv_heads, head_dim, value_dim, alibi, bias = shape
        group, by = heads // kv_heads, (head_dim, element_size, launch.target_of(device), launch.name_of(device))
        options = dict(value_dim=value_dim, group=group, alibi=alibi, bias=bias)
        forward_queries = config.forward_tiles(*by, gather=True, **options).queries
        tiles = config.backward_tiles(*by, dropout=True, **options)
        fold = config.fold(group, tiles.queries, tiles.key_queries)
        item = tiles.queries // fold
        tile = forward_queries // config.fold(group, forward_queries)
        return cls(tile, fold, item, tiles.key_keys, config.chunk_rows(room, tiles.queries, item))

    def slots(self, rows, prefixes, room):
        """The most partial sums that there can be of the gradients of prefixes."""
        return -(-room // self.block) * (rows // self.chunk + prefixes)

    def shapes(self, rows, keys, prefixes, room, learned):
        """Those of a packed schedule's tables, with room for every batch of such a shape: rows of queries and of keys,
        spans, tiles, items, slots. What reads no prefix, or one of them, ends with a tile of its own.

        ``learned`` is None, or how many keys all learned prefixes have, where there are chains. Then there are these,
        the tiles of rows and of learned keys, and links. The pieces of a tree are its nodes and learned prefixes: there
        are no more than chains, in each of them.
        """
        groups, blocks = prefixes + 1, -(-room // self.block)
        items = rows // self.item + groups + -(-keys // self.block) + self.slots(rows, prefixes, room)
        tables = (rows // self.tile + groups, 8), (items, 8), (prefixes, blocks, 3)
        made = [(rows,), (keys,), (4, rows), *tables]
        if learned is None:
            return made
        tiles = [(n // ROWS + prefixes, 8) for n in (keys, learned)]
        return [*made, (prefixes, room), *tiles, (prefixes * min(prefixes, room), 2)]


def pack(seq, shape, *, causal, window, prefixes, room, element_size, device, key_seq=None):
    """A batch as one tensor; see :func:`fastprompt.ops.prefix_attention.scheduled.make_schedule`.

    The tables are as long as any of such a shape can be: programs beyond the end of theirs find no queries. With
    chains, those of a tree, the tensor is ``[N, W, ...]``, so that their number and room are known from its shape.
    """
    table, keys = np.stack(seq.host[:4], 1), None if key_seq is None else np.stack(key_seq.host[:2], 1)
    options = dict(causal=causal, window=window, key_sequences=keys)
    batch = schedule.make_batch(table, seq.prefix_lengths(room), **options)
    learned, chains = None, []
    if seq.chains is not None:
        chains, learned = chain_tables(seq, batch.groups, room), prefixes * room
        prefixes, room = (max(n, 2) for n in seq.chains.shape)  # 0 and 1 would be constants of a graph
    cuts = _Cuts.of(shape, element_size, room, device)
    items, slots, _ = schedule.backward_items(
        batch, query_rows=cuts.item, key_block=cuts.block, chunk_rows=cuts.chunk, dq=True, dkv=True, dprefix=room > 0
    )
    tiles, slots = schedule.query_tiles(batch, cuts.tile), schedule.slot_table(slots, prefixes, room, cuts.block)
    made = batch.query_rows, batch.key_rows, batch.spans, tiles, items, slots, *chains
    key_rows = seq.rows if key_seq is None else key_seq.rows
    extents = cuts.shapes(seq.rows, key_rows, prefixes, room, learned)
    if any(n > most for array, of in zip(made, extents, strict=True) for n, most in zip(array.shape, of, strict=True)):
        raise ValueError("seq.chains must be those of a tree to be put into tables, got more pieces than it has")
    arrays = [np.pad(x, [(0, n - m) for n, m in zip(of, x.shape)]) for x, of in zip(made, extents)]
    return _joined(arrays, device, () if learned is None else (prefixes, room))


def chain_tables(seq, groups, learned):
    """The chains; and for the sums of their keys' gradients the tiles of rows, those of learned keys, and the links of
    their pieces: the chain, and where in it.

    Args:
        groups: of the batch.
        learned: P of the learned prefixes, 0 without.
    """
    used = groups.prefix >= 0
    number = groups.prefix[used]
    found = pieces_of(seq, number, groups.prefix_length[used], learned)
    links = np.stack([np.repeat(number, found.end - found.begin), found.offset], 1)
    order = np.argsort(found.link, kind="stable")
    bounds = np.searchsorted(found.link[order], np.arange(len(found.length) + 1))
    tables = [
        schedule.piece_tiles(
            (found.base * max(learned, 1) + found.row)[some] if of_learned else found.base[some],
            *(x[some] for x in (found.length, bounds[:-1], bounds[1:])), ROWS,
        )
        for of_learned, some in ((False, ~found.learned), (True, found.learned))
    ]  # fmt: skip
    return [seq.host.chains, *tables, links[order]]


def unpack(packed):
    """What stands in place of sequences in calls whose schedule was packed."""
    return Packed(packed)


@dataclass(frozen=True)
class Packed:
    """A schedule of :func:`pack`."""

    tensor: torch.Tensor
    backend: str = "triton"
    kind: str = "padded"
    pages: None = None

    @property
    def chains(self):
        """A tensor of as many chains, or None."""
        return None if self.tensor.dim() == 1 else self.tensor

    def room(self, learned):
        """As of sequences."""
        return learned if self.chains is None else self.chains.shape[1]

    def tables(self, call):
        """The tables for a call of the shape that it was made for."""
        shape = Shape(call.heads, call.kv_heads, call.head_dim, call.value_dim, **call.biases)
        cuts = _Cuts.of(shape, call.q.element_size(), call.prefix_room, call.q.device)
        learned = None if self.chains is None else 0 if call.prefix_k is None else len(call.prefix_k)
        sizes = call.rows, len(call.k), call.prefixes, call.prefix_room
        return _Unpacked(self.tensor.flatten(), cuts, *sizes, learned)


class _Unpacked:
    """As :class:`_Schedule`, of a tensor. Nothing that it holds is known on the host."""

    in_order = False

    def __init__(self, tensor, cuts, rows, keys, prefixes, room, learned):
        self.queries, self.fold, self._room = rows, cuts.fold, room
        parts = _parts(tensor, cuts.shapes(rows, keys, prefixes, room, learned))
        self.tensors, (self._tiles, self._items, self._slots, *self._chains) = parts[:3], parts[3:]
        self._count = cuts.slots(rows, prefixes, room)

    def writes_all_of(self, rows):
        return False

    writes_all_keys_of = writes_all_of

    def chains(self, seq, learned):
        table, *pieces = self._chains
        return (table, self._room), pieces

    def query_tiles(self, rows):
        return self._tiles

    def backward_items(self, **options):
        return self._items, self._slots, self._count


def put(device, *arrays):
    """int32 tensors on a device, by one copy; None stays None."""
    there = [array for array in arrays if array is not None]
    whole = iter(_parts(_joined(there, device), [array.shape for array in there]))
    return [None if array is None else next(whole) for array in arrays]


def _joined(arrays, device, leading=()):
    """Arrays as one int32 tensor, in which each starts aligned; its shape begins with ``leading`` sizes."""
    places = _places([array.shape for array in arrays])
    size = -(-places[-1] // prod(leading)) * prod(leading)
    host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
    for array, place in zip(arrays, places):
        host[place : place + array.size] = torch.from_numpy(array.reshape(-1))
    return host.view(*leading, size // prod(leading)).to(device, non_blocking=True)


def _parts(whole, shapes):
    """The inverse of :func:`_joined`, as views."""
    return [whole[place : place + prod(shape)].view(shape) for shape, place in zip(shapes, _places(shapes))]


def _places(shapes):
    """Where arrays of these shapes start, and where the last ends."""
    return [0, *accumulate(-(-prod(shape) // 32) * 32 for shape in shapes)]
