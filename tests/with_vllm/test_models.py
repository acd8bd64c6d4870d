"""Models whose layers are not all alike, and heads that are spread over ranks: the tokens of PEFT."""

import models
import pytest
from transformers import Gemma3TextConfig, GPT2Config
from vllm import SamplingParams

import fastprompt
from fastprompt.integrations.vllm import connector_config, request

NEW_TOKENS = 10
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def windows():
    """Two kinds of layers, one of them with windows that are shorter than most prompts."""
    return Gemma3TextConfig(
        vocab_size=models.VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=32,
        initializer_range=0.2,
        **NO_TOKENS,
    )


def learned_positions():
    return GPT2Config(
        vocab_size=models.VOCABULARY,
        n_embd=128,
        n_layer=2,
        n_head=4,
        n_positions=512,
        initializer_range=0.2,
        **NO_TOKENS,
    )


CASES = {
    "windows": (windows, {}),
    "learned positions": (learned_positions, {}),
    "speculation": (
        lambda: None,
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
    ),
    "two ranks": (lambda: None, {"tensor_parallel_size": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_peft(case, tmp_path, start_engine):
    config, options = CASES[case]
    models.save_model(tmp_path / "model", config())
    adapters = {}
    for seed, (name, adapter) in enumerate(models.adapters(4).items()):
        adapters[name] = models.adapted(models.load(tmp_path / "model"), adapter, seed)
        task_id = 0 if adapter.peft_type.value == "MULTITASK_PROMPT_TUNING" else None
        compiled = fastprompt.compile_prompt(adapters[name], task_id=task_id)
        compiled.save(tmp_path / "prompts" / f"{name}.safetensors")
    engine = start_engine(
        tmp_path / "model", kv_transfer_config=connector_config(tmp_path / "prompts"), max_model_len=256, **options
    )
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    for text in ([1, 2, 3], list(range(60, 0, -1)), [1, 2, 3]):
        requests = [request(tmp_path / "prompts", name, text, params) for name in adapters]
        outputs = engine.generate(
            [prompt for prompt, _ in requests], [params for _, params in requests], use_tqdm=False
        )
        found = [list(output.outputs[0].token_ids) for output in outputs]
        assert found == [models.answer(model, text, NEW_TOKENS) for model in adapters.values()]
