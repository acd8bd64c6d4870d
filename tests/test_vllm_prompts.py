"""Files of compiled prompts for vLLM, and the middleware, without vLLM; see tests/with_vllm for the rest."""

import asyncio
import base64
import io
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from fastprompt.integrations.vllm import Middleware, PromptError, PromptFolder, embed_prompt, encode_prompt_embeds
from fastprompt.integrations.vllm.requests import prompt_folder

P = 3


def save(file, **changes):
    """A compiled prompt; a change of None leaves a tensor or an entry of the metadata out."""
    torch.manual_seed(0)
    tensors = {f"layers.{i}.{part}": torch.randn(P, 2, 4) for i in range(2) for part in ("keys", "values")}
    metadata = {"format": "fastprompt-compiled-prompt", "version": "1", "length": str(P), "method": "prompt-tuning"}
    for name, value in changes.items():
        (tensors if name.startswith("layers") else metadata)[name] = value
    kept = [{key: value for key, value in one.items() if value is not None} for one in (tensors, metadata)]
    save_file(kept[0], file, metadata=kept[1])
    return tensors


@pytest.fixture
def prompts(tmp_path):
    save(tmp_path / "sql.safetensors")
    return PromptFolder(tmp_path, memory=2**20)


def test_a_prompt_is_read_whole(prompts):
    info = prompts.info("sql")
    assert (info.name, info.length, len(info.shapes)) == ("sql", P, 2)
    tensors = save(prompts.folder / "other.safetensors")
    for i, (keys, values) in enumerate(prompts.layers(info)):
        assert keys.equal(tensors[f"layers.{i}.keys"]) and values.equal(tensors[f"layers.{i}.values"])


def test_salts_follow_what_a_file_holds(prompts):
    first = prompts.info("sql")
    shutil.copy(prompts.folder / "sql.safetensors", prompts.folder / "same.safetensors")
    assert prompts.info("same").salt == first.salt
    save(prompts.folder / "sql.safetensors", **{"layers.0.keys": torch.zeros(P, 2, 4)})
    assert prompts.info("sql").salt != first.salt
    assert first.is_salt(first.salt) and first.is_salt(f"{first.salt}-mine")
    assert not any(first.is_salt(salt) for salt in (None, "", f"{first.salt}0", prompts.info("sql").salt))


def test_a_file_that_was_replaced_is_not_served_for_the_former(prompts):
    info = prompts.info("sql")
    save(prompts.folder / "sql.safetensors", **{"layers.0.keys": torch.zeros(P, 2, 4)})
    with pytest.raises(PromptError, match="was replaced"):
        prompts.layers(info)
    assert prompts.layers(prompts.info("sql"))[0][0].count_nonzero() == 0


def test_names_come_and_go(prompts):
    assert prompts.names() == ["sql"] and "sql" in prompts
    save(prompts.folder / "a.b.safetensors")
    save(prompts.folder / ".part.safetensors")
    (prompts.folder / "notes.txt").write_text("")
    assert prompts.names() == ["a.b", "sql"] and prompts.info("a.b").length == P
    (prompts.folder / "sql.safetensors").unlink()
    assert prompts.names() == ["a.b"]
    with pytest.raises(PromptError, match="there is no prompt 'sql'"):
        prompts.info("sql")


@pytest.mark.parametrize("name", ["", ".part", "../sql", "a/../sql", "sql\0", "x" * 300, "\ud800", None, 3])
def test_a_name_is_no_path(prompts, name):
    (prompts.folder / "a").mkdir()
    save(prompts.folder / ".part.safetensors")
    assert name not in prompts
    with pytest.raises(PromptError, match="there is no prompt"):
        prompts.info(name)


def test_memory_is_kept_to(tmp_path):
    for name in "abc":
        save(tmp_path / f"{name}.safetensors", note=name)
    one = 4 * P * 2 * 4 * 4
    folder = PromptFolder(tmp_path, memory=2 * one)
    infos = {name: folder.info(name) for name in "abc"}
    kept = {name: folder.layers(infos[name]) for name in "ab"}
    assert folder.layers(infos["a"]) is kept["a"]
    folder.layers(infos["c"])
    assert folder.layers(infos["a"]) is kept["a"] and folder.layers(infos["b"]) is not kept["b"]
    empty = PromptFolder(tmp_path)
    assert empty.layers(infos["a"])[0][0].equal(kept["a"][0][0])


