"""Requests -> rows: which prompt, which tokens, how many more; every limit is checked here."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from .answers import Answer
from .bank import PromptBank
from .batching import Piece, Row
from .errors import ApiError
from .sampling import Sampling
from .schema import ChatRequest, CompletionRequest
from .text import TextStream


@dataclass(frozen=True, eq=False)
class Limits:
    """Attributes:
    max_tokens: of soft prompt, text and answer together; None: the positions that the model has.
    max_rows: answers of one request.
    context: the positions that the model has; None: no end.
    """

    max_tokens: int | None
    max_rows: int
    context: int | None

    @property
    def tokens(self) -> int | None:
        """The smaller one of ``max_tokens`` and ``context``."""
        return min((x for x in (self.max_tokens, self.context) if x is not None), default=None)


class Reader:
    """Reads requests to the prompts of a bank.

    Args:
        bank: the prompts.
        tokenizer: of the model.
        base_name: what requests without a prompt call the model.
        limits: what a request may ask for.
    """

    def __init__(self, bank: PromptBank, tokenizer: PreTrainedTokenizerBase, base_name: str, limits: Limits) -> None:
        self.bank, self.base_name, self._limits = bank, base_name, limits
        self._tokenizer: Any = tokenizer
        table: Any = bank.base.get_input_embeddings()
        self._vocabulary = len(table.weight)

    def prompt(self, model: str) -> tuple[str | None, int]:
        """Name and length of the prompt that ``model`` selects.

        Raises:
            ApiError: 404, there is none.
        """
        if model == self.base_name:
            return None, 0
        try:
            return model, self.bank.length(model)
        except KeyError:
            raise ApiError(
                404, f"model: there is no prompt {model!r}; GET /v1/models lists them", "model", "model_not_found"
            ) from None

    def completion(self, asked: CompletionRequest, send: Callable[[Piece], None]) -> tuple[Answer, list[Row]]:
        """The answer to be filled, and its rows."""
        given: Any = asked.prompt
        prompts: Any = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
        return self._rows(asked, prompts, send, False)

    def chat(self, asked: ChatRequest, send: Callable[[Piece], None]) -> tuple[Answer, list[Row]]:
        """The answer to be filled, and its rows."""
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise ApiError(
                400,
                "messages: the model's tokenizer has no chat template; use /v1/completions",
                "messages",
                "no_template",
            )
        turns = [{"role": message.role, "content": message.text} for message in asked.messages]
        try:
            text = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program of the model's, and raises what it likes
            raise ApiError(400, f"messages: the chat template refuses them: {error}", "messages") from None
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._rows(asked, [list(ids)], send, True)

    def _ids(self, prompt, field):
        ids = list(self._tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)
        if not ids:
            raise ApiError(400, f"{field}: expected at least one token, got none", field)
        wrong = next((token for token in ids if not 0 <= token < self._vocabulary), None)
        if wrong is not None:
            raise ApiError(400, f"{field}: token ids must be in 0 to {self._vocabulary - 1}, got {wrong}", field)
        return ids

    def _rows(self, asked, prompts, send, chat):
        """``prompts`` are texts or token ids."""
        name, virtual = self.prompt(asked.model)
        if len(prompts) * asked.n > self._limits.max_rows:
            message = f"at most {self._limits.max_rows} answers a request, got {len(prompts)} texts and n={asked.n}"
            raise ApiError(400, f"n: expected {message}", "n")
        field = "messages" if chat else "prompt"
        if not prompts:
            raise ApiError(400, f"{field}: expected at least one text, got none", field)
        texts = [self._ids(prompt, field) for prompt in prompts]
        drawn = Sampling(asked.temperature, asked.top_p, asked.seed)
        rows: list[Row] = []
        for ids in texts:
            new = self._new_tokens(asked, virtual, len(ids), field)
            for number in range(asked.n):
                own = drawn if drawn.seed is None else replace(drawn, seed=(drawn.seed + number) % 2**63)
                stream = TextStream(self._tokenizer, ids, asked.stops)
                rows.append(Row(len(rows), name, ids, virtual, new, own, stream, send))
        echo = [self._tokenizer.decode(ids, skip_special_tokens=True) if _echoes(asked) else "" for ids in texts]
        front = [text for text in echo for _ in range(asked.n)]
        return Answer(asked.model, chat, front, sum(map(len, texts))), rows

    def _new_tokens(self, asked, virtual, length, field):
        """How many tokens may follow a text."""
        most, new = self._limits.tokens, asked.new_tokens
        if most is None:
            return 16 if new is None else new
        room = most - virtual - length
        if room < 1 or (new is not None and new > room):
            wanted = f" and max_tokens={new}" if new is not None else ""
            raise ApiError(
                400,
                f"{field}: expected at most {most} tokens together, got {virtual} of the soft prompt, {length} of the "
                f"text{wanted}",
                field if room < 1 else "max_tokens",
                "context_length_exceeded",
            )
        return room if new is None else new


def _echoes(asked):
    return isinstance(asked, CompletionRequest) and asked.echo


class Pieces:
    """What becomes of a request's rows, from the thread that runs them to the event loop."""

    def __init__(self) -> None:
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Piece]()

    def send(self, piece: Piece) -> None:
        """From any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)

    async def next(self) -> Piece:
        """The next one."""
        return await self._queue.get()


def context_of(base: Any) -> int | None:
    """The positions that a model has, by its config; None: it does not say."""
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    found = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx")]
    return next((number for number in found if isinstance(number, int) and number > 0), None)


def listed(names: Sequence[str], base_name: str, created: int) -> list[dict[str, Any]]:
    """Prompts, and the model by its own name, as ``GET /v1/models`` lists them."""
    told = {"object": "model", "created": created, "owned_by": "fastprompt"}
    return [{"id": base_name, **told}, *({"id": name, **told, "parent": base_name} for name in names)]
