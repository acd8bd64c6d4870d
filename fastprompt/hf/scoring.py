"""Log-probabilities of completions in a mixed batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from .masks import AsBefore, running
from .mixed import Mixed
from .mixed_text import MixedText
from .prompt_cache import fill, virtual_columns
from .prompt_state import PromptState
from .shared_state import text_config


@dataclass(frozen=True)
class _Run:
    """One row of the model's batch: the row of the call, its ids, where its text ends, what is scored from there on."""

    row: int
    ids: list[int]
    end: int
    completions: Sequence[Sequence[int]]  # of one length

    @property
    def length(self) -> int:
        return len(self.completions[0])


@torch.no_grad()
def logprobs(
    mixed: Mixed,
    rows: Sequence[PromptState],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    completions: Sequence[Sequence[Sequence[int]]],
) -> list[torch.Tensor]:
    """For each row the log-probabilities of its completions behind its text, fp32, summed over their tokens.

    Completions of one token cost one run of the row's text, longer ones a run each. Rows are padded on the right, where
    no layer sees it.

    Args:
        mixed: the model.
        rows, input_ids, attention_mask: see :meth:`Mixed.generate`.
        completions: for each row the token ids of one or more completions, each of at least one token.

    Raises:
        TypeError, ValueError, NotImplementedError: see :meth:`Mixed.generate`.
    """
    text = MixedText.of(input_ids, attention_mask, side="right")
    texts = [ids[:length].tolist() for ids, length in zip(text.ids, text.lengths)]
    if all(len(tokens) == 1 for row in completions for tokens in row):
        runs = [_Run(i, texts[i], len(texts[i]), row) for i, row in enumerate(completions)]
    else:
        runs = [
            _Run(i, [*texts[i], *tokens[:-1]], len(texts[i]), [tokens])
            for i, row in enumerate(completions)
            for tokens in row
        ]
    scores: list[list[torch.Tensor]] = [[] for _ in rows]
    for run, logits in zip(runs, _logits(mixed, rows, runs, input_ids.device)):
        places = torch.tensor([list(tokens) for tokens in run.completions], device=logits.device)
        scores[run.row].append(logits.float().log_softmax(-1).gather(1, places.T).sum(0))
    return [torch.cat(found) for found in scores]


def _logits(mixed, rows, runs, device):
    """For each run the logits ``[n, V]`` that its completions are read from."""
    width = max(len(run.ids) for run in runs)
    front = [rows[run.row] for run in runs]
    mixed.check_reach(max(row.length for row in front) + width)
    ids = torch.tensor([run.ids + run.ids[:1] * (width - len(run.ids)) for run in runs], device=device)
    mask = torch.tensor([[1] * len(run.ids) + [0] * (width - len(run.ids)) for run in runs], device=device)
    first = min(run.end for run in runs) - 1
    keep = torch.arange(first, max(run.end - 1 + run.length for run in runs), device=device)
    with running(AsBefore()):
        cache = fill(DynamicCache(config=text_config(mixed.base.config)), front)
        logits = mixed.forward(cache, ids, torch.cat([virtual_columns(front, device), mask], 1), keep)
    if logits.shape[1] != len(keep):  # of all columns, whatever is asked for
        logits = logits[:, keep.to(logits.device)]
    return [row[run.end - 1 - first :][: run.length] for row, run in zip(logits, runs)]
