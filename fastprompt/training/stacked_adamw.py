"""AdamW for many prompts at once: a state, a gradient norm and a learning rate for each."""

import re
from collections.abc import Sequence

import torch
from torch.optim.adamw import adamw

# The names of parameters that transformers' Trainer does not decay.
_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_FUSED = ("cpu", "cuda")  # devices on which torch updates in one pass


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
        self._not_decayed = [name for name in values if _NOT_DECAYED.search(name)]
        self._decayed = [name for name in values if name not in self._not_decayed]
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
        clips = [1.0] * len(ids)
        if self.max_grad_norm:
            clips = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1).tolist()
        for place, (index, rate, clip) in enumerate(zip(ids, lr, clips)):
            own = {name: gradient[place].contiguous() for name, gradient in gradients.items()}
            if clip < 1:
                for gradient in own.values():
                    gradient.mul_(clip)
            for names, decay in (self._decayed, self.weight_decay), (self._not_decayed, 0.0):
                self._update(index, {name: own[name] for name in names}, rate, decay)
            self.steps[index] += 1

    def _update(self, index, gradients, rate, decay):
        """One of the N, in one pass over its values: a stack is too large for the caches."""
        if not gradients:
            return
        values, exp_avgs, exp_avg_sqs = (
            [stacked[name][index] for name in gradients] for stacked in (self.values, self.exp_avg, self.exp_avg_sq)
        )
        device = values[0].device
        steps = torch.full((len(values),), float(self.steps[index]), device=device)
        adamw(
            values,
            list(gradients.values()),
            exp_avgs,
            exp_avg_sqs,
            [],
            list(steps.unbind()),  # each is counted up
            fused=device.type in _FUSED,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=rate,
            weight_decay=decay,
            eps=self.eps,
            maximize=False,
        )


def gradient_norms(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    """The norm of each one's whole gradient, ``[n]``, of ``{name: [n, ...]}``."""
    parts = [torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients.values()]
    return torch.linalg.vector_norm(torch.stack(parts), dim=0)
