"""The text of an answer, token by token: whole characters only, and nothing behind a text that ends it."""

from collections.abc import Sequence
from typing import Any

_CONTEXT = 5  # tokens in front, from which a tokenizer sees whether a word begins
_INCOMPLETE = "\ufffd"


class TextStream:
    """Turns tokens into text that can be sent.

    Args:
        tokenizer: of transformers.
        front: the ids in front of the answer.
        stops: texts that end it; none of them is part of it.
    """

    def __init__(self, tokenizer: Any, front: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids = list(front[-_CONTEXT:])
        self._start, self._read = 0, len(self._ids)
        self._held = ""  # may be the beginning of a stop
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain by now, and was not before."""
        self._ids.append(token)
        before, now = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        if len(now) <= len(before) or now.endswith(_INCOMPLETE):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._until_stop(now[len(before) :])

    def end(self) -> str:
        """What was held back, as no token follows."""
        if self.stopped:
            return ""
        before, now = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        self._start = self._read = len(self._ids)
        text = self._until_stop(now[len(before) :])
        held, self._held = self._held, ""
        return text + held

    def _decode(self, ids):
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _until_stop(self, new):
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text, stop):
    """How many characters at the end of ``text`` begin ``stop``."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
