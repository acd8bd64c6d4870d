"""What the forward, backward and decode kernels share: addresses, visibility and scores.

The groups ``batch``, ``scores``, ``dropout`` and ``static`` are those of ``arguments.py``.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
DROPOUT_STEP = tl.constexpr(0x9E3779B9)


@triton.jit
def rows_of(virtual, live, rows, GATHER: tl.constexpr):
    """The rows in memory of virtual rows, int64; the same numbers where the batch already stands in that order."""
    if GATHER:
        return tl.load(rows + virtual, mask=live, other=0).to(tl.int64)
    return virtual.to(tl.int64)


@triton.jit
def tile_of_queries(first, last, first_head, batch, BM: tl.constexpr, static: tl.constexpr):
    """``[BM]`` each: virtual query, head, row in memory and whether there is one, of the queries from ``first`` on."""
    m = tl.arange(0, BM)
    query, head = first + m // static.FOLD, first_head + m % static.FOLD
    live = (query < last) & (m // static.FOLD < BM // static.FOLD)
    return query, head, rows_of(query, live, batch.query_rows, static.GATHER), live


@triton.jit
def key_offsets(row, room, stride_batch, stride_row, CACHE: tl.constexpr):
    """Offsets of own keys: rows of ``[Rk, Hkv, Dh]``, or places ``b * room + j`` in the rows or pages of a cache
    ``[B, Hkv, room, Dh]``."""
    if CACHE:
        return (row // room) * stride_batch + (row % room) * stride_row
    return row * stride_row


@triton.jit
def load_rows(base, offsets, live, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """``[n, BLOCK]`` from ``n`` rows of WIDTH elements; zero in dead rows and beyond WIDTH."""
    d = tl.arange(0, BLOCK)
    mask = live[:, None]
    if WIDTH != BLOCK:
        mask = mask & (d < WIDTH)[None, :]
    return tl.load(base + offsets[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def chain_rows(number, place, live, batch):
    """Where the keys at some places of a chain are: rows in memory, or -1 - i for learned key i; int64."""
    return tl.load(batch.chains + number * batch.chain_room + place, mask=live, other=0).to(tl.int64)


@triton.jit
def load_keys(own, learned, at, live, kv_head, static: tl.constexpr):
    """Keys ``[n, BD]`` and values ``[n, BV]``: ``at [n]`` rows of own ones, or learned ones where it is negative."""
    k_at = own.k + (at * own.stride_kr + kv_head * own.stride_kh)
    v_at = own.v + (at * own.stride_vr + kv_head * own.stride_vh)
    if learned is not None:
        number = -1 - at
        k_at = tl.where(at < 0, learned.k + (number * learned.stride_kr + kv_head * learned.stride_kh), k_at)
        v_at = tl.where(at < 0, learned.v + (number * learned.stride_vr + kv_head * learned.stride_vh), v_at)
        # What the compiler no longer sees: rows that consist of 16-byte loads start where these must.
        if static.DH % 8 == 0:
            k_at = tl.multiple_of(k_at, 16)
        if static.DV % 8 == 0:
            v_at = tl.multiple_of(v_at, 16)
    nothing = tl.zeros_like(at)
    b_k = load_rows(k_at[:, None], nothing, live, static.DH, static.BD)
    return b_k, load_rows(v_at[:, None], nothing, live, static.DV, static.BV)


@triton.jit
def store_rows(base, offsets, live, values, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    mask = live[:, None]
    if WIDTH != BLOCK:
        mask = mask & (d < WIDTH)[None, :]
    tl.store(base + offsets[:, None] + d[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def visible(query, live, batch, window, static: tl.constexpr):
    """The intervals of keys that queries see: own ``[low, high)``, and from ``prefix_low`` on in the prefix.

    ``batch.spans [4, queries]``: first and last own key of the query's sequence, what to add to the query's own key to
    get its position behind the prefix, and the own key, which needs no table where all keys are queries. Dead queries
    see nothing.
    """
    low = tl.load(batch.spans + query, mask=live, other=0)
    high = tl.load(batch.spans + batch.queries + query, mask=live, other=0)
    prefix_low = tl.zeros_like(low)
    if static.CAUSAL or static.WINDOW:
        own = query  # the query's own key
        if static.CACHE:
            own = tl.load(batch.spans + 3 * batch.queries + query, mask=live, other=0)
        if static.WINDOW:
            low = tl.maximum(low, own - window + 1)
            shift = tl.load(batch.spans + 2 * batch.queries + query, mask=live, other=0)
            prefix_low = tl.maximum(own + shift - window + 1, 0)
            if not static.CAUSAL:
                high = tl.minimum(high, own + window)
        if static.CAUSAL:
            high = own + 1
    return tl.where(live, low, 0), tl.where(live, high, 0), prefix_low


@triton.jit
def origins(query, head, live, batch, scores, static: tl.constexpr):
    """``[BM]`` each, what :func:`scored` needs of a query: the numbers that prefix keys and own keys would have at its
    place, and its head's slope, or the middle of the head's row in the position bias. Unused without either."""
    prefix_origin, own_origin, gain = query, query, query
    if scores.slopes is not None or scores.bias is not None:
        if static.CACHE:
            own_origin = tl.load(batch.spans + 3 * batch.queries + query, mask=live, other=0)
        prefix_origin = own_origin + tl.load(batch.spans + 2 * batch.queries + query, mask=live, other=0)
        if scores.slopes is not None:
            gain = tl.load(scores.slopes + head)
        else:
            gain = head * (2 * scores.most + 1) + scores.most
    return prefix_origin, own_origin, gain


@triton.jit
def dropout_keys(query, row, head, live, batch, dropout):
    """``[BM]`` each, what :func:`kept` needs of a query: for prefix keys, own keys, both; unused without dropout.

    ``fastprompt/ops/prefix_attention/dropout.py`` says what is computed here and in :func:`kept`.
    """
    prefix_start, own_start, salt = query, query, query
    if dropout is not None:
        high, low = dropout.seed_high.to(tl.uint32, bitcast=True), dropout.seed_low.to(tl.uint32, bitcast=True)
        x = (high.to(tl.uint64) << 32 | low) + (head.to(tl.uint64) << 40) + row.to(tl.uint64)
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9
        x = (x ^ x >> 27) * 0x94D049BB133111EB
        x = x ^ x >> 31
        prefix_start, salt = x.to(tl.uint32), (x >> 32).to(tl.uint32)
        shift = tl.load(batch.spans + 2 * batch.queries + query, mask=live, other=0)
        own_start = prefix_start + shift.to(tl.uint32, bitcast=True) * DROPOUT_STEP
    return prefix_start, own_start, salt


@triton.jit
def kept(key, start, salt, threshold):
    """Which weights dropout keeps, for keys and queries of shapes that broadcast."""
    x = key.to(tl.uint32, bitcast=True) * DROPOUT_STEP + start
    x = (x ^ x >> 16) * 0x21F0AAAD
    x = (x ^ x >> 15 ^ salt) * 0x735A2D97
    return x >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def product(a, b, UPCAST: tl.constexpr):
    """a @ b with fp32 sums and, for fp32, fp32 products. UPCAST: the interpreter's bf16 product is wrong."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def tanh(x):
    """tanh to about 1e-7: the series near zero, where 1 - 2 / (exp(2 x) + 1) would cancel."""
    y = x * x
    near = 1 + y * (
        -1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835 + y * (-1382 / 155925 + y * (21844 / 6081075)))))
    )
    small = tl.exp(-2 * tl.abs(x))
    far = 1 - 2 * small / (1 + small)
    return tl.where(tl.abs(x) < 0.5, x * near, tl.where(x < 0, -far, far))


@triton.jit
def scored(product, key, origin, gain, scores, static: tl.constexpr):
    """Scores from the products of queries and keys, and ``tanh(score / softcap)`` or an unused value; ``key`` and what
    :func:`origins` gives in shapes that broadcast."""
    if static.SOFTCAP:
        capped = tanh(product * (scores.scale / scores.softcap))
        return capped * scores.softcap, capped
    score = product * scores.scale
    if scores.slopes is not None:
        score += gain * (key - origin).to(tl.float32)
    if scores.bias is not None:
        distance = tl.minimum(tl.maximum(key - origin, -scores.most), scores.most)
        score += tl.load(scores.bias + (gain + distance))
    return score, product
