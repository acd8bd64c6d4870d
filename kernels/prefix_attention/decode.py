"""Decode: one query a sequence. Programs share the keys of long caches; the parts are merged in a second launch.

An item is a tile of queries that share a prefix and a split of its keys, or one query and a split of its own cache.
"""

import triton.language as tl

from ..launch import Kernel
from .common import LOG2_E, dropout_keys, key_offsets, load_rows, store_rows, tile_of_queries, visible
from .forward import attend


def _decode(
    q, k, v, prefix_k, prefix_v, part_out, part_lse, items, parts, query_rows, key_rows, spans,
    queries, room, window, scale, softcap, seed_low, seed_high, threshold, keep_scale, heads,
    stride_qr, stride_qh, stride_kb, stride_kr, stride_kh, stride_vb, stride_vr, stride_vh,
    stride_pkn, stride_pkr, stride_pkh, stride_pvn, stride_pvr, stride_pvh,
    GROUP: tl.constexpr, FOLD: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, GATHER: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # Scalars of the item: queries [q0, q1), keys [k0, k1) of the prefix (-1: the query's own), number of the part.
    item = items + tl.program_id(0) * 8
    q0, q1, k0, k1 = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    prefix, part = tl.load(item + 4).to(tl.int64), tl.load(item + 5)
    own = prefix < 0
    first_head = tl.program_id(1) * FOLD
    kv_head = first_head // GROUP

    n = tl.arange(0, BN)
    query, head, row, live = tile_of_queries(q0, q1, first_head, query_rows, BM, FOLD, GATHER)
    low, high, prefix_low = visible(query, live, spans, queries, window, CAUSAL, WINDOW, True)
    prefix_start, own_start, salt = dropout_keys(query, row, head, live, spans, queries, seed_low, seed_high)
    start_of = own_start
    if threshold is not None:
        start_of = tl.where(own, own_start, prefix_start)
    keys_of, values_of = k + kv_head * stride_kh, v + kv_head * stride_vh
    step_k, step_v, shift_k, shift_v = stride_kr, stride_vr, k0 * stride_kr, k0 * stride_vr
    if own:  # one sequence: its keys [k0, k1) stand side by side in the cache
        first = tl.load(key_rows + k0).to(tl.int64)
        shift_k = key_offsets(first, room, stride_kb, stride_kr, True)
        shift_v = key_offsets(first, room, stride_vb, stride_vr, True)
    elif prefix_k is not None:
        keys_of, values_of = prefix_k + kv_head * stride_pkh, prefix_v + kv_head * stride_pvh
        step_k, step_v = stride_pkr, stride_pvr
        shift_k, shift_v = prefix * stride_pkn + k0 * stride_pkr, prefix * stride_pvn + k0 * stride_pvr
        low, high = tl.where(live, prefix_low, 0), tl.where(live, k1, 0)

    b_q = load_rows(q, row * stride_qr + head * stride_qh, live, DH, BD)  # [BM, BD]
    state = (tl.zeros([BM, BD], tl.float32), tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32))
    for start in range(0, k1 - k0, BN):
        key = k0 + start + n  # [BN]
        b_k = load_rows(keys_of, shift_k + (start + n) * step_k, key < k1, DH, BD)  # [BN, BD]
        b_v = load_rows(values_of, shift_v + (start + n) * step_v, key < k1, DH, BD)
        seen = (key < k1)[None, :] & (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
        state = attend(state, b_q, b_k, b_v, seen, key, start_of, salt, threshold, scale, softcap, SOFTCAP, UPCAST)

    total, maximum, weights = state
    if threshold is not None:
        total *= keep_scale
    place = (tl.load(parts + query, mask=live, other=0) + part).to(tl.int64) * heads + head  # [parts, H]
    some = weights > 0
    store_rows(part_out, place * DH, live, total / tl.where(some, weights, 1.0)[:, None], DH, BD)
    tl.store(part_lse + place, tl.where(some, maximum + tl.log(tl.where(some, weights, 1.0)), float("-inf")), mask=live)


def _merge(
    part_out, part_lse, sinks, out, lse, parts, query_rows, heads, lse_rows, stride_or,
    DH: tl.constexpr, BD: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """The parts of one query and head, in order, and the sink."""
    query, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BD)
    total = tl.zeros([BD], tl.float32)
    maximum, weights = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
    if sinks is not None:
        maximum, weights = tl.load(sinks + head).to(tl.float32), weights + 1.0
    first = tl.load(parts + query).to(tl.int64)
    for part in range(0, tl.load(parts + query + 1) - tl.load(parts + query)):
        place = (first + part) * heads + head
        part_weight = tl.load(part_lse + place)
        highest = tl.maximum(maximum, part_weight)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        fade, weight = tl.exp2((maximum - base) * LOG2_E), tl.exp2((part_weight - base) * LOG2_E)
        total = total * fade + weight * tl.load(part_out + place * DH + d, mask=d < DH, other=0.0)  # [BD]
        maximum, weights = highest, weights * fade + weight
    row = query.to(tl.int64)
    if GATHER:
        row = tl.load(query_rows + query).to(tl.int64)
    tl.store(out + row * stride_or + head * DH + d, (total / weights).to(out.dtype.element_ty), mask=d < DH)
    tl.store(lse + head.to(tl.int64) * lse_rows + row, maximum + tl.log(weights))


decode = Kernel(_decode)
merge = Kernel(_merge)
