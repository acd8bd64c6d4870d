"""The part of a row plan that looks at every cell of a batch, in PyTorch; ``triton.py`` is the same in three kernels.

The device counts what sequences consist of (:func:`measure`), the host works out how many rows there are and where each
sequence has its own, and the device writes them (:func:`fill`): the host waits once.
"""

from dataclasses import dataclass

import torch

IGNORE = -100  # a position whose label is ignored, as in Hugging Face and torch.nn.functional.cross_entropy

# What `measure` finds out about a sequence.
STATS = (
    "length",  # its real tokens
    "first",  # the column of the first of them
    "holes",  # whether others than real tokens stand among them
    "labels",  # how many there are
    "orphans",  # whether one of them follows what is no token
    "strangers",  # whether a virtual token is none of the prompt's
    "agree",  # the tokens from the first column on that are those of the first sequence of the same prompt with a token
    "prompt",
)
# What `fill` is told about a sequence.
ENTRY = (
    "prompt_row",  # the first row of the prompt in front, behind which what is shared stands
    "own_row",  # the row of column 0, had it one of its own
    "own_column",  # the first column with a row of its own
    "first_label",  # how many labels the sequences before it have
    "prompt",
    "writes",  # whether it writes the rows of the prompt and what is shared
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
    def front(self):
        """The prompt rows in front of each sequence: none where virtual tokens say where the prompt stands."""
        return 0 if self.virtual is not None else self.prompt_length


@dataclass(frozen=True, eq=False)
class Filled:
    """What :func:`fill` writes; see ``RowPlan``."""

    source: torch.Tensor
    position_ids: torch.Tensor
    grid: torch.Tensor
    label_rows: torch.Tensor | None
    labels: torch.Tensor | None


def measure(batch):
    """``[STATS, B]`` int64."""
    cells = _Cells(batch)
    column, real, none = cells.column, cells.real, torch.zeros(batch.size, dtype=torch.int64, device=batch.device)
    length, first = real.sum(1), (real.cumsum(1) == 0).sum(1)
    holes = (real & (column >= (first + length)[:, None])).any(1)
    labels = orphans = strangers = agree = none
    if batch.labels is not None:
        labels = cells.wanted.sum(1)
        before = torch.cat([real.new_ones(batch.size, 1), real], 1)[:, :-1]
        orphans = (cells.wanted & ~before).any(1)
    if batch.virtual is not None:
        strangers = (real & (cells.of(batch.virtual) >= batch.prompt_length)).any(1)
    if batch.token_ids is not None:
        code = cells.of(batch.token_ids).long()
        if batch.virtual is not None:
            virtual = cells.of(batch.virtual)
            code = torch.where(virtual >= 0, -1 - virtual, code)
        leads = (length > 0)[None, :]
        if batch.prompts is not None:
            leads = leads & (batch.prompts[:, None] == batch.prompts)
        leader = leads.expand(batch.size, -1).int().argmax(1)  # [B]
        agree = ((code == code[leader]) & real & real[leader]).long().cumprod(1).sum(1)
    return torch.stack(
        [length, first, holes, labels, orphans, strangers, agree, none if batch.prompts is None else batch.prompts]
    )


def fill(batch, table, rows, labels, everywhere=False):
    """The plan of ``rows`` rows and ``labels`` labels.

    Args:
        table: ``[ENTRY, E]`` int64, E >= B: behind the sequences, prompts that no sequence has.
        everywhere: padding has rows, too.
    """
    cells, front = _Cells(batch), batch.front
    real = cells.inside if everywhere else cells.real
    entry = dict(zip(ENTRY, table.unsqueeze(2)))  # [E, 1] each
    prompt_row, own_row, own_column, first_label, prompt, writes = (x[: batch.size] for x in entry.values())
    own = real & (cells.column >= own_column)
    row = torch.where(own, own_row, prompt_row + front) + cells.column
    in_front = torch.arange(front, device=batch.device)
    grid = torch.cat([prompt_row + in_front, torch.where(real, row, -1)], 1)
    text = cells.place
    if batch.virtual is not None:
        virtual = cells.of(batch.virtual).long()
        text = torch.where(virtual >= 0, -1 - (prompt * batch.prompt_length + virtual), text)

    # Row number `rows` takes what is not written: the numbers that are could only be picked out by waiting for the
    # device.
    to = torch.where(own | real & (writes != 0), row, rows)
    prompt_to = torch.where(entry["writes"] != 0, entry["prompt_row"] + in_front, rows)
    prompt_text = -1 - (entry["prompt"] * front + in_front)
    position = batch.prefix_length + front + cells.column
    source, position_ids = (
        _scatter(rows, torch.cat([prompt_to.reshape(-1), to.reshape(-1)]), torch.cat([a.reshape(-1), b.reshape(-1)]))
        for a, b in (
            (prompt_text, text),
            ((batch.prefix_length + in_front).expand(prompt_to.shape), position.expand(to.shape)),
        )
    )
    if batch.labels is None:
        return Filled(source, position_ids, grid, None, None)
    before = torch.cat([grid.new_full((batch.size, 1), -1), grid], 1)[:, front : front + batch.width]
    to = torch.where(cells.wanted, first_label + cells.wanted.cumsum(1) - 1, labels).reshape(-1)
    label_rows, shifted = (_scatter(labels, to, x.reshape(-1).long()) for x in (before, cells.of(batch.labels)))
    return Filled(source, position_ids, grid, label_rows, shifted)


def _scatter(size, to, values):
    """``[size]``, of which number ``to[i]`` is ``values[i]``; number ``size`` is nothing."""
    return values.new_empty(size + 1).scatter_(0, to, values)[:size]


class _Cells:
    """``[B, W]`` each: the places of a batch's cells, and which are inside of their sequence, real, labelled."""

    def __init__(self, batch):
        self.batch, self.column = batch, torch.arange(batch.width, device=batch.device)
        if batch.starts is None:
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

    def of(self, values):
        """The values of the cells; anything where a cell is not inside."""
        if self.batch.starts is None:
            return values.view(self.place.shape)
        return values[self.place.clamp(max=len(values) - 1)]
