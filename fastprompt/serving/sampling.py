"""How the next token of a row is drawn: with its own parameters and generator, whatever its neighbours are."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor


@dataclass(frozen=True)
class Sampling:
    """Attributes:
    temperature: 0: the most probable token.
    top_p: draw among the most probable tokens that together have this probability.
    seed: of the row's generator; None: another one each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


class RowSampling(LogitsProcessor):
    """Adds Gumbel noise to the scores of rows that sample, so that the largest is a draw from their distribution.

    A greedy search on these scores samples; greedy rows and rows of any parameters then share a batch, and a seed gives
    the same tokens in every batch.
    """

    def __init__(self, rows: Sequence[Sampling]) -> None:
        self._rows = rows
        self._generators: list[torch.Generator | None] = [None] * len(rows)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        drawn: list[torch.Tensor] = list(scores)
        for index, row in enumerate(self._rows):
            if row.temperature > 0:
                drawn[index] = _noisy(scores[index].float(), row, self._generator(index, scores.device)).to(scores)
        return torch.stack(drawn)  # type: ignore[return-value]

    def _generator(self, index, device):
        if self._generators[index] is None:
            generator = torch.Generator(device)
            seed = self._rows[index].seed
            if seed is None:
                generator.seed()
            else:
                generator.manual_seed(seed)
            self._generators[index] = generator
        return self._generators[index]


def _noisy(scores, row, generator):
    """``scores [V]`` at the row's temperature, among its top_p, plus Gumbel noise."""
    scores = (scores - scores.max()) / row.temperature
    if row.top_p < 1:
        ordered, order = scores.sort(descending=True)
        probabilities = ordered.softmax(0)
        out = probabilities.cumsum(0) - probabilities >= row.top_p
        out[0] = False
        scores = scores.masked_fill(torch.zeros_like(out).scatter(0, order, out), -torch.inf)
    waited = torch.empty_like(scores).exponential_(generator=generator)
    return scores - waited.clamp_min(torch.finfo(scores.dtype).tiny).log()
