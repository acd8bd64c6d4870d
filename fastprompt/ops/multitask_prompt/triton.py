"""multitask_prompt on a GPU: launches the kernels of ``fastprompt.kernels.multitask_prompt``."""

from ...kernels.multitask_prompt.backward import sum_cols, sum_rows, sum_shared
from ...kernels.multitask_prompt.config import cols_tile, rows_tile
from ...kernels.multitask_prompt.forward import make_prompts
from ...kernels.tiles import row_tile


def forward(shared, rows, cols, task_ids):
    (length, width), count = shared.shape, task_ids.shape[0]
    prompts = shared.new_empty(count, length, width)
    tile = row_tile(width, shared.element_size())
    make_prompts(
        (count * -(-length // tile.rows), -(-width // tile.columns)), tile.options,
        *(x.contiguous() for x in (shared, rows, cols, task_ids)), prompts, length, rows.shape[2],
        WIDTH=width, BP=tile.rows, BD=tile.columns,
    )  # fmt: skip
    return prompts


def backward(grad, shared, rows, cols, task_ids, need_shared, need_rows, need_cols):
    """Gradients of shared, rows and cols; an empty tensor stands for one that nobody asked for."""
    tasks, length, rank = rows.shape
    width, size = shared.shape[1], shared.element_size()
    shared, rows, cols, task_ids = (x.contiguous() for x in (shared, rows, cols, task_ids))
    numbers = len(task_ids), length, rank, *grad.stride()[:2]
    constants = dict(STEP=grad.stride(2), WIDTH=width)
    dshared, drows, dcols = (
        shared.new_empty(x.shape if need else 0)
        for x, need in ((shared, need_shared), (rows, need_rows), (cols, need_cols))
    )
    if need_shared:
        tile = row_tile(width, size, loads=1)
        sum_shared(
            (-(-length // tile.rows), -(-width // tile.columns)), tile.options, grad, rows, cols, task_ids, dshared,
            *numbers, **constants, BP=tile.rows, BD=tile.columns,
        )  # fmt: skip
    if need_rows:
        tile = rows_tile(width, rank, size)
        sum_rows(
            (tasks * -(-length // tile.tokens), -(-rank // tile.ranks)), tile.options, grad, shared, cols, task_ids,
            drows, *numbers, width, **constants, BP=tile.tokens, BK=tile.ranks, BD=tile.columns,
        )  # fmt: skip
    if need_cols:
        tile = cols_tile(width, rank, size)
        sum_cols(
            (tasks, -(-width // tile.columns), -(-rank // tile.ranks)), tile.options, grad, shared, rows, task_ids,
            dcols, *numbers, width, **constants, BP=tile.tokens, BK=tile.ranks, BD=tile.columns,
        )  # fmt: skip
    return dshared, drows, dcols
