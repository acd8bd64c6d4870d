"""vLLM's engine with the connector: the tokens of PEFT, whatever shares a batch or a cache."""

import random

import models
import pytest
import torch
from safetensors.torch import save_file
from vllm import SamplingParams

import fastprompt
from fastprompt.integrations.vllm import PromptError, PromptFolder, connector_config, embed_prompt, request

NEW_TOKENS, BLOCK = 12, 32
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)


@pytest.fixture(scope="module")
def engine(task, start_engine):
    return start_engine(task.model, kv_transfer_config=connector_config(task.prompts), enable_prompt_embeds=True)


def generate(engine, requests):
    outputs = engine.generate([prompt for prompt, _ in requests], [params for _, params in requests], use_tqdm=False)
    assert all(output.outputs[0].finish_reason == "length" for output in outputs)
    return [list(output.outputs[0].token_ids) for output in outputs]


def ask(task, name, token_ids, params=GREEDY):
    return ({"prompt_token_ids": token_ids}, params) if name is None else request(task.prompts, name, token_ids, params)


def cache_hits(engine):
    """Tokens found in the prefix cache so far, and tokens loaded by the connector."""
    values = {metric.name: metric.value for metric in engine.get_metrics() if "prefix_cache" in metric.name}
    return values["vllm:prefix_cache_hits"], values["vllm:external_prefix_cache_hits"]


def test_mixed_requests_equal_peft(task, engine):
    names = [None if i % 5 == 4 else task.names[i % 16] for i in range(64)]
    random.Random(1).shuffle(names)
    assert set(names) == {None, *task.names}
    found = generate(engine, [ask(task, name, text) for name, text in zip(names, task.texts)])
    assert found == [task.expected(name, text, NEW_TOKENS) for name, text in zip(names, task.texts)]


def test_mixed_requests_equal_those_of_a_bank(task, engine):
    bank = fastprompt.PromptBank(task.adapters[None])
    for name in task.names:
        bank.add(name, task.prompts / f"{name}.safetensors")
    names, texts = [None if i % 5 == 4 else task.names[i % 16] for i in range(64)], task.texts
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    expected = bank.generate(ids, mask, prompts=names, **options)[:, width:].tolist()
    assert generate(engine, [ask(task, name, text) for name, text in zip(names, texts)]) == expected


@pytest.mark.parametrize("name", ["task3", "task9"])
def test_a_second_request_of_a_long_prompt_finds_its_blocks(task, engine, name):
    length = PromptFolder(task.prompts).info(name).length
    assert length > BLOCK
    engine.reset_prefix_cache()
    (first,) = generate(engine, [ask(task, name, [7, 8, 9])])
    found, loaded = cache_hits(engine)
    second = generate(engine, [ask(task, name, [7, 8, 9]), ask(task, name, [9, 8, 7])])
    found_again, loaded_again = cache_hits(engine)
    whole = length // BLOCK * BLOCK
    assert found_again - found == 2 * whole and loaded_again - loaded == 2 * (length - whole)
    assert second == [first, task.expected(name, [9, 8, 7], NEW_TOKENS)]


def test_prompts_never_see_the_blocks_of_others(task, engine, tmp_path):
    """Equal lengths and texts: only the salt tells them apart; and a plain request has the ids of the placeholders."""
    folder = PromptFolder(task.prompts)
    names = [name for name in task.names if folder.info(name).length == 40]
    assert len(names) > 2
    text = list(range(1, 40))
    plain = [0] * 40 + text
    expected = [task.expected(name, text, NEW_TOKENS) for name in names] + [task.expected(None, plain, NEW_TOKENS)]
    assert len(set(map(tuple, expected))) == len(expected)
    requests = [*(ask(task, name, text) for name in names), ask(task, None, plain)]
    engine.reset_prefix_cache()
    for order in (requests, requests, requests[::-1]):
        found = generate(engine, order)
        assert found == (expected if order is requests else expected[::-1])


def test_files_come_change_and_go(task, engine):
    file, text = task.prompts / "new.safetensors", [5, 6, 7]
    with pytest.raises(PromptError, match="there is no prompt 'new'"):
        ask(task, "new", text)
    for name in ("task2", "task3"):  # the second in place of the first
        models.save_prompt(models.keys_and_values(task.adapters[name]), file)
        for _ in range(2):
            assert generate(engine, [ask(task, "new", text)]) == [task.expected(name, text, NEW_TOKENS)]
    late = ask(task, "new", text)
    file.unlink()
    assert refused(engine, late)


