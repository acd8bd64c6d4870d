"""How far a result may be from the exact one."""

import torch


def assert_within_budget(got, plain, exact):
    """``got`` is as near to ``exact``, in float64, as twice what plain PyTorch in the dtype of ``got`` is, and one rounding."""
    assert got.shape == exact.shape and got.dtype == plain.dtype
    if exact.numel():
        rounding = torch.finfo(got.dtype).eps * exact.abs().max()
        assert (got.double() - exact).abs().max() <= 2 * ((plain.double() - exact).abs().max() + rounding)
