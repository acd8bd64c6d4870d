"""prefix_attention on the CPU without the C++ library, composed of torch's own flash attention kernel.

Each query's softmax is split in two: over its prefix and over its own keys. The batch is folded into the query axis of
the first, so a prefix is read once however many sequences share it. In the second, long sequences run alone and short
ones share tiles, several in one, kept apart by a mask. The halves are merged by their log-sum-exp.

The backward of each half is torch's flash backward given the *merged* out and lse: p = exp(score - lse) and dscore = p
(dout v^T - rowsum(dout out)) hold for any part of the keys, once lse and out are those of the whole. Autograd through
two flash calls would be wrong, it takes lse for a constant.

torch's kernel wants keys and values of one width: the narrower of the two are filled up with zeros, which add nothing
to a score, and give columns of the output that nobody reads.
"""

import numpy as np
import torch
from torch.nn.functional import pad

from ...checks import accumulator
from ..columns import columns_together
from ..sums import sum_rows

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# A tile computes all pairs of its rows and a further kernel call costs time as well. They cost the same at about this
# many query-key pairs (measured: 9 heads of 64, two Zen 3 cores).
_PAIRS_PER_CALL = 2000
_NARROWEST_TILE, _STEP = 32, 16  # thinner or odd matrix products are slow


def forward(q, k, v, prefix_k, prefix_v, seq, **options):
    prefix_k, prefix_v = _in_front(seq, k, prefix_k), _in_front(seq, v, prefix_v)
    widths, inputs = (q.shape[-1], v.shape[-1]), (q, k, v, prefix_k, prefix_v)
    out, lse = _forward(*(_filled_up(x, max(widths)) for x in inputs), seq, **options)
    return out[..., : widths[1]], lse


def backward(grad, q, k, v, prefix_k, prefix_v, out, lse, seq, *, needs, **options):
    front_k, front_v = _in_front(seq, k, prefix_k), _in_front(seq, v, prefix_v)
    if seq.chains is not None:
        needs = *needs[:3], needs[1] or needs[3], needs[2] or needs[4], needs[5]
    widths, inputs = (q.shape[-1], v.shape[-1]), (q, k, v, front_k, front_v)
    grad, *filled_up, out = (_filled_up(x, max(widths)) for x in (grad, *inputs, out))
    *grads, dsinks = _backward(grad, *filled_up, out, lse, seq, needs=needs, **options)
    dq, dk, dv, dfront_k, dfront_v = (None if g is None else g[..., : x.shape[-1]] for g, x in zip(grads, inputs))
    if seq.chains is not None:
        dk, dfront_k = _of_chains(seq, dfront_k, dk, prefix_k)
        dv, dfront_v = _of_chains(seq, dfront_v, dv, prefix_v)
    return dq, dk, dv, dfront_k, dfront_v, dsinks


def _in_front(seq, own, learned):
    """The bank ``[N, P, Hkv, width]``; where prefixes are chains, a copy of each, ``[N, W, Hkv, width]``."""
    if seq.chains is None:
        return learned
    rows = own if learned is None else torch.cat([own, learned.flatten(0, 1)])
    return rows.index_select(0, _numbers(seq, len(own))).unflatten(0, seq.chains.shape)


def _of_chains(seq, gradient, own_gradient, learned):
    """The gradients of k or v and of the learned ones, given that of all chains."""
    if gradient is None:
        return own_gradient, None
    rows = len(own_gradient)
    count = rows if learned is None else rows + learned.shape[:2].numel()
    sums = sum_rows(gradient.flatten(0, 1), _numbers(seq, rows), count)
    return own_gradient + sums[:rows], None if learned is None else sums[rows:].view(learned.shape)


def _numbers(seq, rows):
    """``[N * W]`` where the keys of chains stand in k with the learned ones behind it; of those not used, row 0."""

    def find():
        chains = seq.host.chains
        if seq.prefix_lens is not None:
            chains = np.where(np.arange(chains.shape[1]) < seq.host.prefix_lens[:, None], chains, 0)
        return torch.from_numpy(np.where(chains < 0, rows - 1 - chains, chains).ravel())

    return seq.cached(("composed", "chains", rows), find)


