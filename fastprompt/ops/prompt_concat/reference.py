"""prompt_concat in plain PyTorch: the definition every other backend is measured against."""

from ...checks import accumulator
from ..sums import sum_rows


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
    from_table, dtype = source >= 0, accumulator(grad.dtype)
    dtable = dprompt = grad.new_empty(0)
    if need_table:
        dtable = sum_rows(grad[from_table].to(dtype) * scale, source[from_table], table_rows).to(grad.dtype)
    if need_prompt:
        dprompt = sum_rows(grad[~from_table].to(dtype), -1 - source[~from_table], prompt_rows).to(grad.dtype)
    return dtable, dprompt
