import triton
import triton.language as tl


@triton.jit
def factor(
    rows, cols, task, token, column, length, rank, WIDTH: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """``(rows[task] @ cols[task])[token, column]`` ``[BP, BD]`` in fp32, of ``token [BP, 1]``, ``column [1, BD]``."""
    total = tl.zeros([BP, BD], tl.float32)
    for k in range(rank):
        left = tl.load(rows + (task * length + token) * rank + k, mask=token < length, other=0.0)  # [BP, 1]
        right = tl.load(cols + (task * rank + k) * WIDTH + column, mask=column < WIDTH, other=0.0)  # [1, BD]
        total += left.to(tl.float32) * right.to(tl.float32)
    return total
