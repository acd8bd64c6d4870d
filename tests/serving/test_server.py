"""``fastprompt serve``: OpenAI's interface over the prompts of a bank."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest
import torch
import uvicorn
from tiny_llama import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastprompt.hf.prompt_state import Prompt
from fastprompt.serve import prompt_sources, serve
from fastprompt.serving.app import ServerOptions, create_app
from fastprompt.serving.bank import PromptBank
from fastprompt.serving.compile import CompiledPrompt, compiled
from fastprompt.training import InputError

TOKEN = "not to be guessed"
TEXTS = ("Word: cat", "kind", "Word: fern kind: plant Word:", "animal oak")
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}kind:"
NEW = 8


class Served:
    """A server in a thread, and a client of it."""

    def __init__(self, folder):
        self.folder = folder
        self.model_folder = save_model(folder / "model")
        self.base = AutoModelForCausalLM.from_pretrained(self.model_folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_folder)
        self.bank = PromptBank(self.base)
        (folder / "prompts").mkdir()
        generator = torch.Generator().manual_seed(0)
        for name, size in (("sql", 3), ("summary", 7), ("later", 2)):
            rows = 0.5 * torch.randn(size, 32, generator=generator)
            prompt = compiled(self.base, Prompt("prompt-tuning", rows=rows), self.bank.fingerprint)
            prompt.save(folder / "prompts" / f"{name}.safetensors")
            if name != "later":
                self.bank.add(name, prompt)

    def expected(self, prompt, text, new=NEW):
        """What follows a text, and how many tokens, by ``bank.generate`` of it alone."""
        ids = torch.tensor([self.tokenizer(text)["input_ids"]])
        options = dict(max_new_tokens=new, do_sample=False, pad_token_id=0)
        found = self.bank.generate(ids, prompts=prompt, **options)[0, ids.shape[1] :]
        return self.tokenizer.decode(found, skip_special_tokens=True), len(found)

    @contextmanager
    def running(self, **options):
        admin = dict(admin_token=TOKEN, admin_folder=self.folder / "prompts")
        app = create_app(self.bank, self.tokenizer, ServerOptions("base", **{"max_batch": 8, **admin, **options}))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
            thread.start()
            address = f"http://127.0.0.1:{listening.getsockname()[1]}"
            try:
                with httpx.Client(base_url=address, timeout=60) as client:
                    while not server.started:
                        time.sleep(0.01)
                    client.service = app.state.service
                    yield client
            finally:
                server.should_exit = True
                thread.join()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return Served(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def client(served):
    with served.running() as client:
        yield client


def complete(client, **fields):
    body = {"model": "sql", "prompt": "Word: cat", "max_tokens": NEW, "temperature": 0, **fields}
    return client.post("/v1/completions", json=body)


def streamed(client, path="/v1/completions", **fields):
    """The JSON of each event."""
    body = {"model": "sql", "max_tokens": NEW, "temperature": 0, "stream": True, **fields}
    with client.stream("POST", path, json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def waited_for(condition):
    for _ in range(2000):
        if condition():
            return True
        time.sleep(0.005)
    return False


def test_models_are_the_prompts_and_the_model(client):
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["base", "sql", "summary"]
    assert client.get("/v1/models/sql").json()["id"] == "sql"
    assert client.get("/v1/models/nothing").status_code == 404


def test_requests_in_one_batch_answer_as_each_alone(served, client):
    wanted = [(model, text) for model in ("sql", "summary", "base") for text in TEXTS]
    answers = [None] * len(wanted)

    def ask(index):
        model, text = wanted[index]
        answers[index] = complete(client, model=model, prompt=text, max_tokens=1 + index).json()

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, (model, text) in enumerate(wanted):
        expected, number = served.expected(None if model == "base" else model, text, 1 + index)
        assert answers[index]["choices"][0]["text"] == expected
        assert answers[index]["usage"]["completion_tokens"] == number
    assert re.search(r"fastprompt_batch_rows_bucket\{le=\"8.0\"\} [1-9]", client.get("/metrics").text)


def test_several_texts_and_ids_in_one_request(served, client):
    answer = complete(client, prompt=list(TEXTS[:3]), n=2, echo=True).json()
    texts = [text + served.expected("sql", text)[0] for text in TEXTS[:3] for _ in range(2)]
    assert [choice["text"] for choice in answer["choices"]] == texts
    ids = served.tokenizer(TEXTS[0])["input_ids"]
    assert complete(client, prompt=ids).json()["choices"][0]["text"] == served.expected("sql", TEXTS[0])[0]


def test_streams_are_the_same_text_in_pieces(served, client):
    expected, number = served.expected("sql", TEXTS[0])
    events = streamed(client, prompt=TEXTS[0], echo=True, stream_options={"include_usage": True})
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == TEXTS[0] + expected
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    size = len(served.tokenizer(TEXTS[0])["input_ids"])
    counts = {"prompt_tokens": size, "completion_tokens": number, "total_tokens": size + number}
    assert events[-1]["usage"] == counts


def test_an_answer_ends_before_a_stop(served, client):
    expected, _ = served.expected("sql", TEXTS[0])
    stop = expected[3:5]
    before = expected[: expected.index(stop)]
    choice = complete(client, stop=["never there", stop]).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (before, "stop")
    events = streamed(client, prompt=TEXTS[0], stop=stop)
    assert "".join(event["choices"][0]["text"] for event in events) == before


def test_a_seed_samples_the_same_whatever_its_neighbours(client):
    fields = dict(temperature=1.5, top_p=0.9, seed=5)
    alone = complete(client, **fields).json()["choices"][0]["text"]
    twice = [choice["text"] for choice in complete(client, n=4, **fields).json()["choices"]]
    assert twice[0] == alone and len(set(twice)) > 1
    assert complete(client, temperature=1.5, top_p=0, seed=5).json()["choices"] == complete(client).json()["choices"]


def test_conversations_go_through_the_template(served, client):
    body = {"model": "sql", "messages": [{"role": "user", "content": "cat"}], "max_tokens": NEW, "temperature": 0}
    refused = client.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400 and "no chat template" in refused.json()["error"]["message"]
    served.tokenizer.chat_template = CHAT
    try:
        expected, _ = served.expected("sql", "user: cat kind:")
        answer = client.post("/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["message"]["content"] == expected
        again = [*body["messages"], answer["choices"][0]["message"], *body["messages"]]
        assert client.post("/v1/chat/completions", json={**body, "messages": again}).is_success
        events = streamed(client, "/v1/chat/completions", messages=body["messages"])
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == expected
        parts = [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
        assert client.post("/v1/chat/completions", json={**body, "messages": parts}).status_code == 400
    finally:
        served.tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "nothing"}, 404, "model"),
        ({"model": None}, 400, "model"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [1, 10**6]}, 400, "prompt"),
        ({"prompt": [1, True]}, 400, "prompt"),
        ({"prompt": "cat " * 64}, 400, "prompt"),
        ({"max_tokens": 64}, 400, "max_tokens"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": "8"}, 400, "max_tokens"),
        ({"max_tokens": 10**30}, 400, "max_tokens"),
        ({"prompt": ["cat"] * 9}, 400, "n"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 2}, 400, "top_p"),
        ({"n": 9}, 400, "n"),
        ({"seed": 2**63}, 400, "seed"),
        ({"stop": [""]}, 400, "stop"),
        ({"stop": ["a"] * 5}, 400, "stop"),
        ({"logprobs": 0}, 400, "logprobs"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"surprise": 1}, 400, "surprise"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_cannot_be_done_is_refused_by_name(client, fields, status, param):
    response = complete(client, **fields)
    error = response.json()["error"]
    assert response.status_code == status and error["param"].split(".")[0] == param, error
    assert set(error) == {"message", "type", "param", "code"} and param in error["message"]


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b"", b'{"model": "sql", "prompt": "\\ud800"}', b"[" * 10**5])
def test_bodies_that_are_no_request(client, body):
    assert client.post("/v1/completions", content=body).status_code == 400


def test_fields_that_ask_for_nothing_are_taken(client):
    assert complete(client, user="me", frequency_penalty=0, logprobs=None, logit_bias={}, best_of=1).is_success
    assert client.get("/nothing").json()["error"]["code"] is None
    assert client.get("/v1/completions").status_code == 405


def test_prompts_come_and_go(served, client):
    path, admin = "/admin/prompts/team/later", {"Authorization": f"Bearer {TOKEN}"}
    source = {"path": "later.safetensors"}
    for headers in ({}, {"Authorization": "Bearer guess"}, {"Authorization": TOKEN}):
        assert client.put(path, json=source, headers=headers).status_code == 401
        assert client.delete(path, headers=headers).status_code == 401
    (served.folder / "prompts" / "link").symlink_to(served.folder)
    for outside in ("../model", "/etc/passwd", ".", "link/model", "nothing", "a\0b"):
        assert client.put(path, json={"path": outside}, headers=admin).status_code == 400
    assert client.put("/admin/prompts/base", json=source, headers=admin).status_code == 400
    assert client.put(path, json=source, headers=admin).json()["length"] == 2
    assert (
        complete(client, model="team/later").json()["choices"][0]["text"] == served.expected("team/later", TEXTS[0])[0]
    )
    assert client.delete(path, headers=admin).is_success and client.delete(path, headers=admin).status_code == 404
    assert complete(client, model="team/later").status_code == 404


def test_without_a_token_there_is_no_admin_route(served):
    with served.running(admin_token=None, admin_folder=None) as client:
        assert client.delete("/admin/prompts/sql").status_code == 404
    with pytest.raises(ValueError, match="must be given together"):
        create_app(served.bank, served.tokenizer, ServerOptions("base", admin_token=TOKEN))
    with pytest.raises(ValueError, match="must not be the name of a prompt"):
        create_app(served.bank, served.tokenizer, ServerOptions("sql"))


def test_large_bodies_and_full_queues_are_refused(served):
    with served.running(max_body=200, max_queue=1, max_batch=2) as client:
        assert complete(client, prompt="cat " * 60).status_code == 413
        assert client.post("/v1/completions", content=iter([b" " * 150] * 2)).status_code == 413
        refused = complete(client, n=2)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert complete(client).is_success


def test_a_large_body_is_read_to_its_end(served):
    """Who is cut off while it sends would see a broken connection, and no status."""
    with served.running(max_body=200) as client:
        address = client.base_url.host, client.base_url.port
        with socket.create_connection(address, timeout=0.1) as raw:
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 300\r\n\r\n" + b" " * 150)
            with pytest.raises(TimeoutError):
                raw.recv(1)
            raw.sendall(b" " * 150)
            raw.settimeout(60)
            assert raw.recv(100).startswith(b"HTTP/1.1 413 ")
        with socket.create_connection(address, timeout=60) as raw:  # one that nobody would read
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_request_waits_for_a_prompt_of_the_length_that_it_had(served):
    """A longer one of the same name might not fit behind the model's positions."""
    with served.running(max_wait_ms=300) as client:
        found = []
        thread = threading.Thread(target=lambda: found.append(complete(client, model="changing")))
        served.bank.add("changing", served.folder / "prompts" / "sql.safetensors")
        thread.start()
        assert waited_for(lambda: client.service.batcher.waiting == 1)
        served.bank.add("changing", served.folder / "prompts" / "summary.safetensors")
        thread.join()
        served.bank.remove("changing")
    assert found[0].status_code == 404 and "of another length" in found[0].text


