"""Backward: one launch of work items with three roles, and one that adds up the prefix gradients' partial sums.

With weights p = exp(score - lse) and delta = rowsum(dout out): dv = p^T dout, dscore = p (dout v^T - delta),
dq = dscore k, dk = dscore^T q. Dropout's factors, 0 or 1 / (1 - probability), multiply p in dv and dout v^T in dscore.
A *query* item holds queries and runs over their keys; a *key* item holds own keys, or keys of a prefix, and runs over
the queries that see them. Every item makes delta again from out and dout: items of the same rows are launched side by
side, so the rows come from the cache, and no launch has to wait for another.
"""

import triton
import triton.language as tl

from ..launch import Kernel
from . import schedule
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

QUERIES, KEYS, PREFIX = tl.constexpr(schedule.QUERIES), tl.constexpr(schedule.KEYS), tl.constexpr(schedule.PREFIX)


@triton.jit
def load_queries(
    q, out, dout, lse, row, head, live, lse_rows, stride_qr, stride_qh, stride_or, stride_dor, stride_doh,
    DH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Queries and the gradient of their output ``[BM, BD]``, lse and delta ``[BM]``. Dead rows weigh nothing."""
    b_q = load_rows(q, row * stride_qr + head * stride_qh, live, DH, BD)
    b_do = load_rows(dout, row * stride_dor + head * stride_doh, live, DH, BD)
    b_out = load_rows(out, row * stride_or + head * DH, live, DH, BD)
    b_lse = tl.load(lse + head.to(tl.int64) * lse_rows + row, mask=live, other=float("inf"))
    return b_q, b_do, b_lse, tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)


@triton.jit
def dscores(weight, dweight, delta, capped, SOFTCAP: tl.constexpr):
    result = weight * (dweight - delta)
    if SOFTCAP:
        result *= 1 - capped * capped
    return result


@triton.jit
def dq_of_block(
    dq, b_q, b_k, b_v, b_do, b_lse, delta, seen, key, start, salt, threshold, keep_scale, scale, softcap,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    score, capped = cap(product(b_q, tl.trans(b_k), UPCAST), scale, softcap, SOFTCAP)  # [BM, BN]
    weight = tl.where(seen, tl.exp2((score - b_lse[:, None]) * LOG2_E), 0.0)
    dweight = product(b_do, tl.trans(b_v), UPCAST)
    if threshold is not None:
        used = kept(key[None, :], start[:, None], salt[:, None], threshold)
        dweight = tl.where(used, dweight * keep_scale, 0.0)
    dscore = dscores(weight, dweight, delta[:, None], capped, SOFTCAP)
    return dq + product(dscore.to(b_k.dtype), b_k, UPCAST)


def _backward(
    q, k, v, prefix_k, prefix_v, out, dout, lse, dq, dk, dv, partial_k, partial_v, items, query_rows, key_rows, spans,
    queries, room, window, scale, softcap, seed_low, seed_high, threshold, keep_scale, kv_heads,
    stride_qr, stride_qh, stride_kb, stride_kr, stride_kh, stride_vb, stride_vr, stride_vh,
    stride_pkn, stride_pkr, stride_pkh, stride_pvn, stride_pvr, stride_pvh, lse_rows, stride_or,
    stride_dor, stride_doh, stride_dkb, stride_dkr, stride_dkh,
    GROUP: tl.constexpr, FOLD: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, KEYS_BM: tl.constexpr, KEYS_BN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, GATHER: tl.constexpr, CACHE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    # Scalars of the item: role, queries [q0, q1), keys [k0, k1), prefix, and [p0, p1) or the place of the partial sums.
    item = items + tl.program_id(0) * 8
    role, q0, q1, k0, k1 = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3), tl.load(item + 4)
    prefix = tl.load(item + 5).to(tl.int64)

    if role == QUERIES:
        first_head = tl.program_id(1) * FOLD
        kv_head = first_head // GROUP
        n = tl.arange(0, BN)
        query, head, row, live = tile_of_queries(q0, q1, first_head, query_rows, BM, FOLD, GATHER)
        low, high, prefix_low = visible(query, live, spans, queries, window, CAUSAL, WINDOW, CACHE)
        b_q, b_do, b_lse, delta = load_queries(
            q, out, dout, lse, row, head, live, lse_rows,
            stride_qr, stride_qh, stride_or, stride_dor, stride_doh, DH, BD,
        )  # fmt: skip
        prefix_start, own_start, salt = dropout_keys(query, row, head, live, spans, queries, seed_low, seed_high)
        b_dq = tl.zeros([BM, BD], tl.float32)

        if prefix_k is not None:
            p0, p1 = tl.load(item + 6), tl.load(item + 7)
            keys_of, values_of = prefix_k + kv_head * stride_pkh, prefix_v + kv_head * stride_pvh
            for start in range(p0, p1, BN):
                key = start + n  # [BN]
                b_k = load_rows(keys_of, prefix * stride_pkn + key * stride_pkr, key < p1, DH, BD)  # [BN, BD]
                b_v = load_rows(values_of, prefix * stride_pvn + key * stride_pvr, key < p1, DH, BD)
                seen = (key < p1)[None, :] & live[:, None]
                if WINDOW:
                    seen = seen & (key[None, :] >= prefix_low[:, None])
                b_dq = dq_of_block(
                    b_dq, b_q, b_k, b_v, b_do, b_lse, delta, seen, key, prefix_start, salt, threshold, keep_scale,
                    scale, softcap, SOFTCAP, UPCAST,
                )  # fmt: skip

        for start in range(k0, k1, BN):
            key = start + n
            at = rows_of(key, key < k1, key_rows, GATHER or CACHE)
            b_k = load_rows(
                k + kv_head * stride_kh, key_offsets(at, room, stride_kb, stride_kr, CACHE), key < k1, DH, BD
            )
            b_v = load_rows(
                v + kv_head * stride_vh, key_offsets(at, room, stride_vb, stride_vr, CACHE), key < k1, DH, BD
            )
            seen = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
            b_dq = dq_of_block(
                b_dq, b_q, b_k, b_v, b_do, b_lse, delta, seen, key, own_start, salt, threshold, keep_scale,
                scale, softcap, SOFTCAP, UPCAST,
            )  # fmt: skip
        if dq is not None:
            store_rows(dq, row * stride_or + head * DH, live, b_dq * scale, DH, BD)

    elif tl.program_id(1) < kv_heads:  # query items need more programs where a group of heads is folded in parts
        kv_head = tl.program_id(1)
        key = k0 + tl.arange(0, KEYS_BN)  # [BN], of the prefix or virtual own keys
        real = key < k1
        keys_of, values_of = k + kv_head * stride_kh, v + kv_head * stride_vh
        at = rows_of(key, key < tl.where(role == KEYS, k1, k0), key_rows, GATHER or CACHE)  # not of prefix keys
        k_at, v_at = (
            key_offsets(at, room, stride_kb, stride_kr, CACHE),
            key_offsets(at, room, stride_vb, stride_vr, CACHE),
        )
        if prefix_k is not None:
            if role == PREFIX:
                keys_of = prefix_k + (prefix * stride_pkn + kv_head * stride_pkh)
                values_of = prefix_v + (prefix * stride_pvn + kv_head * stride_pvh)
                k_at, v_at = key * stride_pkr, key * stride_pvr
        b_k, b_v = load_rows(keys_of, k_at, real, DH, BD), load_rows(values_of, v_at, real, DH, BD)  # [BN, BD]
        b_dk, b_dv = tl.zeros([KEYS_BN, BD], tl.float32), tl.zeros([KEYS_BN, BD], tl.float32)

        for part in range(GROUP // FOLD):
            for start in range(q0, q1, KEYS_BM // FOLD):
                first_head = kv_head * GROUP + part * FOLD
                query, head, row, live = tile_of_queries(start, q1, first_head, query_rows, KEYS_BM, FOLD, GATHER)
                low, high, prefix_low = visible(query, live, spans, queries, window, CAUSAL, WINDOW, CACHE)
                if role == PREFIX:
                    low, high = tl.where(live, prefix_low, 0), tl.where(live, k1, 0)
                b_q, b_do, b_lse, delta = load_queries(
                    q, out, dout, lse, row, head, live, lse_rows,
                    stride_qr, stride_qh, stride_or, stride_dor, stride_doh, DH, BD,
                )  # fmt: skip

                seen = real[:, None] & (key[:, None] >= low[None, :]) & (key[:, None] < high[None, :])
                score, capped = cap(product(b_k, tl.trans(b_q), UPCAST), scale, softcap, SOFTCAP)  # [BN, BM]
                weight = tl.where(seen, tl.exp2((score - b_lse[None, :]) * LOG2_E), 0.0)
                used = weight
                if threshold is not None:
                    prefix_start, own_start, salt = dropout_keys(
                        query, row, head, live, spans, queries, seed_low, seed_high
                    )
                    start_of = tl.where(role == PREFIX, prefix_start, own_start)
                    keeps = kept(key[:, None], start_of[None, :], salt[None, :], threshold)
                    used = tl.where(keeps, weight * keep_scale, 0.0)
                b_dv += product(used.to(b_do.dtype), b_do, UPCAST)
                dweight = product(b_v, tl.trans(b_do), UPCAST)
                if threshold is not None:
                    dweight = tl.where(keeps, dweight * keep_scale, 0.0)
                dscore = dscores(weight, dweight, delta[None, :], capped, SOFTCAP)
                b_dk += product(dscore.to(b_q.dtype), b_q, UPCAST)

        if role == PREFIX:
            if partial_k is not None:
                # [slots, KEYS_BN, Hkv, DH]
                place = (tl.load(item + 6).to(tl.int64) * KEYS_BN + tl.arange(0, KEYS_BN)) * kv_heads + kv_head
                store_rows(partial_k, place * DH, real, b_dk * scale, DH, BD)
                store_rows(partial_v, place * DH, real, b_dv, DH, BD)
        elif dk is not None:
            to = kv_head * stride_dkh + key_offsets(at, room, stride_dkb, stride_dkr, CACHE)
            store_rows(dk, to, real, b_dk * scale, DH, BD)
            store_rows(dv, to, real, b_dv, DH, BD)


def _reduce(
    partial_k, partial_v, dprefix_k, dprefix_v, slots, length, kv_heads, blocks,
    DH: tl.constexpr, BD: tl.constexpr, KEYS_BN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A few keys of one prefix: their partial sums in the order of the query chunks; zero where nobody reads them."""
    tiles = (length + ROWS - 1) // ROWS
    prefix, kv_head = tl.program_id(0) // tiles, tl.program_id(1)
    key = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    entry = slots + (prefix * blocks + (tl.program_id(0) % tiles) * ROWS // KEYS_BN) * 3
    first, last, used = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    b_dk, b_dv = tl.zeros([ROWS, BD], tl.float32), tl.zeros([ROWS, BD], tl.float32)
    for slot in range(first, last):
        place = ((slot * KEYS_BN + (key % KEYS_BN).to(tl.int64)) * kv_heads + kv_head) * DH
        b_dk += load_rows(partial_k, place, key < used, DH, BD)
        b_dv += load_rows(partial_v, place, key < used, DH, BD)
    to = ((prefix.to(tl.int64) * length + key) * kv_heads + kv_head) * DH
    store_rows(dprefix_k, to, key < length, b_dk, DH, BD)
    store_rows(dprefix_v, to, key < length, b_dv, DH, BD)


backward = Kernel(_backward)
reduce = Kernel(_reduce)
