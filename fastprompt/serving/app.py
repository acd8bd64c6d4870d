"""The server's routes: OpenAI's completions over the prompts of a bank. For one machine and one process."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from safetensors import SafetensorError
from starlette.exceptions import HTTPException
from transformers import PreTrainedTokenizerBase

from .answers import Answer, sse
from .bank import PromptBank
from .batching import Batcher, Row
from .errors import ApiError
from .metrics import HUNG_UP, Metrics
from .requests import Limits, Pieces, Reader, context_of, listed
from .schema import ChatRequest, CompletionRequest, PromptSource, parse

_CHUNK_SECONDS = 30  # the longest pause inside of a body
_DISCARDED = 2**26  # bytes that are read of a body behind those that it may have
_BODY = "http.request"


class HungUp(Exception):
    """The client went away."""


@dataclass(frozen=True)
class ServerOptions:
    """How a server works.

    Attributes:
        base_name: what requests without a prompt call the model.
        max_batch: rows that are generated together, and answers of one request.
        max_wait_ms: how long the first row of a batch waits for others.
        max_tokens: of soft prompt, text and answer together; None: as many positions as the model has.
        max_body: bytes of a request.
        max_queue: rows that wait.
        admin_token, admin_folder: who may add and remove prompts, and the folder of those that may be added; None:
            nobody.
    """

    base_name: str
    max_batch: int = 32
    max_wait_ms: float = 5.0
    max_tokens: int | None = None
    max_body: int = 2**20
    max_queue: int = 256
    admin_token: str | None = field(default=None, repr=False)
    admin_folder: Path | None = None


class Service:
    """What the routes share.

    Attributes:
        draining: are new requests refused, as the server is about to end? Set by who ends it.
        refused: when the last one was, in ``time.monotonic()``.
        preparing: requests that were accepted and are on their way into the queue.
    """

    def __init__(self, bank: PromptBank, tokenizer: PreTrainedTokenizerBase, options: ServerOptions) -> None:
        context = context_of(bank.base)
        self.bank, self.options, self.started = bank, options, int(time.time())
        self.batcher = Batcher(
            bank,
            max_batch=options.max_batch,
            max_wait=options.max_wait_ms / 1000,
            max_queue=options.max_queue,
            context=context,
        )
        self.metrics = Metrics(lambda: self.batcher.waiting, lambda: self.batcher.running, lambda: len(bank))
        self.batcher.metrics = self.metrics
        limits = Limits(options.max_tokens, options.max_batch, context)
        self.reader = Reader(bank, tokenizer, options.base_name, limits)
        self.draining, self.refused, self.preparing = False, 0.0, 0

    @property
    def is_idle(self) -> bool:
        """Is everything that was accepted finished?"""
        return not self.preparing and self.batcher.is_idle

    async def body(self, request: Request) -> bytes:
        """All of a request's body.

        Raises:
            ApiError: 413, 408; HungUp.
        """
        most, parts, size = self.options.max_body, [], 0
        declared = request.headers.get("content-length", "0")
        more = not declared.isdecimal() or int(declared) <= most + _DISCARDED
        while more:
            try:
                message = await asyncio.wait_for(request.receive(), _CHUNK_SECONDS)
            except asyncio.TimeoutError:
                headers = {"Connection": "close"}
                raise ApiError(408, f"the body paused for {_CHUNK_SECONDS} seconds", headers=headers) from None
            if message["type"] != _BODY:
                raise HungUp
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:  # it is read on: who is cut off while it sends does not see the answer
                parts.clear()
            more = message.get("more_body", False) and size <= most + _DISCARDED
        if size > most or not parts:
            raise ApiError(413, f"expected a body of at most {most} bytes", headers={"Connection": "close"})
        return b"".join(parts)

    async def answer(self, request: Request, chat: bool) -> Response:
        """The response to a completion or a conversation."""
        body = await self.body(request)
        if self.draining:
            self.refused = time.monotonic()
            raise ApiError(503, "the server is about to end", code="draining", headers={"Connection": "close"})
        pieces = Pieces()
        self.preparing += 1
        try:
            # Tokenizing a long text takes a while, and other requests go on meanwhile.
            asked, answer, rows = await asyncio.to_thread(self._read, body, chat, pieces)
            self.batcher.submit(rows)
        finally:
            self.preparing -= 1
        self.metrics.tokens.labels("prompt").inc(answer.prompt_tokens)
        try:
            first = await _or_hung_up(request, pieces, answer, whole=not asked.stream)
        except BaseException:
            self.batcher.cancel(rows)
            raise
        if not asked.stream:
            return JSONResponse(answer.whole())
        counts = asked.stream_options is not None and asked.stream_options.include_usage
        return _Events(self, answer, rows, pieces, first, counts, _route(chat))

    def _read(self, body, chat, pieces):
        if chat:
            asked: Any = parse(ChatRequest, body)
            return asked, *self.reader.chat(asked, pieces.send)
        asked = parse(CompletionRequest, body)
        return asked, *self.reader.completion(asked, pieces.send)


class _Events(StreamingResponse):
    """An answer that is sent as it comes; however that ends, its rows are free afterwards."""

    def __init__(
        self, service: Service, answer: Answer, rows: list[Row], pieces: Pieces, first: Any, counts: bool, route: str
    ) -> None:
        super().__init__(
            self._content(answer, pieces, first, counts),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache"},
        )
        self._service, self._rows, self._route, self._outcome = service, rows, route, HUNG_UP

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._service.batcher.cancel(self._rows)
            self._service.metrics.requests.labels(self._route, str(self._outcome)).inc()

    async def _content(self, answer, pieces, first, counts):
        try:
            for event in answer.opening():
                yield event
            yield answer.event(first)
            while not answer.is_complete:
                piece = await pieces.next()
                answer.add(piece)
                yield answer.event(piece)
            if counts:
                yield answer.usage_event()
            yield "data: [DONE]\n\n"
            self._outcome = 200
        except ApiError as error:
            self._outcome = error.status
            yield sse(error.body())


async def _or_hung_up(request, pieces, answer, whole):
    """Wait for the first piece of an answer, or for the whole of it, while the client is there.

    Raises:
        HungUp: it went away. ApiError: a choice failed.
    """

    async def gather():
        while True:
            piece = await pieces.next()
            answer.add(piece)
            if not whole or answer.is_complete:
                return piece

    async def gone():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(gather()), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise HungUp
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


def create_app(bank: PromptBank, tokenizer: PreTrainedTokenizerBase, options: ServerOptions) -> FastAPI:
    """An ASGI application over the prompts of ``bank``; what its routes share is its ``state.service``.

    Raises:
        ValueError: options that do not fit one another.
    """
    if options.base_name in bank:
        raise ValueError(f"base_name must not be the name of a prompt, got {options.base_name!r}")
    if (options.admin_token is None) != (options.admin_folder is None):
        raise ValueError("admin_token and admin_folder must be given together")
    service = Service(bank, tokenizer, options)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        await asyncio.to_thread(service.batcher.stop)

    app = FastAPI(title="fastprompt", lifespan=lifespan, openapi_url=None)
    app.state.service = service
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    _add_routes(app, service)
    if options.admin_token is not None and options.admin_folder is not None:
        _add_admin_routes(app, service, options.admin_token, options.admin_folder.resolve())
    return app


def _add_routes(app, service):
    async def counted(request: Request, chat: bool) -> Response:
        status: int | None = 500
        try:
            response = await service.answer(request, chat)
            if isinstance(response, _Events):
                status = None  # it is counted at its end
                return response
            status = response.status_code
            return response
        except ApiError as error:
            status = error.status
            raise
        except HungUp:
            status = HUNG_UP
            return Response(status_code=HUNG_UP)
        finally:
            if status is not None:
                service.metrics.requests.labels(_route(chat), str(status)).inc()

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await counted(request, False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await counted(request, True)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        data = listed(service.bank.names, service.options.base_name, service.started)
        return {"object": "list", "data": data}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        prompt, _ = service.reader.prompt(name)
        return listed([] if prompt is None else [name], service.options.base_name, service.started)[-1]

    @app.get("/health")
    async def health() -> Response:
        if service.draining or not service.batcher.is_alive:
            return JSONResponse({"status": "draining" if service.draining else "failed"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_admin_routes(app, service, token, folder):
    expected = f"Bearer {token}".encode()

    def check(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1", "replace")
        if not hmac.compare_digest(given, expected):
            raise ApiError(401, "expected the admin token", headers={"WWW-Authenticate": "Bearer"})

    @app.put("/admin/prompts/{name:path}")
    async def add(name: str, request: Request) -> dict[str, Any]:
        check(request)
        source = parse(PromptSource, await service.body(request))
        if name == service.options.base_name:
            raise ApiError(400, f"name: {name!r} is the model's own name", "name")
        path = _below(folder, source.path)
        try:
            compiled = await asyncio.to_thread(service.bank.add, name, path, task_id=source.task_id)
        except (OSError, ValueError, KeyError, TypeError, NotImplementedError, SafetensorError) as error:
            raise ApiError(400, f"path: {source.path!r} cannot be added: {error}", "path") from None
        return {"id": name, "method": compiled.method, "length": compiled.length, "bytes": compiled.nbytes}

    @app.delete("/admin/prompts/{name:path}")
    async def remove(name: str, request: Request) -> dict[str, Any]:
        check(request)
        try:
            service.bank.remove(name)
        except KeyError:
            raise ApiError(404, f"there is no prompt {name!r}", "name", "model_not_found") from None
        return {"id": name, "deleted": True}


def _below(folder, path):
    """``path`` inside of ``folder``, wherever links lead."""
    try:
        found = (folder / path).resolve()
        if found.is_relative_to(folder) and found != folder and found.exists():
            return found
    except (OSError, ValueError, RuntimeError):
        pass
    raise ApiError(400, f"path: expected a prompt below the server's folder, got {path!r}", "path")


def _route(chat):
    return "chat" if chat else "completions"


async def _answer_error(request: Request, error: Any) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


async def _answer_http_error(request: Request, error: Any) -> Response:
    return await _answer_error(request, ApiError(error.status_code, str(error.detail), headers=error.headers))