def _filled_up(x, width):
    """``x [..., n]`` with zeros up to ``[..., width]``; None stays None."""
    return x if x is None or x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))


def _forward(q, k, v, prefix_k, prefix_v, seq, *, causal, window, softcap, sinks, scale, dropout=None):
    heads, kv_heads = q.shape[1], k.shape[1]
    whole = seq.kind == "packed"  # every row belongs to a sequence and is written below
    out = (torch.empty_like if whole else torch.zeros_like)(q, memory_format=torch.contiguous_format)
    lse = q.new_full((q.shape[0], heads), -torch.inf, dtype=accumulator(q.dtype))
    blocks, readers = _schedule(seq, causal, prefix_k)
    for block in blocks:
        part, part_lse = _flash(
            block.read(q), *_read_keys(block, k, v, heads), 0.0, block.causal, attn_mask=_mask(block, q), scale=scale
        )
        block.write(out, part)
        block.write(lse, part_lse)
    for reader in readers:
        part, part_lse = _flash(
            reader.fold(q, kv_heads),
            reader.prefix(prefix_k, heads),
            reader.prefix(prefix_v, heads),
            0.0,
            False,
            scale=scale,
        )
        part, part_lse = part.permute(2, 1, 0, 3), part_lse.permute(2, 1, 0)  # [Rn, Hkv, G, Dh], [Rn, Hkv, G]
        own, own_lse = (reader.read(x).unflatten(1, (kv_heads, -1)) for x in (out, lse))
        weight = torch.sigmoid(part_lse - own_lse).unsqueeze(-1)
        merged = torch.lerp(own.to(lse.dtype), part.to(lse.dtype), weight)
        reader.write(out, merged.flatten(1, 2).to(out.dtype))
        reader.write(lse, torch.logaddexp(own_lse, part_lse).flatten(1))
    if sinks is not None:
        total = torch.logaddexp(lse, sinks.to(lse.dtype))
        out = (out * torch.exp(lse - total)[..., None]).to(out.dtype)
        lse = torch.where(lse == -torch.inf, lse, total)  # rows outside every sequence stay as they are
    return out, lse.t()


def _backward(
    grad, q, k, v, prefix_k, prefix_v, out, lse, seq, *, causal, window, softcap, sinks, scale, needs, dropout=None
):
    heads, kv_heads = q.shape[1], k.shape[1]
    lse = lse.t()  # [Rq, H]
    whole = seq.kind == "packed"
    dq, dk, dv = (
        (torch.empty_like if whole else torch.zeros_like)(x, memory_format=torch.contiguous_format) for x in (q, k, v)
    )
    dprefix_k, dprefix_v = (torch.zeros_like(t) if need else None for t, need in zip((prefix_k, prefix_v), needs[3:]))
    blocks, readers = _schedule(seq, causal, prefix_k)
    for block in blocks:
        part_q, part_k, part_v = _flash_backward(
            block.read(grad),
            block.read(q),
            *_read_keys(block, k, v, heads),
            block.read(out),
            block.read_lse(lse),
            0.0,
            block.causal,
            attn_mask=_mask(block, q),
            scale=scale,
        )
        block.write(dq, part_q)
        for total, part in ((dk, part_k), (dv, part_v)):
            block.write(total, part.unflatten(1, (kv_heads, -1)).sum(2))
    for reader in readers:
        folded = [reader.fold(t, kv_heads) for t in (grad, q, out)]
        part_q, part_k, part_v = _flash_backward(
            folded[0],
            folded[1],
            reader.prefix(prefix_k, heads),
            reader.prefix(prefix_v, heads),
            folded[2],
            reader.fold(lse.unsqueeze(-1), kv_heads).squeeze(-1),
            0.0,
            False,
            scale=scale,
        )
        reader.add(dq, part_q.permute(2, 1, 0, 3).flatten(1, 2))
        for total, part in ((dprefix_k, part_k), (dprefix_v, part_v)):
            if total is not None:
                summed = part.sum(0, dtype=accumulator(part.dtype)).transpose(0, 1)
                total[reader.prefix_id, : reader.length] = summed.to(total.dtype)
    dsinks = None
    if sinks is not None:
        delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)  # [Rq, H]
        left_over = torch.exp(sinks.to(lse.dtype) - lse).masked_fill(lse == -torch.inf, 0.0)
        dsinks = -(left_over * delta).sum(0)
    return dq, dk, dv, dprefix_k, dprefix_v, dsinks


