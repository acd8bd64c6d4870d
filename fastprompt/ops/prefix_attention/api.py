"""prefix_attention: attention of packed, padded or decoding sequences over a shared prefix and their own keys."""

from typing import Any

import torch

from ...backends import implementation, is_eager, module_of
from ...checks import accumulator, without_autocast
from ...layout import Sequences
from . import checks, reference
from .dropout import Dropout
from .scheduled import flat_of, read_schedule


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
    alibi_slopes: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    key_seq: Sequences | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query over its sequence's prefix and its sequence's own keys, in one softmax.

    Everything behaves exactly as if the prefix stood in front of the sequence, although no key is ever copied:
    positions of own keys start at the prefix's length (plus ``seq.gaps``). A prefix is one of a bank of learned ones,
    or, with ``seq.chains``, a chain of keys that are rows of k and v, those of other sequences, or learned.

    With ``key_seq`` it is cross-attention: the queries of sequence b see its prefix and all rows of k and v that
    ``key_seq`` gives to sequence b, such as those of the text that it was encoded from. A sequence without any key
    gives zeros, as rows outside every sequence do.

    Args:
        q: ``[Rq, H, Dh]`` queries. ``seq`` says which rows form a sequence.
        k, v: ``[Rq, Hkv, Dh]`` own keys and ``[Rq, Hkv, Dv]`` own values, H a multiple of Hkv; for decode
            ``[B, Hkv, Lmax, Dh]`` and ``[B, Hkv, Lmax, Dv]``, the cache, or its pages
            ``[pages, Hkv, page size, Dh]`` and ``[..., Dv]`` (without a backward). Values may be narrower or wider
            than keys. With ``key_seq`` they have as many rows as it says.
        prefix_k, prefix_v: ``[N, P, Hkv, Dh]`` and ``[N, P, Hkv, Dv]``, N prefixes of at most P keys; None: no prefix,
            or chains without learned keys.
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
        alibi_slopes: ``[H]`` fp32; a score grows by the head's slope times ``key position - query position``, after
            the scale. That is ALiBi of a causal model, where the difference is never positive; with
            ``causal=False`` keys behind the query gain. Not differentiable.
        position_bias: ``[H, 2 * M + 1]`` fp32 (float64, too, for float64); a score grows by
            ``position_bias[h, M + d]``, after the scale, where d is ``key position - query position``, at least -M
            and at most M. T5's relative positions are such a table, with ``scale=1``: its buckets stay the same
            beyond some distance M. Its gradient is worked out by PyTorch's own operations, one sequence at a time,
            on every backend.
        key_seq: :class:`fastprompt.Sequences`, not for decode; for each sequence of ``seq`` the rows of k and v that
            its queries see. It takes ``causal=False`` and nothing that depends on a distance (``window``,
            ``alibi_slopes``, ``position_bias``). Prefixes and gaps stand in ``seq``.
        backend: "auto", "reference", "composed", "cpu" or "triton". On a CPU "auto" takes "cpu", the C++ library. For
            float64 and where there is no library it takes "composed", torch's own attention kernel, and "reference"
            for what "composed" does not have: softcap, dropout, ALiBi, a position bias, cross-attention, a window
            shorter than a sequence, and decode. On a
            GPU it takes "triton", and "reference" for float64, for keys or values wider than 256 and where Triton is
            not installed.

    Returns:
        out: ``[Rq, H, Dv]``; zero for rows outside every sequence. Differentiable in q, k, v, prefix_k, prefix_v,
            sinks and position_bias; the gradients of a prefix, rows of k and v in chains among them, are summed over
            the sequences that read it, in a fixed order.
        lse: ``[H, Rq]`` log-sum-exp of the scores, natural log, fp32 (float64 for float64), not differentiable.

    Raises:
        TypeError, ValueError: an argument with another dtype, shape, device or range.
        RuntimeError: a backend that was asked for and cannot run this call.
        NotImplementedError: a gradient where the cache is in pages.
    """
    checks.check_inputs(q, k, v, prefix_k, prefix_v, seq, window, softcap, sinks, key_seq)
    checks.check_gradients(seq, (q, k, v, prefix_k, prefix_v, sinks, position_bias))
    if alibi_slopes is not None or position_bias is not None:
        checks.check_positions(q, softcap, alibi_slopes, position_bias)
    if key_seq is not None:
        checks.check_cross(seq, key_seq, causal, window, alibi_slopes, position_bias)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    seed = checks.seed_of(dropout_p, dropout_seed)
    return PrefixAttention.apply(
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        sinks,
        position_bias,
        alibi_slopes,
        seed,
        (seq, key_seq) if is_eager(q) else flat_of(seq, key_seq),
        bool(causal),
        window,
        None if softcap is None else float(softcap),
        scale,
        float(dropout_p),
        backend,
    )


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
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``out`` of :func:`prefix_attention`, of arguments that are not checked.

    Args:
        schedule: of :func:`fastprompt.ops.prefix_attention.scheduled.make_schedule`, for this shape, these prefixes,
            ``causal`` and ``window``.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    inputs = q, k, v, prefix_k, prefix_v, sinks, position_bias, alibi_slopes, checks.seed_of(dropout_p, None)
    return PrefixAttention.apply(*inputs, schedule, causal, window, softcap, scale, dropout_p, "auto")[0]


class PrefixAttention(torch.autograd.Function):
    """Autograd of :func:`prefix_attention`; arguments are positional and already checked.

    Saves the inputs, out and lse; ``dropout_seed`` is a tensor of one int64, or None without dropout. ``schedule`` is
    ``seq`` and ``key_seq`` in eager calls, which skip the operator's dispatcher; in compiled code, which goes through
    ``torch.ops.fastprompt``, it is a tensor (see ``scheduled.py``).
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
        position_bias: torch.Tensor | None,
        alibi_slopes: torch.Tensor | None,
        dropout_seed: torch.Tensor | None,
        schedule: tuple[Sequences, Sequences | None] | torch.Tensor,
        causal: bool,
        window: int | None,
        softcap: float | None,
        scale: float,
        dropout_p: float,
        backend: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = q, k, v, prefix_k, prefix_v, sinks, position_bias, alibi_slopes, dropout_seed
        options = causal, window, softcap, scale, dropout_p, backend
        if isinstance(schedule, torch.Tensor):
            out, lse = torch.ops.fastprompt.prefix_attention(*inputs, schedule, *options)
            ctx.save_for_backward(*inputs, out, lse, schedule)
            ctx.sequences = None
        else:
            out, lse = _forward(*inputs, *schedule, *options)
            ctx.save_for_backward(*inputs, out, lse)
            ctx.sequences = schedule
        ctx.options = options
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # zeros for lse otherwise
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple:
        if grad is None:
            return (None,) * 16
        tensors, needs = (grad, *ctx.saved_tensors), list(ctx.needs_input_grad[:7])
        if ctx.sequences is not None and is_eager(grad):
            eagerly: Any = _backward
            grads = eagerly(*tensors, *ctx.sequences, *ctx.options, needs)
        else:
            schedule = () if ctx.sequences is None else (flat_of(*ctx.sequences),)
            grads = torch.ops.fastprompt.prefix_attention_backward(*tensors, *schedule, *ctx.options, needs)
        return *(g if need else None for g, need in zip(grads, needs)), *[None] * 9


