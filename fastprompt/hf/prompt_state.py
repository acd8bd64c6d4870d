"""PromptState: what a prompt leaves in every layer of a frozen model, from which any text can go on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from .attachment import evaluation_mode
from .cache import content
from .cache_names import cache_argument
from .masks import AsBefore, running
from .per_layer import per_layer_inputs, searching_part
from .shared_state import KeysValues, SharedState, layers_with_keys, text_config
from .states import StateKey, States
from .structure import why_not_given

_NO_WINDOW = 2**31 - 1  # positions that no text reaches


@dataclass(frozen=True, eq=False)
class PromptState:
    """What one prompt, or a prompt and a text behind it, leaves in every layer.

    Attributes:
        length: P, how many positions it takes.
        keys_values: layer -> its keys and values ``[P, Hkv, Dh]``, as a cache holds them: keys behind the rotary
            embedding of positions 0 to P - 1; the two parts of a latent where attention keeps those (DeepSeek). Layers
            that use another layer's have none.
        states: the convolution and recurrent states behind the last position, without a dimension of the batch.
    """

    length: int
    keys_values: dict[int, KeysValues] = field(default_factory=dict)
    states: States = field(default_factory=dict)

    @classmethod
    def of_learned(cls, shared: SharedState, config: PreTrainedConfig, entry: int = 0) -> "PromptState":
        """One entry of learned keys and values.

        Raises:
            ValueError: a layer with keys and values of its own has none in front.
        """
        own, found = layers_with_keys(config), dict(enumerate(shared.layers))
        missing = [index for index in own if found.get(index) is None]
        if missing:
            raise ValueError(
                f"the prefix must stand in every layer with keys and values of its own, got none in {missing}"
            )
        layers = {index: KeysValues(*(x[entry].detach() for x in shared.layers[index] or ())) for index in own}
        return cls(shared.length, layers)

    @classmethod
    def of_rows(cls, base: PreTrainedModel, rows: torch.Tensor) -> "PromptState":
        """What the embeddings ``[P, D]`` of a prompt leave in ``base``, in evaluation mode; run alone, once.

        Raises:
            ValueError: the model does not keep all of it in a cache.
        """
        if (reason := why_not_given(base)) is not None:
            raise ValueError(f"a {type(base).__name__} has no place for a prompt's state: {reason}")
        cache = cache_of_all_tokens(base.config)
        with torch.no_grad(), evaluation_mode(base), running(AsBefore()):
            mask = torch.ones(1, len(rows), dtype=torch.int64, device=rows.device)
            like = base.get_input_embeddings()(torch.zeros_like(mask[:, :1]))
            base(
                inputs_embeds=rows[None].to(like),
                attention_mask=mask,
                use_cache=True,
                return_dict=True,
                **per_layer_inputs(searching_part(base), -mask),
                **cache_argument(base.forward, cache),
            )
        return next(cls.of_cache(cache, base, [len(rows)]))

    @classmethod
    def of_cache(cls, cache: Cache, base: PreTrainedModel, lengths: Iterable[int]) -> Iterator["PromptState"]:
        """The states of the rows of a cache that keeps all tokens: the last ``lengths[b]`` columns of row b.

        Raises:
            ValueError: it does not hold all of them.
        """
        found = content(cache)
        indexed = [type(layer).__name__ for layer in cache.layers if hasattr(layer, "indexer_keys")]
        if indexed:
            raise ValueError(f"a {type(base).__name__} keeps more in its cache than keys and values ({indexed[0]})")
        attention = {layer: found[layer, "keys", 0].shape[2] for layer, kind, _ in found if kind == "keys"}
        longest = max(lengths := list(lengths))
        missing = set(layers_with_keys(base.config)) - set(attention)
        if not found or missing or min(attention.values(), default=longest) < longest:
            raise ValueError(f"a {type(base).__name__} does not keep all {longest} tokens in its cache, got {cache}")
        for row, length in enumerate(lengths):
            layers, states = {}, {}
            for layer, columns in attention.items():
                both = (found[layer, kind, 0][row, :, columns - length :] for kind in ("keys", "values"))
                layers[layer] = KeysValues(*(x.transpose(0, 1).contiguous() for x in both))
            for (layer, kind, number), x in found.items():
                if kind not in ("keys", "values"):
                    states[StateKey(kind.removesuffix("_states"), layer, number)] = x[row].clone()
            yield cls(length, layers, states)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All its tensors."""
        return [x for layer in self.keys_values.values() for x in layer] + list(self.states.values())

    @property
    def nbytes(self) -> int:
        """How many bytes its tensors take."""
        return sum(x.nbytes for x in self.tensors)

    def to(self, base: PreTrainedModel) -> "PromptState":
        """The same on the devices of the layers of ``base``."""
        devices = _devices_of_layers(base)

        def moved(layer, x):
            return x.to(devices.get(layer, base.device))

        layers = {i: KeysValues(*(moved(i, x) for x in layer)) for i, layer in self.keys_values.items()}
        return PromptState(self.length, layers, {key: moved(key.layer, x) for key, x in self.states.items()})


@dataclass(frozen=True, eq=False)
class Prompt:
    """One trained prompt, as its method gives it.

    Attributes:
        method: the method's name, such as "p-tuning".
        rows: embeddings ``[P, D]``; None where keys and values are learned.
        shared: learned keys and values, of which the first entry counts; or None.
    """

    method: str
    rows: torch.Tensor | None = None
    shared: SharedState | None = None

    def state(self, base: PreTrainedModel) -> PromptState:
        """What it leaves in ``base``. Raises ValueError where that cannot be told."""
        if base.config.is_encoder_decoder:
            raise ValueError(f"model must be a decoder, got the encoder-decoder {type(base).__name__}")
        if base.get_output_embeddings() is None or not base.can_generate():
            raise ValueError(f"model must be a causal LM, got a {type(base).__name__}")
        if self.rows is not None:
            return PromptState.of_rows(base, self.rows.detach())
        shared = self.shared or SharedState()
        return PromptState.of_learned(shared.with_tensors(x.to(base.dtype) for x in shared.tensors()), base.config)


def cache_of_all_tokens(config: PreTrainedConfig) -> DynamicCache:
    """A cache in which layers with a sliding window keep every token, too; the model's mask has the window still."""
    cache = DynamicCache(config=text_config(config))
    own: list[Any] = cache.layers
    for layer in own:
        if hasattr(layer, "sliding_window"):
            layer.sliding_window = _NO_WINDOW
    return cache


def _devices_of_layers(base):
    """Where the layers of a model stand that know their index."""
    found = {}
    for module in base.modules():
        index, parameter = getattr(module, "layer_idx", None), next(module.parameters(), None)
        if isinstance(index, int) and parameter is not None:
            found[index] = parameter.device
    return found
