"""The error budget: how far a result may be from the exact one. Benchmarks, the check on a GPU and the tests share it."""

import torch


def over_budget(got, plain, exact, dtype=None):
    """The error of ``got`` against ``exact``, in float64, over its budget; at most 1 is right, nan is not.

    The budget is twice the error of ``plain``, what plain PyTorch gives in the same precision, and one rounding of the largest
    value to ``dtype``, by default that of ``got``.
    """
    if not exact.numel():
        return 0.0
    eps = torch.finfo(dtype or got.dtype).eps
    got, plain, exact = (x.detach().cpu().double() for x in (got, plain, exact))
    budget = 2 * float((plain - exact).abs().max() + eps * exact.abs().max())
    error = float((got - exact).abs().max())
    return error / budget if budget else (0.0 if error == 0 else float("inf"))
