"""Forward: a program holds a tile of queries and runs one online softmax over its prefix and then its own keys."""

import triton
import triton.language as tl

from ..launch import Kernel
from .common import (
    LOG2_E,
    chain_rows,
    dropout_keys,
    kept,
    key_offsets,
    load_keys,
    load_rows,
    origins,
    product,
    rows_of,
    scored,
    store_rows,
    tile_of_queries,
    visible,
)  # fmt: skip


@triton.jit
def attend(state, query, keys, values, seen, key, place, scores, dropout, static: tl.constexpr):
    """One block of keys into the running ``(sum of values [BM, BV], maximum [BM], sum of weights [BM])``.

    Dropout takes weights from their values and not from the sum. ``key [BN]`` and ``place``, what dropout_keys and
    origins give, say which, and what scores gain.
    The exponential is exp2, the cheaper one; its factor waits until the maximum is subtracted, where it rounds least.
    """
    total, maximum, weights = state
    start, salt, origin, gain = place
    score = product(query, tl.trans(keys), static.UPCAST)  # [BM, BN]
    score, _ = scored(score, key[None, :], origin[:, None], gain[:, None], scores, static)
    score = tl.where(seen, score, float("-inf"))
    highest = tl.maximum(maximum, tl.max(score, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)  # nothing seen so far: no inf - inf
    weight = tl.exp2((score - base[:, None]) * LOG2_E)
    fade = tl.exp2((maximum - base) * LOG2_E)
    if dropout is None:
        total = total * fade[:, None] + product(weight.to(values.dtype), values, static.UPCAST)
        added = tl.sum(weight, 1)
    else:  # the sum first, so that both sorts of weights do not need registers at once
        added = tl.sum(weight, 1)
        weight = tl.where(kept(key[None, :], start[:, None], salt[:, None], dropout.threshold), weight, 0.0)
        total = total * fade[:, None] + product(weight.to(values.dtype), values, static.UPCAST)
    return total, highest, weights * fade + added


def _forward(
    queries, own, prefix, sinks, output, tiles, batch, scores, dropout,
    BM: tl.constexpr, BN: tl.constexpr, static: tl.constexpr,
):  # fmt: skip
    # Scalars of the tile: queries [q0, q1), own keys [k0, k1), prefix and its keys [p0, p1).
    tile = tiles + tl.program_id(0) * 8
    q0, q1, k0, k1 = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    first_head = tl.program_id(1) * static.FOLD
    kv_head = first_head // static.GROUP

    n = tl.arange(0, BN)
    query, head, row, live = tile_of_queries(q0, q1, first_head, batch, BM, static)
    low, high, prefix_low = visible(query, live, batch, scores.window, static)
    prefix_start, own_start, salt = dropout_keys(query, row, head, live, batch, dropout)
    prefix_origin, own_origin, gain = origins(query, head, live, batch, scores, static)
    q_at = row * queries.stride_row + head * queries.stride_head
    b_q = load_rows(queries.q, q_at, live, static.DH, static.BD)  # [BM, BD]
    state = (
        tl.zeros([BM, static.BV], tl.float32),
        tl.full([BM], float("-inf"), tl.float32),
        tl.zeros([BM], tl.float32),
    )

    of_prefix, of_own = (prefix_start, salt, prefix_origin, gain), (own_start, salt, own_origin, gain)
    if prefix is not None or batch.chains is not None:
        number, p0, p1 = tl.load(tile + 4).to(tl.int64), tl.load(tile + 5), tl.load(tile + 6)
        if batch.chains is None:
            prefix_k = prefix.k + (number * prefix.stride_kb + kv_head * prefix.stride_kh)
            prefix_v = prefix.v + (number * prefix.stride_vb + kv_head * prefix.stride_vh)
        for start in range(p0, p1, BN):
            key = start + n  # [BN]
            if batch.chains is None:
                b_k = load_rows(prefix_k, key.to(tl.int64) * prefix.stride_kr, key < p1, static.DH, static.BD)
                b_v = load_rows(prefix_v, key.to(tl.int64) * prefix.stride_vr, key < p1, static.DV, static.BV)
            else:
                at = chain_rows(number, key, key < p1, batch)
                b_k, b_v = load_keys(own, prefix, at, key < p1, kv_head, static)
            seen = (key < p1)[None, :] & live[:, None]
            if static.WINDOW:
                seen = seen & (key[None, :] >= prefix_low[:, None])
            state = attend(state, b_q, b_k, b_v, seen, key, of_prefix, scores, dropout, static)

    own_k, own_v = own.k + kv_head * own.stride_kh, own.v + kv_head * own.stride_vh
    for start in range(k0, k1, BN):
        key = start + n
        at = rows_of(key, key < k1, batch.key_rows, static.GATHER or static.CACHE)
        k_at = key_offsets(at, batch.room, own.stride_kb, own.stride_kr, static.CACHE)
        v_at = key_offsets(at, batch.room, own.stride_vb, own.stride_vr, static.CACHE)
        b_k = load_rows(own_k, k_at, key < k1, static.DH, static.BD)  # [BN, BD]
        b_v = load_rows(own_v, v_at, key < k1, static.DV, static.BV)  # [BN, BV]
        seen = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
        state = attend(state, b_q, b_k, b_v, seen, key, of_own, scores, dropout, static)

    total, maximum, weights = state
    if sinks is not None:  # a logit without a value
        sink = tl.load(sinks + head).to(tl.float32)
        highest = tl.maximum(maximum, sink)
        fade = tl.exp2((maximum - highest) * LOG2_E)
        total, maximum = total * fade[:, None], highest
        weights = weights * fade + tl.exp2((sink - highest) * LOG2_E)
    if dropout is not None:
        total *= dropout.scale
    weights = tl.where(live, weights, 1.0)
    to = row * output.stride_row + head * static.DV
    store_rows(output.out, to, live, total / weights[:, None], static.DV, static.BV)
    tl.store(output.lse + head.to(tl.int64) * output.lse_rows + row, maximum + tl.log(weights), mask=live)


forward = Kernel(_forward)
