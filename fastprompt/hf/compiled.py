"""Attention of packed rows inside of compiled layers: one operator, told of the batch by a tensor.

A compiled layer may read nothing of a batch but tensors: every number that it reads is a constant of its graph, and
another number another graph. So the sequences, which rows are shared and the schedule made of them stay with the batch,
on the host, and the operator is given a tensor that carries them: :func:`carrier`. It gathers what stands in front of
the sequences itself. A layer then has one graph whatever the shape of a batch, and nothing in it waits for a device.
"""

from typing import Any

import torch

from ..checks import accumulator
from ..layout import Sequences
from ..ops.prefix_attention.api import run_backward, run_forward
from .shared_state import SharedState


@torch.compiler.disable
def carrier(seq: Sequences, shared: SharedState) -> torch.Tensor:
    """A tensor that carries what attention needs to know of a batch through compiled code.

    It is on the CPU, wherever the rows are, so that no CUDA graph replays it with another batch.
    """
    tensor: Any = torch.empty(0)
    tensor.batch = seq, shared
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


def _carried(batch: Any) -> tuple[Sequences, SharedState]:
    try:
        return batch.batch
    except AttributeError:
        raise RuntimeError(
            "attention of packed rows was given a copy of the tensor that carries its batch: something in between "
            "copies the inputs of compiled layers, which loses the batch"
        ) from None


@torch.library.impl(_library, "packed_attention", "CompositeExplicitAutograd")
def _forward_op(q, k, v, learned_k, learned_v, sinks, seed, batch, *options):
    seq, shared = _carried(batch)
    prefix_k, prefix_v = shared.bank(learned_k, k), shared.bank(learned_v, v)
    out, lse = run_forward(
        q, k, v, prefix_k, prefix_v, sinks, None, None, seed, seq.to(q.device), None, *options, "auto"
    )
    return out.contiguous(), lse.contiguous()


@torch.library.register_fake("fastprompt::packed_attention", lib=_library)
def _forward_fake(q, k, v, *_):
    return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(*q.shape[1::-1], dtype=accumulator(q.dtype))


@torch.library.impl(_library, "packed_attention_backward", "CompositeExplicitAutograd")
def _backward_op(grad, q, k, v, learned_k, learned_v, sinks, seed, batch, out, lse, *options):
    *options, needs = options
    seq, shared = _carried(batch)
    fronts = [_Front(shared, *x) for x in ((learned_k, k, needs[3], needs[1]), (learned_v, v, needs[4], needs[2]))]
    wanted = *needs[:3], *(front.wanted for front in fronts), needs[5]
    dq, dk, dv, *dfronts, dsinks, _ = run_backward(
        grad, q, k, v, *(front.bank for front in fronts), sinks, None, None, seed, out, lse,
        seq.to(q.device), None, *options, "auto", [*wanted, False],
    )  # fmt: skip
    (dlearned_k, dk), (dlearned_v, dv) = (front.shares(*x) for front, x in zip(fronts, zip(dfronts, (dk, dv))))
    grads = dq, dk, dv, dlearned_k, dlearned_v, dsinks
    return [grad.new_empty(0) if g is None else g.contiguous() for g in grads]


class _Front:
    """What stands in front of the sequences, of keys or values, and where its gradient goes."""

    def __init__(self, shared, learned, own, need_learned, need_own):
        self.needs = need_learned and learned is not None, need_own
        self.inputs = [
            x if x is None else x.detach().requires_grad_(need) for x, need in zip((learned, own), self.needs)
        ]
        with torch.enable_grad():
            self.graph = shared.bank(*self.inputs)
        self.wanted = self.graph is not None and self.graph.requires_grad
        self.bank = None if self.graph is None else self.graph.detach()

    def shares(self, gradient, own_gradient):
        """The gradients of the learned and of the batch's rows, from that of what stands in front and the rows' own."""
        if not self.wanted:
            return None, own_gradient
        asked = [x for x, need in zip(self.inputs, self.needs) if need]
        found = iter(torch.autograd.grad(self.graph, asked, gradient, allow_unused=True))
        learned, own = (next(found) if need else None for need in self.needs)
        if own is None:
            return learned, own_gradient
        return learned, own_gradient.add_(own)


@torch.library.register_fake("fastprompt::packed_attention_backward", lib=_library)
def _backward_fake(grad, q, k, v, learned_k, learned_v, sinks, *arguments):
    needs = arguments[-1]
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if need and x is not None else grad.new_empty(0)
        for x, need in zip((q, k, v, learned_k, learned_v, sinks), needs)
    ]
