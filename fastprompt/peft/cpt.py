"""CPT's loss, of the logits of labelled rows alone."""

import torch
from peft import CPTConfig
from torch.nn import functional as F

from ..layout import IGNORE, RowPlan


class CPTLoss:
    """What PEFT's ``CPTEmbedding.calculate_loss`` computes: a mean over labels, weighted by which example they belong
    to.

    Args:
        config: the adapter's config.
        decay: the config that PEFT takes the weights from.
        labels: ``[B, S]``.
        type_mask: ``[B, S]``, PEFT's ``input_type_mask``: 4, 8, ... where a token is a label of an example; None: 4.
    """

    def __init__(
        self, config: CPTConfig, decay: CPTConfig, labels: torch.Tensor, type_mask: torch.Tensor | None
    ) -> None:
        batch, device = len(labels), labels.device
        prefix = torch.tensor(config.cpt_tokens_type_mask, device=device).expand(batch, -1)
        types = torch.full_like(labels, 4) if type_mask is None else type_mask.to(device)
        types = torch.where(types > 0, types + prefix.max(), types)
        types = torch.cat([prefix, types.long()], 1)
        tokens = torch.tensor(config.cpt_token_ids, device=device).expand(batch, -1)
        is_label = (types > 0) & (types % 4 == 0)
        self.labels = torch.cat([tokens, labels], 1).masked_fill(~is_label, IGNORE)[:, 1:]  # [B, P + S - 1], shifted
        weights = torch.ones(self.labels.shape, device=device)
        if decay.opt_weighted_loss_type == "decay":
            weights = _decayed(types[:, 1:], is_label[:, 1:], decay.opt_loss_decay_factor)
        self.wanted = self.labels != IGNORE
        self.weights = weights[self.wanted]

    def rows(self, plan: RowPlan) -> torch.Tensor:
        """The rows ``[M]`` of a plan that predict the labels."""
        return plan.grid[:, :-1][self.wanted.to(plan.grid.device)]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The loss of ``[M, V]`` logits."""
        loss = F.cross_entropy(logits, self.labels[self.wanted].to(logits.device), reduction="none")
        return (loss * self.weights.to(logits.device)).mean()


def _decayed(types, is_label, factor):
    """The weights ``[B, W]``: 1 for the labels of a row's last example, ``factor`` for the one before it, and so on."""
    weights = torch.ones(types.shape, device=types.device)
    for row, (kinds, labelled) in enumerate(zip(types, is_label)):
        for rank, kind in enumerate(kinds[labelled].unique().flip(0)):
            weights[row, kinds == kind] = factor**rank
    return weights
