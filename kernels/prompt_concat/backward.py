"""Backward: the gradients of a row's readers, summed in fp32 in an order that depends on ``source`` alone.

The inverse index is ``order``, the rows sorted by what they read, and ``starts``, where the readers of each row begin
in it. A row may have one reader or nearly all (a padding token). So that no program sums thousands of rows alone,
``order`` is cut into chunks of equal length; those that lie within one row's readers are summed first, by programs of
their own.
"""

import triton
import triton.language as tl

from ..launch import Kernel

CHUNK = (
    64  # 2 CHUNK rows at the ends of a row's readers and R / CHUNK partial sums are what one program may have to add
)


@triton.jit
def add_rows(total, values, row, live, column, stride, STEP: tl.constexpr, WIDTH: tl.constexpr):
    """``total [BR, BD]`` plus the rows ``row [BR]`` of ``values``, where ``live``."""
    mask = live[:, None] & (column < WIDTH)
    place = values + row.to(tl.int64)[:, None] * stride + column.to(tl.int64) * STEP  # [BR, BD]
    return total + tl.load(place, mask=mask, other=0.0).to(tl.float32)


@Kernel
def sum_chunks(
    grad, keys, order, partial, stride_grad,
    STEP: tl.constexpr, WIDTH: tl.constexpr, TABLE: tl.constexpr, PROMPT: tl.constexpr, CHUNK: tl.constexpr,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``partial[c]`` for the chunks whose rows have all read the same; the others are left alone.

    ``keys`` is the sorted ``source``, ``TABLE`` and ``PROMPT`` say which gradients are wanted.
    """
    begin = tl.program_id(0) * CHUNK
    key = tl.load(keys + begin)
    wanted = key == tl.load(keys + begin + CHUNK - 1)
    if not TABLE:
        wanted = wanted & (key < 0)
    if not PROMPT:
        wanted = wanted & (key >= 0)
    if wanted:
        column = (tl.program_id(1) * BD + tl.arange(0, BD))[None, :]
        total = tl.zeros([BR, BD], tl.float32)
        for first in range(0, CHUNK, BR):
            row = tl.load(order + begin + first + tl.arange(0, BR))  # [BR]
            total = add_rows(total, grad, row, row >= 0, column, stride_grad, STEP, WIDTH)
        place = partial + tl.program_id(0).to(tl.int64) * WIDTH + column
        tl.store(place, tl.sum(total, 0)[None, :], mask=column < WIDTH)


@Kernel
def sum_readers(
    grad, order, starts, partial, out, count, scale, stride_grad,
    STEP: tl.constexpr, WIDTH: tl.constexpr, FALLING: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows of a gradient, each written once, with zero where it has no reader.

    The readers of row j are ``order[starts[j] : starts[j + 1]]``, or from ``starts[j + 1]`` to ``starts[j]`` if
    ``FALLING``.
    """
    column = (tl.program_id(1) * BD + tl.arange(0, BD))[None, :]
    first = tl.program_id(0) * ROWS
    for i in range(tl.minimum(ROWS, count - first)):
        j = first + i
        begin, end = tl.load(starts + j), tl.load(starts + j + 1)
        if FALLING:
            begin, end = end, begin
        low = tl.cdiv(begin, CHUNK)  # chunks [low, high) lie within
        high = tl.maximum(end // CHUNK, low)
        head = tl.minimum(low * CHUNK, end) - begin
        single = head + tl.maximum(end - high * CHUNK, 0)  # rows before and after them
        total = tl.zeros([BR, BD], tl.float32)
        for start in range(0, single, BR):
            place = start + tl.arange(0, BR)  # [BR]
            live = place < single
            place = tl.where(place < head, begin + place, high * CHUNK - head + place)
            row = tl.load(order + place, mask=live, other=0)
            total = add_rows(total, grad, row, live, column, stride_grad, STEP, WIDTH)
        for start in range(low, high, BR):
            chunk = start + tl.arange(0, BR)  # [BR]
            total = add_rows(total, partial, chunk, chunk < high, column, WIDTH, 1, WIDTH)
        sums = tl.sum(total, 0) * scale
        place = out + j.to(tl.int64) * WIDTH + column
        tl.store(place, sums[None, :], mask=column < WIDTH)
