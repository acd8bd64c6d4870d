"""prefix_attention on a GPU: launches the kernels of ``fastprompt.kernels.prefix_attention``."""

import numpy as np
import torch

from ...kernels import launch
from ...kernels.prefix_attention import config, schedule
from ...kernels.prefix_attention.backward import backward as backward_kernel
from ...kernels.prefix_attention.backward import reduce as reduce_kernel
from ...kernels.prefix_attention.decode import decode as decode_kernel
from ...kernels.prefix_attention.decode import merge as merge_kernel
from ...kernels.prefix_attention.forward import forward as forward_kernel


def forward(q, k, v, prefix_k, prefix_v, seq, *, causal, window, softcap, sinks, scale, dropout=None):
    call = _Call(q, k, v, prefix_k, prefix_v, seq, causal, window, softcap, scale, dropout)
    out, lse = call.new_outputs()
    sinks = None if sinks is None else sinks.contiguous()
    if seq.kind == "decode":
        call.decode(out, lse, sinks)
    else:
        call.forward(out, lse, sinks)
    return out, lse


def backward(
    grad, q, k, v, prefix_k, prefix_v, out, lse, seq, *, causal, window, softcap, sinks, scale, dropout=None,
    needs=(True,) * 6,
):  # fmt: skip
    """Gradients of q, k, v, prefix_k, prefix_v, sinks, of those that ``needs`` names (the others may be None)."""
    call = _Call(q, k, v, prefix_k, prefix_v, seq, causal, window, softcap, scale, dropout)
    dq, dk, dv, dprefix_k, dprefix_v = call.backward(grad, out, lse, needs)
    if prefix_k is not None and dprefix_k is None and (needs[3] or needs[4]):  # a bank of prefixes without keys
        dprefix_k, dprefix_v = torch.zeros_like(prefix_k), torch.zeros_like(prefix_v)
    dsinks = None
    if sinks is not None and needs[5]:
        delta = (grad.float() * out.float()).sum(-1).double()  # [Rq, H]; what is summed over all rows mostly cancels
        left_over = torch.exp(sinks.double() - lse.t()).masked_fill(lse.t() == -torch.inf, 0.0)
        dsinks = -(left_over * delta).sum(0)
    return dq, dk, dv, dprefix_k, dprefix_v, dsinks


def _in_wide_loads(x):
    """``x [..., Dh]`` itself, or a copy where its rows could consist of 16-byte loads and do not start where these
    must: the copy costs less than loads of single elements. None stays None."""
    if x is None:
        return None
    misplaced = x.data_ptr() % launch.ALIGNMENT or any(stride % launch.DIVISOR for stride in x.stride()[:-1])
    if x.stride(-1) != 1 or misplaced and x.shape[-1] % launch.DIVISOR == 0:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _dropout_arguments(dropout):
    """The halves of the key and the threshold as int32, and the scale; kernels without dropout lack these arguments."""
    if dropout is None:
        return None, None, None, None
    words = dropout.key, dropout.key >> 32, dropout.threshold
    return *((word + 2**31) % 2**32 - 2**31 for word in words), dropout.scale


