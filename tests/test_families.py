"""The most used families of causal language models, tiny: nothing is wrong, nothing breaks, all run packed."""

import pytest
from needs import cases, needs, needs_states

from benchmarks.families import COMMON, survey
from benchmarks.tiny_families import families

NEWER = {
    **dict.fromkeys(["qwen3_next", "qwen3_5_text", "granitemoehybrid", "falcon_h1"], needs_states),
    "gemma2": needs("transformers", "5.21", "leaves the soft cap out under SDPA"),
    "gemma3n_text": needs("transformers", "5.11", "caches other values than its layers use"),
}


@pytest.mark.parametrize("family", cases(COMMON, NEWER))
def test_family(family):
    if family not in families():
        pytest.skip("this transformers does not have it")
    outcome = survey(family)
    assert outcome.path == "packed" and not outcome.reason, outcome


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
