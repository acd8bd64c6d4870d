"""vLLM's server with connector and middleware, asked by the client of OpenAI."""

import json
from concurrent.futures import ThreadPoolExecutor

import models
import openai
import pytest
from safetensors.torch import save_file

from fastprompt.integrations.vllm import embed_prompt, encode_prompt_embeds

NEW_TOKENS = 12
KEY = "secret"


@pytest.fixture(scope="module")
def client(task, start_server):
    transfer = {
        "kv_connector": "FastPromptConnector",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"prompts": str(task.prompts)},
    }
    address = start_server(
        task.model,
        f"--kv-transfer-config={json.dumps(transfer)}",
        "--middleware=fastprompt.integrations.vllm.Middleware",
        "--enable-scale-out",
        "--enable-prompt-embeds",
        "--served-model-name=base",
        f"--api-key={KEY}",
    )
    return openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=120)


def tokens_of(text):
    return [models.TOKENS[character] for character in text.replace(" ", "Ġ")]


def complete(client, name, text, **options):
    return client.completions.create(
        model=name or "base", prompt=text, max_tokens=NEW_TOKENS, temperature=0, **options, extra_body=IDS
    )


IDS = {"return_token_ids": True}


def test_models_are_listed(task, client):
    listed = {model.id for model in client.models.list()}
    assert listed == {"base", *task.names}
    (task.prompts / "half.safetensors").write_bytes((task.prompts / "task0.safetensors").read_bytes()[:-1])
    models.save_prompt(models.keys_and_values(task.adapters["task1"]), task.prompts / "added.safetensors")
    assert {model.id for model in client.models.list()} == {*listed, "added"}
    assert complete(client, "added", "a b").choices[0].token_ids == task.expected("task1", tokens_of("a b"), NEW_TOKENS)
    (task.prompts / "half.safetensors").unlink()
    (task.prompts / "added.safetensors").unlink()
    assert {model.id for model in client.models.list()} == listed


def test_completions_by_name_side_by_side(task, client):
    names = [None, *task.names] * 2
    texts = [f"question {i}: " + "why? " * (i % 7) for i in range(len(names))]
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda one: complete(client, *one), zip(names, texts)))
    assert [answer.choices[0].token_ids for answer in answers] == [
        task.expected(name, tokens_of(text), NEW_TOKENS) for name, text in zip(names, texts)
    ]


@pytest.mark.parametrize("name", [None, "task2", "task5"])
def test_prompts_of_a_request_may_be_many_texts_or_ids(task, client, name):
    texts = ["one", "two and three"]
    expected = [task.expected(name, tokens_of(text), NEW_TOKENS) for text in texts]
    for prompt in (texts, [tokens_of(text) for text in texts]):
        assert [choice.token_ids for choice in complete(client, name, prompt).choices] == expected
    assert complete(client, name, tokens_of("one")).choices[0].token_ids == expected[0]


def test_streamed_completions(task, client):
    whole = complete(client, "task3", "a stream").choices[0]
    parts = [chunk.choices[0].text for chunk in complete(client, "task3", "a stream", stream=True) if chunk.choices]
    assert len(parts) > 1 and "".join(parts) == whole.text
    assert whole.token_ids == task.expected("task3", tokens_of("a stream"), NEW_TOKENS)


MESSAGES = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "what is a ring?"}]
RENDERED = "<system>be kind<user>what is a ring?<reply>"


@pytest.mark.parametrize("name", [None, "task1", "task6", "task12"])
def test_chat_by_name(task, client, name):
    options = {"model": name or "base", "messages": MESSAGES, "max_tokens": NEW_TOKENS, "temperature": 0}
    whole = client.chat.completions.create(**options, extra_body=IDS)
    assert whole.choices[0].token_ids == task.expected(name, tokens_of(RENDERED), NEW_TOKENS)
    chunks = list(client.chat.completions.create(**options, stream=True))
    parts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(parts) > 1 and "".join(parts) == whole.choices[0].message.content


def test_a_repetition_penalty_counts_the_text_alone(task, client):
    text = "aaa bbb aaa"
    expected = task.expected("task4", tokens_of(text), NEW_TOKENS, repetition_penalty=1.9)
    answer = client.completions.create(
        model="task4", prompt=text, max_tokens=NEW_TOKENS, temperature=0, extra_body={**IDS, "repetition_penalty": 1.9}
    )
    assert answer.choices[0].token_ids == expected


def test_a_salt_of_the_clients_own(task, client):
    expected = task.expected("task9", tokens_of("salted"), NEW_TOKENS)
    for salt in ("mine", "yours", "mine"):
        answer = client.completions.create(
            model="task9", prompt="salted", max_tokens=NEW_TOKENS, temperature=0, extra_body={**IDS, "cache_salt": salt}
        )
        assert answer.choices[0].token_ids == expected


def test_prompt_embeddings(task, client, tmp_path):
    model, text = task.adapters["task8"], [1, 2, 3]
    save_file({"prompt_embeds": model.get_prompt(batch_size=1)[0].detach().clone()}, tmp_path / "prompt.safetensors")
    embeds = embed_prompt(tmp_path / "prompt.safetensors", text, model.get_input_embeddings())
    answer = client.completions.create(
        model="base",
        prompt=None,
        max_tokens=NEW_TOKENS,
        temperature=0,
        extra_body={**IDS, "prompt_embeds": encode_prompt_embeds(embeds)},
    )
    assert answer.choices[0].token_ids == task.expected("task8", text, NEW_TOKENS)


BAD = {
    "echo": {"echo": True},
    "logprobs of the prompt": {"extra_body": {"prompt_logprobs": 0}},
    "fields of the connector's": {"extra_body": {"kv_transfer_params": {"fastprompt": "task1"}}},
    "too long": {"prompt": "x" * 490},
    "no text": {"prompt": []},
    "no number": {"max_tokens": "many"},
}


@pytest.mark.parametrize("why", BAD)
def test_bad_requests_get_a_clear_4xx(task, client, why):
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(**{"model": "task3", "prompt": "a", "max_tokens": 4, **BAD[why]})
    assert raised.value.body["message"]


def test_fields_without_the_salt_are_refused(task, client):
    fields = {"kv_transfer_params": {"fastprompt": "task0"}}
    with pytest.raises(openai.BadRequestError, match="cache_salt must be that of prompt 'task0'"):
        client.completions.create(model="base", prompt=[0] * 20 + [5], max_tokens=4, extra_body=fields)


def test_unknown_names_and_keys(task, client):
    for name in ("nothing", "../model/model", ".hidden"):
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            complete(client, name, "a")
    for call in (lambda c: complete(c, "task1", "a"), lambda c: c.models.list()):
        with pytest.raises(openai.AuthenticationError):
            call(client.with_options(api_key="wrong"))