class _Call:
    """The inputs of one call and the constants that all its kernels share."""

    def __init__(self, q, k, v, prefix_k, prefix_v, seq, causal, window, softcap, scale, dropout):
        if prefix_k is not None and prefix_k.shape[1] == 0:
            prefix_k = prefix_v = None
        self.q, self.k, self.v, self.prefix_k, self.prefix_v = map(_in_wide_loads, (q, k, v, prefix_k, prefix_v))
        self.seq, self.cache = seq, seq.kind == "decode"
        self.rows, self.heads, self.head_dim = q.shape
        self.kv_heads, self.group = k.shape[1], q.shape[1] // k.shape[1]
        self.room = k.shape[2] if self.cache else 0
        self.dropout = dropout is not None
        self.width = config.block_width(self.head_dim)
        self.tiled_by = self.head_dim, q.element_size(), launch.target_of(q.device), launch.name_of(q.device)
        self.prefix_room = 0 if prefix_k is None else prefix_k.shape[1]
        self.schedule = _Schedule.of(seq, self.prefix_room, self.room, causal, window, q.device)
        self.numbers = (
            self.schedule.batch.queries, self.room, window or 0, scale, softcap or 0.0, *_dropout_arguments(dropout),
        )  # fmt: skip
        self.constants = dict(
            GROUP=self.group, DH=self.head_dim, BD=self.width, CAUSAL=causal, WINDOW=window is not None,
            SOFTCAP=softcap is not None, GATHER=not self.schedule.batch.in_order,
            UPCAST=launch.INTERPRETED and q.dtype == torch.bfloat16,
        )  # fmt: skip
        stride_k, stride_v = (
            x.stride()[:-1] if self.cache else (0, x.stride(0), x.stride(1)) for x in (self.k, self.v)
        )
        if self.cache:  # [B, Hkv, Lmax, Dh] -> batch, place, head
            stride_k, stride_v = ((b, place, head) for b, head, place in (stride_k, stride_v))
        prefix = (0,) * 6 if prefix_k is None else (*self.prefix_k.stride()[:-1], *self.prefix_v.stride()[:-1])
        self.strides = *self.q.stride()[:-1], *stride_k, *stride_v, *prefix

    def new_outputs(self):
        """``out`` and ``lse``: rows outside every sequence are written here, all others by a kernel."""
        whole = self.schedule.batch.queries == self.rows
        out = (torch.empty if whole else torch.zeros)(self.q.shape, dtype=self.q.dtype, device=self.q.device)
        if whole:
            return out, self.q.new_empty(self.heads, self.rows, dtype=torch.float32)
        return out, self.q.new_full((self.heads, self.rows), -torch.inf, dtype=torch.float32)

    def forward(self, out, lse, sinks):
        tiles = config.forward_tiles(*self.tiled_by, group=self.group, gather=self.constants["GATHER"])
        fold = config.fold(self.group, tiles.queries)
        table = self.schedule.query_tiles(tiles.queries // fold)
        forward_kernel(
            (len(table), self.heads // fold), tiles.options, self.q, self.k, self.v, self.prefix_k, self.prefix_v,
            sinks, out, lse, table, *self.schedule.tensors, *self.numbers, *self.strides, lse.stride(0), out.stride(0),
            **self.constants, FOLD=fold, BM=tiles.queries, BN=tiles.keys, CACHE=False,
        )  # fmt: skip

    def decode(self, out, lse, sinks):
        batch = self.schedule.batch
        fold = config.fold(self.group, config.DECODE_ROWS)
        groups = batch.groups
        sharing = int((groups.last - groups.first)[groups.prefix >= 0].max(initial=1))
        tiles = config.decode_tiles(*self.tiled_by, fold=fold, sharing=sharing)
        split = config.decode_split(batch.keys, self.heads // fold)
        items, parts, total = self.schedule.decode_items(tiles.queries // fold, split)
        part_out = self.q.new_empty(total, self.heads, self.head_dim, dtype=torch.float32)
        part_lse = self.q.new_empty(total, self.heads, dtype=torch.float32)
        decode_kernel(
            (len(items), self.heads // fold), tiles.options, self.q, self.k, self.v, self.prefix_k, self.prefix_v,
            part_out, part_lse, items, parts, *self.schedule.tensors, *self.numbers, self.heads, *self.strides,
            **self.constants, FOLD=fold, BM=tiles.queries, BN=tiles.keys,
        )  # fmt: skip
        merge_kernel(
            (batch.queries, self.heads), launch.Options(num_warps=1, num_stages=2), part_out, part_lse, sinks, out, lse,
            parts, self.schedule.tensors[0], self.heads, lse.stride(0), out.stride(0),
            DH=self.head_dim, BD=self.width, GATHER=self.constants["GATHER"],
        )  # fmt: skip

    def backward(self, grad, out, lse, needs):
        q, k, kv_heads = self.q, self.k, self.kv_heads
        need_q, need_kv, need_prefix = (
            needs[0],
            needs[1] or needs[2],
            self.prefix_k is not None and (needs[3] or needs[4]),
        )
        grad, out, lse = _in_wide_loads(grad), out.contiguous(), lse.contiguous()
        tiles = config.backward_tiles(*self.tiled_by, group=self.group, dropout=self.dropout)
        fold = config.fold(self.group, tiles.queries, tiles.key_queries)
        chunk = config.chunk_rows(self.prefix_room, tiles.queries, tiles.queries // fold)
        items, slots, count = self.schedule.backward_items(
            query_rows=tiles.queries // fold, key_block=tiles.key_keys, chunk_rows=chunk,
            dq=need_q, dkv=need_kv, dprefix=need_prefix, prefixes=0 if self.prefix_k is None else len(self.prefix_k),
        )  # fmt: skip
        whole = self.schedule.batch.queries == self.rows and not self.cache
        new = torch.empty if whole else torch.zeros
        dq = new(q.shape, dtype=q.dtype, device=q.device) if need_q else None
        dk, dv = (new(k.shape, dtype=k.dtype, device=k.device) if need_kv else None for _ in range(2))
        partial_k, partial_v = (
            q.new_empty(count, tiles.key_keys, kv_heads, self.head_dim, dtype=torch.float32) if need_prefix else None
            for _ in range(2)
        )
        stride_dk = (kv_heads * self.head_dim, self.head_dim)  # row, head
        if self.cache:
            stride_dk = self.head_dim, self.room * self.head_dim
        backward_kernel(
            (len(items), self.heads // fold), tiles.options, q, k, self.v, self.prefix_k, self.prefix_v, out, grad, lse,
            dq, dk, dv, partial_k, partial_v, items, *self.schedule.tensors, *self.numbers, kv_heads, *self.strides,
            lse.stride(0), out.stride(0), *grad.stride()[:-1], kv_heads * self.room * self.head_dim, *stride_dk,
            **self.constants, FOLD=fold, BM=tiles.queries, BN=tiles.keys, KEYS_BM=tiles.key_queries,
            KEYS_BN=tiles.key_keys, CACHE=self.cache,
        )  # fmt: skip
        dprefix_k = dprefix_v = None
        if need_prefix:
            dprefix_k, dprefix_v = (q.new_empty(self.prefix_k.shape) for _ in range(2))
            rows = 16
            reduce_kernel(
                (len(self.prefix_k) * -(-self.prefix_room // rows), kv_heads), launch.Options(num_warps=4),
                partial_k, partial_v, dprefix_k, dprefix_v, slots, self.prefix_room, kv_heads,
                -(-self.prefix_room // tiles.key_keys),
                DH=self.head_dim, BD=self.width, KEYS_BN=tiles.key_keys, ROWS=rows,
            )  # fmt: skip
        return dq, dk, dv, dprefix_k, dprefix_v


class _Schedule:
    """The tables of one batch on its device, made when first asked for; all layers share them through ``seq``."""

    def __init__(self, batch, prefix_room, device, cache):
        self.batch, self.prefix_room, self.device, self._tables = batch, prefix_room, device, {}
        query_rows = None if batch.in_order else batch.query_rows
        key_rows = batch.key_rows if cache else query_rows
        self.tensors = self._put(query_rows, key_rows, batch.spans)

    @classmethod
    def of(cls, seq, prefix_room, room, causal, window, device):
        def make():
            decode, table, lengths = seq.kind == "decode", np.stack(seq.host[:4], 1), seq.prefix_lengths(prefix_room)
            batch = schedule.make_batch(table, lengths, decode=decode, room=room, causal=causal, window=window)
            return cls(batch, prefix_room, device, decode)

        return seq.cached(("triton", prefix_room, room, causal, window, device), make)

    def query_tiles(self, rows):
        return self._cached(("tiles", rows), lambda: ([schedule.query_tiles(self.batch, rows)], None))[0]

    def backward_items(self, *, prefixes, **options):
        """Items, slots, and how many slots there are."""

        def make():
            items, slots, count = schedule.backward_items(self.batch, **options)
            return [items, schedule.slot_table(slots, prefixes, self.prefix_room, options["key_block"])], count

        return self._cached(("backward", prefixes, *options.values()), make)

    def decode_items(self, rows, split):
        """Items, the first part of each query, and how many parts there are."""

        def make():
            items, parts = schedule.decode_items(self.batch, rows=rows, prefix_split=split, own_split=split)
            return [items, parts], int(parts[-1])

        return self._cached(("decode", rows, split), make)

    def _cached(self, key, make):
        if key not in self._tables:
            arrays, number = make()
            self._tables[key] = *self._put(*arrays), number
        return self._tables[key]

    def _put(self, *arrays):
        """int32 tensors on the device, by one copy; None stays None."""
        places = [0]
        for array in arrays:
            places.append(places[-1] + (0 if array is None else -(-array.size // 32) * 32))  # each starts aligned
        host = torch.zeros(places[-1], dtype=torch.int32, pin_memory=self.device.type == "cuda")
        for array, place in zip(arrays, places):
            if array is not None:
                host[place : place + array.size] = torch.from_numpy(array.reshape(-1))
        whole = host.to(self.device, non_blocking=True)
        return [
            None if array is None else whole[place : place + array.size].view(array.shape)
            for array, place in zip(arrays, places)
        ]
