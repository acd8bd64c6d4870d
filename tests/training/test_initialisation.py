"""Where a prompt starts: random, words of a vocabulary, a text, zero, the prompt of a multitask run."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training_runs import METHODS, encoder_of

from fastprompt.training import InputError, TrainedAdapter, TrainingRun, train


@pytest.mark.parametrize("init", ["random", "vocab", "text"])
def test_initialisation(config, init):
    text = "Word: cat" if init == "text" else None
    run = TrainingRun(dataclasses.replace(config, init=init, init_text=text))
    prompt = run.model.prompt_encoder["default"].embedding.weight
    table = run.model.get_input_embeddings().weight
    known = (prompt[:, None] == table[None]).all(-1).any(-1)
    assert known.all() if init != "random" else not known.any()
    if init == "text":
        ids = (run.tokenizer(text)["input_ids"] * 4)[:4]
        assert torch.equal(prompt, table[ids])


def test_prefix_from_zero_has_zero_values(config):
    for name in ("prefix-tuning zero", "prefix-tuning projection zero"):
        cache = TrainingRun(dataclasses.replace(config, **METHODS[name])).model.get_prompt(batch_size=1)
        assert not any(layer.values.any() for layer in cache.layers)


@pytest.mark.parametrize("ranks", [1, 3])
def test_each_task_starts_from_the_shared_prompt(config, ranks):
    changes = {**METHODS["multitask"], "num_ranks": ranks, "init": "text", "init_text": "Word: cat"}
    run = TrainingRun(dataclasses.replace(config, **changes))
    prompts = run.model.get_prompt(batch_size=3, task_ids=torch.arange(3))
    ids = (run.tokenizer("Word: cat")["input_ids"] * 4)[:4]
    assert torch.equal(prompts, run.model.get_input_embeddings().weight[ids].expand(3, -1, -1))
    # The ranks must not move in step, or they would be one.
    gradient = torch.autograd.grad(run.model(**run.batch(0)).loss, encoder_of(run).prefix_task_cols)[0]
    assert ranks == 1 or not torch.allclose(gradient[..., 0], gradient[..., 1])


@pytest.fixture
def source(config, tmp_path):
    config = dataclasses.replace(config, **METHODS["multitask"], output=str(tmp_path / "source"))
    train(config)
    return load_file(tmp_path / "source/adapter_model.safetensors")


@pytest.mark.parametrize("how", [{}, {"source_init": "exact", "source_task": "y"}, {"source_init": "shared"}], ids=str)
def test_target_starts_from_its_source(config, tmp_path, source, how):
    target = {"method": "multitask", "init": "random", "num_ranks": 2, "source": str(tmp_path / "source"), **how}
    run = TrainingRun(dataclasses.replace(config, **target))
    factors = torch.ones(())
    if how.get("source_init") != "shared":
        cols, rows = source["prefix_task_cols"], source["prefix_task_rows"]
        factors = cols[1] @ rows[1] if how else cols.mean(0) @ rows.mean(0)
    prompt = run.model.get_prompt(batch_size=1, task_ids=torch.tensor([0]))[0]
    assert torch.allclose(prompt, source["prompt_embeddings"] * factors, rtol=1e-6)
    run.train()
    shutil.rmtree(tmp_path / "source")
    assert "tasks" not in TrainedAdapter(run.config.output).evaluate(config.data)


@pytest.mark.parametrize(
    ("changes", "argument", "said"),
    [
        ({"source": "nowhere"}, "source", r"holds no adapter_config\.json"),
        ({"num_virtual_tokens": 5}, "num_virtual_tokens", "expected 4 like the source, got 5"),
        ({"num_ranks": None}, "num_ranks", "expected 2 like the source, got 1"),
        ({"task_column": "topic"}, "source_init", "'average' starts one task, and the data has 3; expected 'shared'"),
        ({"source_init": "exact", "source_task": "w"}, "source_task", r"expected one of \['x', 'y', 'z'\], got 'w'"),
    ],
)
def test_unusable_sources_are_named(config, tmp_path, source, changes, argument, said):
    target = {"method": "multitask", "init": "random", "num_ranks": 2, "source": str(tmp_path / "source"), **changes}
    with pytest.raises(InputError, match=said) as caught:
        TrainingRun(dataclasses.replace(config, **target))
    assert caught.value.argument == argument


def test_only_a_multitask_run_is_a_source(config, tmp_path):
    train(config)
    target = {"method": "multitask", "init": "random", "source": config.output, "output": str(tmp_path / "target")}
    with pytest.raises(InputError, match="holds a PROMPT_TUNING adapter; expected a multitask run"):
        TrainingRun(dataclasses.replace(config, **target))
