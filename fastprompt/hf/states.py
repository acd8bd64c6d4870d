"""Recurrent and convolution states: what a layer is handed in place of a cache, so that a prompt's state can be shared.

Mixers of transformers read and write their states through six methods of the cache. The cache itself writes in place,
which no gradient passes; this object answers the same calls and keeps what it is given.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from ..layout import Bucket
from ..ops import prompt_concat


class StateKey(NamedTuple):
    """Which state: its kind ("conv" or "recurrent"), its layer, and its number among those of that layer."""

    kind: str
    layer: int
    number: int


# The states [n, ...] of n sequences.
States = dict[StateKey, torch.Tensor]


@dataclass(eq=False)
class Recorded:
    """What layers leave behind while packed rows run, for a cache.

    Attributes:
        keys_values: the index of a layer, and what its attention updated the cache with: keys and values
            ``[Hkv, R, Dh]``, or latents of which it makes them.
        indexer_keys: the index of a layer with an indexer, and the keys ``[R, width]`` that it scores.
        mixers: for each layer with a state what ran it (a ``Mixer``), and the states that the N prompts left.
    """

    keys_values: list[tuple[int, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    indexer_keys: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    mixers: list[tuple[Any, States]] = field(default_factory=list)


def gathered_states(shared: States, bucket: Bucket) -> States:
    """The states that the sequences of a bucket continue.

    Gradients add up over the sequences in a fixed order, on every device.
    """
    if bucket.parents is None:
        return {}
    found = {}
    for key, states in shared.items():
        flat = states.flatten(1)
        found[key] = prompt_concat(bucket.parents.to(flat.device), flat, flat[:0]).unflatten(1, states.shape[1:])
    return found


class ForkedStates:
    """What mixers are handed for n sequences side by side.

    Args:
        before: the states they start from; {}: from nothing.

    Attributes:
        now: the states by now. Never those of ``before``, written over.
    """

    def __init__(self, before: States) -> None:
        self.now: States = dict(before)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The last columns of what was convolved so far, ``[n, C, K]``."""
        return self.now.get(StateKey("conv", layer_idx, state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """``[n, ...]``."""
        return self.now.get(StateKey("recurrent", layer_idx, state_idx))

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Is there a state of this layer, or of any?"""
        return any(
            layer_idx in (None, key.layer) and state_idx in (None, key.number) for key in self.now if key.kind == "conv"
        )

    def is_recording_past(self, layer_idx: int) -> bool:
        """Never: nothing is rolled back."""
        return False

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """New columns ``[n, C, W]`` -> these with the state in front, or with zeros where there are fewer than K."""
        key = StateKey("conv", layer_idx, state_idx)
        before = self.now.get(key)
        if before is not None:
            size, columns = before.shape[-1], torch.cat([before, conv_states], -1)
        else:
            size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            columns = pad(conv_states, (max(size - conv_states.shape[-1], 0), 0))
        self.now[key] = columns[..., -size:]
        return columns

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """The new state ``[n, ...]``, returned as it is."""
        self.now[StateKey("recurrent", layer_idx, state_idx)] = recurrent_states
        return recurrent_states
