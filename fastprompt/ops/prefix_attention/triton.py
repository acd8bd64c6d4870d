"""prefix_attention on a GPU: launches the kernels of ``fastprompt.kernels.prefix_attention``."""

import numpy as np
import torch

from ...kernels import launch
from ...kernels.prefix_attention import arguments, config, schedule
from ...kernels.prefix_attention.backward import add_up
from ...kernels.prefix_attention.backward import backward as backward_kernel
from ...kernels.prefix_attention.backward import reduce as reduce_kernel
from ...kernels.prefix_attention.decode import decode as decode_kernel
from ...kernels.prefix_attention.decode import merge as merge_kernel
from ...kernels.prefix_attention.forward import forward as forward_kernel
from .packed_tables import ROWS, Packed, chain_tables, put
from .packed_tables import pack as pack
from .packed_tables import unpack as unpack


def forward(q, k, v, prefix_k, prefix_v, seq, *, causal, window, softcap, sinks, scale, dropout=None, **features):
    """``out`` and ``lse``; ``features``: alibi_slopes, position_bias, key_seq."""
    call = _Call(q, k, v, prefix_k, prefix_v, seq, causal, window, softcap, scale, dropout, **features)
    out, lse = call.new_outputs()
    sinks = None if sinks is None else sinks.contiguous()
    if seq.kind == "decode":
        call.decode(out, lse, sinks)
    else:
        call.forward(out, lse, sinks)
    return out, lse


def backward(
    grad, q, k, v, prefix_k, prefix_v, out, lse, seq, *, causal, window, softcap, sinks, scale, dropout=None,
    needs=(True,) * 6, **features,
):  # fmt: skip
    """Gradients of q, k, v, prefix_k, prefix_v, sinks, of those that ``needs`` names (the others may be None)."""
    call = _Call(q, k, v, prefix_k, prefix_v, seq, causal, window, softcap, scale, dropout, **features)
    dq, dk, dv, dprefix_k, dprefix_v = call.backward(grad, out, lse, needs)
    if prefix_k is not None and dprefix_k is None and (needs[3] or needs[4]):  # a bank of prefixes without keys
        dprefix_k, dprefix_v = torch.zeros_like(prefix_k), torch.zeros_like(prefix_v)
    if dprefix_k is not None:
        dprefix_k, dprefix_v = dprefix_k.view(prefix_k.shape), dprefix_v.view(prefix_v.shape)
    dsinks = None
    if sinks is not None and needs[5]:
        delta = (grad.float() * out.float()).sum(-1).double()  # [Rq, H]; what is summed over all rows mostly cancels
        left_over = torch.exp(sinks.double() - lse.t()).masked_fill(lse.t() == -torch.inf, 0.0)
        dsinks = -(left_over * delta).sum(0)
    return dq, dk, dv, dprefix_k, dprefix_v, dsinks


def _in_wide_loads(x):
    """``x [..., width]`` itself, or a copy where its rows could consist of 16-byte loads and do not start where these
    must: the copy costs less than loads of single elements. None stays None."""
    if x is None:
        return None
    misplaced = x.data_ptr() % launch.ALIGNMENT or any(stride % launch.DIVISOR for stride in x.stride()[:-1])
    if x.stride(-1) != 1 or misplaced and x.shape[-1] % launch.DIVISOR == 0:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _new_like(x, written):
    """Memory for a gradient, zero unless a kernel writes all of it."""
    return (torch.empty if written else torch.zeros)(x.shape, dtype=x.dtype, device=x.device)


def _dropout_arguments(dropout):
    """The halves of the seed and the threshold as int32."""
    if dropout is None:
        return None
    words = dropout.key, dropout.key >> 32, dropout.threshold
    return arguments.Dropout(*((word + 2**31) % 2**32 - 2**31 for word in words), dropout.scale)


