"""Backward: one kernel for each gradient. All sums run over n, then over tokens or columns, in rising order.

``grad [N, P, D]`` may have any strides, all other tensors are contiguous.
"""

import triton
import triton.language as tl

from ..launch import Kernel
from .common import factor


@Kernel
def sum_shared(
    grad, rows, cols, task_ids, dshared, count, length, rank, stride_gn, stride_gp,
    STEP: tl.constexpr, WIDTH: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``dshared`` = sum over n of ``grad[n] * (rows[t] @ cols[t])``."""
    token = (tl.program_id(0) * BP + tl.arange(0, BP))[:, None]  # [BP, 1]
    column = (tl.program_id(1) * BD + tl.arange(0, BD))[None, :]  # [1, BD]
    live = (token < length) & (column < WIDTH)
    place = grad + token.to(tl.int64) * stride_gp + column.to(tl.int64) * STEP
    total = tl.zeros([BP, BD], tl.float32)
    for n in range(count):
        task = tl.load(task_ids + n).to(tl.int64)
        value = tl.load(place + n * stride_gn, mask=live, other=0.0)  # [BP, BD]
        total += value.to(tl.float32) * factor(rows, cols, task, token, column, length, rank, WIDTH, BP, BD)
    tl.store(dshared + token.to(tl.int64) * WIDTH + column, total, mask=live)


@triton.jit
def dfactor(grad, shared, grad_offset, shared_offset, live):
    """A tile ``[BP, BD]`` of ``grad[n] * shared`` in fp32, the gradient of the factor, zero outside.

    The offsets within a tile are the same for all tiles: made once they leave registers free, which some targets need.
    """
    value = tl.load(grad + grad_offset, mask=live, other=0.0)
    return value.to(tl.float32) * tl.load(shared + shared_offset, mask=live, other=0.0).to(tl.float32)


@triton.jit
def zeros(BP: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr):
    """BK sums ``[BP, BD]``, apart so that each keeps the layout in which its rows are loaded."""
    totals = ()
    for _ in tl.static_range(BK):
        totals += (tl.zeros([BP, BD], tl.float32),)
    return totals


@Kernel
def sum_rows(
    grad, shared, cols, task_ids, drows, count, length, rank, stride_gn, stride_gp, stride_sp,
    STEP: tl.constexpr, WIDTH: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``drows[t]`` = sum over the n of task t of ``(grad[n] * shared) @ cols[t].T``; zero for a task without."""
    blocks = tl.cdiv(length, BP)
    task = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks * BP + tl.arange(0, BP))[:, None]  # [BP, 1]
    within = tl.arange(0, BD)[None, :]  # [1, BD]
    grad_offset, shared_offset = token * stride_gp + within.to(tl.int64) * STEP, token * stride_sp + within
    k = tl.program_id(1) * BK
    totals = zeros(BP, BK, BD)
    for n in range(count):
        if tl.load(task_ids + n) == task:
            for start in range(0, WIDTH, BD):
                column = start + within
                live = (token < length) & (column < WIDTH)
                place = grad + n * stride_gn + tl.cast(start, tl.int64) * STEP
                inner = dfactor(place, shared + start, grad_offset, shared_offset, live)  # [BP, BD]
                new = ()
                for i in tl.static_range(BK):
                    last = tl.minimum(k + i, rank - 1)  # what is past the last is computed again and not stored
                    right = tl.load(
                        cols + (task * rank + last) * WIDTH + column, mask=column < WIDTH, other=0.0
                    )  # [1, BD]
                    new += (totals[i] + inner * right.to(tl.float32),)
                totals = new
    for i in tl.static_range(BK):
        if k + i < rank:
            place = drows + (task * length + token) * rank + k + i  # [BP, 1]
            tl.store(place, tl.sum(totals[i], 1)[:, None], mask=token < length)


@Kernel
def sum_cols(
    grad, shared, rows, task_ids, dcols, count, length, rank, stride_gn, stride_gp, stride_sp,
    STEP: tl.constexpr, WIDTH: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``dcols[t]`` = sum over the n of task t of ``rows[t].T @ (grad[n] * shared)``; zero for a task without."""
    task = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BD + tl.arange(0, BD))[None, :]  # [1, BD]
    within = tl.arange(0, BP)[:, None]  # [BP, 1]
    grad_offset, shared_offset = within * stride_gp + column.to(tl.int64) * STEP, within * stride_sp + column
    k = tl.program_id(2) * BK
    totals = zeros(BP, BK, BD)
    for n in range(count):
        if tl.load(task_ids + n) == task:
            for start in range(0, length, BP):
                token = start + within
                live = (token < length) & (column < WIDTH)
                place = grad + n * stride_gn + start * stride_gp
                inner = dfactor(place, shared + start * stride_sp, grad_offset, shared_offset, live)  # [BP, BD]
                new = ()
                for i in tl.static_range(BK):
                    last = tl.minimum(k + i, rank - 1)
                    left = tl.load(
                        rows + (task * length + token) * rank + last, mask=token < length, other=0.0
                    )  # [BP, 1]
                    new += (totals[i] + left.to(tl.float32) * inner,)
                totals = new
    for i in tl.static_range(BK):
        if k + i < rank:
            place = dcols + (task * rank + k + i) * WIDTH + column  # [1, BD]
            tl.store(place, tl.sum(totals[i], 0)[None, :], mask=column < WIDTH)
