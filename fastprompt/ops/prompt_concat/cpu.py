"""prompt_concat by the C++ library."""

import torch

from ...checks import check_range
from ..columns import columns_together


def forward(source, table, prompt, scale):
    """The rows ``[R, D]``; ValueError if ``source`` is out of range, which shows while they are copied."""
    rows = table.new_empty(source.shape[0], table.shape[1])
    if not torch.ops.fastprompt.prompt_concat_cpu(
        source, columns_together(table), columns_together(prompt), scale, rows
    ):
        _raise(source, table.shape[0], prompt.shape[0])
    return rows


def backward(grad, source, scale, table_rows, prompt_rows, need_table, need_prompt):
    """Gradients of the two row sources; an empty tensor stands for one that nobody asked for."""
    dtable = grad.new_empty(table_rows, grad.shape[1]) if need_table else None
    dprompt = grad.new_empty(prompt_rows, grad.shape[1]) if need_prompt else None
    if not torch.ops.fastprompt.prompt_concat_backward_cpu(
        columns_together(grad), source, scale, dtable, dprompt, table_rows, prompt_rows
    ):
        _raise(source, table_rows, prompt_rows)
    return tuple(grad.new_empty(0) if x is None else x for x in (dtable, dprompt))


def _raise(source, table_rows, prompt_rows):
    check_range("source", source, -prompt_rows, table_rows)
