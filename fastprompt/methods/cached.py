"""The output of an encoder, kept while nothing trains."""

from collections.abc import Callable, Iterable

import torch


class CachedOutput:
    """What an encoder gave in evaluation mode with gradients off, until one of its parameters changes.

    A parameter that was written in place, replaced, moved or cast is noticed. Nothing is kept while one has a gradient.
    What writes past autograd's version counter is not seen (``parameter.data.add_(...)``, a kernel of one's own): call
    :meth:`drop` after that.
    """

    # The state, the output, and aliases of the parameters.
    _kept: tuple[tuple, torch.Tensor, list[torch.Tensor]] | None = None

    def __call__(
        self, parameters: Iterable[torch.Tensor], training: bool, encode: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """``encode()``, or what it gave before; it depends on ``parameters`` alone, looked at only to keep it."""
        if training or torch.is_grad_enabled():
            out = encode()
            if out.requires_grad:  # fused optimizers write past the version counter, but after a backward
                out.register_hook(self.drop)
            return out
        parameters = list(parameters)
        state = _state(parameters)
        if state is None:
            return encode()
        if self._kept is None or self._kept[0] != (*state, self._kept[1]._version):
            # Not an inference tensor, which a later call without inference_mode could not use for a gradient.
            with torch.inference_mode(False), torch.no_grad():
                out = encode()
            # The aliases keep the memory that the state names from being given to another tensor.
            self._kept = (*state, out._version), out, [parameter.detach() for parameter in parameters]
        return self._kept[1]

    def drop(self, grad: torch.Tensor | None = None) -> None:
        """Forget the output. Takes a gradient that it ignores, so that it may be a hook."""
        self._kept = None

    def __getstate__(self) -> dict:
        return {}  # addresses and versions mean nothing in a copy or a later process


def _state(parameters: list[torch.Tensor]) -> tuple | None:
    """What the output depends on; None where a change could pass unseen."""
    # Inference tensors have no version, and a fused optimizer that is about to step does not count it up.
    if any(parameter.is_inference() or parameter.grad is not None for parameter in parameters):
        return None
    device = parameters[0].device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return autocast, *((p.data_ptr(), p._version, p.dtype, p.device) for p in parameters)