BAD = {
    "another format": ({"format": "pt"}, "expected format"),
    "a later version": ({"version": "2"}, "expected format"),
    "no length": ({"length": None}, "P at least 1"),
    "another length": ({"length": "4"}, "P at least 1"),
    "no token": ({"length": "0"}, "P at least 1"),
    "a state of a recurrent layer": ({"layers.1.recurrent_state": torch.zeros(2)}, "nothing else"),
    "no values": ({"layers.1.values": None}, "nothing else"),
    "a missing layer": ({"layers.0.keys": None, "layers.0.values": None}, "nothing else"),
    "two dimensions": ({"layers.1.keys": torch.zeros(P, 4)}, "P at least 1"),
    "other heads": ({"layers.1.keys": torch.zeros(P, 1, 4)}, "P at least 1"),
    "integers": ({"layers.1.keys": torch.zeros(P, 2, 4, dtype=torch.int32)}, "expected ..BF16"),
    "no layer": ({f"layers.{i}.{part}": None for i in (0, 1) for part in ("keys", "values")}, "has none"),
}


@pytest.mark.parametrize("why", BAD)
def test_other_files_are_refused(prompts, why):
    changes, message = BAD[why]
    save(prompts.folder / "bad.safetensors", **changes)
    with pytest.raises(PromptError, match=message):
        prompts.info("bad")
    assert prompts.names() == ["bad", "sql"] and prompts.served() == ["sql"]


@pytest.mark.parametrize("size", [0, 3, 8, 50, -1])
def test_half_a_file_is_refused(prompts, size):
    data = (prompts.folder / "sql.safetensors").read_bytes()
    (prompts.folder / "half.safetensors").write_bytes(data[:size])
    with pytest.raises(PromptError, match="not all of one|is it whole"):
        prompts.info("half")
    assert prompts.served() == ["sql"]


def test_prompts_of_another_model_are_refused_where_the_model_is_known(prompts):
    save(prompts.folder / "ours.safetensors", fingerprint="a-b")
    known = PromptFolder(prompts.folder, fingerprint="a-b")
    assert known.info("ours").length == P and known.served() == ["ours"]
    with pytest.raises(PromptError, match="fingerprint None; expected a-b"):
        known.info("sql")


@pytest.mark.parametrize(
    "options", [{}, {"prompts": 1}, {"memory": 1}, {"prompts": ".", "memory": -1}, {"prompts": ".", "more": 1}]
)
def test_options_are_checked(options):
    with pytest.raises(ValueError, match="kv_connector_extra_config must be"):
        prompt_folder(SimpleNamespace(kv_connector_extra_config=options))


