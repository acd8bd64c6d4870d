"""Attention of packed rows inside of compiled layers: one operator, told of the batch by a tensor.

A compiled layer may read nothing of a batch but tensors: every number that it reads is a constant of its graph, and
another number another graph. So the sequences and the schedule made of them stay with the batch, on the host, and the
operator is given a tensor that carries them: :func:`carrier`. A layer then has one graph whatever the shape of a batch,
and nothing in it waits for a device.
"""

from typing import Any

import torch

from ..checks import accumulator
from ..layout import Sequences
from ..ops.prefix_attention.api import run_backward, run_forward


@torch.compiler.disable
def carrier(seq: Sequences) -> torch.Tensor:
    """A tensor that carries what attention needs to know of a batch through compiled code.

    It is on the CPU, wherever the rows are, so that no CUDA graph replays it with another batch.
    """
    tensor: Any = torch.empty(0)
    tensor.batch = seq
    return tensor


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    learned: tuple[torch.Tensor, torch.Tensor] | None,
    batch: torch.Tensor,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    scale: float,
    dropout_p: float,
) -> torch.Tensor:
    """What ``prefix_attention`` gives for packed rows ``[R, H, Dh]`` behind what they share.

    Args:
        learned: the keys and values that stand in front in this layer, ``[N, P, Hkv, Dh]``.
        batch: of :func:`carrier`.
    """
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu") if dropout_p else None
    options = causal, window, softcap, scale, dropout_p
    return _PackedAttention.apply(q, k, v, *(learned or (None, None)), sinks, seed, batch, *options)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, learned_k, learned_v, sinks, seed, batch, *options):
        tensors = q, k, v, learned_k, learned_v, sinks, seed, batch
        out, lse = torch.ops.fastprompt.packed_attention(*tensors, *options)
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
        grads = torch.ops.fastprompt.packed_attention_backward(grad, *ctx.saved_tensors, *ctx.options, needs)
        return *(g if need else None for g, need in zip(grads, needs)), *[None] * 7


_library = torch.library.Library("fastprompt", "FRAGMENT")
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? learned_k, Tensor? learned_v, Tensor? sinks, Tensor? seed, Tensor batch"
)
_OPTIONS = "bool causal, int? window, float? softcap, float scale, float dropout_p"
_library.define(f"packed_attention({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)")
_library.define(
    f"packed_attention_backward(Tensor grad, {_INPUTS}, Tensor out, Tensor lse, {_OPTIONS}, bool[] needs) -> Tensor[]"
)


def _carried(batch: Any) -> Sequences:
    try:
        return batch.batch
    except AttributeError:
        raise RuntimeError(
            "attention of packed rows was given a copy of the tensor that carries its batch: something in between "
            "copies the inputs of compiled layers, which loses the batch"
        ) from None


@torch.library.impl(_library, "packed_attention", "CompositeExplicitAutograd")
def _forward_op(q, k, v, learned_k, learned_v, sinks, seed, batch, *options):
    seq = _carried(batch).to(q.device)
    out, lse = run_forward(q, k, v, learned_k, learned_v, sinks, None, None, seed, seq, None, *options, "auto")
    return out.contiguous(), lse.contiguous()


@torch.library.register_fake("fastprompt::packed_attention", lib=_library)
def _forward_fake(q, k, v, *_):
    return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(*q.shape[1::-1], dtype=accumulator(q.dtype))


@torch.library.impl(_library, "packed_attention_backward", "CompositeExplicitAutograd")
def _backward_op(grad, q, k, v, learned_k, learned_v, sinks, seed, batch, out, lse, *options):
    *options, needs = options
    seq = _carried(batch).to(q.device)
    inputs = q, k, v, learned_k, learned_v, sinks, None, None, seed, out, lse
    *grads, _ = run_backward(grad, *inputs, seq, None, *options, "auto", [*needs, False])
    return [grad.new_empty(0) if g is None else g.contiguous() for g in grads]


@torch.library.register_fake("fastprompt::packed_attention_backward", lib=_library)
def _backward_fake(grad, q, k, v, learned_k, learned_v, sinks, *arguments):
    needs = arguments[-1]
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if need and x is not None else grad.new_empty(0)
        for x, need in zip((q, k, v, learned_k, learned_v, sinks), needs)
    ]