def _implementation(q, v, prefix_k, alibi_slopes, position_bias, seq, key_seq, window, softcap, dropout_p, requested):
    """The module whose ``forward`` and ``backward`` run the call."""
    if not isinstance(seq, Sequences):
        return module_of("prefix_attention", seq.backend)
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
        alibi=alibi_slopes is not None,
        position_bias=position_bias is not None,
        cross=key_seq is not None,
    )


def _forward(
    q, k, v, prefix_k, prefix_v, sinks, position_bias, alibi_slopes, dropout_seed,
    seq, key_seq, causal, window, softcap, scale, dropout_p, backend,
):  # fmt: skip
    if isinstance(seq, Sequences):
        cache, bank = k.shape[::2] if seq.kind == "decode" else None, None if prefix_k is None else prefix_k.shape[:2]
        seq.cached(("ranges", cache, bank), lambda: checks.check_ranges(k, prefix_k, seq))
    facts = q, v, prefix_k, alibi_slopes, position_bias, seq, key_seq, window, softcap, dropout_p, backend
    runner = _implementation(*facts)
    options = dict(causal=causal, window=window, softcap=softcap, sinks=sinks, scale=scale)
    options |= _given(dropout_p, dropout_seed, alibi_slopes, position_bias, key_seq)
    with without_autocast(q.device.type):
        return runner.forward(q, k, v, prefix_k, prefix_v, seq, **options)


