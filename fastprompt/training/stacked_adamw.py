"""AdamW for many prompts at once: one update for all, a state, a gradient norm and a learning rate for each."""

import re
from collections.abc import Sequence

import torch

# The names of parameters that transformers' Trainer does not decay.
_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


class StackedAdamW:
    """AdamW over ``{name: [N, ...]}``, where each of the N has steps, moments and a gradient norm of its own.

    An update of some of them is what ``torch.optim.AdamW`` gives each, behind ``torch.nn.utils.clip_grad_norm_`` of its
    own gradients; biases and norms are not decayed, as in transformers' Trainer.

    Args:
        values: the parameters; :meth:`step` writes into them.
        weight_decay: relative to the learning rate.
        max_grad_norm: what the norm of an update's gradient is clipped to; 0: never.
        betas, eps: as in ``torch.optim.AdamW``.

    Attributes:
        steps: ``[N]`` int64, the updates that each has had.
        exp_avg, exp_avg_sq: ``{name: [N, ...]}``, the moments.
    """

    def __init__(
        self,
        values: dict[str, torch.Tensor],
        *,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.values, self.betas, self.eps = values, betas, eps
        self.weight_decay, self.max_grad_norm = weight_decay, max_grad_norm
        self.steps = torch.zeros(len(next(iter(values.values()))), dtype=torch.int64)
        self.exp_avg = {name: torch.zeros_like(x) for name, x in values.items()}
        self.exp_avg_sq = {name: torch.zeros_like(x) for name, x in values.items()}

    @torch.no_grad()
    def step(
        self, ids: Sequence[int], gradients: dict[str, torch.Tensor], norms: torch.Tensor, lr: Sequence[float]
    ) -> None:
        """Update some of the N.

        Args:
            ids: which n of them, each once.
            gradients: ``{name: [n, ...]}``, not clipped; they are written into.
            norms: ``[n]``, their :func:`gradient_norms`.
            lr: the learning rate of each of the n.
        """
        index = torch.tensor(list(ids))
        self.steps[index] += 1
        steps, rates = self.steps[index].double(), torch.tensor(list(lr), dtype=torch.float64)
        first, second = self.betas
        # What differs from one to the next, in float64 on the host as torch computes it, then as a factor of a row.
        factors = torch.stack(
            [
                1 - rates * self.weight_decay,
                rates / (1 - first**steps),
                (1 - second**steps).sqrt(),
            ]
        )
        index, factors = index.to(norms.device), factors.to(norms.device, torch.float32)
        clip = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1) if self.max_grad_norm else None
        for name, value in self.values.items():
            decay, size, root = (x.view(-1, *[1] * (value.dim() - 1)) for x in factors)
            gradient, exp_avg, exp_avg_sq = gradients[name], self.exp_avg[name][index], self.exp_avg_sq[name][index]
            if clip is not None:
                gradient.mul_(clip.view_as(size))
            exp_avg.lerp_(gradient, 1 - first)
            exp_avg_sq.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            updated = value[index]
            if self.weight_decay and not _NOT_DECAYED.search(name):
                updated.mul_(decay)
            updated.sub_(exp_avg.mul(size).div_(exp_avg_sq.sqrt().div_(root).add_(self.eps)))
            for whole, part in ((value, updated), (self.exp_avg[name], exp_avg), (self.exp_avg_sq[name], exp_avg_sq)):
                whole.index_copy_(0, index, part)


def gradient_norms(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    """The norm of each one's whole gradient, ``[n]``, of ``{name: [n, ...]}``."""
    parts = [torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients.values()]
    return torch.linalg.vector_norm(torch.stack(parts), dim=0)
