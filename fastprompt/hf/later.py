"""A tensor that is computed when somebody reads it: the logits of a training step, which most steps never read."""

from collections.abc import Callable, Sequence

import torch
from torch.utils._pytree import tree_map

Compute = Callable[..., torch.Tensor]

# What is known of the tensor before it is computed.
_KNOWN = {
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "grad_fn")),
    *(getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "nelement", "is_floating_point", "__hash__")),
    torch.numel,
    torch.is_floating_point,
}


def later(
    sources: Sequence[torch.Tensor], compute: Compute, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """``compute(*sources)`` of a known shape, dtype and device, at the first operation on it, with its gradient.

    Every operation of torch's, a method or a function, meets the computed tensor, which is an ordinary one with an
    ordinary graph. Code that takes a tensor past these, as an ``autograd.Function`` does, meets a :class:`LaterTensor`
    that has its values, too; then the backward computes a second time.
    """
    result = _Later.apply(compute, shape, dtype, device, *sources)
    result.sources = tuple(sources)
    return result


class LaterTensor(torch.Tensor):
    """See :func:`later`. ``sources`` are what it is computed of."""

    sources: tuple[torch.Tensor, ...]
    compute: Compute
    _found: torch.Tensor | None = None

    @staticmethod
    def make(compute: Compute, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> "LaterTensor":
        result = torch.Tensor._make_wrapper_subclass(LaterTensor, shape, dtype=dtype, device=device)
        result.compute = compute
        return result

    def read(self) -> torch.Tensor:
        """The computed tensor; with a graph if gradients are recorded now."""
        needs_graph = torch.is_grad_enabled() and any(x.requires_grad for x in self.sources)
        found = self._found
        if found is None or (needs_graph and not found.requires_grad):
            found = self._found = self.compute(*self.sources)
        return found

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if function is torch.Tensor.float and len(args) == 1:  # Accelerate converts all outputs in mixed precision
            one = args[0]
            convert = lambda *sources: one.compute(*sources).float()  # noqa: E731
            return later(one.sources, convert, one.shape, torch.float32, one.device)
        return function(*tree_map(_read, args), **tree_map(_read, kwargs))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*tree_map(_read_detached, args), **tree_map(_read_detached, kwargs or {}))


def _read(x):
    return x.read() if isinstance(x, LaterTensor) else x


def _read_detached(x):
    return x.read().detach() if isinstance(x, LaterTensor) else x


class _Later(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute, shape, dtype, device, *sources):
        ctx.compute = compute
        ctx.save_for_backward(*sources)
        return LaterTensor.make(compute, shape, dtype, device)

    @staticmethod
    def backward(ctx, *grads):
        needed = ctx.needs_input_grad[4:]
        sources = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needed)]
        with torch.enable_grad():
            torch.autograd.backward(ctx.compute(*sources), grads)  # of a head that trains, too
        return None, None, None, None, *(x.grad for x in sources)