def test_prompts_of_another_model_are_refused(task, engine):
    layers = models.keys_and_values(task.adapters["task0"])
    wrong = {"layers": layers[:2], "heads": [(k[:, :1], v[:, :1]) for k, v in layers]}
    for name, changed in wrong.items():
        models.save_prompt(changed, task.prompts / f"wrong_{name}.safetensors")
        assert refused(engine, ask(task, f"wrong_{name}", [1, 2]))
        (task.prompts / f"wrong_{name}.safetensors").unlink()


def refused(engine, one):
    """Whether a request fails, and the engine goes on."""
    (output,) = engine.generate([one[0]], [one[1]], use_tqdm=False)
    return output.outputs[0].finish_reason == "error" and not output.outputs[0].token_ids


def changed(one, **changes):
    prompt, params = one
    params = params.clone()
    for key in [key for key in changes if hasattr(params, key)]:
        setattr(params, key, changes.pop(key))
    prompt = {**prompt, **changes}
    return {key: value for key, value in prompt.items() if value is not None}, params


BAD = {
    "no salt": {"cache_salt": None},
    "another's salt": {"cache_salt": "fastprompt-0"},
    "a salt and no name": {"extra_args": None},
    "an unknown name": {"extra_args": {"kv_transfer_params": {"fastprompt": "nothing"}}},
    "a path": {"extra_args": {"kv_transfer_params": {"fastprompt": "../model/model"}}},
    "a number": {"extra_args": {"kv_transfer_params": {"fastprompt": 1}}},
    "no text": {"prompt_token_ids": [0] * 20},
    "no placeholders": {"prompt_token_ids": list(range(1, 40))},
    "too few placeholders": {"prompt_token_ids": [0] * 19 + [1, 2, 3]},
    "a penalty for placeholders": {"repetition_penalty": 1.5},
    "no reading of the cache": {"skip_reading_prefix_cache": True},
}


@pytest.mark.parametrize("why", BAD)
def test_what_would_give_a_wrong_answer_is_refused(task, engine, why):
    good = ask(task, "task0", [1, 2, 3])
    bad = changed(good, **BAD[why])
    for _ in range(2):  # neither before nor after its blocks are cached
        assert refused(engine, bad)
        assert generate(engine, [good]) == [task.expected("task0", [1, 2, 3], NEW_TOKENS)]


def test_refused_and_good_requests_in_one_batch(task, engine):
    good = [ask(task, name, text) for name, text in zip(task.names, task.texts)]
    requests = [one for pair in zip(good, (changed(one, cache_salt=None) for one in good)) for one in pair]
    outputs = engine.generate([prompt for prompt, _ in requests], [params for _, params in requests], use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error"] * 16
    for name, text, output in zip(task.names, task.texts, outputs[::2]):
        assert list(output.outputs[0].token_ids) == task.expected(name, text, NEW_TOKENS)


def test_a_repetition_penalty_counts_the_text_alone(task, engine):
    start = [4, 4, 0, 9, 30]
    text, penalty = start + task.expected("task1", start, NEW_TOKENS), 1.7
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, repetition_penalty=penalty)
    expected = task.expected("task1", text, NEW_TOKENS, repetition_penalty=penalty)
    assert expected != task.expected("task1", text, NEW_TOKENS)
    assert generate(engine, [ask(task, "task1", text, params)]) == [expected]


def test_several_samples_of_one_request(task, engine):
    params = SamplingParams(top_k=1, n=3, max_tokens=NEW_TOKENS)
    prompt, params = ask(task, "task2", [1, 2, 3], params)
    (output,) = engine.generate([prompt], [params], use_tqdm=False)
    assert [list(one.token_ids) for one in output.outputs] == [task.expected("task2", [1, 2, 3], NEW_TOKENS)] * 3


def test_a_second_turn(task, engine):
    text = [1, 2, 3]
    (first,) = generate(engine, [ask(task, "task3", text)])
    longer = [*text, *first, 4, 5]
    assert generate(engine, [ask(task, "task3", longer)]) == [task.expected("task3", longer, NEW_TOKENS)]


def test_prompt_embeddings(task, engine, tmp_path):
    model, text = task.adapters["task0"], [1, 2, 3]
    save_file({"prompt_embeds": model.get_prompt(batch_size=1)[0].detach().clone()}, tmp_path / "prompt.safetensors")
    embeds = embed_prompt(tmp_path / "prompt.safetensors", text, model.get_input_embeddings())
    assert embeds.shape == (20 + 3, 64) and embeds.dtype == torch.float32
    assert generate(engine, [({"prompt_embeds": embeds}, GREEDY)]) == [task.expected("task0", text, NEW_TOKENS)]
