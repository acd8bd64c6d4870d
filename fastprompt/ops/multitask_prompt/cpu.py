"""multitask_prompt by the C++ library."""

import torch

from ...checks import check_range


def forward(shared, rows, cols, task_ids):
    """The prompts ``[N, P, D]``; ValueError if a task is out of range."""
    prompts = shared.new_empty(task_ids.shape[0], *shared.shape)
    factors = [x.contiguous() for x in (shared, rows, cols)]
    if not torch.ops.fastprompt.multitask_prompt_cpu(*factors, task_ids, prompts):
        check_range("task_ids", task_ids, 0, rows.shape[0])
    return prompts


def backward(grad, shared, rows, cols, task_ids, need_shared, need_rows, need_cols):
    """Gradients of shared, rows and cols; an empty tensor stands for one that nobody asked for."""
    grads = [
        x.new_zeros(x.shape) if need else None
        for x, need in ((shared, need_shared), (rows, need_rows), (cols, need_cols))
    ]
    inputs = [x.contiguous() for x in (grad, shared, rows, cols)]
    if not torch.ops.fastprompt.multitask_prompt_backward_cpu(*inputs, task_ids, *grads):
        check_range("task_ids", task_ids, 0, rows.shape[0])
    return tuple(grad.new_empty(0) if x is None else x for x in grads)
