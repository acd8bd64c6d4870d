"""The output of an encoder, kept while nothing trains."""

from collections.abc import Callable, Iterable
from functools import cache

import torch

_AT_ONCE = 2**20  # words that are looked at together
_SAMPLE = 64  # numbers of a weight of a large model


class CachedOutput:
    """What an encoder gave in evaluation mode with gradients off, until the value of one of its parameters changes.

    The values themselves are looked at, so it does not matter how they are written: an optimizer, ``parameter.data``, a
    kernel of one's own.
    """

    # The state, and the output.
    _kept: tuple[tuple, torch.Tensor] | None = None

    def __call__(
        self, parameters: Iterable[torch.Tensor], training: bool, encode: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """``encode()``, or what it gave before; it depends on ``parameters`` alone, looked at only to keep it."""
        if training or torch.is_grad_enabled():
            return encode()
        state = values_of(list(parameters))
        if self._kept is None or self._kept[0] != (*state, self._kept[1]._version):
            # Not an inference tensor, which a later call without inference_mode could not use for a gradient.
            with torch.inference_mode(False), torch.no_grad():
                out = encode()
            self._kept = (*state, out._version), out
        return self._kept[1]

    def drop(self) -> None:
        """Forget the output."""
        self._kept = None

    def __getstate__(self) -> dict:
        return {}


def values_of(parameters: list[torch.Tensor]) -> tuple:
    """What tells the values of parameters from others, however they were written; and what autocast makes of them."""
    device = parameters[0].device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    sums = torch.stack([_checksum(p.detach()).to(parameters[0].device) for p in parameters]).tolist()
    return autocast, *((p.dtype, p.device, p.shape, checksum) for p, checksum in zip(parameters, sums))


def sample_of(parameters: list[torch.Tensor]) -> tuple:
    """What tells weights from others at little cost: where they are, and a few numbers of each.

    Whatever is written into all of a weight changes it: a merge of an adapter, an average, another checkpoint. Weights
    that are not in memory, or of another kind than torch's own (quantised, sharded), count by where they are alone.
    """
    parts: dict[tuple, list[torch.Tensor]] = {}
    for x in parameters:
        if type(x.data) is torch.Tensor and not x.is_meta and x.is_contiguous() and x.numel():
            flat = x.detach().view(-1)
            parts.setdefault((x.device, x.dtype), []).append(flat[:: -(-len(flat) // _SAMPLE)])
    sums = [_checksum(torch.cat(found)).item() for found in parts.values()]
    versions = [None if x.is_inference() else x._version for x in parameters]
    return *sums, *((x.data_ptr(), version) for x, version in zip(parameters, versions))


def _checksum(x: torch.Tensor) -> torch.Tensor:
    """A number that changes with any bit of any number of a tensor, almost surely.

    The sum of all words of 32 bits, each times a random number of its place, in float64, where the last bit of a word
    still shows.
    """
    data = x.contiguous().view(-1).view(torch.uint8)
    if len(data) % 4:
        data = torch.nn.functional.pad(data, (0, -len(data) % 4))
    weights = _weights(x.device)
    parts = data.view(torch.int32).split(_AT_ONCE)
    sums = torch.stack([torch.dot(part.double(), weights[: len(part)]) for part in parts])
    return torch.dot(sums, weights[-len(sums) :].flip(0))


@cache
def _weights(device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(_AT_ONCE, generator=generator, dtype=torch.float64).add_(0.5).to(device)
