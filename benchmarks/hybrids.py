"""One training step of Prompt Tuning in front of a model with recurrent layers, as in :mod:`benchmarks.step`.

The model is of the kind of Qwen3.5: three layers of the gated delta rule to one of attention. In a recurrent layer the
prompt leaves a state, from which every row starts; the rows are cut into chunks there, and padded to buckets.
"""

from functools import partial

import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from . import models, step
from .workloads import uneven_workloads

SIZES = dict(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    linear_key_head_dim=64,
    linear_value_head_dim=64,
    linear_num_key_heads=4,
    linear_num_value_heads=8,
    max_position_embeddings=1024,
)


def qwen(sizes=SIZES):
    """The frozen model; every call gives the same weights in a model of its own."""
    torch.manual_seed(0)
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**sizes)).requires_grad_(False)


def providers(workload, sizes=SIZES):
    """Name -> step."""
    batch = workload.batch(sizes["vocab_size"])
    steps = step.peft_and_ours(lambda: models.soft_prompt(qwen(sizes), workload.prompt), batch)
    return steps | {"floor": step.Floor(qwen(sizes), workload)}


def run(out, quick=False, sizes=SIZES):
    """Run, print, and write ``hybrids.csv`` and a plot into ``out``; False if a result was wrong."""
    title = "Prompt Tuning, Qwen3.5"
    return step.compare(title, uneven_workloads(quick=quick), partial(providers, sizes=sizes), out / "hybrids", quick)
