"""Rows of many requests, behind whatever prompts, gathered into batches that one thread runs."""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from .bank import PromptBank
from .errors import ApiError
from .metrics import Metrics
from .sampling import RowSampling, Sampling
from .text import TextStream

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """What became of a row: new text, and at its end why (``stop``, ``length``) and how many tokens, or an error."""

    index: int
    text: str = ""
    finish_reason: str | None = None
    tokens: int = 0
    error: ApiError | None = None


@dataclass(eq=False)
class Row:
    """One answer to be generated.

    Attributes:
        index: which of its request's answers.
        prompt: the name of the soft prompt, or None.
        ids: of the text.
        virtual: the length of the soft prompt.
        max_tokens: how many may be generated, at least 1.
        sampling: how.
        text: where its tokens become text.
        send: is given what becomes of it, from another thread.
    """

    index: int
    prompt: str | None
    ids: Sequence[int]
    virtual: int
    max_tokens: int
    sampling: Sampling
    text: TextStream
    send: Callable[[Piece], None]
    generated: int = 0
    finished: bool = False
    accepted: float = field(default_factory=time.monotonic)

    def finish(self, piece: Piece) -> None:
        """Send its last piece, unless it was sent or the client has gone."""
        if not self.finished:
            self.finished = True
            self.send(piece)

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.finished = True


