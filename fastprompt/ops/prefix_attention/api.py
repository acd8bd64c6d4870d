"""prefix_attention: attention of packed, padded or decoding sequences over a shared prefix and their own keys."""

from typing import Any

import torch

from ...backends import implementation, is_eager
from ...checks import FLOATS, accumulator, check_range, check_tensor, without_autocast
from ...layout import Sequences
from .dropout import Dropout


def prefix_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_k: torch.Tensor | None,
    prefix_v: torch.Tensor | None,
    seq: Sequences,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query over its sequence's prefix and its sequence's own keys, in one softmax.

    Everything behaves exactly as if the prefix stood in front of the sequence, although no key is ever copied:
    positions of own keys start at the prefix's length (plus ``seq.gaps``).

    Args:
        q: ``[Rq, H, Dh]`` queries. ``seq`` says which rows form a sequence.
        k, v: ``[Rq, Hkv, Dh]`` own keys and ``[Rq, Hkv, Dv]`` own values, H a multiple of Hkv; for decode
            ``[B, Hkv, Lmax, Dh]`` and ``[B, Hkv, Lmax, Dv]``, the cache. Values may be narrower or wider than keys.
        prefix_k, prefix_v: ``[N, P, Hkv, Dh]`` and ``[N, P, Hkv, Dv]``, N prefixes of at most P keys; None: no prefix.
        seq: :class:`fastprompt.Sequences`, made once a batch.
        causal: own keys behind the query are hidden.
        window: a key is visible only if it stands less than ``window`` positions from the query, prefix included.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sinks: ``[H]`` logits that join the softmax's denominator and carry no value.
        scale: factor on the scores, ``Dh ** -0.5`` by default, whatever Dv.
        dropout_p: probability, in [0, 1), with which each weight of the softmax becomes 0; the others are multiplied
            by ``1 / (1 - dropout_p)``, as in torch's scaled_dot_product_attention. lse is that without dropout.
        dropout_seed: an int64, or a tensor that holds one (a tensor on a GPU is waited for). It, the query's row of q,
            its head and the key's position decide what is dropped, on every backend alike: sequences that share a
            prefix draw masks of their own, and two calls with one seed draw the same, so layers need different ones.
            None: a seed is drawn from torch's default CPU generator, if ``dropout_p > 0``.
        backend: "auto", "reference", "composed", "cpu" or "triton". On a CPU "auto" takes "cpu", the C++ library. For
            float64 and where there is no library it takes "composed", torch's own attention kernel, and "reference"
            for softcap, dropout, a window shorter than a sequence, and decode, which "composed" does not have. On a
            GPU it takes "triton", and "reference" for float64, for keys or values wider than 256 and where Triton is
            not installed.

    Returns:
        out: ``[Rq, H, Dv]``; zero for rows outside every sequence. Differentiable in q, k, v, prefix_k, prefix_v and
            sinks; the gradients of a prefix are summed over the sequences that read it, in a fixed order.
        lse: ``[H, Rq]`` log-sum-exp of the scores, natural log, fp32 (float64 for float64), not differentiable.

    Raises:
        TypeError, ValueError: an argument with another dtype, shape, device or range.
        RuntimeError: a backend that was asked for and cannot run this call.
    """
    _check(q, k, v, prefix_k, prefix_v, seq, window, softcap, sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    seed = _seed(dropout_p, dropout_seed)
    return PrefixAttention.apply(
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        sinks,
        seed,
        seq,
        bool(causal),
        window,
        None if softcap is None else float(softcap),
        scale,
        float(dropout_p),
        backend,
    )


class PrefixAttention(torch.autograd.Function):
    """Autograd of :func:`prefix_attention`; arguments are positional and already checked.

    Saves the inputs, out and lse; ``dropout_seed`` is a tensor of one int64, or None without dropout. Eager calls skip
    the operator's dispatcher so that the schedule worked out from ``seq`` is shared by all layers; compiled code goes
    through ``torch.ops.fastprompt``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prefix_k: torch.Tensor | None,
        prefix_v: torch.Tensor | None,
        sinks: torch.Tensor | None,
        dropout_seed: torch.Tensor | None,
        seq: Sequences,
        causal: bool,
        window: int | None,
        softcap: float | None,
        scale: float,
        dropout_p: float,
        backend: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = q, k, v, prefix_k, prefix_v, sinks, dropout_seed
        options = causal, window, softcap, scale, dropout_p, backend
        if is_eager(q):
            out, lse = _forward(*inputs, seq, *options)
        else:
            out, lse = torch.ops.fastprompt.prefix_attention(*inputs, seq.tensors(), seq.kind, seq.rows, *options)
        ctx.save_for_backward(*inputs, out, lse)
        ctx.seq, ctx.options = seq, options
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # zeros for lse otherwise
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple:
        if grad is None:
            return (None,) * 14
        seq, tensors = ctx.seq, (grad, *ctx.saved_tensors)
        needs = list(ctx.needs_input_grad[:6])
        if is_eager(grad):
            eagerly: Any = _backward
            grads = eagerly(*tensors, seq, *ctx.options, needs)
        else:
            grads = torch.ops.fastprompt.prefix_attention_backward(
                *tensors, seq.tensors(), seq.kind, seq.rows, *ctx.options, needs
            )
        return *(g if need else None for g, need in zip(grads, needs)), *[None] * 8


