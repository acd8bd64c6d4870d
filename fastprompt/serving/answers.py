"""The JSON of OpenAI's answers, whole and in chunks."""

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from .batching import Piece


@dataclass
class Answer:
    """The answer to one request, as its pieces come in.

    Args:
        model: the name that was asked for.
        chat: of a conversation, or a plain completion?
        echo: the text in front of each choice.
        prompt_tokens: tokens of the request's texts.
    """

    model: str
    chat: bool
    echo: list[str]
    prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex
        self._texts = list(self.echo)
        self._reasons: list[str | None] = [None] * len(self.echo)
        self._tokens = 0

    @property
    def is_complete(self) -> bool:
        """Is every choice finished?"""
        return None not in self._reasons

    def add(self, piece: Piece) -> None:
        """Take in what became of a choice; one with an error raises it."""
        if piece.error is not None:
            raise piece.error
        self._texts[piece.index] += piece.text
        self._reasons[piece.index] = piece.finish_reason
        self._tokens += piece.tokens

    def whole(self) -> dict[str, Any]:
        """The response of a request that does not stream."""
        choices = []
        for index, (text, reason) in enumerate(zip(self._texts, self._reasons)):
            said: dict[str, Any] = {"text": text}
            if self.chat:
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": reason})
        return {**self._head("chat.completion"), "choices": choices, "usage": self._usage()}

    def opening(self) -> list[str]:
        """The events in front of the first token: the role, or the text that is echoed."""
        if self.chat:
            return [
                self._chunk(index, {"delta": {"role": "assistant", "content": ""}}) for index in range(len(self.echo))
            ]
        return [self._chunk(index, {"text": text}) for index, text in enumerate(self.echo) if text]

    def event(self, piece: Piece) -> str:
        """The event of a piece."""
        said: dict[str, Any] = {"text": piece.text}
        if self.chat:
            said = {"delta": {"content": piece.text} if piece.text else {}}
        return self._chunk(piece.index, said, piece.finish_reason)

    def usage_event(self) -> str:
        """The event with the counts."""
        return sse({**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()})

    def _chunk(self, index, said, reason=None):
        choice = {"index": index, **said, "logprobs": None, "finish_reason": reason}
        return sse({**self._head("chat.completion.chunk"), "choices": [choice]})

    def _head(self, chat_object):
        kind = chat_object if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _usage(self):
        total = self.prompt_tokens + self._tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self._tokens, "total_tokens": total}


def sse(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content)}\n\n"
