"""Backward: one launch of work items with three roles, and one that adds up the prefix gradients' partial sums.

With weights p = exp(score - lse) and delta = rowsum(dout out): dv = p^T dout, dscore = p (dout v^T - delta),
dq = dscore k, dk = dscore^T q. Dropout's factors, 0 or 1 / (1 - probability), multiply p in dv and dout v^T in dscore.
A *query* item holds queries and runs over their keys; a *key* item holds own keys, or keys of a prefix, and runs over
the queries that see them. Every item makes delta again from out and dout: items of the same rows are launched side by
side, so the rows come from the cache, and no launch has to wait for another. What the kernels are called with stands
in ``arguments.py``.
"""

import triton
import triton.language as tl

from ..launch import Kernel
from . import schedule
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

QUERIES, KEYS, PREFIX = tl.constexpr(schedule.QUERIES), tl.constexpr(schedule.KEYS), tl.constexpr(schedule.PREFIX)


@triton.jit
def load_queries(queries, output, gradient, row, head, live, static: tl.constexpr):
    """``[BM, BD]`` queries, ``[BM, BV]`` gradient of their output, ``[BM]`` lse and delta. Dead rows weigh nothing."""
    b_q = load_rows(queries.q, row * queries.stride_row + head * queries.stride_head, live, static.DH, static.BD)
    do_at = row * gradient.stride_row + head * gradient.stride_head
    b_do = load_rows(gradient.dout, do_at, live, static.DV, static.BV)
    b_out = load_rows(output.out, row * output.stride_row + head * static.DV, live, static.DV, static.BV)
    b_lse = tl.load(output.lse + head.to(tl.int64) * output.lse_rows + row, mask=live, other=float("inf"))
    return b_q, b_do, b_lse, tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)


@triton.jit
def dscores(weight, dweight, delta, capped, static: tl.constexpr):
    result = weight * (dweight - delta)
    if static.SOFTCAP:
        result *= 1 - capped * capped
    return result


@triton.jit
def dq_of_block(dq, loaded, b_k, b_v, seen, key, place, scores, dropout, static: tl.constexpr):
    """``dq [BM, BD]`` with what one block of keys adds; ``loaded``: what load_queries gives; ``place``: see attend."""
    b_q, b_do, b_lse, delta = loaded
    start, salt, origin, gain = place
    score = product(b_q, tl.trans(b_k), static.UPCAST)  # [BM, BN]
    score, capped = scored(score, key[None, :], origin[:, None], gain[:, None], scores, static)
    weight = tl.where(seen, tl.exp2((score - b_lse[:, None]) * LOG2_E), 0.0)
    dweight = product(b_do, tl.trans(b_v), static.UPCAST)
    if dropout is not None:
        used = kept(key[None, :], start[:, None], salt[:, None], dropout.threshold)
        dweight = tl.where(used, dweight * dropout.scale, 0.0)
    dscore = dscores(weight, dweight, delta[:, None], capped, static)
    return dq + product(dscore.to(b_k.dtype), b_k, static.UPCAST)


