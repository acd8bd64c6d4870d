"""What the connector refuses when vLLM starts: the check that it makes then, without an engine."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma3TextConfig, Llama4TextConfig, LlamaConfig
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from fastprompt.integrations.vllm import connector_config, register
from fastprompt.integrations.vllm.supported import check_engine

SIZES = {"block_size": 32, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
FULL = FullAttentionSpec(**SIZES)


def check(
    *specs,
    rope=None,
    max_model_len=512,
    parallel=None,
    speculative=None,
    config=LlamaConfig,
    quantization=None,
    **transfer,
):
    text = config(rope_parameters=rope) if rope else config()
    parallel = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, **(parallel or {})}
    engine = SimpleNamespace(
        kv_transfer_config=KVTransferConfig(
            **{"kv_connector": "FastPromptConnector", "kv_role": "kv_consumer", **transfer}
        ),
        parallel_config=SimpleNamespace(**parallel),
        speculative_config=speculative and SimpleNamespace(method=speculative),
        model_config=SimpleNamespace(hf_text_config=text, max_model_len=max_model_len, quantization=quantization),
    )
    groups = [SimpleNamespace(kv_cache_spec=spec, layer_names=["model.layers.0.attn"]) for spec in specs or [FULL]]
    check_engine(engine, SimpleNamespace(kv_cache_groups=groups))


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 64,
    "long_factor": [2.0] * 64,
    "original_max_position_embeddings": 256,
}


@pytest.mark.parametrize(
    "engine",
    [
        {},
        {"specs": [FULL, SlidingWindowSpec(**SIZES, sliding_window=8)]},
        {"kv_role": "kv_both"},
        {"speculative": "ngram"},
        {"rope": LONGROPE, "max_model_len": 256},
        {"config": Gemma3TextConfig},
    ],
)
def test_what_is_right_passes(engine):
    check(*engine.pop("specs", []), **engine)


@pytest.mark.parametrize(
    "engine, error, message",
    [
        ({"kv_load_failure_policy": "recompute"}, ValueError, "kv_load_failure_policy is 'recompute'"),
        ({"kv_role": "kv_producer"}, ValueError, "kv_role is 'kv_producer'"),
        ({"kv_connector": "MultiConnector"}, ValueError, "kv_connector is 'MultiConnector'"),
        ({"parallel": {"decode_context_parallel_size": 2}}, NotImplementedError, "decode_context_parallel_size is 2"),
        ({"speculative": "eagle3"}, NotImplementedError, "speculative decoding by 'eagle3'"),
        ({"specs": [MLAAttentionSpec(**SIZES)]}, NotImplementedError, "keeps a MLAAttentionSpec"),
        (
            {"specs": [FULL, MambaSpec(shapes=((2, 2),), dtypes=(torch.float32,), block_size=32)]},
            NotImplementedError,
            "keeps a MambaSpec",
        ),
        (
            {"specs": [ChunkedLocalAttentionSpec(**SIZES, attention_chunk_size=64)]},
            NotImplementedError,
            "keeps a ChunkedLocalAttentionSpec",
        ),
        ({"specs": [FullAttentionSpec(**SIZES, attention_chunk_size=64)]}, NotImplementedError, "chunked"),
        ({"specs": [FullAttentionSpec(**SIZES, non_causal=True)]}, NotImplementedError, "bidirectional"),
        ({"rope": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, NotImplementedError, "'dynamic'"),
        ({"config": Llama4TextConfig}, NotImplementedError, "another order than transformers, for 'llama4_text'"),
        ({"quantization": "gguf"}, NotImplementedError, "another order than transformers"),
        ({"rope": LONGROPE, "max_model_len": 257}, NotImplementedError, "max_model_len is 257: above 256"),
    ],
)
def test_what_would_be_wrong_is_refused(engine, error, message):
    with pytest.raises(error, match=message):
        check(*engine.pop("specs", []), **engine)


def test_vllm_knows_the_connector(tmp_path):
    register()
    register()
    found = KVConnectorFactory.get_connector_class(connector_config(tmp_path))
    assert found.__name__ == "FastPromptConnector" and KVConnectorFactory.supports_hma_config(
        connector_config(tmp_path)
    )
