"""Forward: a program holds a tile of queries and runs one online softmax over its prefix and then its own keys."""

import triton
import triton.language as tl

from ..launch import Kernel
from .common import (
    LOG2_E,
    cap,
    dropout_keys,
    kept,
    key_offsets,
    load_rows,
    product,
    rows_of,
    store_rows,
    tile_of_queries,
    visible,
)  # fmt: skip


@triton.jit
def attend(
    state, query, keys, values, seen, key, start, salt, threshold, scale, softcap,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running ``(sum of values [BM, BD], maximum [BM], sum of weights [BM])``.

    Dropout (no threshold: none) takes weights from their values and not from the sum, ``key [BN]`` and what
    dropout_keys gives say which. The exponential is exp2, the cheaper one; its factor waits until the maximum is
    subtracted, where it rounds least.
    """
    total, maximum, weights = state
    score, _ = cap(product(query, tl.trans(keys), UPCAST), scale, softcap, SOFTCAP)  # [BM, BN]
    score = tl.where(seen, score, float("-inf"))
    highest = tl.maximum(maximum, tl.max(score, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)  # nothing seen so far: no inf - inf
    weight = tl.exp2((score - base[:, None]) * LOG2_E)
    fade = tl.exp2((maximum - base) * LOG2_E)
    if threshold is None:
        total = total * fade[:, None] + product(weight.to(values.dtype), values, UPCAST)
        added = tl.sum(weight, 1)
    else:  # the sum first, so that both sorts of weights do not need registers at once
        added = tl.sum(weight, 1)
        weight = tl.where(kept(key[None, :], start[:, None], salt[:, None], threshold), weight, 0.0)
        total = total * fade[:, None] + product(weight.to(values.dtype), values, UPCAST)
    return total, highest, weights * fade + added


def _forward(
    q, k, v, prefix_k, prefix_v, sinks, out, lse, tiles, query_rows, key_rows, spans,
    queries, room, window, scale, softcap, seed_low, seed_high, threshold, keep_scale,
    stride_qr, stride_qh, stride_kb, stride_kr, stride_kh, stride_vb, stride_vr, stride_vh,
    stride_pkn, stride_pkr, stride_pkh, stride_pvn, stride_pvr, stride_pvh, lse_rows, stride_or,
    GROUP: tl.constexpr, FOLD: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, GATHER: tl.constexpr, CACHE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    # Scalars of the tile: queries [q0, q1), own keys [k0, k1), prefix and its keys [p0, p1).
    tile = tiles + tl.program_id(0) * 8
    q0, q1, k0, k1 = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    first_head = tl.program_id(1) * FOLD
    kv_head = first_head // GROUP

    n = tl.arange(0, BN)
    query, head, row, live = tile_of_queries(q0, q1, first_head, query_rows, BM, FOLD, GATHER)
    low, high, prefix_low = visible(query, live, spans, queries, window, CAUSAL, WINDOW, CACHE)
    prefix_start, own_start, salt = dropout_keys(query, row, head, live, spans, queries, seed_low, seed_high)
    b_q = load_rows(q, row * stride_qr + head * stride_qh, live, DH, BD)  # [BM, BD]
    state = (tl.zeros([BM, BD], tl.float32), tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32))

    if prefix_k is not None:
        prefix, p0, p1 = tl.load(tile + 4).to(tl.int64), tl.load(tile + 5), tl.load(tile + 6)
        prefix_k += prefix * stride_pkn + kv_head * stride_pkh
        prefix_v += prefix * stride_pvn + kv_head * stride_pvh
        for start in range(p0, p1, BN):
            key = start + n  # [BN]
            b_k = load_rows(prefix_k, key.to(tl.int64) * stride_pkr, key < p1, DH, BD)  # [BN, BD]
            b_v = load_rows(prefix_v, key.to(tl.int64) * stride_pvr, key < p1, DH, BD)
            seen = (key < p1)[None, :] & live[:, None]
            if WINDOW:
                seen = seen & (key[None, :] >= prefix_low[:, None])
            state = attend(
                state, b_q, b_k, b_v, seen, key, prefix_start, salt, threshold, scale, softcap, SOFTCAP, UPCAST
            )

    k += kv_head * stride_kh
    v += kv_head * stride_vh
    for start in range(k0, k1, BN):
        key = start + n
        at = rows_of(key, key < k1, key_rows, GATHER or CACHE)
        b_k = load_rows(k, key_offsets(at, room, stride_kb, stride_kr, CACHE), key < k1, DH, BD)  # [BN, BD]
        b_v = load_rows(v, key_offsets(at, room, stride_vb, stride_vr, CACHE), key < k1, DH, BD)
        seen = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
        state = attend(state, b_q, b_k, b_v, seen, key, own_start, salt, threshold, scale, softcap, SOFTCAP, UPCAST)

    total, maximum, weights = state
    if sinks is not None:  # a logit without a value
        sink = tl.load(sinks + head).to(tl.float32)
        highest = tl.maximum(maximum, sink)
        fade = tl.exp2((maximum - highest) * LOG2_E)
        total, maximum = total * fade[:, None], highest
        weights = weights * fade + tl.exp2((sink - highest) * LOG2_E)
    if threshold is not None:
        total *= keep_scale
    weights = tl.where(live, weights, 1.0)
    store_rows(out, row * stride_or + head * DH, live, total / weights[:, None], DH, BD)
    tl.store(lse + head.to(tl.int64) * lse_rows + row, maximum + tl.log(weights), mask=live)


forward = Kernel(_forward)
