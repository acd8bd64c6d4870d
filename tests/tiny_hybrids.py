"""Tiny causal LMs with recurrent or convolution layers, of the table in ``benchmarks/tiny_families.py``."""

import torch

from benchmarks.tiny_families import tiny_model

# Families whose layers start from the state that they are given.
PACKED = (
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "qwen3_next",
    "olmo_hybrid",
    "kimi_linear",
    "lfm2",
    "lfm2_moe",
    "lfm3",
    "granitemoehybrid",
    "bamba",
    "falcon_h1",
    "nemotron_h",
    "zamba2",
    "mamba2",
    "zaya",
)
# Those whose layers do not, and what is said of them.
REFUSED = {
    "jamba": "JambaMambaMixer does not start from the recurrent state that it is given",
    "mamba": "MambaMixer does not start from the recurrent state that it is given",
    "falcon_mamba": "FalconMambaMixer does not start from the recurrent state that it is given",
    "minimax": "layers of type linear_attention, through which one sequence would reach into the next",
}


def build_hybrid(name, dtype=torch.float32, seed=0, **changes):
    """A model of one of these families in training mode."""
    return tiny_model(name, seed, **changes).to(dtype).train()
