"""prefix_attention by the C++ library."""

import torch

from ..columns import columns_together
from .schedule import cpu_schedule

_LANES = 16  # of the widest vectors


def forward(
    q, k, v, prefix_k, prefix_v, seq, *, causal, window, softcap, sinks, scale, dropout=None,
    alibi_slopes=None, position_bias=None, key_seq=None,
):  # fmt: skip
    """``out`` and ``lse`` as the reference returns them."""
    q, k, v, prefix_k, prefix_v = (columns_together(t) for t in (q, k, v, prefix_k, prefix_v))
    whole, _ = _written(seq, key_seq, prefix_k)
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
        _bias(seq, prefix_k, alibi_slopes, position_bias),
        list(_schedule(q, k, prefix_k, seq, causal, window, key_seq)),
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
    schedule = _schedule(q, k, prefix_k, seq, causal, window, key_seq)
    queries, keys = _written(seq, key_seq, prefix_k)
    dq, dk, dv = (
        _empty_like(t, whole) if need else None for t, whole, need in zip((q, k, v), (queries, keys, keys), needs)
    )
    every_prefix = (
        prefix_k is not None and seq.prefix_lens is None and len(schedule.prefixes) == len(prefix_k)
    )  # is read to its end
    dprefix_k, dprefix_v = (
        _empty_like(t, every_prefix) if need else None for t, need in zip((prefix_k, prefix_v), needs[3:])
    )
    sink_parts = lse.new_zeros(len(schedule.chunks), q.shape[1]) if needs[5] else None
    torch.ops.fastprompt.prefix_attention_backward_cpu.default(
        grad,
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        _fp32(sinks),
        _bias(seq, prefix_k, alibi_slopes, position_bias),
        out,
        lse.contiguous(),
        list(schedule),
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


def _schedule(q, k, prefix_k, seq, causal, window, key_seq):
    sizes = dict(room=_room(prefix_k), heads=q.shape[1], kv_heads=k.shape[1])
    block = k.shape[2] if seq.kind == "decode" else None
    return cpu_schedule(seq, causal=causal, window=window, **sizes, key_seq=key_seq, block=block)


def _room(prefix_k):
    return 0 if prefix_k is None else prefix_k.shape[1]


def _written(seq, key_seq, prefix_k):
    """Whether all rows of queries, and all of keys, belong to sequences that a kernel runs on and so are written."""
    if key_seq is None:
        return (seq.kind == "packed",) * 2
    room = _room(prefix_k)

    def find():
        queries, keys = seq.host.lengths, key_seq.host.lengths
        unread = (queries > 0) & (keys + seq.prefix_lengths(room) == 0)
        return (
            seq.kind == "packed" and not unread.any(),
            key_seq.kind == "packed" and not ((keys > 0) & (queries == 0)).any(),
        )

    return seq.cached(("written", room, key_seq), find)


def _bias(seq, prefix_k, alibi_slopes, position_bias):
    """``[H, 2 * farthest + 1]`` what scores gain at every distance that there is, so that the kernel reads it in whole
    vectors: it makes no difference between the features. None without them."""
    if alibi_slopes is None and position_bias is None:
        return None
    room, most = _room(prefix_k), None if position_bias is None else position_bias.shape[1] // 2

    def find():
        farthest = seq.span(room) + _LANES
        distances = torch.arange(-farthest, farthest + 1)
        return distances.float() if most is None else most + distances.clamp(-most, most)

    found = seq.cached(("distances", room, most), find)
    table = alibi_slopes[:, None] * found if position_bias is None else position_bias.index_select(1, found)
    return table.contiguous()


def _empty_like(x, written):
    return (torch.empty_like if written else torch.zeros_like)(x, memory_format=torch.contiguous_format)


def _fp32(sinks):
    return None if sinks is None else sinks.float().contiguous()


def _dropout(dropout):
    """The key, None without dropout, the threshold and the scale."""
    return (None, 0, 1.0) if dropout is None else (dropout.key, dropout.threshold, dropout.scale)
