"""rotary on a GPU: launches the kernel of ``fastprompt.kernels.rotary``."""

from ...kernels.rotary.turn import turn
from ...kernels.tiles import row_tile


def forward(x, cosine, sine):
    """As the reference."""
    return _run(x, cosine, sine, False)


def backward(grad, cosine, sine):
    """As the reference."""
    return _run(grad, cosine, sine, True)


def _run(x, cosine, sine, is_backward):
    batch, rows, heads, width = x.shape
    out, count, half = x.new_empty(x.shape), batch * rows * heads, width // 2
    tile = row_tile(half, x.element_size(), loads=2)  # of each half, and as many of the tables' halves
    turn(
        (-(-count // tile.rows), -(-half // tile.columns)), tile.options, x, cosine.contiguous(), sine.contiguous(),
        out, count, rows, cosine.shape[0] * rows, *x.stride()[:3], STEP=x.stride(3), HEADS=heads, HALF=half,
        BACKWARD=is_backward, BH=tile.rows, BD=tile.columns,
    )  # fmt: skip
    return out