@triton.jit
def dq_of_queries(
    item, queries, own, prefix, output, gradient, gradients, batch, scores, dropout,
    BM: tl.constexpr, BN: tl.constexpr, static: tl.constexpr,
):  # fmt: skip
    """A query item: queries [q0, q1) run over keys [p0, p1) of their prefix and then over their own, [k0, k1)."""
    q0, q1, k0, k1, number, p0, p1 = item
    first_head = tl.program_id(1) * static.FOLD
    kv_head = first_head // static.GROUP
    n = tl.arange(0, BN)
    query, head, row, live = tile_of_queries(q0, q1, first_head, batch, BM, static)
    low, high, prefix_low = visible(query, live, batch, scores.window, static)
    loaded = load_queries(queries, output, gradient, row, head, live, static)
    prefix_start, own_start, salt = dropout_keys(query, row, head, live, batch, dropout)
    prefix_origin, own_origin, gain = origins(query, head, live, batch, scores, static)
    of_prefix, of_own = (prefix_start, salt, prefix_origin, gain), (own_start, salt, own_origin, gain)
    b_dq = tl.zeros([BM, static.BD], tl.float32)

    if prefix is not None or batch.chains is not None:
        if batch.chains is None:
            prefix_k, prefix_v = prefix.k + kv_head * prefix.stride_kh, prefix.v + kv_head * prefix.stride_vh
        for start in range(p0, p1, BN):
            key = start + n  # [BN]
            if batch.chains is None:
                k_at = number * prefix.stride_kb + key * prefix.stride_kr
                v_at = number * prefix.stride_vb + key * prefix.stride_vr
                b_k = load_rows(prefix_k, k_at, key < p1, static.DH, static.BD)  # [BN, BD]
                b_v = load_rows(prefix_v, v_at, key < p1, static.DV, static.BV)  # [BN, BV]
            else:
                at = chain_rows(number, key, key < p1, batch)
                b_k, b_v = load_keys(own, prefix, at, key < p1, kv_head, static)
            seen = (key < p1)[None, :] & live[:, None]
            if static.WINDOW:
                seen = seen & (key[None, :] >= prefix_low[:, None])
            b_dq = dq_of_block(b_dq, loaded, b_k, b_v, seen, key, of_prefix, scores, dropout, static)

    own_k, own_v = own.k + kv_head * own.stride_kh, own.v + kv_head * own.stride_vh
    for start in range(k0, k1, BN):
        key = start + n
        at = rows_of(key, key < k1, batch.key_rows, static.GATHER or static.CACHE)
        k_at = key_offsets(at, batch.room, own.stride_kb, own.stride_kr, static.CACHE)
        v_at = key_offsets(at, batch.room, own.stride_vb, own.stride_vr, static.CACHE)
        b_k = load_rows(own_k, k_at, key < k1, static.DH, static.BD)
        b_v = load_rows(own_v, v_at, key < k1, static.DV, static.BV)
        seen = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
        b_dq = dq_of_block(b_dq, loaded, b_k, b_v, seen, key, of_own, scores, dropout, static)
    if gradients.dq is not None:
        to = row * gradients.stride_row + head * static.DH
        store_rows(gradients.dq, to, live, b_dq * scores.scale, static.DH, static.BD)


@triton.jit
def dkv_of_block(sums, loaded, b_k, b_v, seen, key, place, scores, dropout, static: tl.constexpr):
    """``dk [BN, BD]`` and ``dv [BN, BV]`` with what one tile of queries adds; the others as in dq_of_block."""
    b_dk, b_dv = sums
    b_q, b_do, b_lse, delta = loaded
    start, salt, origin, gain = place
    score = product(b_k, tl.trans(b_q), static.UPCAST)  # [BN, BM]
    score, capped = scored(score, key[:, None], origin[None, :], gain[None, :], scores, static)
    weight = tl.where(seen, tl.exp2((score - b_lse[None, :]) * LOG2_E), 0.0)
    used = weight
    if dropout is not None:
        keeps = kept(key[:, None], start[None, :], salt[None, :], dropout.threshold)
        used = tl.where(keeps, weight * dropout.scale, 0.0)
    b_dv += product(used.to(b_do.dtype), b_do, static.UPCAST)
    dweight = product(b_v, tl.trans(b_do), static.UPCAST)
    if dropout is not None:
        dweight = tl.where(keeps, dweight * dropout.scale, 0.0)
    dscore = dscores(weight, dweight, delta[None, :], capped, static)
    b_dk += product(dscore.to(b_q.dtype), b_q, static.UPCAST)
    return b_dk, b_dv


