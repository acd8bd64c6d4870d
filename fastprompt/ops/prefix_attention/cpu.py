"""prefix_attention on the CPU, composed of torch's own flash attention kernel.

Each query's softmax is split in two: over its prefix and over its own keys. The batch is folded into the query axis of
the first, so a prefix is read once however many sequences share it; sequences of similar length run together in the
second. The halves are merged by their log-sum-exp. The backward of each half is torch's flash backward given the
*merged* out and lse, which is exact: see DESIGN section 4.2, and note that autograd through two flash calls is not.
"""

import torch

from ...checks import accumulator

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Padding a sequence to a longer one costs arithmetic, a further bucket costs a few kernel calls. They cost the same
# at about this many query-key pairs (measured: 9 heads of 64, two Zen 3 cores, 150 us a bucket).
_PAIRS_PER_BUCKET = 2000


def unsupported(q, seq, prefix_length, causal, window, softcap):
    """None if this backend can run the call, else the reason why not."""
    if q.device.type != "cpu":
        return f"q is on {q.device}"
    if softcap is not None:
        return "torch's CPU flash attention has no softcap"
    if seq.kind == "decode":
        return "decode runs on the reference"
    if window is not None and window < seq.span(prefix_length):
        return f"torch's CPU flash attention has no sliding window, and {window} is shorter than the longest sequence"
    return None


def forward(q, k, v, prefix_k, prefix_v, seq, *, causal, sinks, scale):
    heads, kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full((q.shape[0], heads), -torch.inf, dtype=accumulator(q.dtype))
    buckets, readers = _schedule(seq, causal, prefix_k)
    for bucket in buckets:
        part, part_lse = _flash(bucket.pad(q), bucket.pad_keys(k, heads), bucket.pad_keys(v, heads), 0.0, causal, scale=scale)
        bucket.write(out, bucket.unpad(part))
        bucket.write(lse, bucket.unpad(part_lse.unsqueeze(-1)).squeeze(-1))
    for reader in readers:
        part, part_lse = _flash(reader.fold(q, kv_heads), reader.prefix(prefix_k, heads), reader.prefix(prefix_v, heads), 0.0, False, scale=scale)
        part = part.permute(2, 1, 0, 3).reshape(-1, heads, head_dim)  # [Rn, H, Dh]
        part_lse = part_lse.permute(2, 1, 0).reshape(-1, heads)  # [Rn, H]
        own, own_lse = reader.read(out), reader.read(lse)
        merged = torch.logaddexp(own_lse, part_lse)
        weight, own_weight = torch.exp(part_lse - merged), torch.exp(own_lse - merged)
        merged_out = torch.addcmul(own * own_weight[..., None], part, weight[..., None])
        reader.write(out, merged_out.to(out.dtype))
        reader.write(lse, merged)
    if sinks is not None:
        total = torch.logaddexp(lse, sinks.to(lse.dtype))
        out = (out * torch.exp(lse - total)[..., None]).to(out.dtype)
        lse = torch.where(lse == -torch.inf, lse, total)  # rows outside every sequence stay as they are
    return out, lse.t()


def backward(grad, q, k, v, prefix_k, prefix_v, out, lse, seq, *, causal, sinks, scale):
    heads, kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    groups = heads // kv_heads
    lse = lse.t()  # [Rq, H]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dprefix_k, dprefix_v = (None if t is None else torch.zeros_like(t) for t in (prefix_k, prefix_v))
    buckets, readers = _schedule(seq, causal, prefix_k)
    for bucket in buckets:
        part_q, part_k, part_v = _flash_backward(
            bucket.pad(grad), bucket.pad(q), bucket.pad_keys(k, heads), bucket.pad_keys(v, heads),
            bucket.pad(out), bucket.pad(lse.unsqueeze(-1)).squeeze(-1), 0.0, causal, scale=scale)
        bucket.write(dq, bucket.unpad(part_q))
        for total, part in ((dk, part_k), (dv, part_v)):
            bucket.write(total, bucket.unpad(part).view(-1, kv_heads, groups, head_dim).sum(2))
    for reader in readers:
        folded = [reader.fold(t, kv_heads) for t in (grad, q, out)]
        part_q, part_k, part_v = _flash_backward(
            folded[0], folded[1], reader.prefix(prefix_k, heads), reader.prefix(prefix_v, heads), folded[2],
            reader.fold(lse.unsqueeze(-1), kv_heads).squeeze(-1), 0.0, False, scale=scale)
        reader.add(dq, part_q.permute(2, 1, 0, 3).reshape(-1, heads, head_dim))
        for total, part in ((dprefix_k, part_k), (dprefix_v, part_v)):
            total[reader.prefix_id, : reader.length] = part.sum(0, dtype=accumulator(part.dtype)).transpose(0, 1).to(total.dtype)
    dsinks = None
    if sinks is not None:
        delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)  # [Rq, H]
        left_over = torch.exp(sinks.to(lse.dtype) - lse).masked_fill(lse == -torch.inf, 0.0)
        dsinks = -(left_over * delta).sum(0)
    return dq, dk, dv, dprefix_k, dprefix_v, dsinks


