"""An ASGI middleware for vLLM's server: the name of a prompt as ``model`` of an ordinary request.

A request that names a prompt is rendered first, by vLLM's own ``/render`` route, into the token ids that it would have
without a prompt. Then it goes on with these ids behind placeholders, and the fields that the connector wants. The
response is vLLM's, streamed or not.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

from .prompts import PromptError, PromptFolder, PromptInfo
from .requests import FIELD, prompt_folder, with_placeholders

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COMPLETIONS, CHAT, MODELS = "/v1/completions", "/v1/chat/completions", "/v1/models"
# Fields that would need the prompt's own text or logits, or say what a prompt's name already says.
UNSUPPORTED = ("echo", "prompt_logprobs", "prompt_embeds", "use_beam_search", "kv_transfer_params")


class Middleware:
    """``--middleware fastprompt.integrations.vllm.Middleware``, with the connector and ``--enable-scale-out``.

    ``/v1/models`` lists the prompts; ``/v1/completions`` and ``/v1/chat/completions`` take their names as ``model``.
    The folder is that of the connector. What cannot be served as it is gets a status of 400 and the reason.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self._prompts: PromptFolder | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else ""
        if path == MODELS and scope["method"] == "GET":
            await self._list_models(scope, receive, send)
        elif path in (COMPLETIONS, CHAT) and scope["method"] == "POST":
            await self._complete(path, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _list_models(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, headers, content = await self._ask(scope, scope["path"], "GET", b"")
        if status == HTTPStatus.OK:
            listed = json.loads(content)
            base = listed["data"][0]
            names = await asyncio.to_thread(self._folder(scope).served)
            listed["data"] += [{**base, "id": name, "owned_by": "fastprompt", "parent": base["id"]} for name in names]
            content = json.dumps(listed).encode()
        await _respond(send, status, headers, content)

    async def _complete(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        content = await _read(receive)
        if content is None:
            return
        try:
            body = json.loads(content)
        except ValueError:
            body = None  # vLLM says what is wrong with it
        try:
            info = await self._prompt_of(scope, body)
            if info is not None:
                answer = await self._rewrite(path, scope, body, info)
                if not isinstance(answer, dict):
                    return await _respond(send, *answer)
                content = json.dumps(answer).encode()
        except PromptError as error:
            return await _refuse(send, str(error))
        await self.app(_with_length(scope, content), _replay(content, receive), send)

    async def _prompt_of(self, scope: Scope, body: Any) -> PromptInfo | None:
        """The prompt that a request names as its model; and whether one that has the fields by itself has the salt."""
        if not isinstance(body, dict):
            return None
        prompts, model, fields = self._folder(scope), body.get("model"), body.get("kv_transfer_params")
        if isinstance(model, str) and model not in _base_names(scope) and model in prompts:
            return await asyncio.to_thread(prompts.info, model)
        if isinstance(fields, dict) and isinstance(name := fields.get(FIELD), str):
            info, salt = await asyncio.to_thread(prompts.info, name), body.get("cache_salt")
            if not isinstance(salt, str) or not info.is_salt(salt):
                raise PromptError(f"cache_salt must be that of prompt {name!r}, got {salt!r}")
        return None

    async def _rewrite(
        self, path: str, scope: Scope, body: dict[str, Any], info: PromptInfo
    ) -> dict[str, Any] | tuple[int, list[tuple[bytes, bytes]], bytes]:
        """The request that vLLM is given; or its refusal of the one that came."""
        body = {**body, "model": _base_names(scope)[0]}
        rendered = await self._ask(scope, f"{scope['path']}/render", "POST", json.dumps(body).encode())
        if rendered[0] != HTTPStatus.OK:  # who may not ask is told nothing else
            return rendered
        for field in UNSUPPORTED:
            if body.get(field) is not None and body[field] is not False:
                raise PromptError(f"{field} cannot be had behind a prompt, got {body[field]!r} for {info.name!r}")
        texts = json.loads(rendered[2])
        texts = [texts] if isinstance(texts, dict) else texts
        if any(text.get("features") for text in texts):
            raise PromptError(f"prompt {info.name!r} takes text alone; the request has images or audio")
        ids = [with_placeholders(info, text["token_ids"], _repetition_penalty(text)) for text in texts]
        own_salt = body.get("cache_salt")
        body["cache_salt"] = f"{info.salt}-{own_salt}" if own_salt else info.salt
        body["kv_transfer_params"] = {FIELD: info.name}
        body.pop("truncate_prompt_tokens", None)  # the ids are truncated
        if path == COMPLETIONS:
            body["prompt"] = ids
        else:
            body["kv_transfer_params"]["prompt_token_ids"] = ids[0]  # taken in place of rendering the messages
        return body

    def _folder(self, scope: Scope) -> PromptFolder:
        if self._prompts is None:
            config = scope["app"].state.vllm_config.kv_transfer_config
            if config is None or config.kv_connector != "FastPromptConnector":
                raise RuntimeError("the middleware needs --kv-transfer-config with kv_connector FastPromptConnector")
            self._prompts = prompt_folder(config)
        return self._prompts

    async def _ask(
        self, scope: Scope, path: str, method: str, content: bytes
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """What the server answers to a request of its own: status, headers, content."""
        start: Message = {}
        parts: list[bytes] = []

        async def keep(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                parts.append(message.get("body", b""))

        inner = {**_with_length(scope, content), "path": path, "raw_path": path.encode(), "method": method}
        await self.app(inner, _replay(content, _wait), keep)
        return start["status"], list(start.get("headers", [])), b"".join(parts)


def _base_names(scope: Scope) -> list[str]:
    args = scope["app"].state.args
    return args.served_model_name or [args.model]


def _repetition_penalty(text: dict[str, Any]) -> float:
    """With the server's defaults, which the request may not have said."""
    return text.get("sampling_params", {}).get("repetition_penalty", 1.0)


async def _read(receive: Receive) -> bytes | None:
    """The body of a request, None if the client goes before all of it is here."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _replay(content: bytes, receive: Receive) -> Receive:
    """A body that was read, once more; then what else comes, as that the client has gone."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": content, "more_body": False}

    return again


async def _wait() -> Message:
    return await asyncio.get_running_loop().create_future()


def _with_length(scope: Scope, content: bytes) -> Scope:
    headers = [
        (name, value) for name, value in scope["headers"] if name not in (b"content-length", b"transfer-encoding")
    ]
    return {**scope, "headers": [*headers, (b"content-length", str(len(content)).encode())]}


async def _respond(send: Send, status: int, headers: list[tuple[bytes, bytes]], content: bytes) -> None:
    kept = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    kept.append((b"content-length", str(len(content)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": kept})
    await send({"type": "http.response.body", "body": content})


async def _refuse(send: Send, reason: str) -> None:
    """An error as OpenAI's clients and vLLM have it."""
    error = {"message": reason, "type": "BadRequestError", "param": None, "code": HTTPStatus.BAD_REQUEST.value}
    content = json.dumps({"error": error}).encode()
    await _respond(send, HTTPStatus.BAD_REQUEST, [(b"content-type", b"application/json")], content)