def test_a_client_that_hangs_up_frees_its_rows(served, monkeypatch):
    generate, steps = served.bank.generate, []

    def slowly(*arguments, stopping_criteria, **options):
        def wait(*_, **__):
            steps.append(time.sleep(0.05))
            return False

        def each(input_ids, scores, **_):
            wait()
            return torch.zeros(len(input_ids), dtype=torch.bool)

        return generate(*arguments, stopping_criteria=[*stopping_criteria, each], **options)

    monkeypatch.setattr(served.bank, "generate", slowly)
    monkeypatch.setattr(served.base.generation_config, "eos_token_id", None)
    with served.running(max_batch=1) as client:
        service = client.service
        body = {"model": "sql", "prompt": "cat", "max_tokens": 50, "temperature": 0, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as running:
            lines = running.iter_lines()
            assert next(lines)
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json={**body, "stream": False}, timeout=0.2)
            assert waited_for(lambda: service.batcher.waiting == 0)
            assert service.batcher.running == 1
        assert waited_for(lambda: service.is_idle)
        assert len(steps) < 45
        assert 'status="499"} 2.0' in client.get("/metrics").text


def test_a_failing_batch_is_an_answer(served, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no memory")

    with served.running() as client:
        with monkeypatch.context() as context:
            context.setattr(served.bank, "generate", fail)
            assert complete(client).status_code == 500
        assert complete(client).is_success and client.get("/health").json() == {"status": "ok"}


def test_sigterm_finishes_what_was_accepted(served):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["serve", "--prompts", str(served.folder / "prompts"), "--port", str(port)]  # they know their model
    command += ["--max-wait-ms", "1500", "--base-name", "base"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastprompt.cli", *command], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

            def is_up():
                try:
                    return client.get("/health").is_success
                except httpx.TransportError:
                    return time.sleep(0.1)

            assert waited_for(is_up)
            found = []
            thread = threading.Thread(target=lambda: found.append(complete(client, model="summary")))
            thread.start()
            assert waited_for(lambda: "fastprompt_waiting_rows 1.0" in client.get("/metrics").text)
            process.send_signal(signal.SIGTERM)
            assert waited_for(lambda: client.get("/health").status_code == 503)
            assert complete(client).status_code == 503
            thread.join()
        assert found[0].json()["choices"][0]["text"] == served.expected("summary", TEXTS[0])[0]
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()


def test_prompts_must_agree_on_a_model_or_one_is_given(served, tmp_path):
    sql = CompiledPrompt.load(served.folder / "prompts" / "sql.safetensors")
    for name, base in (("sql", sql.base_model), ("other", "another"), ("silent", "")):
        replace(sql, base_model=base).save(tmp_path / f"{name}.safetensors")
    for names, message in ((["sql", "other"], "of another model"), (["silent"], "do not say"), ([], "do not say")):
        with pytest.raises(InputError, match=message):
            serve(prompts=[str(tmp_path / f"{name}.safetensors") for name in names])


def test_sources_of_prompts(served):
    folder = served.folder / "prompts"
    assert sorted(prompt_sources([str(folder)])) == ["later", "sql", "summary"]
    one = str(folder / "sql.safetensors")
    assert list(prompt_sources([one, f"team/sql={one}"])) == ["sql", "team/sql"]
    for given in ([one, one], ["nothing"], ["a=nothing"], [f"={one}"], [str(served.folder)]):
        with pytest.raises(InputError):
            prompt_sources(given)
