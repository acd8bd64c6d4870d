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
    sources: Sequence[torch.Tensor],
    compute: Compute,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    *,
    trains: bool = False,
) -> torch.Tensor:
    """``compute(*sources)`` of a known shape, dtype and device, at the first operation on it, with its gradient.

    Every operation of torch's, a method or a function, meets the computed tensor, which is an ordinary one with an
    ordinary graph, or without one if none is recorded now. Code that takes a tensor past these, as an
    ``autograd.Function`` does, meets a :class:`LaterTensor` that has its values, too; then the backward computes a
    second time.

    Args:
        sources: what it is computed of.
        compute: a function of them.
        shape, dtype, device: those of what it gives.
        trains: has it a gradient though no source has, by weights that ``compute`` knows?
    """
    records = torch.is_grad_enabled() and (trains or any(x.requires_grad for x in sources))
    return _made(sources, compute, shape, dtype, device, records)


def _made(sources, compute, shape, dtype, device, records):
    if records:
        made = _Later.apply(compute, shape, dtype, device, torch.empty(0, requires_grad=True), *sources)
    else:
        made = LaterTensor.make(compute, shape, dtype, device)
    made.sources, made.records = tuple(sources), records
    return made


class LaterTensor(torch.Tensor):
    """See :func:`later`. ``sources`` are what it is computed of; ``records``: with a graph?"""

    sources: tuple[torch.Tensor, ...]
    compute: Compute
    records: bool
    _found: torch.Tensor | None = None
    _has_graph = False

    @staticmethod
    def make(compute: Compute, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> "LaterTensor":
        result = torch.Tensor._make_wrapper_subclass(LaterTensor, shape, dtype=dtype, device=device)
        result.compute = compute
        return result

    def read(self) -> torch.Tensor:
        """The computed tensor; with a graph if gradients are recorded now."""
        needs_graph, found = self.records and torch.is_grad_enabled(), self._found
        if found is None or (needs_graph and not self._has_graph):
            with torch.set_grad_enabled(needs_graph):
                found = self.compute(*self.sources)
            self._found, self._has_graph = found, needs_graph
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
            records = one.records and torch.is_grad_enabled()
            return _made(one.sources, convert, one.shape, torch.float32, one.device, records)
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
    def forward(ctx, compute, shape, dtype, device, anchor, *sources):  # the anchor requires a gradient
        ctx.compute = compute
        ctx.save_for_backward(*sources)
        return LaterTensor.make(compute, shape, dtype, device)

    @staticmethod
    def backward(ctx, *grads):
        needed = ctx.needs_input_grad[5:]
        sources = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needed)]
        with torch.enable_grad():
            torch.autograd.backward(ctx.compute(*sources), grads)  # of weights that train, too
        return None, None, None, None, None, *(x.grad for x in sources)
