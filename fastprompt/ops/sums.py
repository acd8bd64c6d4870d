"""Sums in a fixed order, for the backward passes of gathers."""

import torch


def sum_rows(parts: torch.Tensor, index: torch.Tensor, count: int) -> torch.Tensor:
    """``sums[i]`` = sum of ``parts[n]`` where ``index[n] == i``, for ``i`` below ``count``; the same bits every time.

    On a CPU only index_add_ keeps an order (index_put_ adds atomically), elsewhere only index_put_ does (it sorts).
    """
    sums = parts.new_zeros(count, *parts.shape[1:])
    if parts.device.type == "cpu":
        return sums.index_add_(0, index, parts)
    return sums.index_put_((index.long(),), parts, accumulate=True)