def _read_keys(block, k, v, heads):
    """Keys and values of a block, every key head repeated for the query heads of its group."""
    return (block.read(x).repeat_interleave(heads // x.shape[1], 1) for x in (k, v))


def _mask(block, q):
    return None if block.mask is None else block.mask.to(q.dtype)


class _Rows:
    """A set of rows in rising order, read and written without a copy where they stand together."""

    def __init__(self, rows):
        first, last = int(rows[0]), int(rows[-1])
        together = last - first + 1 == len(rows)
        self.slice = slice(first, last + 1) if together else None
        self.index = None if together else torch.from_numpy(rows)

    def read(self, x):
        rows = x.index_select(0, self.index) if self.slice is None else x[self.slice]
        return columns_together(rows)  # the kernel takes any other stride

    def write(self, x, values):
        if self.slice is None:
            x.index_copy_(0, self.index, values)
        else:
            x[self.slice] = values

    def add(self, x, values):
        if self.slice is None:
            x.index_add_(0, self.index, values)
        else:
            x[self.slice] += values


class _Run:
    """Sequences of one length that stand side by side, as a ``[b, L]`` batch: read and written in place."""

    mask = None

    def __init__(self, start, length, count, causal):
        self.length, self.causal = length, causal
        self.rows = _Rows(range(start, start + count * length))

    def read(self, x):
        """``[R, H, ...]`` -> ``[b, H, L, ...]``."""
        return self.rows.read(x).unflatten(0, (-1, self.length)).transpose(1, 2)

    def read_lse(self, lse):
        return self.read(lse)

    def write(self, x, values):
        """``[b, H, L, ...]`` into the rows of ``x [R, H, ...]``."""
        self.rows.write(x, values.transpose(1, 2).flatten(0, 1))


class _Tiles:
    """Short sequences, several in a tile one after the other, kept apart by a mask: a ``[tiles, width]`` batch.

    The rows left over at the end of a tile repeat its first row and are read by no one.
    """

    causal = False  # the mask says it all

    def __init__(self, starts, lengths, tile, width, causal):
        order = np.argsort(tile, kind="stable")
        starts, lengths, tile = starts[order], lengths[order], tile[order]
        ends = lengths.cumsum()
        first = np.flatnonzero(np.diff(tile, prepend=-1))  # sequence of each tile
        column = ends - lengths
        column -= column[first][tile]
        places, rows = _ranges(tile * width + column, lengths), _ranges(starts, lengths)
        source = np.repeat(starts[first], width)  # [tiles * width], the row in each place
        source[places] = rows
        owner = np.full(len(source), -1)
        owner[places] = np.repeat(np.arange(len(lengths)), lengths)

        self.width, self.source, owner = width, torch.from_numpy(source), torch.from_numpy(owner)
        in_tile = owner.view(-1, width)
        seen = in_tile[:, :, None] == in_tile[:, None, :]
        if causal:
            seen = seen.tril()
        self.mask = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, None]  # [tiles, 1, width, width]
        self.left_over = (owner < 0)[:, None]
        order = np.argsort(rows)
        self.rows, self.places = _Rows(rows[order]), torch.from_numpy(places[order])

    def read(self, x):
        """``[R, H, ...]`` -> ``[tiles, H, width, ...]``."""
        return x.index_select(0, self.source).unflatten(0, (-1, self.width)).transpose(1, 2)

    def read_lse(self, lse):
        """With an infinite lse a left-over row weighs nothing, so nothing of it reaches a gradient."""
        rows = lse.index_select(0, self.source).masked_fill_(self.left_over, torch.inf)
        return rows.unflatten(0, (-1, self.width)).transpose(1, 2)

    def write(self, x, values):
        """``[tiles, H, width, ...]`` into the rows of ``x [R, H, ...]``."""
        self.rows.write(x, values.transpose(1, 2).flatten(0, 1).index_select(0, self.places))


class _Reader(_Rows):
    """All rows that read one prefix, whichever sequence they belong to."""

    def __init__(self, prefix_id, length, rows):
        super().__init__(rows)
        self.prefix_id, self.length = prefix_id, length

    def fold(self, x, kv_heads):
        """``[R, H, Dh]`` -> ``[G, Hkv, Rn, Dh]``: a group's query heads become a batch that shares one key head."""
        return self.read(x).unflatten(1, (kv_heads, -1)).permute(2, 1, 0, 3)

    def prefix(self, bank, heads):
        """``[N, P, Hkv, Dh]`` -> ``[G, Hkv, P, Dh]``, a view."""
        keys = bank[self.prefix_id, : self.length].transpose(0, 1)  # [Hkv, P, Dh]
        keys = columns_together(keys)
        return keys.expand(heads // keys.shape[0], *keys.shape)


def _schedule(seq, causal, prefix_k):
    """Blocks of own keys and readers of prefixes; worked out once a batch, all layers share it."""
    room = None if prefix_k is None else prefix_k.shape[1]
    return seq.cached(
        ("composed", causal, room), lambda: (_blocks(seq, causal), [] if room is None else _readers(seq, room))
    )


def _blocks(seq, causal):
    """The longest sequences run by themselves, the others in tiles as wide as the longest of them.

    How many run by themselves is decided by counting pairs: tiles cost ``rows * width`` of them, a run its lengths
    squared, and each call ``_PAIRS_PER_CALL`` more.
    """
    host = seq.host
    order = np.lexsort((host.starts, -host.lengths))
    order = order[host.lengths[order] > 0]
    starts, lengths = host.starts[order], host.lengths[order]
    if not len(order):
        return []
    joined = (lengths[1:] == lengths[:-1]) & (starts[1:] == starts[:-1] + lengths[:-1])
    first = np.flatnonzero(np.append(True, ~joined))  # sequences of one length side by side are a group
    last = np.append(first[1:], len(order))
    length, count = lengths[first], last - first

    # The cost if the first 0, 1, ... groups run by themselves.
    alone = np.append(0, np.cumsum(count * length**2 + _PAIRS_PER_CALL))
    rows = np.append(np.cumsum((count * length)[::-1])[::-1], 0)
    tiles = rows * np.append(_width(length), 0) + _PAIRS_PER_CALL * (rows > 0)
    best = int((alone + tiles).argmin())
    runs = zip(starts[first[:best]].tolist(), length[:best].tolist(), count[:best].tolist())
    blocks = [_Run(*run, causal) for run in runs]
    if best < len(first):
        short = slice(first[best], None)
        width = int(_width(length[best]))
        blocks.append(_Tiles(starts[short], lengths[short], _fill(lengths[short], width), width, causal))
    return blocks


def _fill(lengths, width):
    """The tile of ``width`` rows that each sequence goes to, longest first: the first that has room.

    Sequences of one length are placed at once: they fill up one tile after the other.
    """
    tile, room = [], np.zeros(0, np.int64)
    for negative, count in zip(*np.unique(-lengths, return_counts=True)):
        length = -negative
        missing = max(0, count - (room // length).sum())
        room = np.append(room, np.full(-(-missing // (width // length)), width))
        fit = room // length
        taken = np.clip(count - (fit.cumsum() - fit), 0, fit)
        tile.append(np.repeat(np.arange(len(room)), taken))
        room -= taken * length
    return np.concatenate(tile)


def _readers(seq, room):
    host, prefix_lengths = seq.host, seq.prefix_lengths(room)
    order = np.lexsort((host.starts, host.prefix_ids))
    order = order[(host.lengths[order] > 0) & (prefix_lengths[order] > 0)]
    prefix, first = np.unique(host.prefix_ids[order], return_index=True)
    sequences = np.split(order, first[1:])  # of each prefix
    return [
        _Reader(i, int(prefix_lengths[some[0]]), _ranges(host.starts[some], host.lengths[some]))
        for i, some in zip(prefix.tolist(), sequences)
    ]


def _ranges(starts, lengths):
    """``[starts[i], starts[i] + lengths[i])`` for all i, one after the other."""
    before = lengths.cumsum() - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())


def _width(longest):
    """The width of tiles that hold sequences of these lengths."""
    return np.maximum(-(-longest // _STEP) * _STEP, _NARROWEST_TILE)