def _keys(k, v, cache=False):
    """Keys and values of rows ``[Rk, Hkv, n]``, of a cache ``[B, Hkv, Lmax, n]``, of prefixes ``[N, P, Hkv, n]``."""
    strides = []
    for x in (k, v):
        batch, row, head = x.stride()[:-1] if x.dim() == 4 else (0, *x.stride()[:-1])
        strides += [batch, head, row] if cache else [batch, row, head]
    return arguments.Keys(k, v, *strides)


def _output(out, lse):
    return arguments.Output(out, lse, out.stride(0), lse.stride(0))


class _Call:
    """The inputs of one call and the constants that all its kernels share."""

    def __init__(
        self, q, k, v, prefix_k, prefix_v, seq, causal, window, softcap, scale, dropout,
        alibi_slopes=None, position_bias=None, key_seq=None,
    ):  # fmt: skip
        learned = 0 if prefix_k is None else prefix_k.shape[1]
        self.prefix_room = seq.room(learned)
        if learned == 0 or self.prefix_room == 0:
            prefix_k = prefix_v = None
        chained = seq.chains is not None and self.prefix_room > 0
        self.prefixes = len(seq.chains) if chained else 0 if prefix_k is None else len(prefix_k)
        if chained and prefix_k is not None:
            prefix_k, prefix_v = prefix_k.flatten(0, 1), prefix_v.flatten(0, 1)
        self.q, self.k, self.v, self.prefix_k, self.prefix_v = map(_in_wide_loads, (q, k, v, prefix_k, prefix_v))
        self.seq, self.cache = seq, seq.kind == "decode"
        self.rows, self.heads, self.head_dim = q.shape
        self.value_dim = v.shape[-1]
        self.kv_heads, self.group = k.shape[1], q.shape[1] // k.shape[1]
        self.room = k.shape[2] if self.cache else 0
        device = launch.target_of(q.device), launch.name_of(q.device)
        self._tiled_by = self.head_dim, q.element_size(), *device
        self.biases = dict(alibi=alibi_slopes is not None, bias=position_bias is not None)
        if isinstance(seq, Packed):
            self.schedule = seq.tables(self)
        else:
            self.schedule = _Schedule.of(seq, self.prefix_room, self.room, causal, window, q.device, key_seq)

        self.queries = arguments.Queries(self.q, *self.q.stride()[:-1])
        self.own = _keys(self.k, self.v, self.cache)
        self.prefix = None if prefix_k is None else _keys(self.prefix_k, self.prefix_v)
        chains, self.pieces = self.schedule.chains(seq, learned) if chained else ((), None)
        self.batch = arguments.Batch(*self.schedule.tensors, self.schedule.queries, self.room, *chains)
        slopes, bias = (None if x is None else x.contiguous() for x in (alibi_slopes, position_bias))
        most = 0 if bias is None else bias.shape[1] // 2
        self.scores = arguments.Scores(scale, softcap or 0.0, window or 0, slopes, bias, most)
        self.dropout = _dropout_arguments(dropout)
        self.flags = dict(
            CAUSAL=causal, WINDOW=window is not None, SOFTCAP=softcap is not None,
            GATHER=not self.schedule.in_order, CACHE=self.cache, PAGES=seq.pages is not None,
            UPCAST=launch.INTERPRETED and q.dtype == torch.bfloat16,
        )  # fmt: skip

    def static(self, fold):
        return arguments.Static(*self.widths, self.group, fold, **self.flags)

    def _tiles(self, rule, **options):
        return rule(*self._tiled_by, value_dim=self.value_dim, **options)

    @property
    def widths(self):
        """Of keys and of values, each with that of its block."""
        return tuple(n for width in (self.head_dim, self.value_dim) for n in (width, config.block_width(width)))

    def new_outputs(self):
        """``out`` and ``lse``: rows outside every sequence are written here, all others by a kernel."""
        whole = self.schedule.writes_all_of(self.rows)
        shape = self.rows, self.heads, self.value_dim
        out = (torch.empty if whole else torch.zeros)(shape, dtype=self.q.dtype, device=self.q.device)
        if whole:
            return out, self.q.new_empty(self.heads, self.rows, dtype=torch.float32)
        return out, self.q.new_full((self.heads, self.rows), -torch.inf, dtype=torch.float32)

    def forward(self, out, lse, sinks):
        gathers = self.flags["GATHER"] or self.pieces is not None
        options = dict(group=self.group, gather=gathers, **self.biases)
        tiles = self._tiles(config.forward_tiles, **options)
        fold = config.fold(self.group, tiles.queries)
        table = self.schedule.query_tiles(tiles.queries // fold)
        forward_kernel(
            (len(table), self.heads // fold), tiles.options, self.queries, self.own, self.prefix, sinks,
            _output(out, lse), table, self.batch, self.scores, self.dropout,
            BM=tiles.queries, BN=tiles.keys, static=self.static(fold),
        )  # fmt: skip

    def decode(self, out, lse, sinks):
        batch = self.schedule.batch
        fold = config.fold(self.group, config.DECODE_ROWS)
        groups = batch.groups
        sharing = int((groups.last - groups.first)[groups.prefix >= 0].max(initial=1))
        sharing = max(sharing, int(self.seq.host.queries.max(initial=1)))
        tiles = self._tiles(config.decode_tiles, fold=fold, sharing=sharing)
        split = config.decode_split(batch.keys, self.heads // fold)
        items, parts, total = self.schedule.decode_items(tiles.queries // fold, split)
        part_out = self.q.new_empty(total, self.heads, self.value_dim, dtype=torch.float32)
        part_lse = self.q.new_empty(total, self.heads, dtype=torch.float32)
        decode_kernel(
            (len(items), self.heads // fold), tiles.options, self.queries, self.own, self.prefix, part_out, part_lse,
            items, parts, self.batch, self.scores, self.dropout, self.heads,
            BM=tiles.queries, BN=tiles.keys, static=self.static(fold),
        )  # fmt: skip
        merge_kernel(
            (batch.queries, self.heads), launch.Options(num_warps=1, num_stages=2), part_out, part_lse, sinks,
            _output(out, lse), parts, self.batch, self.heads,
            static=arguments.Static(*self.widths, GATHER=self.flags["GATHER"]),
        )  # fmt: skip

    def backward(self, grad, out, lse, needs):
        q, kv_heads = self.q, self.kv_heads
        need_q, need_kv = needs[0], needs[1] or needs[2]
        need_learned = self.prefix_k is not None and (needs[3] or needs[4])
        need_prefix = need_learned or self.pieces is not None and need_kv
        grad, out, lse = _in_wide_loads(grad), out.contiguous(), lse.contiguous()
        options = dict(group=self.group, dropout=self.dropout is not None, **self.biases)
        tiles = self._tiles(config.backward_tiles, **options)
        fold = self.schedule.fold or config.fold(self.group, tiles.queries, tiles.key_queries)
        chunk = config.chunk_rows(self.prefix_room, tiles.queries, tiles.queries // fold)
        items, slots, count = self.schedule.backward_items(
            query_rows=tiles.queries // fold, key_block=tiles.key_keys, chunk_rows=chunk,
            dq=need_q, dkv=need_kv, dprefix=need_prefix, prefixes=self.prefixes,
        )  # fmt: skip
        dq = _new_like(q, self.schedule.writes_all_of(self.rows)) if need_q else None
        whole = self.schedule.writes_all_keys_of(len(self.k)) and not self.cache
        dk, dv = (_new_like(x, whole) if need_kv else None for x in (self.k, self.v))
        partial_k, partial_v = (
            q.new_empty(count, tiles.key_keys, kv_heads, width, dtype=torch.float32) if need_prefix else None
            for width in (self.head_dim, self.value_dim)
        )
        backward_kernel(
            (len(items), self.heads // fold), tiles.options, self.queries, self.own, self.prefix, _output(out, lse),
            arguments.Gradient(grad, *grad.stride()[:-1]),
            arguments.Gradients(
                dq, dk, dv, self.heads * self.head_dim, *self._strides(self.head_dim), *self._strides(self.value_dim),
                partial_k, partial_v,
            ),
            items, self.batch, self.scores, self.dropout, kv_heads, BM=tiles.queries, BN=tiles.keys,
            KEYS_BM=tiles.key_queries, KEYS_BN=tiles.key_keys, static=self.static(fold),
        )  # fmt: skip
        dprefix_k = dprefix_v = None
        if need_learned:
            new = q.new_empty if self.pieces is None else q.new_zeros
            dprefix_k, dprefix_v = new(self.prefix_k.shape), new(self.prefix_v.shape)
        if not need_prefix:
            return dq, dk, dv, dprefix_k, dprefix_v
        blocks, options = -(-self.prefix_room // tiles.key_keys), config.reduce_options(max(self.widths))
        constants = dict(KEYS_BN=tiles.key_keys, ROWS=ROWS, static=arguments.Static(*self.widths))
        if self.pieces is None:
            reduce_kernel(
                (self.prefixes * -(-self.prefix_room // ROWS), kv_heads), options, partial_k, partial_v,
                dprefix_k, dprefix_v, slots, self.prefix_room, kv_heads, blocks, **constants,
            )  # fmt: skip
            return dq, dk, dv, dprefix_k, dprefix_v
        of_rows, of_learned, links = self.pieces
        for needed, table, totals in ((need_kv, of_rows, (dk, dv)), (need_learned, of_learned, (dprefix_k, dprefix_v))):
            if needed:
                add_up(
                    (len(table), kv_heads), options, partial_k, partial_v, *totals, table, links, slots, kv_heads,
                    blocks, **constants,
                )  # fmt: skip
        return dq, dk, dv, dprefix_k, dprefix_v

    def _strides(self, width):
        """Of batch, row and head in the gradient of own keys, or of values."""
        if self.cache:
            return self.kv_heads * self.room * width, width, self.room * width
        return 0, self.kv_heads * width, width


class _Schedule:
    """The tables of one batch on its device, made when first asked for; all layers share them through ``seq``."""

    fold = None  # is a matter of the call

    def __init__(self, batch, prefix_room, device):
        self.batch, self.prefix_room, self.device, self._tables = batch, prefix_room, device, {}
        self.queries, self.in_order = batch.queries, batch.in_order
        query_rows = None if batch.in_order else batch.query_rows
        key_rows = None if batch.in_order and not batch.cache else batch.key_rows
        self.tensors = self._put(query_rows, key_rows, batch.spans)

    @classmethod
    def of(cls, seq, prefix_room, room, causal, window, device, key_seq):
        def make():
            host, lengths = seq.host, seq.prefix_lengths(prefix_room)
            cache, keys = None, None if key_seq is None else np.stack(key_seq.host[:2], 1)
            if seq.kind == "decode":
                cache = schedule.Cache(room, host.queries, host.key_starts, host.pages)
            table = np.stack(host[:4], 1)
            batch = schedule.make_batch(table, lengths, causal=causal, window=window, cache=cache, key_sequences=keys)
            return cls(batch, prefix_room, device)

        return seq.cached(("triton", prefix_room, room, causal, window, device, key_seq), make)

    def chains(self, seq, learned):
        """The table of the chains and its width; and the others of :func:`chain_tables`."""
        table, *pieces, _ = self._cached(
            ("chains", learned), lambda: (chain_tables(seq, self.batch.groups, learned), None)
        )
        return (table, self.prefix_room), pieces

    def writes_all_of(self, rows):
        return self.queries == rows

    def writes_all_keys_of(self, rows):
        return self.batch.keys == rows

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
        return put(self.device, *arrays)
