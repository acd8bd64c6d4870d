"""Forward: the rows of a batch, each copied from the table or from the prompts."""

import triton.language as tl

from ..launch import Kernel


@Kernel
def gather(
    source, table, prompt, rows, count, scale, stride_table, stride_prompt,
    TABLE_STEP: tl.constexpr, PROMPT_STEP: tl.constexpr, WIDTH: tl.constexpr, SCALED: tl.constexpr,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    column = (tl.program_id(1) * BD + tl.arange(0, BD))[None, :]
    index = tl.load(source + row, mask=row < count, other=0)[:, None].to(tl.int64)  # [BR, 1]
    live = (row < count)[:, None] & (column < WIDTH)
    # A row has one of the two sources, the loads of the other are masked off. A choice between the addresses instead
    # would hide from the compiler that they are aligned.
    token = tl.load(
        table + index * stride_table + column.to(tl.int64) * TABLE_STEP, mask=live & (index >= 0), other=0.0
    )  # [BR, BD]
    virtual = tl.load(
        prompt + (-1 - index) * stride_prompt + column.to(tl.int64) * PROMPT_STEP, mask=live & (index < 0), other=0.0
    )
    if SCALED:
        token = (token.to(tl.float32) * scale).to(token.dtype)
    tl.store(rows + row.to(tl.int64)[:, None] * WIDTH + column, tl.where(index >= 0, token, virtual), mask=live)