HEADERS = [
    b"[]",
    b"{",
    b"1",
    b'{"__metadata__": 1}',
    b'{"layers.0.keys": 1}',
    b'{"layers.0.keys": {"dtype": "F32", "shape": 3, "data_offsets": [0, 0]}}',
    b"[" * 10**5,
]


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_strange_headers_are_refused(prompts, header):
    (prompts.folder / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(PromptError, match="odd"):
        prompts.info("odd")
    assert prompts.served() == ["sql"]


def test_shapes_that_do_not_fit_the_bytes_are_refused(prompts):
    data = (prompts.folder / "sql.safetensors").read_bytes()
    odd = data.replace(b"[3,2,4]", b"[3,2,5]")
    assert odd != data
    (prompts.folder / "odd.safetensors").write_bytes(odd)
    with pytest.raises(PromptError, match="not a safetensors file"):
        prompts.info("odd")


def test_no_folder(tmp_path):
    with pytest.raises(PromptError, match="must be a folder"):
        PromptFolder(tmp_path / "nothing")


# The middleware, in front of a server that renders one token a character and gives back what it was asked.


async def server(scope, receive, send):
    body = b""
    while (message := await receive()).get("more_body"):
        body += message["body"]
    body += message["body"]
    if dict(scope["headers"]).get(b"authorization") == b"wrong":
        return await reply(send, 401, {"error": "Unauthorized"})
    assert dict(scope["headers"])[b"content-length"] == str(len(body)).encode()
    if scope["path"] == "/v1/models":
        return await reply(send, 200, {"object": "list", "data": [{"id": "base", "object": "model", "created": 1}]})
    request = json.loads(body)
    if not scope["path"].endswith("/render"):
        return await reply(send, 200, {"path": scope["path"], "request": request})
    assert request["model"] == "base"
    parameters = {"repetition_penalty": request.get("repetition_penalty", 1.0)}
    if "messages" in request:
        ids = [ord(character) for message in request["messages"] for character in message["content"]]
        return await reply(
            send, 200, {"token_ids": ids, "sampling_params": parameters, "features": request.get("media")}
        )
    texts = request["prompt"] if isinstance(request["prompt"], list) else [request["prompt"]]
    if not texts:
        return await reply(send, 400, {"error": "no text"})
    rendered = [{"token_ids": list(map(ord, text)), "sampling_params": parameters, "features": None} for text in texts]
    await reply(send, 200, rendered)


async def reply(send, status, content):
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    data = json.dumps(content).encode()
    await send({"type": "http.response.body", "body": data[:5], "more_body": True})
    await send({"type": "http.response.body", "body": data[5:]})


@pytest.fixture
def ask(prompts):
    """A function that sends one request through the middleware; gives status and content."""
    transfer = SimpleNamespace(
        kv_connector="FastPromptConnector", kv_connector_extra_config={"prompts": str(prompts.folder)}
    )
    state = SimpleNamespace(
        args=SimpleNamespace(served_model_name=["base", "alias"], model="folder"),
        vllm_config=SimpleNamespace(kv_transfer_config=transfer),
    )
    middleware = Middleware(server)

    def send(path, content=b"", method="POST", **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        parts, sent = [data[:7], data[7:]], []

        async def receive():
            part = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(parts)}

        async def keep(message):
            sent.append(message)

        given = {"content-length": str(len(data)), **headers}
        scope = {"type": "http", "method": method, "path": path, "root_path": "", "app": SimpleNamespace(state=state)}
        scope["headers"] = [(name.encode(), value.encode()) for name, value in given.items()]
        asyncio.run(middleware(scope, receive, keep))
        return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))

    return send


def test_a_name_becomes_the_fields_of_the_connector(prompts, ask):
    salt = prompts.info("sql").salt
    status, answer = ask(
        "/v1/completions", {"model": "sql", "prompt": "ab", "stream": True, "truncate_prompt_tokens": 9}
    )
    fields = {"cache_salt": salt, "kv_transfer_params": {"fastprompt": "sql"}}
    request = {"model": "base", "prompt": [[0] * P + [97, 98]], "stream": True, **fields}
    assert (status, answer) == (200, {"path": "/v1/completions", "request": request})

    messages = [{"role": "user", "content": "c"}]
    status, answer = ask("/v1/chat/completions", {"model": "sql", "messages": messages, "tools": [1]})
    fields["kv_transfer_params"] = {"fastprompt": "sql", "prompt_token_ids": [0] * P + [99]}
    request = {"model": "base", "messages": messages, "tools": [1], **fields}
    assert (status, answer) == (200, {"path": "/v1/chat/completions", "request": request})


def test_many_texts_a_penalty_and_a_salt(prompts, ask):
    body = {"model": "sql", "prompt": ["ab", "c"], "repetition_penalty": 1.5, "cache_salt": "mine"}
    request = ask("/v1/completions", body)[1]["request"]
    assert request["prompt"] == [[97] * P + [97, 98], [99] * P + [99]]
    assert request["cache_salt"] == prompts.info("sql").salt + "-mine"


@pytest.mark.parametrize(
    "content",
    [
        {"model": "base", "prompt": "ab"},
        {"model": "alias", "prompt": "ab"},
        {"prompt": "ab"},
        {"model": "nothing", "prompt": "ab"},
        {"model": ["sql"], "prompt": "ab"},
    ],
)
def test_other_requests_pass_as_they_are(prompts, ask, content):
    save(prompts.folder / "base.safetensors")
    save(prompts.folder / "alias.safetensors")
    assert ask("/v1/completions", content) == (200, {"path": "/v1/completions", "request": content})
    assert ask("/v1/embeddings", {"model": "sql"})[1]["request"] == {"model": "sql"}


