"""prefix_attention by the C++ library."""

import torch

from ..columns import columns_together
from .schedule import cpu_schedule


def forward(q, k, v, prefix_k, prefix_v, seq, *, causal, window, softcap, sinks, scale, dropout=None):
    """``out`` and ``lse`` as the reference returns them."""
    q, k, v, prefix_k, prefix_v = (columns_together(t) for t in (q, k, v, prefix_k, prefix_v))
    whole = seq.kind == "packed"  # every row belongs to a sequence and is written
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
        list(_schedule(q, k, prefix_k, seq, causal, window)),
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
    grad, q, k, v, prefix_k, prefix_v, out, lse, seq, *, needs, causal, window, softcap, sinks, scale, dropout=None
):
    """Gradients of q, k, v, prefix_k, prefix_v and sinks; None for those that ``needs``, six bools, leaves out."""
    grad, q, k, v, prefix_k, prefix_v, out = (columns_together(t) for t in (grad, q, k, v, prefix_k, prefix_v, out))
    schedule = _schedule(q, k, prefix_k, seq, causal, window)
    whole = seq.kind == "packed"
    dq, dk, dv = (_empty_like(t, whole) if need else None for t, need in zip((q, k, v), needs))
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


def _schedule(q, k, prefix_k, seq, causal, window):
    room = 0 if prefix_k is None else prefix_k.shape[1]
    return cpu_schedule(seq, causal=causal, window=window, room=room, heads=q.shape[1], kv_heads=k.shape[1])


def _empty_like(x, written):
    return (torch.empty_like if written else torch.zeros_like)(x, memory_format=torch.contiguous_format)


def _fp32(sinks):
    return None if sinks is None else sinks.float().contiguous()


def _dropout(dropout):
    """The key, None without dropout, the threshold and the scale."""
    return (None, 0, 1.0) if dropout is None else (dropout.key, dropout.threshold, dropout.scale)
