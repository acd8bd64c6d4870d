"""RowPlan: the rows that a batch needs."""

from dataclasses import dataclass

import torch

from .sequences import Sequences
from .tree import Tree


@dataclass(frozen=True, eq=False)
class RowPlan:
    """The rows a batch needs and how to read the result. R rows, B sequences, W = P + longest width.

    Attributes:
        layout: "shared", "packed" or "padded".
        source: ``[R]`` int64; ``>= 0``: the flat position of a token in ``input_ids`` (or ``inputs_embeds``),
            ``-1 - j``: row j of the prompts ``[N * P, D]``. What ``prompt_concat`` takes.
        position_ids: ``[R]`` int64, as PEFT numbers them: a token in column c has position P + c, behind a learned
            prefix of Q keys Q + P + c.
        sequences: what attention needs. None for ``padded`` batches with holes in the mask.
        shared: the rows that sequences share.
        grid: ``[B, W]`` int64, the row of every cell of the padded result, -1 where there is none.
        label_rows: ``[M]`` int64, the rows that predict a label, in batch order (a row may predict several: the last
            prompt row predicts the first token of every sequence). None without labels.
        labels: ``[M]`` int64, what they predict: already shifted.
        prompts: the ids of the N prompts, as the caller gave them, ascending; ``(0,)`` without ids.
        prompt_ids: ``[B]``, which of the N each sequence has.
        predicting: the rows of ``label_rows``, each once, in order; None: they were not looked for.
        places: ``[M]`` int64, which of them predicts each label.
        to_last_label: are tokens left out that no label depends on?
        front: the rows from this one on are tokens, or dead; None: the rows of prompts stand anywhere.
        ids: ``[R]`` int64, the token id of every row, below 0 where a prompt's stands; None: nobody asked for them.
    """

    layout: str
    source: torch.Tensor
    position_ids: torch.Tensor
    sequences: Sequences | None
    shared: Tree
    grid: torch.Tensor
    label_rows: torch.Tensor | None
    labels: torch.Tensor | None
    prompts: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    to_last_label: bool = False
    predicting: torch.Tensor | None = None
    places: torch.Tensor | None = None
    front: int | None = None
    ids: torch.Tensor | None = None

    @property
    def counts(self) -> tuple[int, int]:
        """How many rows it has, and how many the padded batch."""
        return len(self.source), self.grid.numel()

    @property
    def predicting_once(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``predicting`` and ``places`` of a batch that has labels. ValueError: the plan was made without."""
        if self.predicting is None or self.places is None:
            raise ValueError("the plan was made without labels")
        return self.predicting, self.places

    def token_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``source`` with token ids in place of token positions: for gathering from the embedding table directly."""
        flat = input_ids.reshape(-1)
        if flat.numel() == 0:
            return self.source
        return torch.where(self.source >= 0, flat[self.source.clamp(min=0)], self.source)

    def padding(self) -> torch.Tensor | None:
        """``[sequences]`` the padding in front of each sequence and of what it continues; None: there is none."""
        seq = self.sequences
        if seq is None or seq.gaps is None:
            return None
        return seq.gaps if not self.shared.nodes else seq.gaps + torch.from_numpy(self.shared.gaps).to(seq.gaps.device)

    def unpack(self, rows: torch.Tensor, fill: float = 0) -> torch.Tensor:
        """``[R, ...]`` -> ``[B, W, ...]``; cells without a row hold ``fill``."""
        cells = rows[self.grid.clamp(min=0)]
        missing = (self.grid < 0).view(self.grid.shape + (1,) * (rows.dim() - 1))
        return cells.masked_fill_(missing, fill)  # of the copy that indexing made
