"""Positions on packed rows in models that are given none: T5's relative ones, and embeddings that number the rows."""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .masks import PackedMask, UnsupportedAttention
from .structure import RELATIVE, has_own_forward, is_relative_attention


@dataclass(frozen=True, eq=False)
class PositionBias:
    """What attention adds to its scores by distance alone, in place of a tensor over all pairs of rows.

    Attributes:
        table: ``[H, 2 * M + 1]``, for distances from -M to M, those of the ends beyond; None: nothing is added.
    """

    table: torch.Tensor | None

    def to(self, *args: Any, **kwargs: Any) -> "PositionBias":
        """As ``PackedMask.to``."""
        return self


def patch_relative_attention(model: nn.Module) -> None:
    """Let T5's attention add its bias by distance on packed rows; :func:`unpatch_relative_attention` undoes it.

    Its own forward runs, but for the two places where it makes a tensor of all pairs of rows: of distances, and of
    zeros where it has no bias. Modules with a forward of their own are left alone.
    """
    for module in model.modules():
        if is_relative_attention(module) and not has_own_forward(module):
            module.forward = types.MethodType(_forward, module)


def unpatch_relative_attention(model: nn.Module) -> None:
    """Undo :func:`patch_relative_attention`."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) is _forward:
            del module.forward


def _forward(self, *args, **kwargs):
    packed = (isinstance(x, PackedMask) and x.dense is None for x in (*args, *kwargs.values()))
    if not any(packed):
        return type(self).forward(self, *args, **kwargs)
    bias, own = _bias(self), vars(self)
    before = {name: own[name] for name in (RELATIVE, "compute_bias") if name in own}
    try:
        own.update({RELATIVE: True, "compute_bias": lambda *args, **kwargs: bias})
        return type(self).forward(self, *args, **kwargs)
    finally:
        own.pop("compute_bias", None)
        own.update(before)


# What pickle looks up in the module when it loads it: the forward of its class, so that it comes back unpatched.
_forward.__name__ = "forward"


def _bias(module):
    """The bias of one layer, made by the layer itself, for queries and keys as far from one another as it knows."""
    if not getattr(module, RELATIVE):
        return PositionBias(None)
    far = module.relative_attention_max_distance  # from here on it tells no distances apart
    bias = module.compute_bias(far + 1, far + 1)[0]  # [H, queries, keys]
    if bias.requires_grad:
        raise UnsupportedAttention(f"the relative positions of {type(module).__name__} train")
    return PositionBias(torch.cat([bias[:, far], bias[:, 0, 1:]], 1))


@contextmanager
def counted(counters: list[nn.Module], positions: torch.Tensor, longest: int) -> Iterator[None]:
    """While the block runs, embeddings of positions that number rows give those of ``positions``.

    Args:
        counters: from ``structure.row_counters``.
        positions: ``[R]`` int64.
        longest: more than the largest of them.
    """
    rows = len(positions)

    def lengthened(x):
        """An argument for R rows as one for ``longest`` rows."""
        if isinstance(x, torch.Tensor):
            if x.dim() == 1 and len(x) == rows:  # the numbers themselves
                return torch.arange(longest, device=x.device)
            return x[:, :1].expand(-1, longest, *x.shape[2:]) if x.dim() > 1 and x.shape[1] == rows else x
        is_shape = isinstance(x, tuple | list) and tuple(x[:2]) == (1, rows)
        return torch.Size([1, longest, *x[2:]]) if is_shape else x

    def before(module, args, kwargs):
        return tuple(map(lengthened, args)), {name: lengthened(x) for name, x in kwargs.items()}

    def behind(module, args, output):
        return output.index_select(-2, positions.to(output.device))

    hooks = []
    try:
        for module in counters:
            hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.append(module.register_forward_hook(behind))
        yield
    finally:
        for hook in hooks:
            hook.remove()
