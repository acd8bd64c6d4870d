"""Forward: ``prompts[n] = shared * (rows[t] @ cols[t])``."""

import triton.language as tl

from ..launch import Kernel
from .common import factor


@Kernel
def make_prompts(
    shared, rows, cols, task_ids, prompts, length, rank,
    WIDTH: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Every tensor contiguous: ``shared [P, D]``, ``rows [T, P, r]``, ``cols [T, r, D]``, ``prompts [N, P, D]``."""
    blocks = tl.cdiv(length, BP)
    n = tl.program_id(0) // blocks
    token = (tl.program_id(0) % blocks * BP + tl.arange(0, BP))[:, None]  # [BP, 1]
    column = (tl.program_id(1) * BD + tl.arange(0, BD))[None, :]  # [1, BD]
    live = (token < length) & (column < WIDTH)
    task = tl.load(task_ids + n).to(tl.int64)
    value = tl.load(shared + token.to(tl.int64) * WIDTH + column, mask=live, other=0.0)  # [BP, BD]
    value = value.to(tl.float32) * factor(rows, cols, task, token, column, length, rank, WIDTH, BP, BD)
    tl.store(prompts + (n.to(tl.int64) * length + token) * WIDTH + column, value, mask=live)
