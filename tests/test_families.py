"""The most used families of causal language models, tiny: nothing is wrong, nothing breaks, most run packed."""

import pytest

from benchmarks.families import COMMON, survey
from benchmarks.tiny_families import families

# PEFT's own forward, for a reason that is true.
PADDED = {
    "falcon": "attention in code of its own",
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


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"attention_chunk_size": 64}, None),  # chunks that hold every row
        ({"attention_chunk_size": 16}, "attention in chunks"),
        ({"floor_scale": 64, "attn_temperature_tuning": True}, "attention depends on a row's place from row 64 on"),
    ],
)
def test_llama_4(changes, reason):
    """Its chunks, and a temperature that counts the rows of a batch where it means positions."""
    outcome = survey("llama4_text", **changes)
    assert outcome.path == "packed", outcome
    assert reason is None and not outcome.reason or reason is not None and reason in outcome.reason
