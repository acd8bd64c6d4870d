"""prefix_attention on the CPU without the C++ library, composed of torch's own flash attention kernel.

Each query's softmax is split in two: over its prefix and over its own keys. The batch is folded into the query axis of
the first, so a prefix is read once however many sequences share it. In the second, long sequences run alone and short
ones share tiles, several in one, kept apart by a mask. The halves are merged by their log-sum-exp.

The backward of each half is torch's flash backward given the *merged* out and lse: p = exp(score - lse) and
dscore = p (dout v^T - rowsum(dout out)) hold for any part of the keys, once lse and out are those of the whole.
Autograd through two flash calls would be wrong, it takes lse for a constant.
"""

import torch

from ...checks import accumulator
from ..columns import columns_together

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# A tile computes all pairs of its rows and a further kernel call costs time as well. They cost the same at about this
# many query-key pairs (measured: 9 heads of 64, two Zen 3 cores).
_PAIRS_PER_CALL = 2000
_NARROWEST_TILE, _STEP = 32, 16  # thinner or odd matrix products are slow


def unsupported(q, seq, prefix_length, window, softcap, dropout_p):
    """None if this backend can run the call, else the reason why not."""
    if q.device.type != "cpu":
        return f"q is on {q.device}"
    if softcap is not None:
        return "torch's CPU flash attention has no softcap"
    if dropout_p > 0:
        return "torch's CPU flash attention takes no dropout mask"
    if seq.kind == "decode":
        return "decode runs on the reference"
    if window is not None and window < seq.span(prefix_length):
        return f"torch's CPU flash attention has no sliding window, and {window} is shorter than the longest sequence"
    return None


def forward(q, k, v, prefix_k, prefix_v, seq, *, causal, window, softcap, sinks, scale, dropout=None):
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


def backward(
    grad, q, k, v, prefix_k, prefix_v, out, lse, seq, *, causal, window, softcap, sinks, scale, needs, dropout=None
):
    heads, kv_heads = q.shape[1], k.shape[1]
    lse = lse.t()  # [Rq, H]
    whole = seq.kind == "packed"
    dq, dk, dv = (
        (torch.empty_like if whole else torch.zeros_like)(x, memory_format=torch.contiguous_format) for x in (q, k, v)
    )
    dprefix_k, dprefix_v = (None if t is None else torch.zeros_like(t) for t in (prefix_k, prefix_v))
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
            total[reader.prefix_id, : reader.length] = (
                part.sum(0, dtype=accumulator(part.dtype)).transpose(0, 1).to(total.dtype)
            )
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
        together = rows[-1] - rows[0] + 1 == len(rows)
        self.slice = slice(rows[0], rows[-1] + 1) if together else None
        self.index = None if together else torch.tensor(rows)

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

    def __init__(self, sequences, causal):
        (start, self.length), self.causal = sequences[0], causal
        self.rows = _Rows(range(start, start + len(sequences) * self.length))

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

    def __init__(self, tiles, width, causal):
        self.width = width
        source = torch.tensor([[tile[0][0]] * width for tile in tiles])  # [tiles, width], the row in each place
        owner = torch.full_like(source, -1)
        for i, tile in enumerate(tiles):
            column = 0
            for number, (start, length) in enumerate(tile):
                source[i, column : column + length] = torch.arange(start, start + length)
                owner[i, column : column + length] = number
                column += length
        seen = owner[:, :, None] == owner[:, None, :]
        if causal:
            seen = seen.tril()
        self.mask = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, None]  # [tiles, 1, width, width]
        self.source, self.left_over = source.flatten(), (owner < 0).flatten()[:, None]
        places = (owner >= 0).flatten().nonzero()[:, 0]
        rows, order = self.source[places].sort()
        self.rows, self.places = _Rows(rows.tolist()), places[order]

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
        super().__init__(sorted(rows))
        self.prefix_id, self.length = prefix_id, length

    def fold(self, x, kv_heads):
        """``[R, H, Dh]`` -> ``[G, Hkv, Rn, Dh]``: the heads of a group become a batch that shares one key head."""
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
    groups = []  # sequences of one length, side by side
    for start, length in sorted((s, n) for s, n, _, _ in seq.host if n):
        if groups and groups[-1][-1] == (start - length, length):
            groups[-1].append((start, length))
        else:
            groups.append([(start, length)])
    groups.sort(key=lambda group: -group[0][1])
    rows = sum(len(group) * group[0][1] for group in groups)
    best, alone, spent = torch.inf, 0, 0
    for i, group in enumerate([*groups, [(0, 0)]]):  # the first i groups by themselves
        width = _width(group[0][1])
        cost = spent + (rows * width + _PAIRS_PER_CALL if rows else 0)
        if cost < best:
            best, alone = cost, i
        spent += len(group) * group[0][1] ** 2 + _PAIRS_PER_CALL
        rows -= len(group) * group[0][1]
    blocks = [_Run(group, causal) for group in groups[:alone]]
    if short := [sequence for group in groups[alone:] for sequence in group]:
        width = _width(short[0][1])
        blocks.append(_Tiles(_fill(short, width), width, causal))
    return blocks


def _fill(sequences, width):
    """Sequences, longest first, into tiles of ``width`` rows: each into the first that has room."""
    tiles, room = [], []
    for sequence in sequences:
        i = next((i for i, free in enumerate(room) if free >= sequence[1]), len(tiles))
        if i == len(tiles):
            tiles.append([])
            room.append(width)
        tiles[i].append(sequence)
        room[i] -= sequence[1]
    return tiles


def _readers(seq, room):
    rows = {}
    for start, length, prefix_id, _ in seq.host:
        if length and seq.prefix_length(prefix_id, room):
            rows.setdefault(prefix_id, []).extend(range(start, start + length))
    return [_Reader(i, seq.prefix_length(i, room), found) for i, found in sorted(rows.items())]


def _width(longest):
    """The width of a tile that holds a sequence of this length."""
    return max(-(-longest // _STEP) * _STEP, _NARROWEST_TILE)
