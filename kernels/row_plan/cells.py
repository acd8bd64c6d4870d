"""A program walks over the columns of one sequence, ``BC`` at a time. Launches matter here, bytes do not."""

import triton
import triton.language as tl

from ..launch import Kernel

IGNORE = tl.constexpr(-100)


@triton.jit
def cells_of(b, starts, lengths, width):
    """The place of column 0 of sequence b in the flat tensors, and its columns."""
    if starts is None:
        begin, columns = b.to(tl.int64) * width, width
    else:
        begin, columns = tl.load(starts + b), tl.load(lengths + b).to(tl.int32)
    return begin, columns


@triton.jit
def are_real(real, place, inside):
    live = inside
    if real is not None:
        live = tl.load(real + place, mask=inside, other=0) != 0
    return live


@triton.jit
def are_wanted(label, column, inside, FRONT: tl.constexpr):
    """Which labels count: without rows in front nothing predicts the first token."""
    wanted = inside & (label != IGNORE)
    if not FRONT:
        wanted = wanted & (column > 0)
    return wanted


@Kernel
def measure(
    real, labels, virtual, prompts, starts, lengths, stats, batch, width, prompt_length,
    FRONT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``stats [9, B]`` of a sequence, but for how far it agrees with others."""
    b, c = tl.program_id(0), tl.arange(0, BC)
    begin, columns = cells_of(b, starts, lengths, width)
    count, first, last = tl.zeros([BC], tl.int32), tl.full([BC], width, tl.int32), tl.full([BC], -1, tl.int32)
    labelled, needed = tl.zeros([BC], tl.int32), tl.zeros([BC], tl.int32)
    behind_padding, out_of_range = tl.zeros([BC], tl.int32), tl.zeros([BC], tl.int32)
    for start in range(0, columns, BC):
        column = start + c  # [BC]
        inside = column < columns
        live = are_real(real, begin + column, inside)
        count += live.to(tl.int32)
        first = tl.minimum(first, tl.where(live, column, width))
        last = tl.maximum(last, tl.where(live, column, -1))
        if labels is not None:
            wanted = are_wanted(tl.load(labels + begin + column, mask=inside, other=IGNORE), column, inside, FRONT)
            before = are_real(real, begin + column - 1, inside & (column > 0)) | (column == 0)
            labelled += wanted.to(tl.int32)
            needed = tl.maximum(needed, tl.where(wanted, column, 0))
            behind_padding += (wanted & (before == 0)).to(tl.int32)
        if virtual is not None:
            out_of_range += (tl.load(virtual + begin + column, mask=live, other=-1) >= prompt_length).to(tl.int32)
    length = tl.sum(count)
    begins, ends = tl.min(first), tl.max(last) + 1
    tl.store(stats + b, length)
    tl.store(stats + batch + b, begins)
    tl.store(stats + 2 * batch + b, (length > 0) & (ends - begins > length))
    tl.store(stats + 3 * batch + b, tl.sum(labelled))
    tl.store(stats + 4 * batch + b, tl.sum(behind_padding) > 0)
    tl.store(stats + 5 * batch + b, tl.sum(out_of_range) > 0)
    tl.store(stats + 6 * batch + b, 0)
    if prompts is None:
        tl.store(stats + 7 * batch + b, 0)
    else:
        tl.store(stats + 7 * batch + b, tl.load(prompts + b))
    tl.store(stats + 8 * batch + b, tl.max(needed))


@Kernel
def compare(real, virtual, token_ids, starts, lengths, stats, batch, width, BC: tl.constexpr):
    """How many tokens from the first column on are those of the first sequence of the same prompt that has one."""
    b, c = tl.program_id(0), tl.arange(0, BC)
    prompt, leader = tl.load(stats + 7 * batch + b), batch
    for start in range(0, batch, BC):
        other = start + c
        leads = tl.load(stats + other, mask=other < batch, other=0) > 0
        leads = leads & (tl.load(stats + 7 * batch + other, mask=other < batch, other=-1) == prompt)
        leader = tl.minimum(leader, tl.min(tl.where(leads, other, batch)))
    leader = tl.minimum(leader, batch - 1)  # without one, this sequence has no token
    begin, columns = cells_of(b, starts, lengths, width)
    begin_leader, columns_leader = cells_of(leader, starts, lengths, width)
    agree = tl.full([BC], width, tl.int32)
    for start in range(0, width, BC):
        column = start + c
        same = are_real(real, begin + column, column < columns) & are_real(
            real, begin_leader + column, column < columns_leader
        )
        alike = tl.load(token_ids + begin + column, mask=same, other=0) == tl.load(
            token_ids + begin_leader + column, mask=same, other=0
        )
        if virtual is not None:
            own = tl.load(virtual + begin + column, mask=same, other=-1)
            theirs = tl.load(virtual + begin_leader + column, mask=same, other=-1)
            alike = ((own < 0) & (theirs < 0) & alike) | ((own >= 0) & (own == theirs))
        agree = tl.minimum(agree, tl.where(same & alike, width, column))
    tl.store(stats + 6 * batch + b, tl.min(agree))


@Kernel
def fill(
    real, labels, virtual, starts, lengths, table, source, position_ids, grid, label_rows, shifted,
    batch, width, front, prompt_length, prefix_length, entries,
    FRONT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The rows and the cells of a sequence, and its labels."""
    b, c = tl.program_id(0), tl.arange(0, BC)
    entry = table + b
    prompt_row, own_row, own_column = tl.load(entry), tl.load(entry + entries), tl.load(entry + 2 * entries)
    first_label, prompt, writes = (
        tl.load(entry + 3 * entries),
        tl.load(entry + 4 * entries),
        tl.load(entry + 5 * entries) != 0,
    )
    end = tl.load(entry + 6 * entries)
    is_sequence = b < batch  # or a prompt that none has
    cells = grid + b.to(tl.int64) * (front + width)
    for start in range(0, front, BC):
        j = start + c
        tl.store(cells + j, prompt_row + j, mask=j < tl.where(is_sequence, front, 0))
        written = j < tl.where(writes, front, 0)
        tl.store(source + prompt_row + j, -1 - (prompt * front + j), mask=written)
        tl.store(position_ids + prompt_row + j, prefix_length + j, mask=written)
    if is_sequence:
        begin, columns = cells_of(b, starts, lengths, width)
        for start in range(0, width, BC):
            column = start + c
            inside = column < columns
            live = are_real(real, begin + column, inside) & (column < end)
            row = tl.where(column >= own_column, own_row, prompt_row + front) + column
            tl.store(cells + front + column, tl.where(live, row, -1), mask=column < width)
            text = begin + column
            if virtual is not None:
                number = tl.load(virtual + begin + column, mask=live, other=-1).to(tl.int64)
                text = tl.where(number >= 0, -1 - (prompt * prompt_length + number), text)
            written = live & (column >= tl.where(writes, 0, own_column))
            tl.store(source + row, text, mask=written)
            tl.store(position_ids + row, prefix_length + front + column, mask=written)
            if labels is not None:
                label = tl.load(labels + begin + column, mask=inside, other=IGNORE)
                wanted = are_wanted(label, column, inside, FRONT)
                place = first_label + tl.cumsum(wanted.to(tl.int32), 0) - 1
                before = tl.where(column > own_column, own_row, prompt_row + front) + column - 1
                tl.store(label_rows + place, before, mask=wanted)
                tl.store(shifted + place, label.to(tl.int64), mask=wanted)
                first_label += tl.sum(wanted.to(tl.int32))
