"""Heads turned by the positions of their rows, forward or backward."""

import triton.language as tl

from ..launch import Kernel


@Kernel
def turn(
    x, cosine, sine, out, count, rows, tables, stride_batch, stride_row, stride_head,
    STEP: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BACKWARD: tl.constexpr,
    BH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``out``, ``count`` heads ``[2 * HALF]`` one after the other, of the heads of ``x [B, rows, HEADS, 2 * HALF]``.

    Only x may have any strides. The rows of the tables ``[tables, 2 * HALF]`` are those of x, again for each batch
    where there are fewer. Halves (a, b) become (a * cosine - b * sine, b * cosine + a * sine); backward takes the sine
    of the other half, and its negative.
    """
    number = (tl.program_id(0) * BH + tl.arange(0, BH))[:, None]  # [BH, 1]
    column = (tl.program_id(1) * BD + tl.arange(0, BD))[None, :]  # [1, BD]
    live = (number < count) & (column < HALF)
    row, head = number // HEADS, number % HEADS

    table = (row % tables).to(tl.int64) * (2 * HALF) + column  # [BH, BD]; neighbours read one row, from the L1 cache
    low_cosine = tl.load(cosine + table, mask=live, other=0.0).to(tl.float32)
    high_cosine = tl.load(cosine + table + HALF, mask=live, other=0.0).to(tl.float32)
    low_sine = tl.load(sine + table, mask=live, other=0.0).to(tl.float32)
    high_sine = tl.load(sine + table + HALF, mask=live, other=0.0).to(tl.float32)
    if BACKWARD:
        low_sine, high_sine = -high_sine, -low_sine

    place = x + (row // rows).to(tl.int64) * stride_batch + (row % rows).to(tl.int64) * stride_row
    place += head.to(tl.int64) * stride_head + column.to(tl.int64) * STEP
    a = tl.load(place, mask=live, other=0.0).to(tl.float32)
    b = tl.load(place + HALF * STEP, mask=live, other=0.0).to(tl.float32)
    turned = out + number.to(tl.int64) * (2 * HALF) + column
    tl.store(turned, a * low_cosine - b * low_sine, mask=live)
    tl.store(turned + HALF, b * high_cosine + a * high_sine, mask=live)
