"""multitask_prompt in plain PyTorch: the definition every other backend is measured against."""

from ...checks import accumulator
from ..sums import sum_rows


def forward(shared, rows, cols, task_ids):
    """prompts[n] = shared * (rows[t] @ cols[t]) with t = task_ids[n], rounded once at the end."""
    return _factors(rows, cols, task_ids).mul_(shared).to(shared.dtype)


def backward(grad, shared, rows, cols, task_ids, need_shared, need_rows, need_cols):
    """Gradients of shared, rows and cols; an empty tensor stands for one that nobody asked for."""
    dtype = shared.dtype
    dshared, drows, dcols = (shared.new_empty(0) for _ in range(3))
    if need_shared:
        dshared = _factors(rows, cols, task_ids).mul_(grad).sum(0).to(dtype)
    if need_rows or need_cols:
        dfactors = grad.to(accumulator(dtype)) * shared  # [N, P, D]
    if need_rows:
        drows = sum_rows(dfactors @ _pick(cols, task_ids).mT, task_ids, len(rows)).to(dtype)
    if need_cols:
        dcols = sum_rows(_pick(rows, task_ids).mT @ dfactors, task_ids, len(cols)).to(dtype)
    return dshared, drows, dcols


def _factors(rows, cols, task_ids):
    return _pick(rows, task_ids) @ _pick(cols, task_ids)  # [N, P, D]


def _pick(tensor, task_ids):
    """The given tasks only, in the dtype that sums are kept in."""
    return tensor.index_select(0, task_ids).to(accumulator(tensor.dtype))
