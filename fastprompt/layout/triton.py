"""``cells.py`` on a GPU: launches the kernels of ``fastprompt.kernels.row_plan``."""

import torch

from ..kernels import launch
from ..kernels.row_plan.cells import compare
from ..kernels.row_plan.cells import fill as fill_kernel
from ..kernels.row_plan.cells import measure as measure_kernel
from .cells import STATS, Batch, Filled

_COLUMNS = 1024
_OPTIONS = launch.Options(num_warps=4, num_stages=1)


def measure(batch: Batch) -> torch.Tensor:
    stats = torch.empty(len(STATS), batch.size, dtype=torch.int64, device=batch.device)
    measure_kernel(
        (batch.size,), _OPTIONS, _bytes(batch.real), batch.labels, batch.virtual, batch.prompts, batch.starts,
        batch.lengths, stats, batch.size, batch.width, batch.prompt_length, FRONT=batch.front > 0, BC=_block(batch),
    )  # fmt: skip
    if batch.token_ids is not None:
        compare(
            (batch.size,), _OPTIONS, _bytes(batch.real), batch.virtual, batch.token_ids, batch.starts,
            batch.lengths, stats, batch.size, batch.width, BC=_block(batch),
        )  # fmt: skip
    return stats


def fill(batch: Batch, table: torch.Tensor, rows: int, labels: int, everywhere: bool = False) -> Filled:
    new = lambda *shape: torch.empty(shape, dtype=torch.int64, device=batch.device)  # noqa: E731
    source, position_ids, grid = new(rows), new(rows), new(batch.size, batch.front + batch.width)
    label_rows, shifted = (None, None) if batch.labels is None else (new(labels), new(labels))
    entries = table.shape[1]
    fill_kernel(
        (entries,), _OPTIONS, None if everywhere else _bytes(batch.real), batch.labels, batch.virtual, batch.starts,
        batch.lengths, table, source, position_ids, grid, label_rows, shifted, batch.size, batch.width, batch.front,
        batch.prompt_length, batch.prefix_length, entries, FRONT=batch.front > 0, BC=_block(batch),
    )  # fmt: skip
    return Filled(source, position_ids, grid, label_rows, shifted)


def _block(batch: Batch) -> int:
    """Columns at a time: one compiled variant for short batches, one for all others."""
    return 128 if max(batch.width, batch.front) <= 128 else _COLUMNS


def _bytes(real: torch.Tensor | None) -> torch.Tensor | None:
    return None if real is None else real.view(torch.uint8)
