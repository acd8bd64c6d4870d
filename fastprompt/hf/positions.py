"""T5's relative positions on packed rows: a bias by distance, and no tensor over all pairs of rows."""

from dataclasses import dataclass
from typing import Any

import torch

from .masks import PackedMask, UnsupportedAttention
from .module_patch import ModulePatch
from .structure import RELATIVE, is_relative_attention


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

    def on(self, queries: torch.Tensor) -> torch.Tensor | None:
        """The table as prefix_attention takes it with these queries."""
        dtype = torch.promote_types(queries.dtype, torch.float32)
        return None if self.table is None else self.table.to(queries.device, dtype)


def _relative_attention(model):
    return [module for module in model.modules() if is_relative_attention(module)]


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


# T5's attention adds its bias by distance on packed rows. Its own forward runs, but for the two places where it makes a
# tensor of all pairs of rows: of distances, and of zeros where it has no bias.
RELATIVE_ATTENTION = ModulePatch(_relative_attention, _forward)


def _bias(module):
    """The bias of one layer, made by the layer itself, for queries and keys as far from one another as it knows."""
    if not getattr(module, RELATIVE):
        return PositionBias(None)
    far = module.relative_attention_max_distance  # from here on it tells no distances apart
    bias = module.compute_bias(far + 1, far + 1)[0]  # [H, queries, keys]
    if bias.requires_grad:
        raise UnsupportedAttention(f"the relative positions of {type(module).__name__} train")
    return PositionBias(torch.cat([bias[:, far], bias[:, 0, 1:]], 1))
