"""prompt_concat on a GPU: launches the kernels of ``fastprompt.kernels.prompt_concat``.

Rows only: position ids, labels and segment starts belong to the row plan (``fastprompt/layout/triton.py``), which waits
for the device once, because the number of rows has to be known here.
"""

import torch

from ...kernels.prompt_concat.backward import CHUNK, sum_chunks, sum_readers
from ...kernels.prompt_concat.forward import gather
from ...kernels.tiles import row_tile


def forward(source, table, prompt, scale):
    count, width = source.shape[0], table.shape[1]
    rows = table.new_empty(count, width)
    tile = row_tile(width, table.element_size(), loads=2)
    gather(
        (-(-count // tile.rows), -(-width // tile.columns)), tile.options, source.contiguous(), table, prompt, rows,
        count, scale, table.stride(0), prompt.stride(0), TABLE_STEP=table.stride(1), PROMPT_STEP=prompt.stride(1),
        WIDTH=width, SCALED=scale != 1.0, BR=tile.rows, BD=tile.columns,
    )  # fmt: skip
    return rows


def backward(grad, source, scale, table_rows, prompt_rows, need_table, need_prompt):
    """Gradients of the two row sources; an empty tensor stands for one that nobody asked for."""
    dtable = dprompt = grad.new_empty(0)
    if need_table or need_prompt:
        readers = _Readers(grad, source, need_table, need_prompt)
        if need_table:
            dtable = readers.sums(table_rows, scale)
        if need_prompt:
            dprompt = readers.sums(prompt_rows, 1.0, prompt=True)
    return dtable, dprompt


class _Readers:
    """The inverse index of ``source``, and the partial sums of its chunks."""

    def __init__(self, grad, source, need_table, need_prompt):
        (count, width), self.grad = grad.shape, grad
        self.keys, self.order = torch.sort(source, stable=True)
        self.partial = grad.new_empty(count // CHUNK, width, dtype=torch.float32)
        self.tile = row_tile(width, grad.element_size(), most_columns=256)
        self.blocks = -(-width // self.tile.columns)
        self.constants = dict(
            STEP=grad.stride(1), WIDTH=width, CHUNK=CHUNK, BR=min(self.tile.rows, CHUNK), BD=self.tile.columns
        )
        sum_chunks(
            (count // CHUNK, self.blocks), self.tile.options, grad, self.keys, self.order, self.partial, grad.stride(0),
            TABLE=need_table, PROMPT=need_prompt, **self.constants,
        )  # fmt: skip

    def sums(self, count, scale, prompt=False):
        """``[count, D]``: for every row of the table, or of the prompts, the sum over its readers, times ``scale``."""
        bounds = torch.arange(count + 1, dtype=self.keys.dtype, device=self.keys.device)
        starts = torch.searchsorted(self.keys, -bounds if prompt else bounds, out_int32=True)
        out = self.grad.new_empty(count, self.grad.shape[1])
        rows = 1 if prompt else 8  # of the table's rows few have a reader
        sum_readers(
            (-(-count // rows), self.blocks), self.tile.options, self.grad, self.order, starts, self.partial, out,
            count, scale, self.grad.stride(0), FALLING=prompt, ROWS=rows, **self.constants,
        )  # fmt: skip
        return out
