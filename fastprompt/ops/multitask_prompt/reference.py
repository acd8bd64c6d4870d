"""multitask_prompt in plain PyTorch: the definition every other backend is measured against."""

import torch

from ..checks import accumulator


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
        drows = _sum_tasks(dfactors @ _pick(cols, task_ids).mT, task_ids, len(rows)).to(dtype)
    if need_cols:
        dcols = _sum_tasks(_pick(rows, task_ids).mT @ dfactors, task_ids, len(cols)).to(dtype)
    return dshared, drows, dcols


def _factors(rows, cols, task_ids):
    return _pick(rows, task_ids) @ _pick(cols, task_ids)  # [N, P, D]


def _pick(tensor, task_ids):
    """The given tasks only, in the dtype that sums are kept in."""
    return tensor.index_select(0, task_ids).to(accumulator(tensor.dtype))


def _sum_tasks(parts, task_ids, tasks):
    """sums[t] = sum of parts[n] where task_ids[n] == t, in a fixed order.

    On a CPU only index_add_ keeps an order (index_put_ adds atomically), elsewhere only index_put_ does (it sorts).
    """
    sums = parts.new_zeros(tasks, *parts.shape[1:])
    if parts.device.type == "cpu":
        return sums.index_add_(0, task_ids, parts)
    return sums.index_put_((task_ids.long(),), parts, accumulate=True)