def _backward(
    grad, q, k, v, prefix_k, prefix_v, sinks, position_bias, alibi_slopes, dropout_seed, out, lse,
    seq, key_seq, causal, window, softcap, scale, dropout_p, backend, needs,
):  # fmt: skip
    """Gradients in the order of the inputs, in their dtypes, None for an input that is None or whose is not needed."""
    facts = q, v, prefix_k, alibi_slopes, position_bias, seq, key_seq, window, softcap, dropout_p, backend
    runner = _implementation(*facts)
    inputs = (q, k, v, prefix_k, prefix_v, sinks, position_bias)
    needs = [need and x is not None for x, need in zip(inputs, needs)]
    if needs[6] and not isinstance(seq, Sequences):
        raise NotImplementedError("position_bias has no gradient where the schedule is in tables: give the sequences")
    options = dict(causal=causal, window=window, softcap=softcap, sinks=sinks, scale=scale)
    options |= _given(dropout_p, dropout_seed, alibi_slopes, position_bias, key_seq)
    tensors, grads = (grad, q, k, v, prefix_k, prefix_v, out, lse, seq), [None] * len(inputs)
    with without_autocast(q.device.type):
        if any(needs[:6]):
            grads[:6] = runner.backward(*tensors, **options, needs=needs[:6])
        if needs[6]:
            grads[6] = reference.position_bias_gradient(*tensors, **options)
    return [g.to(x.dtype) if need else None for x, g, need in zip(inputs, grads, needs)]


def _given(dropout_p, dropout_seed, alibi_slopes, position_bias, key_seq):
    """What a backend is told of the features that a call has: one that has not all of them never meets the others."""
    given = {}
    if dropout_p:
        given["dropout"] = Dropout(dropout_p, int(dropout_seed))
    if alibi_slopes is not None:
        given["alibi_slopes"] = alibi_slopes
    if position_bias is not None:
        given["position_bias"] = position_bias
    if key_seq is not None:
        given["key_seq"] = key_seq
    return given


_library = torch.library.Library("fastprompt", "FRAGMENT")
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, Tensor? sinks, Tensor? position_bias, "
    "Tensor? alibi_slopes, Tensor? dropout_seed"
)
_OPTIONS = "Tensor schedule, bool causal, int? window, float? softcap, float scale, float dropout_p, str backend"
_library.define(f"prefix_attention({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)")
_library.define(
    f"prefix_attention_backward(Tensor grad, {_INPUTS}, Tensor out, Tensor lse, {_OPTIONS}, bool[] needs) -> Tensor[]"
)


@torch.library.impl(_library, "prefix_attention", "CompositeExplicitAutograd")
def _forward_op(q, *arguments):
    inputs, schedule, options = arguments[:8], arguments[8], arguments[9:]
    out, lse = _forward(q, *inputs, *read_schedule(schedule, q.device), *options)
    return out.contiguous(), lse.contiguous()


@torch.library.register_fake("fastprompt::prefix_attention", lib=_library)
def _forward_fake(q, k, v, *_):
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=accumulator(q.dtype))
    return q.new_empty(*q.shape[:2], v.shape[-1]), lse


@torch.library.impl(_library, "prefix_attention_backward", "CompositeExplicitAutograd")
def _backward_op(grad, *arguments):
    tensors, schedule, options = arguments[:11], arguments[11], arguments[12:]
    grads = _backward(grad, *tensors, *read_schedule(schedule, grad.device), *options)
    return [grad.new_empty(0) if g is None else g.contiguous() for g in grads]


@torch.library.register_fake("fastprompt::prefix_attention_backward", lib=_library)
def _backward_fake(grad, *arguments):
    inputs, needs = arguments[:7], arguments[-1]
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if need and x is not None else grad.new_empty(0)
        for x, need in zip(inputs, needs)
    ]
