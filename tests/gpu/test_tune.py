"""What the tuner judges tiles by: the rule's results must be right there, and wrong ones be told."""

from dataclasses import replace

import pytest
from fastprompt.kernels.prefix_attention import tuned
from guard import DEVICE

from benchmarks.gpu import tune


@pytest.mark.parametrize("bits", tune.DTYPES)
@pytest.mark.parametrize("role", tuned.FIELDS)
def test_the_rules_results_are_right(role, bits):
    *_, flags = tune.calls(role, 16, tune.DTYPES[bits], DEVICE, rows=64)
    assert flags.right
    results = flags.run()
    assert len(results) == (6 if role == "backward" else 2)
    for i, result in enumerate(results):
        off = [*results[:i], result + 0.1, *results[i + 1 :]]
        assert not replace(flags, run=lambda off=off: off).right
