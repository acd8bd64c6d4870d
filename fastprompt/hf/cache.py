"""The cache that a model's own forward would return, made of what the layers of a packed batch leave."""

from typing import Any

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedConfig

from ..layout import PairPlan, RowPlan, final_buckets
from .shared_state import SharedState, layers_with_own_keys, text_config
from .states import Recorded, gathered_states


class RecordingCache(DynamicCache):
    """What layers are handed as their cache while packed rows run: empty, it records what they update it with.

    Args:
        recorded: where it leaves that.
        config: the model's config.
    """

    def __init__(self, recorded: Recorded, config: PreTrainedConfig) -> None:
        super().__init__(config=text_config(config))
        self._recorded = recorded

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[1, Hkv, R, Dh]``, returned as they are."""
        self._recorded.keys_values.append((layer_idx, key_states[0], value_states[0]))
        return key_states, value_states

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Keys of an indexer ``[1, R, width]``; none of them is given back: on packed rows it has none to score."""
        self._recorded.indexer_keys.append((layer_idx, indexer_key_states[0]))
        return indexer_key_states[:, :0]


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
        config: the model's config.
    """

    _pending = None

    def __init__(self, plan: RowPlan, recorded: Recorded, shared: SharedState | None, config: PreTrainedConfig) -> None:
        super().__init__(config=text_config(config))
        self._pending = plan, recorded, shared or SharedState(), layers_with_own_keys(config)

    @property
    def layers(self) -> list[Any]:
        if self._pending is not None:
            plan, recorded, shared, own = self._pending
            self._pending = None
            for index, *packed in recorded.keys_values:
                if index < own:
                    learned = shared.layers[index] if shared.layers else None
                    self._layers[index].update(*_padded(plan, packed, learned))
            for index, keys in recorded.indexer_keys:
                self._layers[index].update_indexer(plan.unpack(keys))
            for key, state in _final_states(plan, recorded).items():
                layer = self._layers[key.layer]
                update = layer.update_conv_state if key.kind == "conv" else layer.update_recurrent_state
                update(state, key.number)
        return self._layers

    @layers.setter
    def layers(self, layers: list[Any]) -> None:
        self._layers = layers

    def __getstate__(self):
        self.layers  # noqa: B018 - a copy or a file holds keys and values
        return vars(self)


class PairRecorder:
    """What the decoder of an encoder-decoder leaves for a cache, of its own tokens and of the encoder's.

    Args:
        config: the decoder's config.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config.get_text_config(decoder=True)
        self.own, self.of_sources = Recorded(), Recorded()

    def handed(self) -> EncoderDecoderCache:
        """What the layers are handed as their cache."""
        parts = (RecordingCache(recorded, self.config) for recorded in (self.own, self.of_sources))
        return EncoderDecoderCache(*parts)

    def cache(self, plan: PairPlan, shared: SharedState | None) -> "PairCache":
        """The cache that the model's own forward would return; arguments as of :class:`PackedCache`."""
        own = PackedCache(plan.target, self.own, shared, self.config)
        of_sources = PackedCache(plan.source, self.of_sources, None, self.config)
        return PairCache(own, of_sources, [index for index, *_ in self.of_sources.keys_values])


class PairCache(EncoderDecoderCache):
    """An ``EncoderDecoderCache`` of two that are put together when somebody looks at them.

    Args:
        own, of_sources: of self-attention and of cross-attention.
        layers: the indices of the layers that the latter holds.
    """

    def __init__(self, own: PackedCache, of_sources: PackedCache, layers: list[int]) -> None:
        self.self_attention_cache, self.cross_attention_cache = own, of_sources
        self.is_updated = dict.fromkeys(layers, True)


def content(cache: Cache) -> dict[tuple[int, str, int], torch.Tensor]:
    """All tensors of a cache: by layer, kind and number. The keys of an indexer are of one head."""
    found = {}
    for layer, holder in enumerate(cache.layers):
        for kind in ("keys", "values"):
            if getattr(holder, kind, None) is not None:
                found[layer, kind, 0] = getattr(holder, kind)
        of_indexer = getattr(holder, "indexer_keys", None)
        if of_indexer is not None:
            found[layer, "indexer_keys", 0] = of_indexer[:, None]
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


def _padded(plan, packed, learned):
    """``[Hkv, R, Dh]`` keys and values -> ``[B, Hkv, Q + W, Dh]``, the learned ones in front."""
    padded = [plan.unpack(x.transpose(0, 1)).transpose(1, 2) for x in packed]
    if learned is None:
        return padded
    ids = torch.tensor(plan.prompt_ids, dtype=torch.int64, device=plan.grid.device)
    return [torch.cat([front.to(x)[ids].transpose(1, 2), x], 2) for front, x in zip(learned, padded)]
