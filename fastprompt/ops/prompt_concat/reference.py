"""prompt_concat in plain PyTorch: the definition every other backend is measured against."""

import torch

from ...checks import accumulator


def forward(source, table, prompt, scale):
    """rows[r] = table[source[r]] * scale if source[r] >= 0, else prompt[-1 - source[r]]."""
    rows = table.new_empty(source.numel(), table.shape[1])  # [R, D]
    from_table = source >= 0
    tokens = table.index_select(0, source[from_table])
    rows[from_table] = tokens if scale == 1.0 else tokens * scale
    rows[~from_table] = prompt.index_select(0, -1 - source[~from_table])
    return rows


def backward(grad, source, scale, table_rows, prompt_rows, need_table, need_prompt):
    """Gradients of the two row sources; an empty tensor stands for one that nobody asked for."""
    from_table = source >= 0
    dtable = dprompt = grad.new_empty(0)
    if need_table:
        dtable = _sum_rows(grad[from_table] * scale, source[from_table], table_rows)
    if need_prompt:
        dprompt = _sum_rows(grad[~from_table], -1 - source[~from_table], prompt_rows)
    return dtable, dprompt


def _sum_rows(rows, index, count):
    """sums[i] = sum of rows[r] where index[r] == i, in a fixed order (index_put_ sorts on a GPU; index_add_ would not)."""
    total = rows.new_zeros(count, rows.shape[1], dtype=accumulator(rows.dtype))
    total.index_put_((index,), rows.to(total.dtype), accumulate=True)
    return total.to(rows.dtype)
