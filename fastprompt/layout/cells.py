"""The part of a row plan that looks at every cell of a batch, in PyTorch; ``cpu.py`` and ``triton.py`` do the same.

The device counts what sequences consist of (:func:`measure`), the host works out how many rows there are and where each
sequence has its own, and the device writes them (:func:`fill`): the host waits once.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

IGNORE = -100  # a position whose label is ignored, as in Hugging Face and torch.nn.functional.cross_entropy

# What `measure` finds out about a sequence.
STATS = (
    "length",  # its real tokens
    "first",  # the column of the first of them
    "holes",  # whether others than real tokens stand among them
    "labels",  # how many there are
    "behind_padding",  # whether one of them follows what is no token
    "out_of_range",  # whether a virtual token is none of the prompt's
    "agree",  # the tokens from the first column on that are those of the first sequence of the same prompt with a token
    "prompt",
    "needed",  # the column of its last label, in front of which stands all that a label depends on; 0 without labels
)


class Stats(NamedTuple):
    """``STATS`` on the host, ``[B]`` int64 each."""

    length: np.ndarray
    first: np.ndarray
    holes: np.ndarray
    labels: np.ndarray
    behind_padding: np.ndarray
    out_of_range: np.ndarray
    agree: np.ndarray
    prompt: np.ndarray
    needed: np.ndarray

    @property
    def gaps(self) -> np.ndarray | None:
        """``first``, or None if every sequence begins in column 0."""
        return self.first if self.first.any() else None


# What `fill` is told about a sequence.
ENTRY = (
    "prompt_row",  # the first row of the prompt in front, behind which what is shared stands
    "own_row",  # the row of column 0, had it one of its own
    "own_column",  # the first column with a row of its own
    "first_label",  # how many labels the sequences before it have
    "prompt",
    "writes",  # whether it writes the rows of the prompt and what is shared
    "end",  # the column from which on it has no rows
)


@dataclass(frozen=True, eq=False)
class Batch:
    """Column c of sequence b is place ``starts[b] + c`` of the flat tensors, B sequences of at most W columns.

    Attributes:
        size, width: B and W.
        device: of all the tensors.
        starts, lengths: ``[B]`` int64; None: ``b * W`` and W.
        real: ``[B * W]`` bool; None: everything is.
        labels, virtual, token_ids: ``[T]`` or None. virtual: which virtual token stands there, -1: none.
        prompts: ``[B]`` int64, the prompt of each sequence; None: prompt 0.
        prompt_length: P.
        prefix_length: Q, the keys in front of everything.
    """

    size: int
    width: int
    device: torch.device
    starts: torch.Tensor | None
    lengths: torch.Tensor | None
    real: torch.Tensor | None
    labels: torch.Tensor | None
    virtual: torch.Tensor | None
    token_ids: torch.Tensor | None
    prompts: torch.Tensor | None
    prompt_length: int
    prefix_length: int

    @property
    def front(self) -> int:
        """The prompt rows in front of each sequence: none where virtual tokens say where the prompt stands."""
        return 0 if self.virtual is not None else self.prompt_length

    @cached_property
    def cells(self) -> "_Cells":
        return _Cells(self)


@dataclass(frozen=True, eq=False)
class Filled:
    """What :func:`fill` writes; see ``RowPlan``."""

    source: torch.Tensor
    position_ids: torch.Tensor
    grid: torch.Tensor
    label_rows: torch.Tensor | None
    labels: torch.Tensor | None


def measure(batch: Batch) -> torch.Tensor:
    """``[STATS, B]`` int64."""
    cells = batch.cells
    real, nothing = cells.real, torch.zeros(batch.size, dtype=torch.int64, device=batch.device)
    length, first = real.sum(1), _first(real)
    starts = real & ~_shifted(real, False)  # real tokens that none stands before
    holes = starts.sum(1) > 1
    labels = needed = behind_padding = out_of_range = agree = nothing
    if batch.labels is not None:
        labels = cells.wanted.sum(1)
        needed = (batch.width - 1 - _first(cells.wanted.flip(1))).clamp(min=0)
        behind_padding = (cells.wanted & ~_shifted(real, True)).sum(1) > 0
    if batch.virtual is not None:
        out_of_range = (real & (cells.of(batch.virtual) >= batch.prompt_length)).any(1)
    if batch.token_ids is not None:
        code = cells.of(batch.token_ids).long()
        if batch.virtual is not None:
            virtual = cells.of(batch.virtual)
            code = torch.where(virtual >= 0, -1 - virtual, code)
        leader = _leaders(length, batch.prompts)
        alike = code == code.index_select(0, leader)
        agree = _first(~(alike & real & real.index_select(0, leader)))
    prompts = nothing if batch.prompts is None else batch.prompts
    return torch.stack([length, first, holes, labels, behind_padding, out_of_range, agree, prompts, needed])


def _first(flags: torch.Tensor) -> torch.Tensor:
    """``[B, W]`` bool -> ``[B]``: the first column that is set, W where none is."""
    padded = torch.nn.functional.pad(flags, (0, 1), value=True)
    return padded.view(torch.uint8).argmax(1)


def _shifted(values: torch.Tensor, before: int) -> torch.Tensor:
    """``[B, W]``, the column before each; ``before`` stands before the first."""
    return torch.nn.functional.pad(values, (1, 0), value=before)[:, :-1]


def _leaders(length: torch.Tensor, prompts: torch.Tensor | None) -> torch.Tensor:
    """``[B]`` the first sequence of the same prompt that has a token, or any of the prompt if none has."""
    empty = (length == 0).long()
    if prompts is None:
        return empty.argmin().expand(len(length))
    key = 2 * prompts + empty
    ordered, order = key.sort(stable=True)
    return order[torch.searchsorted(ordered, 2 * prompts)]


def fill(batch: Batch, table: torch.Tensor, rows: int, labels: int, everywhere: bool = False) -> Filled:
    """The plan of ``rows`` rows and ``labels`` labels.

    Args:
        table: ``[ENTRY, E]`` int64, E >= B: behind the sequences, prompts that no sequence has.
        everywhere: padding has rows, too.
    """
    cells, front = batch.cells, batch.front
    entry = dict(zip(ENTRY, table.unsqueeze(2)))  # [E, 1] each
    prompt_row, own_row, own_column, first_label, prompt, writes, end = (x[: batch.size] for x in entry.values())
    column = cells.column
    real = (cells.inside if everywhere else cells.real) & (column < end)
    own = real & (column >= own_column)
    row = torch.where(own, own_row, prompt_row + front).add_(column)
    in_front = torch.arange(front, device=batch.device)
    grid = torch.cat([prompt_row + in_front, torch.where(real, row, -1)], 1)
    text = cells.place
    if batch.virtual is not None:
        virtual = cells.of(batch.virtual).long()
        text = torch.where(virtual >= 0, -1 - (prompt * batch.prompt_length + virtual), text)

    # Row number `rows` takes what is not written: picking out the others would mean waiting for the device.
    to = torch.where(own | real & (writes != 0), row, rows)
    prompt_to = torch.where(entry["writes"] != 0, entry["prompt_row"] + in_front, rows)
    prompt_text = -1 - (entry["prompt"] * front + in_front)
    source = _scatter(rows, (prompt_to, prompt_text), (to, text))
    first = batch.prefix_length
    position_ids = _scatter(rows, (prompt_to, first + in_front), (to, first + front + column))
    if batch.labels is None:
        return Filled(source, position_ids, grid, None, None)
    wanted = cells.wanted
    before = grid[:, front - 1 : -1] if front else _shifted(grid, -1)
    to = torch.where(wanted, wanted.cumsum(1).add_(first_label - 1), labels)
    label_rows = _scatter(labels, (to, before))
    shifted = _scatter(labels, (to, cells.of(batch.labels).long()))
    return Filled(source, position_ids, grid, label_rows, shifted)


def _scatter(size: int, *parts: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """``[size]``, of which number ``to`` is ``values`` for each of ``(to, values)``; number ``size`` is nothing."""
    result = parts[0][0].new_empty(size + 1)
    for to, values in parts:
        result.scatter_(0, to.reshape(-1), values.expand(to.shape).reshape(-1))
    return result[:size]


class _Cells:
    """``[B, W]`` each: the places of a batch's cells, and which are inside of their sequence, real, labelled."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.column = batch, torch.arange(batch.width, device=batch.device)
        if batch.starts is None or batch.lengths is None:
            self.place = torch.arange(batch.size * batch.width, device=batch.device).view(batch.size, batch.width)
            self.inside = torch.ones_like(self.place, dtype=torch.bool)
        else:
            self.place = batch.starts[:, None] + self.column
            self.inside = self.column < batch.lengths[:, None]
        self.real = self.inside if batch.real is None else batch.real.view(self.place.shape)
        if batch.labels is not None:
            self.wanted = self.inside & (self.of(batch.labels) != IGNORE)
            if not batch.front:  # nothing stands before the first token, as in Hugging Face
                self.wanted = self.wanted & (self.column > 0)

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The values of the cells; anything where a cell is not inside."""
        if self.batch.starts is None:
            return values.view(self.place.shape)
        return values[self.place.clamp(max=len(values) - 1)]
