"""The most used families of causal language models, tiny: nothing is wrong, nothing breaks, most run packed."""

import pytest

from benchmarks.families import COMMON, survey
from benchmarks.tiny_families import families

# PEFT's own forward, for a reason that is true.
PADDED = {
    "falcon": "attention in code of its own",
    "llama4_text": "chunks",
}


@pytest.mark.parametrize("family", COMMON)
def test_family(family):
    if family not in families():
        pytest.skip("this transformers does not have it")
    outcome = survey(family)
    if family in PADDED:
        assert outcome.path == "PEFT's forward" and PADDED[family] in outcome.reason
    else:
        assert outcome.path == "packed", outcome
