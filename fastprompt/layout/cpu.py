"""``cells.py`` by the C++ library: each cell is looked at once."""

import torch

from .cells import STATS, Batch, Filled


def measure(batch: Batch) -> torch.Tensor:
    stats = torch.empty(len(STATS), batch.size, dtype=torch.int64)
    torch.ops.fastprompt.row_plan_measure_cpu.default(
        batch.real,
        batch.labels,
        batch.virtual,
        batch.token_ids,
        batch.prompts,
        batch.starts,
        batch.lengths,
        batch.width,
        batch.prompt_length,
        batch.front > 0,
        stats,
    )
    return stats


def fill(batch: Batch, table: torch.Tensor, rows: int, labels: int, everywhere: bool = False) -> Filled:
    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64)

    source, position_ids, grid = new(rows), new(rows), new(batch.size, batch.front + batch.width)
    label_rows, shifted = (None, None) if batch.labels is None else (new(labels), new(labels))
    torch.ops.fastprompt.row_plan_fill_cpu.default(
        None if everywhere else batch.real,
        batch.labels,
        batch.virtual,
        batch.starts,
        batch.lengths,
        table,
        batch.width,
        batch.front,
        batch.prompt_length,
        batch.prefix_length,
        source,
        position_ids,
        grid,
        label_rows,
        shifted,
    )
    return Filled(source, position_ids, grid, label_rows, shifted)
