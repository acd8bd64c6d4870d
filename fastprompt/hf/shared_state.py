"""What stands in front of sequences in every layer and was learned: keys and values."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class KeysValues(NamedTuple):
    """Learned keys and values of one layer, ``[N, P, Hkv, Dh]`` each: one of the N stands in front of a sequence."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, eq=False)
class SharedState:
    """What the sequences of a batch share, beside rows of their own: those are in ``Sequences.chains``.

    Attributes:
        layers: for each layer its learned keys and values, or None if it has none; () if no layer has any.
        ids: ``[B]`` int64, which of the N stands in front of each row of a padded batch; None: the first.
    """

    layers: tuple[KeysValues | None, ...] = ()
    ids: torch.Tensor | None = None

    @classmethod
    def of_tensor(
        cls,
        prefix: torch.Tensor,
        config: PreTrainedConfig | None = None,
        layers: Sequence[int] | None = None,
    ) -> "SharedState":
        """Learned keys and values in one tensor, read where they lie.

        Args:
            prefix: ``[L, 2, P, Hkv, Dh]`` or ``[L, 2, N, P, Hkv, Dh]``.
            config: the model's config, which says whose keys and values a layer without its own reads (Gemma 3n and 4).
            layers: the indices of the L layers in the model; None: 0 to L - 1.
        """
        if prefix.dim() == 5:
            prefix = prefix.unsqueeze(2)
        indices = range(len(prefix)) if layers is None else layers
        # Unbound rather than indexed: backward then stacks the layers' gradients instead of adding each up with zeros.
        found = {index: KeysValues(*layer.unbind()) for index, layer in zip(indices, prefix.unbind())}
        return cls(_with_borrowed([found.get(i) for i in range(max(found, default=-1) + 1)], config))

    @classmethod
    def of_cache(cls, cache: Cache, config: PreTrainedConfig) -> "SharedState":
        """A ``Cache`` of batch size 1 that was filled before the first token; ``config`` as in :meth:`of_tensor`."""
        own_layers: list[Any] = cache.layers
        filled = [(x.keys, x.values) if getattr(x, "is_initialized", False) else None for x in own_layers]
        length = max((cache.get_seq_length(i) for i, layer in enumerate(filled) if layer is not None), default=0)
        layers = [layer and KeysValues(*(_rows_of_cache(x, length) for x in layer)) for layer in filled]
        return cls(_with_borrowed(layers, config))

    @property
    def length(self) -> int:
        """P, the length of the learned keys and values; 0 without any."""
        return next((layer.keys.shape[1] for layer in self.layers if layer is not None), 0)

    @property
    def learned(self) -> bool:
        """Has any layer learned keys and values?"""
        return any(layer is not None for layer in self.layers)

    @property
    def everywhere(self) -> bool:
        """Have all layers the same in front, so that what is equal below them is equal above? True without any, too."""
        return None not in self.layers

    def tensors(self) -> list[torch.Tensor]:
        """The learned keys and values of all layers, one after the other."""
        return [x for layer in self.layers if layer is not None for x in layer]

    def with_tensors(self, tensors: Iterable[torch.Tensor]) -> "SharedState":
        """The same with other learned keys and values, in the order of :meth:`tensors`."""
        new = iter(tensors)
        return replace(self, layers=tuple(layer and KeysValues(next(new), next(new)) for layer in self.layers))

    def banks(self) -> dict[bool, tuple[int, int]]:
        """By whether a layer has learned keys and values: how many prefixes it has, and how long they are."""
        found = {False: (0, 0)} if not self.layers or None in self.layers else {}
        for layer in self.layers:
            if layer is not None:
                found[True] = len(layer.keys), layer.keys.shape[1]
        return found

    def repeated(self, batch: int) -> torch.Tensor | None:
        """``ids`` for a batch that repeats each row, as beam search does; None if all rows have the first."""
        return None if self.ids is None else self.ids.repeat_interleave(batch // max(len(self.ids), 1))

    def of_each_row(self, batch: int) -> "SharedState":
        """The same with an entry of its own for each of ``batch`` rows."""
        ids = self.repeated(batch)
        if ids is None:
            return self
        return replace(self.with_tensors(x[ids] for x in self.tensors()), ids=None)

    def to_cache(self, ids: torch.Tensor, config: PreTrainedConfig, dtype: torch.dtype) -> DynamicCache:
        """A cache that starts with entry ``ids[b]`` in row b: what a model's own padded forward takes."""
        cache = DynamicCache(config=text_config(config))
        for index, layer in enumerate(self.layers[: layers_with_own_keys(config)]):
            if layer is not None:
                keys, values = (x[ids].transpose(1, 2).to(dtype) for x in layer)
                cache.update(keys, values, index)
        return cache


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a model's config that describes its text decoder."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def layers_with_own_keys(config: PreTrainedConfig) -> int:
    """How many layers have keys and values of their own; in the models that share them, the last ones have none."""
    text = text_config(config)
    return text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", 0) or 0)


def layers_with_keys(config: PreTrainedConfig) -> list[int]:
    """The indices of the layers that have keys and values of their own; recurrent layers, for example, have none."""
    layers = DynamicCache(config=text_config(config)).layers[: layers_with_own_keys(config)]
    return [index for index, layer in enumerate(layers) if isinstance(layer, DynamicLayer)]


def why_not_learned(config: PreTrainedConfig) -> str | None:
    """Why learned keys and values, one tensor of one width, cannot stand in front of a model's own; None: they can.

    Models with latent attention (DeepSeek) make keys of one width and values of another out of what their cache holds,
    so it has no place for either.
    """
    text = text_config(config)
    if getattr(text, "kv_lora_rank", None):
        return "its cache holds latents, out of which it makes keys of one width and values of another"
    values = getattr(text, "v_head_dim", None)
    if values is not None and values != head_width(text):
        return f"its keys are {head_width(text)} wide and its values {values}"
    return None


def head_width(text: PreTrainedConfig) -> int:
    """The width of a head's keys in a text decoder whose heads are all alike."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _with_borrowed(layers, config):
    """Layers without keys and values of their own get those of the layer that theirs come from."""
    text = text_config(config)
    if getattr(text, "num_kv_shared_layers", 0) or 0:
        total, own = text.num_hidden_layers, layers_with_own_keys(config)
        layers = layers[:own] + [None] * (total - len(layers[:own]))
        for layer in range(own, total):
            same = [i for i in range(own) if text.layer_types[i] == text.layer_types[layer]]
            layers[layer] = layers[same[-1]] if same else None
    return tuple(layers)


def _rows_of_cache(x, length):
    """``[1, Hkv, n, Dh]`` of a cache -> ``[1, length, Hkv, Dh]``.

    A layer with a sliding window keeps only the last n positions; what it dropped no window reaches, so zeros do there.
    """
    rows = x.transpose(1, 2)
    return rows if x.shape[2] == length else pad(rows, (0, 0, 0, 0, length - x.shape[2], 0))  # pad copies in any case
