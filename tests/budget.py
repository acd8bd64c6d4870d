"""How far a result may be from the exact one."""

import torch


def assert_within_budget(got, plain, exact):
    """``got`` is as near to ``exact``, in float64, as twice what plain PyTorch in the dtype of ``got`` is, and one rounding."""
    assert got.dtype == plain.dtype and got.shape == plain.shape == exact.shape
    eps = torch.finfo(got.dtype).eps
    got, plain, exact = (x.detach().cpu().double() for x in (got, plain, exact))
    if exact.numel():
        budget = 2 * ((plain - exact).abs().max() + eps * exact.abs().max())
        error = (got - exact).abs().max()
        assert error <= budget, f"error {error:.2e} over the budget of {budget:.2e}"  # NaN fails, too
