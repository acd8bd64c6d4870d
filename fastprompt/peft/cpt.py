"""CPT without waiting for a device: its loss, of the logits of labelled rows alone, and what its encoder projects."""

from typing import Any

import torch
from peft import CPTConfig
from torch.nn import functional as F

from ..layout import IGNORE, RowPlan


class CPTLoss:
    """What PEFT's ``CPTEmbedding.calculate_loss`` computes: a mean over labels, weighted by which example they belong
    to. Tokens of the prompt are labels, too, in every row of the batch.

    Which these are the config says, and how many labels the text has, the plan: nobody waits for a device.

    Args:
        config: the adapter's config.
        decay: the config that PEFT takes the weights from.
        labels: ``[B, S]``.
        type_mask: ``[B, S]``, PEFT's ``input_type_mask``: 4, 8, ... where a token is a label of an example; None: 4.

    Attributes:
        labels: ``[B, S]``, those of the text that count; -100 elsewhere.
    """

    def __init__(
        self, config: CPTConfig, decay: CPTConfig, labels: torch.Tensor, type_mask: torch.Tensor | None
    ) -> None:
        of_prompt: Any = config.cpt_tokens_type_mask
        batch, device = len(labels), labels.device
        types = torch.full_like(labels, 4) if type_mask is None else type_mask.to(device)
        types = torch.where(types > 0, types + max(of_prompt), types).long()
        self.labels = labels.masked_fill(~_is_label(types), IGNORE)
        columns = [column for column, kind in enumerate(of_prompt) if column and kind > 0 and kind % 4 == 0]
        self.columns = torch.tensor(columns, dtype=torch.int64, device=device)
        tokens = torch.tensor(config.cpt_token_ids, device=device)[self.columns]
        self.of_prompt = tokens.repeat(batch)  # [B * K]
        self.weights: torch.Tensor | None = None
        if decay.opt_weighted_loss_type == "decay":
            types = torch.cat([torch.tensor(of_prompt, device=device).expand(batch, -1), types], 1)
            self.weights = _decayed(types[:, 1:], decay.opt_loss_decay_factor)  # of columns 1, 2, ...

    def rows(self, plan: RowPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of a plan that predict the labels, each once, and which of them each label is predicted by: the
        labels in the prompt, row by row of the batch, and then those of the text."""
        before = plan.grid[:, self.columns.to(plan.grid.device) - 1]
        once = before[:1] if plan.layout == "shared" else before  # that of the first row of the batch is everybody's
        places = torch.arange(once.numel(), device=once.device).view(once.shape).expand(before.shape)
        of_text, places_of_text = plan.predicting_once
        return torch.cat([once.flatten(), of_text]), torch.cat([places.flatten(), once.numel() + places_of_text])

    def __call__(self, plan: RowPlan, logits: torch.Tensor) -> torch.Tensor:
        """The loss of ``[M, V]`` logits."""
        of_text: Any = plan.labels
        labels = torch.cat([self.of_prompt, of_text]).to(logits.device)
        loss = F.cross_entropy(logits, labels, reduction="none")
        return loss.mean() if self.weights is None else (loss * self._of_labels(plan).to(loss.device)).mean()

    def _of_labels(self, plan):
        """The weights ``[M]``."""
        width, count, wanted = self.labels.shape[1], len(plan.labels), self.labels != IGNORE
        place = torch.where(wanted, wanted.flatten().cumsum(0).view(wanted.shape) - 1, count)
        of_text = self.weights.new_empty(count + 1)
        of_text.scatter_(0, place.flatten(), self.weights[:, -width:].flatten())
        return torch.cat([self.weights[:, self.columns - 1].flatten(), of_text[:count]])


def projected(encoder: Any) -> torch.Tensor:
    """What PEFT's ``CPTEmbedding.get_projection`` gives: its rows, those that are too long cut to their length."""
    with torch.no_grad():
        weight = encoder.delta_embedding.weight
        norm, longest = torch.norm(weight, p=2, dim=1), encoder.get_epsilon().to(weight.device)
        factor = torch.where(norm > 0, longest / norm.clamp(min=longest), 1)
        return (weight * factor[:, None]).to(weight.dtype)


def _is_label(types):
    return (types > 0) & (types % 4 == 0)


def _decayed(types, factor):
    """The weights ``[B, W]``: 1 for the labels of a row's last example, ``factor`` for the one before it, and so on."""
    kinds, order = types.where(_is_label(types), 0).sort(dim=1, descending=True)
    rank = F.pad((kinds[:, 1:] != kinds[:, :-1]).cumsum(1), (1, 0))
    rank = torch.empty_like(rank).scatter_(1, order, rank)
    return (factor ** rank.double()).float()
