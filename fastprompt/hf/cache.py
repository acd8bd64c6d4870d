"""The cache that a model's own forward would return, made of what the layers of a packed batch leave."""

from typing import Any

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from ..layout import PairPlan, RowPlan, final_buckets
from .shared_state import SharedState, layers_with_own_keys, text_config
from .states import Recorded, gathered_states


class PackedCache(DynamicCache):
    """A ``DynamicCache`` of ``[B, Hkv, W, Dh]`` keys and values, and states ``[B, ...]``, that are put together when
    somebody looks at them.

    Most calls that return a cache are evaluations, which never do. At padding, which no mask lets anybody see, it holds
    zeros as keys and values; the states are those behind the last column, padding included, so that the layers that
    keep one run once more, on padded rows.

    Args:
        plan: the batch's RowPlan.
        recorded: what the layers left.
        shared: the learned keys and values in front, or None.
        prompt_ids: ``[B]``, which of them each row has; None: the first.
        config: the model's config.
    """

    _pending = None

    def __init__(
        self,
        plan: RowPlan,
        recorded: Recorded,
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
            for index, packed in self._by_layer(recorded.keys_values):
                if index < own:
                    learned = shared.layers[index] if shared.layers else None
                    self._layers[index].update(*_padded(plan, packed, learned, prompt_ids))
            for key, state in _final_states(plan, recorded).items():
                layer = self._layers[key.layer]
                update = layer.update_conv_state if key.kind == "conv" else layer.update_recurrent_state
                update(state, key.number)
        return self._layers

    @layers.setter
    def layers(self, layers: list[Any]) -> None:
        self._layers = layers

    def _by_layer(self, keys_values):
        """Keys and values with the index of their layer, which its module says unless layers share one (Zamba 2)."""
        indices = [index for index, *_ in keys_values]
        if len(set(indices)) < len(indices):
            indices = [index for index, layer in enumerate(self._layers) if isinstance(layer, DynamicLayer)]
        return zip(indices, (packed for _, *packed in keys_values))

    def __getstate__(self):
        self.layers  # noqa: B018 - a copy or a file holds keys and values
        return vars(self)


class PairCache(EncoderDecoderCache):
    """An ``EncoderDecoderCache`` of two caches like :class:`PackedCache`.

    Args:
        plan, recorded, shared, prompt_ids: as there; the plan is one of pairs.
        config: the decoder's config.
    """

    def __init__(
        self,
        plan: PairPlan,
        recorded: Recorded,
        shared: SharedState | None,
        prompt_ids: torch.Tensor | None,
        config: PreTrainedConfig,
    ) -> None:
        config = config.get_text_config(decoder=True)
        self.self_attention_cache = PackedCache(plan.target, recorded, shared, prompt_ids, config)
        self.cross_attention_cache = PackedCache(plan.source, Recorded(recorded.of_sources), None, None, config)
        self.is_updated = {index: True for index, *_ in recorded.of_sources}


def content(cache: Cache) -> dict[tuple[int, str, int], torch.Tensor]:
    """All tensors of a cache: by layer, kind and number."""
    found = {}
    for layer, holder in enumerate(cache.layers):
        for kind in ("keys", "values"):
            if getattr(holder, kind, None) is not None:
                found[layer, kind, 0] = getattr(holder, kind)
        for kind in ("conv_states", "recurrent_states"):
            states = getattr(holder, kind, {})
            found.update({(layer, kind, index): x for index, x in states.items() if x is not None})
    return found


def _final_states(plan, recorded):
    """The states ``[B, ...]`` of all layers behind the last column of each row."""
    final, order = {}, None
    for mixer, shared in recorded.mixers:
        members, buckets = final_buckets(plan)
        states = [gathered_states(shared, bucket) for bucket in buckets]
        ran = [mixer.run(bucket, state)[1] if bucket.rows.shape[1] else state for bucket, state in zip(buckets, states)]
        order = torch.cat(members).argsort() if order is None else order
        for key in ran[0]:
            final[key] = torch.cat([x[key] for x in ran])[order.to(ran[0][key].device)]
    return final


def _padded(plan, packed, learned, prompt_ids):
    """``[Hkv, R, Dh]`` keys and values -> ``[B, Hkv, Q + W, Dh]``, the learned ones in front."""
    padded = [plan.unpack(x.transpose(0, 1)).transpose(1, 2) for x in packed]
    if learned is None:
        return padded
    batch = len(plan.grid)
    ids = torch.zeros(batch, dtype=torch.int64, device=plan.grid.device) if prompt_ids is None else prompt_ids
    return [torch.cat([front.to(x)[ids].transpose(1, 2), x], 2) for front, x in zip(learned, padded)]
