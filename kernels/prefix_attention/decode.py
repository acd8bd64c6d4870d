"""Decode: few queries a sequence. Programs share the keys of long caches; the parts are merged in a second launch.

An item is a tile of queries that share a prefix and a split of its keys, or the queries of one sequence and a split of
their own cache.
"""

import triton.language as tl

from ..launch import Kernel
from .common import LOG2_E, dropout_keys, key_offsets, load_rows, origins, store_rows, tile_of_queries, visible
from .forward import attend


def _decode(
    queries, own, prefix, part_out, part_lse, items, parts, batch, scores, dropout, heads,
    BM: tl.constexpr, BN: tl.constexpr, static: tl.constexpr,
):  # fmt: skip
    # Scalars of the item: queries [q0, q1), keys [k0, k1) of the prefix (-1: the queries' own), number of the part.
    item = items + tl.program_id(0) * 8
    q0, q1, k0, k1 = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    number, part = tl.load(item + 4).to(tl.int64), tl.load(item + 5)
    of_sequence = number < 0
    first_head = tl.program_id(1) * static.FOLD
    kv_head = first_head // static.GROUP

    n = tl.arange(0, BN)
    query, head, row, live = tile_of_queries(q0, q1, first_head, batch, BM, static)
    low, high, prefix_low = visible(query, live, batch, scores.window, static)
    prefix_start, own_start, salt = dropout_keys(query, row, head, live, batch, dropout)
    prefix_origin, own_origin, gain = origins(query, head, live, batch, scores, static)
    start_of, origin = own_start, own_origin
    if dropout is not None:
        start_of = tl.where(of_sequence, own_start, prefix_start)
    if scores.slopes is not None or scores.bias is not None:
        origin = tl.where(of_sequence, own_origin, prefix_origin)
    keys_of, values_of = own.k + kv_head * own.stride_kh, own.v + kv_head * own.stride_vh
    step_k, step_v, shift_k, shift_v = own.stride_kr, own.stride_vr, k0 * own.stride_kr, k0 * own.stride_vr
    if of_sequence:  # its keys [k0, k1) stand side by side in the cache, but for pages
        first = tl.load(batch.key_rows + k0).to(tl.int64)
        shift_k = key_offsets(first, batch.room, own.stride_kb, own.stride_kr, True)
        shift_v = key_offsets(first, batch.room, own.stride_vb, own.stride_vr, True)
    elif prefix is not None:
        keys_of, values_of = prefix.k + kv_head * prefix.stride_kh, prefix.v + kv_head * prefix.stride_vh
        step_k, step_v = prefix.stride_kr, prefix.stride_vr
        shift_k = number * prefix.stride_kb + k0 * prefix.stride_kr
        shift_v = number * prefix.stride_vb + k0 * prefix.stride_vr
        low, high = tl.where(live, prefix_low, 0), tl.where(live, k1, 0)

    q_at = row * queries.stride_row + head * queries.stride_head
    b_q = load_rows(queries.q, q_at, live, static.DH, static.BD)  # [BM, BD]
    state = (
        tl.zeros([BM, static.BV], tl.float32),
        tl.full([BM], float("-inf"), tl.float32),
        tl.zeros([BM], tl.float32),
    )
    for start in range(0, k1 - k0, BN):
        key = k0 + start + n  # [BN]
        k_at, v_at = shift_k + (start + n) * step_k, shift_v + (start + n) * step_v
        if static.PAGES:
            if of_sequence:
                place = tl.load(batch.key_rows + key, mask=key < k1, other=0).to(tl.int64)
                k_at = key_offsets(place, batch.room, own.stride_kb, own.stride_kr, True)
                v_at = key_offsets(place, batch.room, own.stride_vb, own.stride_vr, True)
        b_k = load_rows(keys_of, k_at, key < k1, static.DH, static.BD)  # [BN, BD]
        b_v = load_rows(values_of, v_at, key < k1, static.DV, static.BV)  # [BN, BV]
        seen = (key < k1)[None, :] & (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
        state = attend(state, b_q, b_k, b_v, seen, key, (start_of, salt, origin, gain), scores, dropout, static)

    total, maximum, weights = state
    if dropout is not None:
        total *= dropout.scale
    place = (tl.load(parts + query, mask=live, other=0) + part).to(tl.int64) * heads + head  # [parts, H]
    some = weights > 0
    result = total / tl.where(some, weights, 1.0)[:, None]
    store_rows(part_out, place * static.DV, live, result, static.DV, static.BV)
    tl.store(part_lse + place, tl.where(some, maximum + tl.log(tl.where(some, weights, 1.0)), float("-inf")), mask=live)


def _merge(part_out, part_lse, sinks, output, parts, batch, heads, static: tl.constexpr):
    """The parts of one query and head, in order, and the sink."""
    query, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, static.BV)
    total = tl.zeros([static.BV], tl.float32)
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
        values = tl.load(part_out + place * static.DV + d, mask=d < static.DV, other=0.0)  # [BV]
        total = total * fade + weight * values
        maximum, weights = highest, weights * fade + weight
    row = query.to(tl.int64)
    if static.GATHER:
        row = tl.load(batch.query_rows + query).to(tl.int64)
    to = output.out + row * output.stride_row + head * static.DV + d
    tl.store(to, (total / weights).to(output.out.dtype.element_ty), mask=d < static.DV)
    tl.store(output.lse + head.to(tl.int64) * output.lse_rows + row, maximum + tl.log(weights))


decode = Kernel(_decode)
merge = Kernel(_merge)