@triton.jit
def dkv_of_keys(
    role, item, queries, own, prefix, output, gradient, gradients, batch, scores, dropout, kv_heads,
    BM: tl.constexpr, BN: tl.constexpr, static: tl.constexpr,
):  # fmt: skip
    """A key item: own keys [k0, k1), or those of a prefix, run over queries [q0, q1). The sums of a prefix's keys are
    partial ones, and go to a slot."""
    q0, q1, k0, k1, number, slot, _ = item
    kv_head = tl.program_id(1)
    key = k0 + tl.arange(0, BN)  # [BN], of the prefix or virtual own keys
    real = key < k1
    keys_of, values_of = own.k + kv_head * own.stride_kh, own.v + kv_head * own.stride_vh
    at = rows_of(key, key < tl.where(role == KEYS, k1, k0), batch.key_rows, static.GATHER or static.CACHE)
    k_at = key_offsets(at, batch.room, own.stride_kb, own.stride_kr, static.CACHE)
    v_at = key_offsets(at, batch.room, own.stride_vb, own.stride_vr, static.CACHE)
    if batch.chains is None:
        if prefix is not None:
            if role == PREFIX:
                keys_of = prefix.k + (number * prefix.stride_kb + kv_head * prefix.stride_kh)
                values_of = prefix.v + (number * prefix.stride_vb + kv_head * prefix.stride_vh)
                k_at, v_at = key * prefix.stride_kr, key * prefix.stride_vr
        b_k = load_rows(keys_of, k_at, real, static.DH, static.BD)  # [BN, BD]
        b_v = load_rows(values_of, v_at, real, static.DV, static.BV)  # [BN, BV]
    else:
        in_chain = key < tl.where(role == PREFIX, k1, k0)
        from_at = tl.where(in_chain, chain_rows(number, key, in_chain, batch), at)
        b_k, b_v = load_keys(own, prefix, from_at, real, kv_head, static)
    sums = tl.zeros([BN, static.BD], tl.float32), tl.zeros([BN, static.BV], tl.float32)

    for part in range(static.GROUP // static.FOLD):
        for start in range(q0, q1, BM // static.FOLD):
            first_head = kv_head * static.GROUP + part * static.FOLD
            query, head, row, live = tile_of_queries(start, q1, first_head, batch, BM, static)
            low, high, prefix_low = visible(query, live, batch, scores.window, static)
            if role == PREFIX:
                low, high = tl.where(live, prefix_low, 0), tl.where(live, k1, 0)
            loaded = load_queries(queries, output, gradient, row, head, live, static)
            seen = real[:, None] & (key[:, None] >= low[None, :]) & (key[:, None] < high[None, :])
            prefix_start, start_of, salt = dropout_keys(query, row, head, live, batch, dropout)
            if dropout is not None:
                start_of = tl.where(role == PREFIX, prefix_start, start_of)
            prefix_origin, origin, gain = origins(query, head, live, batch, scores, static)
            if scores.slopes is not None or scores.bias is not None:
                origin = tl.where(role == PREFIX, prefix_origin, origin)
            place = start_of, salt, origin, gain
            sums = dkv_of_block(sums, loaded, b_k, b_v, seen, key, place, scores, dropout, static)

    b_dk, b_dv = sums
    if role == PREFIX:
        if gradients.partial_k is not None:
            # [slots, BN, Hkv, DH] and [slots, BN, Hkv, DV]
            place = (slot.to(tl.int64) * BN + tl.arange(0, BN)) * kv_heads + kv_head
            store_rows(gradients.partial_k, place * static.DH, real, b_dk * scores.scale, static.DH, static.BD)
            store_rows(gradients.partial_v, place * static.DV, real, b_dv, static.DV, static.BV)
    elif gradients.dk is not None:
        dk_at = key_offsets(at, batch.room, gradients.stride_kb, gradients.stride_kr, static.CACHE)
        dv_at = key_offsets(at, batch.room, gradients.stride_vb, gradients.stride_vr, static.CACHE)
        dk_at += kv_head * gradients.stride_kh
        dv_at += kv_head * gradients.stride_vh
        store_rows(gradients.dk, dk_at, real, b_dk * scores.scale, static.DH, static.BD)
        store_rows(gradients.dv, dv_at, real, b_dv, static.DV, static.BV)


def _backward(
    queries, own, prefix, output, gradient, gradients, items, batch, scores, dropout, kv_heads,
    BM: tl.constexpr, BN: tl.constexpr, KEYS_BM: tl.constexpr, KEYS_BN: tl.constexpr, static: tl.constexpr,
):  # fmt: skip
    first = items + tl.program_id(0) * 8
    role, q0, q1, k0, k1 = (
        tl.load(first),
        tl.load(first + 1),
        tl.load(first + 2),
        tl.load(first + 3),
        tl.load(first + 4),
    )
    item = q0, q1, k0, k1, tl.load(first + 5).to(tl.int64), tl.load(first + 6), tl.load(first + 7)
    if role == QUERIES:
        dq_of_queries(
            item, queries, own, prefix, output, gradient, gradients, batch, scores, dropout, BM, BN, static,
        )  # fmt: skip
    elif tl.program_id(1) < kv_heads:  # query items need more programs where a group of heads is folded in parts
        dkv_of_keys(
            role, item, queries, own, prefix, output, gradient, gradients, batch, scores, dropout, kv_heads,
            KEYS_BM, KEYS_BN, static,
        )  # fmt: skip


def _reduce(
    partial_k, partial_v, dprefix_k, dprefix_v, slots, length, kv_heads, blocks,
    KEYS_BN: tl.constexpr, ROWS: tl.constexpr, static: tl.constexpr,
):  # fmt: skip
    """A few keys of one prefix: their partial sums in the order of the query chunks; zero where nobody reads them."""
    tiles = (length + ROWS - 1) // ROWS
    prefix, kv_head = tl.program_id(0) // tiles, tl.program_id(1)
    key = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    entry = slots + (prefix * blocks + (tl.program_id(0) % tiles) * ROWS // KEYS_BN) * 3
    first, last, used = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    b_dk, b_dv = tl.zeros([ROWS, static.BD], tl.float32), tl.zeros([ROWS, static.BV], tl.float32)
    for slot in range(first, last):
        place = (slot * KEYS_BN + (key % KEYS_BN).to(tl.int64)) * kv_heads + kv_head
        b_dk += load_rows(partial_k, place * static.DH, key < used, static.DH, static.BD)
        b_dv += load_rows(partial_v, place * static.DV, key < used, static.DV, static.BV)
    to = (prefix.to(tl.int64) * length + key) * kv_heads + kv_head
    store_rows(dprefix_k, to * static.DH, key < length, b_dk, static.DH, static.BD)
    store_rows(dprefix_v, to * static.DV, key < length, b_dv, static.DV, static.BV)


def _add_up(
    partial_k, partial_v, dk, dv, tiles, links, slots, kv_heads, blocks,
    KEYS_BN: tl.constexpr, ROWS: tl.constexpr, static: tl.constexpr,
):  # fmt: skip
    """A few keys of a piece of chains: their partial sums, chain by chain and in the order of the query chunks, onto
    their gradients."""
    tile, kv_head = tiles + tl.program_id(0) * 8, tl.program_id(1)
    row, count, number = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    n = tl.arange(0, ROWS)
    live = n < count
    b_dk, b_dv = tl.zeros([ROWS, static.BD], tl.float32), tl.zeros([ROWS, static.BV], tl.float32)
    for link in range(tl.load(tile + 3), tl.load(tile + 4)):
        first_place = tl.load(links + 2 * link + 1) + number
        of_chain = slots + tl.load(links + 2 * link) * blocks * 3
        chunks = of_chain + first_place // KEYS_BN * 3  # as many for all blocks of a chain
        place = first_place + n
        slot = tl.load(of_chain + place // KEYS_BN * 3, mask=live, other=0)
        for chunk in range(tl.load(chunks + 1) - tl.load(chunks)):
            at = ((slot + chunk).to(tl.int64) * KEYS_BN + place % KEYS_BN) * kv_heads + kv_head
            b_dk += load_rows(partial_k, at * static.DH, live, static.DH, static.BD)
            b_dv += load_rows(partial_v, at * static.DV, live, static.DV, static.BV)
    to = (row + n) * kv_heads + kv_head
    b_dk += load_rows(dk, to * static.DH, live, static.DH, static.BD)
    b_dv += load_rows(dv, to * static.DV, live, static.DV, static.BV)
    store_rows(dk, to * static.DH, live, b_dk, static.DH, static.BD)
    store_rows(dv, to * static.DV, live, b_dv, static.DV, static.BV)


backward = Kernel(_backward)
reduce = Kernel(_reduce)
add_up = Kernel(_add_up)
