"""prefix_attention by a schedule that is data, for compiled code.

A compiled layer may read nothing of a batch but tensors: every number that it reads is a constant of its graph, and
another number another graph; and what it reads of a tensor's values waits for the device. So the schedule is worked out
once a batch, outside of the layers, from what the host knows of the sequences, and put into one tensor. Its size, and
the grid of a launch, depend on the shapes of the call alone.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from ...backends import implementation
from ...checks import accumulator, without_autocast
from ...layout import Sequences
from .api import run_backward, run_forward
from .dropout import Dropout


class Shape(NamedTuple):
    """The heads of a call, on which its schedule depends."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> "Shape":
        """That of a call with q ``[Rq, H, Dh]``, k ``[Rk, Hkv, Dh]`` and v ``[Rk, Hkv, Dv]``."""
        return cls(q.shape[1], k.shape[1], q.shape[2], v.shape[2])


def make_schedule(
    seq: Sequences,
    shape: Shape,
    *,
    causal: bool,
    window: int | None,
    prefixes: int,
    room: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """The schedule of a call, for :func:`scheduled_attention`.

    Args:
        seq: not for decode.
        shape: of the call.
        causal, window: as in prefix_attention.
        prefixes, room: N and P of its prefixes ``[N, P, Hkv, Dh]``; 0 without.
        dtype, device: those of q.

    Returns:
        A vector of integers on ``device``, whose length depends on how many rows, prefixes and keys of a prefix there
        are, and not on the sequences. For backends that look at sequences themselves it holds these, on the CPU.
    """
    backend: Any = _backend(device.type, dtype, shape)
    if not hasattr(backend, "pack"):
        return _of_sequences(seq)
    options = dict(causal=causal, window=window, prefixes=prefixes, room=room)
    return backend.pack(seq, shape, **options, element_size=dtype.itemsize, device=device)


def scheduled_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_k: torch.Tensor | None,
    prefix_v: torch.Tensor | None,
    schedule: torch.Tensor,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    scale: float,
    dropout_p: float,
) -> torch.Tensor:
    """``out`` of prefix_attention, ``[Rq, H, Dv]``, of arguments that are not checked.

    Args:
        schedule: of :func:`make_schedule`, for this shape, these prefixes, ``causal`` and ``window``.
    """
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu") if dropout_p else None
    options = causal, window, softcap, scale, dropout_p
    return _ScheduledAttention.apply(q, k, v, prefix_k, prefix_v, sinks, seed, schedule, *options)


class _ScheduledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, prefix_k, prefix_v, sinks, seed, schedule, *options):
        tensors = q, k, v, prefix_k, prefix_v, sinks, seed, schedule
        out, lse = torch.ops.fastprompt.scheduled_attention(*tensors, *options)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 13
        needs = list(ctx.needs_input_grad[:6])
        grads = torch.ops.fastprompt.scheduled_attention_backward(grad, *ctx.saved_tensors, *ctx.options, needs)
        return *(g if need else None for g, need in zip(grads, needs)), *[None] * 7


def _backend(device, dtype, shape):
    return implementation("prefix_attention", "auto", device, dtype, head_dim=shape.head_dim, value_dim=shape.value_dim)


def _of_sequences(seq: Sequences) -> torch.Tensor:
    """Sequences as one tensor on the CPU."""
    host = seq.host
    used = np.zeros(0, np.int64) if host.prefix_lens is None else host.prefix_lens
    parts = host.starts, host.lengths, host.prefix_ids, used, host.gaps
    header = np.array([seq.kind == "packed", seq.rows, *map(len, parts)])
    return torch.from_numpy(np.concatenate([header, *parts]))


def _sequences_of(schedule: torch.Tensor) -> Sequences:
    """The inverse of :func:`_of_sequences`."""
    packed, rows, *sizes = schedule[:7].tolist()
    parts, nothing = schedule[7:].split(sizes), schedule.new_empty(0)  # neither a cache nor chains
    return Sequences.from_tensors("packed" if packed else "padded", rows, [*parts, *[nothing] * 4])


_library = torch.library.Library("fastprompt", "FRAGMENT")
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, Tensor? sinks, Tensor? seed, Tensor schedule"
)
_OPTIONS = "bool causal, int? window, float? softcap, float scale, float dropout_p"
_library.define(f"scheduled_attention({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)")
_library.define(
    f"scheduled_attention_backward(Tensor grad, {_INPUTS}, Tensor out, Tensor lse, {_OPTIONS}, bool[] needs)"
    " -> Tensor[]"
)


@torch.library.impl(_library, "scheduled_attention", "CompositeExplicitAutograd")
def _forward_op(q, k, v, prefix_k, prefix_v, sinks, seed, schedule, *options):
    backend: Any = _backend(q.device.type, q.dtype, Shape.of(q, k, v))
    if hasattr(backend, "pack"):
        batch = backend.unpack(schedule.to(q.device))  # layers may be spread over devices
        with without_autocast(q.device.type):
            out, lse = backend.forward(q, k, v, prefix_k, prefix_v, batch, **_named(sinks, seed, *options))
    else:
        seq = _sequences_of(schedule).to(q.device)
        out, lse = run_forward(q, k, v, prefix_k, prefix_v, sinks, None, None, seed, seq, None, *options, "auto")
    return out.contiguous(), lse.contiguous()


@torch.library.register_fake("fastprompt::scheduled_attention", lib=_library)
def _forward_fake(q, k, v, *_):
    return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(*q.shape[1::-1], dtype=accumulator(q.dtype))


@torch.library.impl(_library, "scheduled_attention_backward", "CompositeExplicitAutograd")
def _backward_op(grad, q, k, v, prefix_k, prefix_v, sinks, seed, schedule, out, lse, *options):
    *options, needs = options
    inputs = q, k, v, prefix_k, prefix_v, sinks
    needs = [need and x is not None for x, need in zip(inputs, needs)]
    backend: Any = _backend(q.device.type, q.dtype, Shape.of(q, k, v))
    if hasattr(backend, "pack"):
        tensors = grad, q, k, v, prefix_k, prefix_v, out, lse, backend.unpack(schedule.to(q.device))
        with without_autocast(q.device.type):
            grads = backend.backward(*tensors, **_named(sinks, seed, *options), needs=needs)
    else:
        seq = _sequences_of(schedule).to(q.device)
        grads = run_backward(
            grad, *inputs, None, None, seed, out, lse, seq, None, *options, "auto", [*needs, False]
        )[:6]  # fmt: skip
    return [g.to(x.dtype).contiguous() if need else grad.new_empty(0) for x, g, need in zip(inputs, grads, needs)]


@torch.library.register_fake("fastprompt::scheduled_attention_backward", lib=_library)
def _backward_fake(grad, q, k, v, prefix_k, prefix_v, sinks, *arguments):
    needs = arguments[-1]
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if need and x is not None else grad.new_empty(0)
        for x, need in zip((q, k, v, prefix_k, prefix_v, sinks), needs)
    ]


def _named(sinks, seed, causal, window, softcap, scale, dropout_p):
    """The options of a backend."""
    options = dict(causal=causal, window=window, softcap=softcap, sinks=sinks, scale=scale)
    return options | (dict(dropout=Dropout(dropout_p, int(seed))) if dropout_p else {})
