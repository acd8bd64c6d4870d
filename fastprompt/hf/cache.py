"""The cache that a model's own forward would return, made of a packed batch's keys and values."""

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig

from ..layout import RowPlan
from .shared_state import SharedState, layers_with_own_keys, text_config


class PackedCache(DynamicCache):
    """A ``DynamicCache`` of ``[B, Hkv, W, Dh]`` keys and values that are put together when somebody looks at them.

    Most calls that return a cache are evaluations, which never do. At padding, which no mask lets anybody see, it holds
    zeros.

    Args:
        plan: the batch's RowPlan.
        recorded: for each layer's index its packed ``(keys, values)``, ``[Hkv, R, Dh]`` each.
        shared: the learned keys and values in front, or None.
        prompt_ids: ``[B]``, which of them each row has; None: the first.
        config: the model's config.
    """

    _pending = None

    def __init__(
        self,
        plan: RowPlan,
        recorded: dict[int, tuple[torch.Tensor, torch.Tensor]],
        shared: SharedState | None,
        prompt_ids: torch.Tensor | None,
        config: PreTrainedConfig,
    ) -> None:
        super().__init__(config=text_config(config))
        self._pending = plan, recorded, shared or SharedState(), prompt_ids, layers_with_own_keys(config)

    @property
    def layers(self) -> list[Any]:
        if self._pending is not None:
            plan, recorded, shared, prompt_ids, own = self._pending
            self._pending = None
            for index in sorted(recorded):
                if index < own:
                    learned = shared.layers[index] if shared.layers else None
                    self._layers[index].update(*_padded(plan, recorded[index], learned, prompt_ids))
        return self._layers

    @layers.setter
    def layers(self, layers: list[Any]) -> None:
        self._layers = layers

    def __getstate__(self):
        self.layers  # noqa: B018 - a copy or a file holds keys and values
        return vars(self)


def _padded(plan, packed, learned, prompt_ids):
    """``[Hkv, R, Dh]`` keys and values -> ``[B, Hkv, Q + W, Dh]``, the learned ones in front."""
    padded = [plan.unpack(x.transpose(0, 1)).transpose(1, 2) for x in packed]
    if learned is None:
        return padded
    batch = len(plan.grid)
    ids = torch.zeros(batch, dtype=torch.int64, device=plan.grid.device) if prompt_ids is None else prompt_ids
    return [torch.cat([front.to(x)[ids].transpose(1, 2), x], 2) for front, x in zip(learned, padded)]
