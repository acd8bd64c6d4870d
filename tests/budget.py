"""How far a result may be from the exact one; see :mod:`benchmarks.budget`."""

import torch


def assert_within(budget, results):
    """Every number of every result within its budget."""
    ratio = budget.ratio(results)
    assert ratio <= 1, f"error {ratio:.3g} times over the budget"  # NaN fails, too


def assert_sums_rounded_once(got, exact, size, terms):
    """Every number of ``got`` is a sum of ``terms`` products kept in fp32, in any order, and rounded once.

    ``exact`` is that sum in float64 and ``size`` the same sum over absolute values: what an order may lose is relative
    to it (Higham, Accuracy and Stability of Numerical Algorithms, 4.2), so that sums that cancel are judged fairly,
    too.
    """
    assert got.shape == exact.shape == size.shape
    kept, stored = torch.finfo(torch.float32), torch.finfo(got.dtype)
    got, exact, size = (x.detach().cpu().double() for x in (got, exact, size))
    lost = terms * kept.eps / 2 * size
    allowed = lost + stored.eps / 2 * (exact.abs() + lost) + stored.smallest_normal * stored.eps  # the last: subnormals
    excess = ((got - exact).abs() - allowed).max() if got.numel() else torch.zeros(())
    assert excess <= 0, f"{excess:.2e} more than rounding explains"  # NaN fails, too