REFUSED = {
    "echo": ({"echo": True}, "echo cannot be had"),
    "logprobs of the prompt": ({"prompt_logprobs": 0}, "prompt_logprobs cannot be had"),
    "beams": ({"use_beam_search": True}, "use_beam_search cannot be had"),
    "embeddings": ({"prompt_embeds": ""}, "prompt_embeds cannot be had"),
    "fields of its own": ({"kv_transfer_params": {}}, "kv_transfer_params cannot be had"),
    "no salt": ({"model": "base", "kv_transfer_params": {"fastprompt": "sql"}}, "cache_salt must be that of"),
    "an unknown prompt": ({"model": "base", "kv_transfer_params": {"fastprompt": "x"}}, "there is no prompt 'x'"),
    "half a file": ({"model": "half"}, "is it whole"),
    "images": ({"messages": [], "media": {"image": 1}}, "text alone"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_served_gets_400_and_the_reason(prompts, ask, why):
    (prompts.folder / "half.safetensors").write_bytes((prompts.folder / "sql.safetensors").read_bytes()[:-1])
    changes, reason = REFUSED[why]
    path = "/v1/chat/completions" if "messages" in changes else "/v1/completions"
    status, answer = ask(path, {"model": "sql", "prompt": "ab", **changes})
    assert status == 400 and reason in answer["error"]["message"]


def test_what_the_server_refuses_comes_back(ask):
    assert ask("/v1/completions", {"model": "sql", "prompt": []}) == (400, {"error": "no text"})
    for arguments in (("/v1/completions", {"model": "sql", "prompt": "a", "echo": True}), ("/v1/models", b"", "GET")):
        assert ask(*arguments, authorization="wrong") == (401, {"error": "Unauthorized"})


def test_models_lists_what_can_be_served(prompts, ask):
    (prompts.folder / "half.safetensors").write_bytes(b"half")
    status, answer = ask("/v1/models", method="GET")
    assert status == 200 and [model["id"] for model in answer["data"]] == ["base", "sql"]
    assert answer["data"][1]["parent"] == "base"


# Prompt embeddings.


def test_embeddings_of_prompt_and_text(tmp_path):
    embed, prompt = torch.nn.Embedding(7, 4).to(torch.bfloat16), torch.randn(P, 4)
    save_file({"prompt_embeddings": prompt}, tmp_path / "adapter_model.safetensors")
    embeds = embed_prompt(tmp_path / "adapter_model.safetensors", [1, 5], embed)
    assert embeds.equal(torch.cat([prompt.to(torch.bfloat16), embed.weight[[1, 5]].detach()]))
    decoded = torch.load(io.BytesIO(base64.b64decode(encode_prompt_embeds(embeds[1:]))), weights_only=True)
    assert decoded.equal(embeds[1:]) and decoded.untyped_storage().nbytes() == decoded.nbytes


def test_what_is_no_prompt_of_embeddings_is_refused(tmp_path):
    embed, file = torch.nn.Embedding(7, 4), tmp_path / "file.safetensors"
    for tensors, message in (
        ({"a": torch.zeros(P, 8)}, "width 8"),
        ({"a": torch.zeros(P)}, "one tensor"),
        ({"a": torch.zeros(P, 4), "b": torch.zeros(1)}, "one tensor"),
        ({}, "one tensor"),
    ):
        save_file(tensors, file)
        with pytest.raises(ValueError, match=message):
            embed_prompt(file, [1], embed)
    save_file({"a": torch.zeros(P, 4)}, file)
    with pytest.raises(ValueError, match="at least one token"):
        embed_prompt(file, [], embed)
    for ids in ([7], [1, -1]):
        with pytest.raises(ValueError, match="ids of the model"):
            embed_prompt(file, ids, embed)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="safetensors file"):
        embed_prompt(file, [1], embed)
    with pytest.raises(TypeError, match="a tensor"):
        encode_prompt_embeds(torch.zeros(3))


def test_the_plugin_needs_little():
    """Each of vLLM's processes imports it: neither torch nor transformers, PEFT or the kernels come with it."""
    show = "import sys; from fastprompt.integrations.vllm import register; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True, timeout=300)
    loaded = {name.split(".")[0] for name in output.stdout.split()}
    assert not loaded & {"torch", "transformers", "peft", "triton", "vllm"}
    show = "import sys; from fastprompt.integrations.vllm import Middleware, PromptFolder; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True, timeout=300)
    assert not {name.split(".")[0] for name in output.stdout.split()} & {"transformers", "peft", "vllm"}
