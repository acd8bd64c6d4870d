"""The text of a mixed batch, without the padding that users put where they like."""

from dataclasses import dataclass

import torch

from ..checks import INTS, check_tensor


@dataclass(frozen=True, eq=False)
class MixedText:
    """Token ids of several rows, padded on one side.

    Attributes:
        ids: ``[B, S]`` int64; at padding whatever stood there.
        mask: ``[B, S]`` int64, 1 at tokens; S is the length of the longest row.
    """

    ids: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor, mask: torch.Tensor | None, side: str = "left") -> "MixedText":
        """Rows whose tokens stand anywhere, moved to the other end than the ``side`` of the padding.

        Raises:
            TypeError, ValueError: no ids, a mask of another shape, or a row without a token.
        """
        mask = checked_mask(ids, mask)
        if not bool(mask.any(1).all()):
            empty = (~mask.any(1)).nonzero().flatten().tolist()
            raise ValueError(f"input_ids must hold at least one token in each row, got none in rows {empty}")
        order = mask.int().argsort(dim=1, stable=True, descending=side == "right")
        width = int(mask.sum(1).max())
        order = order[:, :width] if side == "right" else order[:, -width:]
        return cls(ids.gather(1, order).long(), mask.gather(1, order).long())

    @property
    def lengths(self) -> list[int]:
        """The tokens of each row."""
        return self.mask.sum(1).tolist()

    @property
    def is_padded(self) -> bool:
        """Is there any padding?"""
        return not bool(self.mask.all())


def checked_mask(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """``[B, S]`` booleans, of ids or a mask that users pass.

    Raises:
        TypeError, ValueError: other dtypes or shapes.
    """
    check_tensor("input_ids", ids, ["B", "S"], dtypes=INTS)
    if not len(ids):
        raise ValueError("input_ids must have at least one row, got none")
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    check_tensor("attention_mask", mask, list(ids.shape))
    return mask.to(ids.device) != 0
