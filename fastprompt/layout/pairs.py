"""Row plans of an encoder-decoder: the rows of its sources and those of its targets."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from ..checks import INTS, check_tensor
from .plan import IGNORE, CannotPack, RowPlan, plan_padded_input
from .sequences import Sequences


@dataclass(frozen=True, eq=False)
class PairPlan:
    """The rows of a batch of pairs. The queries of target b see the rows of source b, and no others, as keys.

    Attributes:
        source: the encoder's rows, each sequence behind a prompt of its own.
        target: the decoder's rows. Its labels are those that the decoder's rows predict, as they come: the decoder's
            tokens are shifted and not the labels.
    """

    source: RowPlan
    target: RowPlan

    @cached_property
    def keys(self) -> Sequences:
        """The rows that the targets' queries see: the sources, in which no position counts any more."""
        sources: Any = self.source.sequences
        return sources if sources.gaps is None else replace(sources, gaps=None)

    @property
    def prompts(self) -> tuple[int, ...]:
        """See RowPlan; those of sources and targets are the same."""
        return self.source.prompts

    @property
    def counts(self) -> tuple[int, int]:
        """How many rows it has, and how many the padded batch."""
        source, target = self.source.counts, self.target.counts
        return source[0] + target[0], source[1] + target[1]


def plan_pairs(
    source: RowPlan,
    width: int,
    num_virtual_tokens: int,
    *,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    prompt_ids: torch.Tensor | None = None,
    only_used_prompts: bool = False,
    prefix_length: int = 0,
    up_to_last_label: bool = False,
    backend: str = "auto",
) -> PairPlan:
    """Plan the targets of a batch whose sources are planned: ``[B, T]``.

    Args:
        source: of the ``packed`` layout.
        width: T.
        num_virtual_tokens: P, of prompts in front of the targets.
        attention_mask: ``[B, T]``, nonzero where a target's token is real; None: everywhere.
        labels: ``[B, T]`` int64, what each of these columns predicts, -100 to ignore.
        prompt_ids, only_used_prompts, prefix_length, backend: see :func:`plan_padded_input`.
        up_to_last_label: leave out what stands behind the last label of a row. In a causal decoder no label sees it. A
            batch without any labels keeps its tokens.

    Raises:
        CannotPack: holes in the mask or padding in front, or a label that padding would predict.
        ValueError, TypeError: wrong arguments.
    """
    batch, device = len(source.grid), source.grid.device
    if labels is not None:
        check_tensor("labels", labels, [batch, width], dtypes=INTS)
        labels = labels.to(device)
    if attention_mask is not None:
        check_tensor("attention_mask", attention_mask, [batch, width])
        attention_mask = attention_mask.to(device)
    real = attention_mask
    wanted = None if labels is None else labels != IGNORE
    if up_to_last_label and wanted is not None and bool(wanted.any()):
        real = wanted.flip(1).cumsum(1).flip(1) > 0  # a label stands here or further on
        if attention_mask is not None:
            real &= attention_mask != 0
    target = plan_padded_input(
        batch,
        width,
        num_virtual_tokens,
        attention_mask=real,
        prompt_ids=prompt_ids,
        only_used_prompts=only_used_prompts,
        prefix_length=prefix_length,
        layout="packed",
        device=device,
        backend=backend,
    )
    if target.sequences is not None and target.sequences.gaps is not None:
        raise CannotPack("the decoder's tokens are padded on the left")
    if labels is None or wanted is None:
        return PairPlan(source, target)
    label_rows = target.grid[:, num_virtual_tokens:][wanted]
    if bool((label_rows < 0).any()):
        raise CannotPack(f"the decoder's padding has labels other than {IGNORE}; mask them with it")
    return PairPlan(source, replace(target, label_rows=label_rows, labels=labels[wanted].long()))