def _check(q, k, v, prefix_k, prefix_v, seq, window, softcap, sinks):
    if not isinstance(seq, Sequences):
        raise TypeError(f"seq must be a fastprompt.Sequences, got {type(seq).__name__}")
    check_tensor("q", q, [seq.rows, "H", "Dh"], dtypes=FLOATS)
    rows, heads, head_dim = q.shape
    if head_dim == 0:
        raise ValueError("q must have heads of at least one number, got none")
    if seq.kind == "decode":
        check_tensor("k", k, [rows, "Hkv", "Lmax", head_dim], like=("q", q))
    else:
        check_tensor("k", k, [rows, "Hkv", head_dim], like=("q", q))
    check_tensor("v", v, [*k.shape[:-1], "Dv"], like=("q", q))
    kv_heads, value_dim = k.shape[1], v.shape[-1]
    if value_dim == 0:
        raise ValueError("v must have values of at least one number, got none")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q must have a multiple of k's {kv_heads} heads, got {heads}")
    if (prefix_k is None) != (prefix_v is None):
        raise ValueError("prefix_k and prefix_v must both be given or both be None")
    if prefix_k is not None:
        check_tensor("prefix_k", prefix_k, ["N", "P", kv_heads, head_dim], like=("q", q))
        check_tensor("prefix_v", prefix_v, [*prefix_k.shape[:-1], value_dim], like=("q", q))
        if seq.prefix_lens is not None:
            check_tensor("seq.prefix_lens", seq.prefix_lens, [prefix_k.shape[0]])
    if sinks is not None:
        check_tensor("sinks", sinks, [heads], dtypes=FLOATS, like=("q", q))
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be a positive int or None, got {window!r}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap!r}")


def _seed(p, seed):
    """The seed as a tensor of one int64, drawn where none is given; None without dropout."""
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"dropout_p must be a float, got {type(p).__name__}")
    if not 0 <= p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1), got {p!r}")
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"dropout_seed must be one int64, got {seed.dtype} of shape {list(seed.shape)}")
    elif seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"dropout_seed must be an int, a tensor or None, got {type(seed).__name__}")
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"dropout_seed must lie in [-2**63, 2**63), got {seed}")
    if p == 0:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
    return seed if isinstance(seed, torch.Tensor) else torch.tensor(seed, dtype=torch.int64, device="cpu")


def _implementation(q, v, prefix_k, seq, window, softcap, dropout_p, requested):
    """The module whose ``forward`` and ``backward`` run the call."""
    short_window, on_cpu = None, q.device.type == "cpu"
    if window is not None and on_cpu:  # a backend of the CPU alone asks for it
        room = 0 if prefix_k is None else prefix_k.shape[1]
        span = seq.cached(("span", room), lambda: seq.span(room))
        short_window = window if window < span else None
    return implementation(
        "prefix_attention",
        requested,
        q.device.type,
        q.dtype,
        head_dim=q.shape[-1],
        value_dim=v.shape[-1],
        decode=seq.kind == "decode",
        softcap=softcap is not None,
        dropout=dropout_p > 0,
        short_window=short_window,
    )


def _check_ranges(k, prefix_k, seq):
    """What only the values of seq tell, from the host, where they have to be known anyway."""
    if seq.kind == "decode":
        check_range("seq.lengths", torch.from_numpy(seq.host.lengths), 0, k.shape[2] + 1)
    if prefix_k is not None:
        if seq.prefix_ids is None:
            if len(seq.starts) and prefix_k.shape[0] == 0:
                raise ValueError("seq.prefix_ids is None (prefix 0 for all), but prefix_k holds no prefix")
        else:
            check_range("seq.prefix_ids", torch.from_numpy(seq.host.prefix_ids), -1, prefix_k.shape[0])
        if seq.prefix_lens is not None:
            check_range("seq.prefix_lens", torch.from_numpy(seq.host.prefix_lens), 0, prefix_k.shape[1] + 1)