class _Rows:
    """A set of rows, read and written without a copy where they stand together."""

    def __init__(self, rows):
        together = not rows or rows[-1] - rows[0] + 1 == len(rows)  # rows are given in rising order
        self.slice = slice(rows[0], rows[-1] + 1) if rows and together else None
        self.index = None if self.slice is not None else torch.tensor(rows, dtype=torch.int64)

    def read(self, x):
        return x[self.slice] if self.slice is not None else x.index_select(0, self.index)

    def write(self, x, values):
        if self.slice is not None:
            x[self.slice] = values
        else:
            x.index_copy_(0, self.index, values)

    def add(self, x, values):
        if self.slice is not None:
            x[self.slice] += values
        else:
            x.index_add_(0, self.index, values)


class _Bucket(_Rows):
    """Sequences of similar length that run as one ``[b, L]`` batch; a causal mask hides the padding behind each."""

    def __init__(self, sequences):
        super().__init__([row for start, length in sequences for row in range(start, start + length)])
        self.count, self.longest = len(sequences), max(length for _, length in sequences)
        self.slots = None  # where each row stands in the padded batch; None: everywhere, in order
        if any(length != self.longest for _, length in sequences):
            self.slots = torch.tensor([i * self.longest + j for i, (_, n) in enumerate(sequences) for j in range(n)])

    def pad(self, x):
        """``[R, H, Dh]`` -> ``[b, H, L, Dh]``, zeros behind the end of a sequence."""
        rows = self.read(x)
        if self.slots is not None:
            rows = rows.new_zeros(self.count * self.longest, *rows.shape[1:]).index_copy_(0, self.slots, rows)
        elif not rows.stride(-1) == 1:
            rows = rows.contiguous()
        return rows.unflatten(0, (self.count, self.longest)).transpose(1, 2)

    def pad_keys(self, x, heads):
        """As :meth:`pad`, every key head repeated for the query heads of its group."""
        return self.pad(x).repeat_interleave(heads // x.shape[1], 1)

    def unpad(self, x):
        """``[b, H, L, ...]`` -> ``[rows, H, ...]``."""
        rows = x.transpose(1, 2).reshape(self.count * self.longest, x.shape[1], *x.shape[3:])
        return rows if self.slots is None else rows.index_select(0, self.slots)


class _Reader(_Rows):
    """All rows that read one prefix, whichever sequence they belong to."""

    def __init__(self, prefix_id, length, rows):
        super().__init__(sorted(rows))
        self.prefix_id, self.length = prefix_id, length

    def fold(self, x, kv_heads):
        """``[R, H, Dh]`` -> ``[G, Hkv, Rn, Dh]``: the query heads of a group become a batch that shares one key head."""
        rows = self.read(x)
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        return rows.unflatten(1, (kv_heads, -1)).permute(2, 1, 0, 3)

    def prefix(self, bank, heads):
        """``[N, P, Hkv, Dh]`` -> ``[G, Hkv, P, Dh]``, a view."""
        keys = bank[self.prefix_id, : self.length].transpose(0, 1)  # [Hkv, P, Dh]
        keys = keys if keys.stride(-1) == 1 else keys.contiguous()
        return keys.expand(heads // keys.shape[0], *keys.shape)


def _schedule(seq, causal, prefix_k):
    """Buckets of sequences and readers of prefixes; worked out once a batch, all layers share it."""
    room = None if prefix_k is None else prefix_k.shape[1]
    cache = seq.__dict__.setdefault("_cpu_schedules", {})
    if (causal, room) not in cache:
        cache[causal, room] = _buckets(seq, causal), [] if room is None else _readers(seq, room)
    return cache[causal, room]


def _buckets(seq, causal):
    buckets, current, waste = [], [], 0
    for start, length in sorted(((s, n) for s, n, _, _ in seq.host if n), key=lambda x: (-x[1], x[0])):
        longest = current[0][1] if current else length
        waste += longest**2 - length**2
        # Without a causal mask nothing would hide the padding, so there only equal lengths share a bucket.
        if current and (waste > _PAIRS_PER_BUCKET if causal else length != longest):
            buckets.append(current)
            current, waste = [], 0
        current.append((start, length))
    if current:
        buckets.append(current)
    return [_Bucket(sorted(bucket)) for bucket in buckets]


def _readers(seq, room):
    rows = {}
    for start, length, prefix_id, _ in seq.host:
        if length and seq.prefix_length(prefix_id, room):
            rows.setdefault(prefix_id, []).extend(range(start, start + length))
    return [_Reader(i, seq.prefix_length(i, room), found) for i, found in sorted(rows.items())]
