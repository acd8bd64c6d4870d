"""An engine with fewer blocks than its requests want: they are preempted, and wait."""

import models
import pytest
from vllm import SamplingParams

from fastprompt.integrations.vllm import connector_config, request

LONG = SamplingParams(temperature=0, max_tokens=110)


@pytest.fixture(scope="module")
def engine(task, start_engine):
    """Seven blocks of 32 tokens, one of which stays empty, for two requests that end with 6 each."""
    return start_engine(
        task.model,
        kv_transfer_config=connector_config(task.prompts, memory=0),
        max_model_len=192,
        max_num_seqs=2,
        num_gpu_blocks_override=8,
        enable_prefix_caching=False,
    )


def preemptions(engine):
    return next(metric.value for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions")


def test_preempted_requests_load_again(task, engine):
    names = ["task3", "task12", "task6", None]
    requests = [
        ({"prompt_token_ids": [3, 4]}, LONG) if n is None else request(task.prompts, n, [3, 4], LONG) for n in names
    ]
    outputs = engine.generate([prompt for prompt, _ in requests], [params for _, params in requests], use_tqdm=False)
    assert preemptions(engine) > 0
    for name, output in zip(names, outputs):
        assert list(output.outputs[0].token_ids) == task.expected(name, [3, 4], 110)


def test_a_prompt_that_is_lost_while_a_request_waits_fails_it_alone(task, engine):
    file = task.prompts / "lost.safetensors"
    models.save_prompt(models.keys_and_values(task.adapters["task0"]), file)
    core, finished, tokens = engine.llm_engine, {}, 0
    for key, name in (("one", "task3"), ("two", "task9"), ("lost", "lost"), ("last", "task0")):
        core.add_request(key, *request(task.prompts, name, [3, 4], LONG))
    while core.has_unfinished_requests():
        for output in core.step():
            tokens = max(tokens, len(output.outputs[0].token_ids))
            if output.finished:
                finished[output.request_id] = output.outputs[0]
        if tokens > 40:  # the first two run, and leave no place; the others are with the scheduler
            file.unlink(missing_ok=True)
    # The engine does not wait for us: the request may have begun, and be preempted, before its file goes.
    begun = list(finished["lost"].token_ids)
    assert finished["lost"].finish_reason == "error" and begun == task.expected("task0", [3, 4], 110)[: len(begun)]
    for key, name in (("one", "task3"), ("two", "task9"), ("last", "task0")):
        assert list(finished[key].token_ids) == task.expected(name, [3, 4], 110)