class Batcher:
    """The queue of rows, and the thread that runs them.

    A batch begins when ``max_batch`` rows wait, or the first one has waited for ``max_wait`` seconds, and runs until
    its last row is finished; rows that come meanwhile wait for the next one.

    Args:
        bank: the prompts and their model.
        metrics: what is counted, once it is set.
        max_batch, max_wait: see above.
        max_queue: how many rows may wait.
        context: the positions that the model has; None: no end.
    """

    def __init__(
        self, bank: PromptBank, *, max_batch: int, max_wait: float, max_queue: int, context: int | None = None
    ) -> None:
        self.bank, self.max_batch, self.max_wait, self.max_queue = bank, max_batch, max_wait, max_queue
        self.context = context
        self.metrics: Metrics | None = None
        config = bank.base.generation_config
        ends: Any = config.eos_token_id
        self.ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
        self._pad = config.pad_token_id if config.pad_token_id is not None else min(self.ends, default=0)
        self._changed = threading.Condition()
        self._waiting: list[Row] = []
        self._running: list[Row] = []
        self._stopping = False
        self._took = 1.0  # seconds of the last batch
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Rows of the running batch that are not finished."""
        return sum(not row.finished for row in self._running)

    @property
    def is_idle(self) -> bool:
        """Does nothing wait or run?"""
        with self._changed:
            return not self._waiting and not self._running

    @property
    def is_alive(self) -> bool:
        """Does the thread run?"""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="fastprompt-batches", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Finish what waits, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def submit(self, rows: Sequence[Row]) -> None:
        """Let the rows of a request wait, all or none.

        Raises:
            ApiError: 429, there is no room.
        """
        with self._changed:
            if len(self._waiting) + len(rows) > self.max_queue:
                headers = {"Retry-After": str(max(1, math.ceil(self._took)))}
                message = f"{len(self._waiting)} of at most {self.max_queue} rows wait already, no room for {len(rows)}"
                raise ApiError(429, message, code="queue_full", headers=headers)
            self._waiting.extend(rows)
            self._changed.notify()

    def cancel(self, rows: Sequence[Row]) -> None:
        """Free the rows of a client that has gone: those that wait at once, those that run with the next token."""
        with self._changed:
            for row in rows:
                row.cancel()
            self._waiting = [row for row in self._waiting if not row.finished]

    def _run(self):
        while batch := self._next():
            started = time.monotonic()
            self._answer(batch)
            self._took = time.monotonic() - started
            with self._changed:
                self._running = []

    def _next(self):
        """The rows of the next batch; none when all is done."""
        with self._changed:
            while True:
                if not self._waiting:
                    if self._stopping:
                        return []
                    self._changed.wait()
                    continue
                left = self._waiting[0].accepted + self.max_wait - time.monotonic()
                if self._stopping or left <= 0 or len(self._waiting) >= self.max_batch:
                    break
                self._changed.wait(left)
            self._running = self._chosen()
            self._waiting = [row for row in self._waiting if row not in self._running]
            return list(self._running)

    def _chosen(self):
        """The first row that waits, and those behind it that fit beside it."""
        chosen: list[Row] = []
        front = new = 0
        for row in self._waiting:
            longest, most = max(front, row.virtual + len(row.ids)), max(new, row.max_tokens)
            # A row that is finished is run on with its batch, and must not leave the positions that the model has.
            if chosen and self.context is not None and longest + most > self.context:
                continue
            chosen.append(row)
            front, new = longest, most
            if len(chosen) == self.max_batch:
                break
        return chosen

    def _answer(self, rows):
        """Run rows; each is finished afterwards."""
        steps = _Steps(rows, self.ends, self.metrics)
        for row in rows:
            if not self._has_prompt(row):
                row.finish(Piece(row.index, error=_gone(row.prompt)))
        rows = [row for row in rows if not row.finished]
        if not rows:
            return
        try:
            steps = _Steps(rows, self.ends, self.metrics)
            self._generate(rows, steps)
            return
        except (ValueError, TypeError, NotImplementedError, OSError) as error:
            # The bank refuses what it cannot do before it runs anything. Alone, a row may do.
            if not steps.began and len(rows) > 1:
                for row in rows:
                    self._answer([row])
                return
            failed = None if steps.began or isinstance(error, OSError) else ApiError(400, str(error))
            _LOG.warning("a batch was refused: %s", error)
        except Exception:
            failed = None
            _LOG.exception("a batch of %d rows failed", len(rows))
        for row in rows:
            row.finish(
                Piece(row.index, error=failed or ApiError(500, "the generation failed; the server's log says why"))
            )

    def _has_prompt(self, row):
        """Is its prompt still there, and as long as when the row was found to fit the model's positions?"""
        try:
            return row.prompt is None or self.bank.length(row.prompt) == row.virtual
        except KeyError:
            return False

    def _generate(self, rows, steps):
        if self.metrics is not None:
            self.metrics.batch_rows.observe(len(rows))
        width = max(len(row.ids) for row in rows)
        device = self.bank.base.device
        ids = torch.tensor([[self._pad] * (width - len(row.ids)) + list(row.ids) for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in rows], device=device)
        options: dict[str, Any] = dict(do_sample=False, num_beams=1, num_return_sequences=1, pad_token_id=self._pad)
        if any(row.sampling.temperature > 0 for row in rows):
            options["logits_processor"] = LogitsProcessorList([RowSampling([row.sampling for row in rows])])
        self.bank.generate(
            ids,
            mask,
            prompts=[row.prompt for row in rows],
            max_new_tokens=max(row.max_tokens for row in rows),
            stopping_criteria=StoppingCriteriaList([steps]),
            **options,
        )


class _Steps(StoppingCriteria):
    """Is called with each new token of a batch: sends it on, and says which rows are finished."""

    def __init__(self, rows, ends, metrics):
        self._rows, self._ends, self._metrics = rows, ends, metrics
        self.began = False

    def __call__(self, input_ids, scores, **kwargs):
        self.began = True
        for row, token in zip(self._rows, input_ids[:, -1].tolist()):
            if not row.finished:
                self._step(row, token)
        return torch.tensor([row.finished for row in self._rows], device=input_ids.device)

    def _step(self, row, token):
        row.generated += 1
        if self._metrics is not None:
            self._metrics.tokens.labels("completion").inc()
            if row.generated == 1:
                self._metrics.first_token.observe(time.monotonic() - row.accepted)
        ends = token in self._ends
        text = "" if ends else row.text.add(token)
        if ends or row.text.stopped or row.generated == row.max_tokens:
            text += row.text.end()
            reason = "stop" if ends or row.text.stopped else "length"
            row.finish(Piece(row.index, text, reason, row.generated))
        elif text:
            row.send(Piece(row.index, text))


def _gone(name):
    message = f"the prompt {name!r} was removed, or replaced by one of another length, before the request was run"
    return ApiError(404, message, "model", "model_not_found")