def _forward(q, k, v, prefix_k, prefix_v, sinks, dropout_seed, seq, causal, window, softcap, scale, dropout_p, backend):
    room, bank = k.shape[2] if seq.kind == "decode" else None, None if prefix_k is None else prefix_k.shape[:2]
    seq.cached(("ranges", room, bank), lambda: _check_ranges(k, prefix_k, seq))
    runner = _implementation(q, v, prefix_k, seq, window, softcap, dropout_p, backend)
    dropout = _dropout(dropout_p, dropout_seed)
    options = dict(causal=causal, window=window, softcap=softcap, sinks=sinks, scale=scale, dropout=dropout)
    with without_autocast(q.device.type):
        return runner.forward(q, k, v, prefix_k, prefix_v, seq, **options)


def _backward(
    grad, q, k, v, prefix_k, prefix_v, sinks, dropout_seed, out, lse,
    seq, causal, window, softcap, scale, dropout_p, backend, needs,
):  # fmt: skip
    """Gradients in the order of the inputs, in their dtypes, None for an input that is None or whose is not needed."""
    runner = _implementation(q, v, prefix_k, seq, window, softcap, dropout_p, backend)
    dropout = _dropout(dropout_p, dropout_seed)
    inputs = (q, k, v, prefix_k, prefix_v, sinks)
    needs = [need and x is not None for x, need in zip(inputs, needs)]
    options = dict(
        causal=causal, window=window, softcap=softcap, sinks=sinks, scale=scale, dropout=dropout, needs=needs
    )
    with without_autocast(q.device.type):
        grads = runner.backward(grad, q, k, v, prefix_k, prefix_v, out, lse, seq, **options)
    return [g.to(x.dtype) if need else None for x, g, need in zip(inputs, grads, needs)]


def _dropout(p, seed):
    """None without dropout."""
    return None if p == 0 else Dropout(p, int(seed))


_library = torch.library.Library("fastprompt", "FRAGMENT")
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, Tensor? sinks, Tensor? dropout_seed"
_OPTIONS = (
    "Tensor[] seq, str kind, int rows, bool causal, int? window, float? softcap, float scale, float dropout_p, "
    "str backend"
)
_library.define(f"prefix_attention({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)")
_library.define(
    f"prefix_attention_backward(Tensor grad, {_INPUTS}, Tensor out, Tensor lse, {_OPTIONS}, bool[] needs) -> Tensor[]"
)


@torch.library.impl(_library, "prefix_attention", "CompositeExplicitAutograd")
def _forward_op(q, k, v, prefix_k, prefix_v, sinks, dropout_seed, seq, kind, rows, *options):
    out, lse = _forward(
        q, k, v, prefix_k, prefix_v, sinks, dropout_seed, Sequences.from_tensors(kind, rows, seq), *options
    )
    return out.contiguous(), lse.contiguous()


@torch.library.register_fake("fastprompt::prefix_attention", lib=_library)
def _forward_fake(q, k, v, prefix_k, prefix_v, sinks, dropout_seed, seq, kind, rows, *options):
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=accumulator(q.dtype))
    return q.new_empty(*q.shape[:2], v.shape[-1]), lse


@torch.library.impl(_library, "prefix_attention_backward", "CompositeExplicitAutograd")
def _backward_op(grad, q, k, v, prefix_k, prefix_v, sinks, dropout_seed, out, lse, seq, kind, rows, *options):
    seq = Sequences.from_tensors(kind, rows, seq)
    grads = _backward(grad, q, k, v, prefix_k, prefix_v, sinks, dropout_seed, out, lse, seq, *options)
    return [grad.new_empty(0) if g is None else g.contiguous() for g in grads]


@torch.library.register_fake("fastprompt::prefix_attention_backward", lib=_library)
def _backward_fake(grad, q, k, v, prefix_k, prefix_v, sinks, dropout_seed, out, lse, seq, kind, rows, *options):
    pairs = zip((q, k, v, prefix_k, prefix_v, sinks), options[-1])
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if need and x is not None else grad.new_empty(0)
        for x, need in pairs
    ]
