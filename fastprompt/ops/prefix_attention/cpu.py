"""prefix_attention by the C++ library."""

from functools import lru_cache
from typing import NamedTuple

import torch

from ..columns import columns_together
from .schedule import cpu_schedule

_LANES = 16  # of the widest vectors


class Scheduled(NamedTuple):
    """What a call asks of a batch: the tables of its schedule, and what follows from the sequences besides.

    Attributes:
        tables: those of :class:`CpuSchedule`.
        queries, keys: do all rows of queries, and of keys, belong to sequences that the kernel runs on and so writes?
        span: of the sequences.
    """

    tables: list[torch.Tensor]
    queries: bool
    keys: bool
    span: int

    @property
    def chunks(self) -> int:
        return self.tables[2].numel() // 4

    @property
    def learned(self) -> int:
        """How many learned keys are read."""
        return int(self.tables[-1][-1])


def forward(
    q, k, v, prefix_k, prefix_v, seq, *, causal, window, softcap, sinks, scale, dropout=None,
    alibi_slopes=None, position_bias=None, key_seq=None,
):  # fmt: skip
    """``out`` and ``lse`` as the reference returns them."""
    q, k, v, prefix_k, prefix_v = (columns_together(t) for t in (q, k, v, prefix_k, prefix_v))
    batch = _batch(q, k, prefix_k, seq, causal, window, key_seq)
    whole = batch.queries
    out = (torch.empty if whole else torch.zeros)(*q.shape[:2], v.shape[-1], dtype=q.dtype, device=q.device)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    if not whole:
        lse.fill_(-torch.inf)
    torch.ops.fastprompt.prefix_attention_cpu.default(
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        _fp32(sinks),
        _bias(batch, alibi_slopes, position_bias),
        batch.tables,
        causal,
        window,
        softcap,
        scale,
        *_dropout(dropout),
        out,
        lse,
    )
    return out, lse


def backward(
    grad, q, k, v, prefix_k, prefix_v, out, lse, seq, *, needs, causal, window, softcap, sinks, scale, dropout=None,
    alibi_slopes=None, position_bias=None, key_seq=None,
):  # fmt: skip
    """Gradients of q, k, v, prefix_k, prefix_v and sinks; None for those that ``needs``, six bools, leaves out."""
    grad, q, k, v, prefix_k, prefix_v, out = (columns_together(t) for t in (grad, q, k, v, prefix_k, prefix_v, out))
    batch = _batch(q, k, prefix_k, seq, causal, window, key_seq)
    written = batch.queries, batch.keys, batch.keys
    dq, dk, dv = (_empty_like(t, whole) if need else None for t, whole, need in zip((q, k, v), written, needs))
    every_prefix = prefix_k is not None and batch.learned == prefix_k.shape[:2].numel()  # is read to its end
    dprefix_k, dprefix_v = (
        _empty_like(t, every_prefix) if need else None for t, need in zip((prefix_k, prefix_v), needs[3:])
    )
    sink_parts = lse.new_zeros(batch.chunks, q.shape[1]) if needs[5] else None
    torch.ops.fastprompt.prefix_attention_backward_cpu.default(
        grad,
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        _fp32(sinks),
        _bias(batch, alibi_slopes, position_bias),
        out,
        lse.contiguous(),
        batch.tables,
        causal,
        window,
        softcap,
        scale,
        *_dropout(dropout),
        dq,
        dk,
        dv,
        dprefix_k,
        dprefix_v,
        sink_parts,
    )
    return dq, dk, dv, dprefix_k, dprefix_v, None if sink_parts is None else sink_parts.sum(0).to(sinks.dtype)


def _batch(q, k, prefix_k, seq, causal, window, key_seq):
    """What the call asks of its batch; worked out once, all layers share it."""
    room = 0 if prefix_k is None else prefix_k.shape[1]
    block = k.shape[2] if seq.kind == "decode" else None
    heads, kv_heads = q.shape[1], k.shape[1]

    def make():
        options = dict(causal=causal, window=window, room=room, heads=heads, kv_heads=kv_heads)
        tables = cpu_schedule(seq, **options, key_seq=key_seq, block=block)
        return Scheduled(list(tables), *_written(seq, key_seq, room), seq.span(room))

    return seq.cached(("cpu", causal, window, room, heads, kv_heads, key_seq, block), make)


def _written(seq, key_seq, room):
    """Whether all rows of queries, and all of keys, belong to sequences that a kernel runs on and so are written."""
    if key_seq is None:
        return (seq.kind == "packed",) * 2
    queries, keys = seq.host.lengths, key_seq.host.lengths
    unread = (queries > 0) & (keys + seq.prefix_lengths(room) == 0)
    return (
        bool(seq.kind == "packed" and not unread.any()),
        bool(key_seq.kind == "packed" and not ((keys > 0) & (queries == 0)).any()),
    )


def _bias(batch, alibi_slopes, position_bias):
    """``[H, 2 * farthest + 1]`` what scores gain at every distance that there is, so that the kernel reads it in whole
    vectors: it makes no difference between the features. None without them."""
    if alibi_slopes is None and position_bias is None:
        return None
    found = _distances(batch.span + _LANES, None if position_bias is None else position_bias.shape[1] // 2)
    table = alibi_slopes[:, None] * found if position_bias is None else position_bias.index_select(1, found)
    return table.contiguous()


@lru_cache(maxsize=4)  # all layers of a batch ask for the same
def _distances(farthest, most):
    """Distances of keys from queries, or which columns of a position bias are theirs."""
    distances = torch.arange(-farthest, farthest + 1)
    return distances.float() if most is None else most + distances.clamp(-most, most)


def _empty_like(x, written):
    return (torch.empty_like if written else torch.zeros_like)(x, memory_format=torch.contiguous_format)


def _fp32(sinks):
    return None if sinks is None else sinks.float().contiguous()


def _dropout(dropout):
    """The key, None without dropout, the threshold and the scale."""
    return (None, 0, 1.0) if dropout is None else (dropout.key, dropout.threshold, dropout.scale)
