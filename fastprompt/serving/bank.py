"""PromptBank: compiled prompts of one frozen model by name, and batches that mix them row by row."""

import os
import tempfile
import threading
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..hf.fingerprint import fingerprint
from ..hf.mixed import NO_PROMPT
from ..hf.mixed_probe import mixed_model
from ..hf.prompt_state import PromptState
from ..hf.scoring import logprobs
from .compile import LEARNED, CompiledPrompt, compile_folder


@dataclass
class _Entry:
    """A prompt of the bank: in memory, or what it was and the file that holds it."""

    compiled: CompiledPrompt
    in_memory: bool = True
    file: Path | None = None


class PromptBank:
    """Hundreds of prompts of one frozen model, each run once and for all, and one batch for requests to any of them.

    Safe to change while requests run: a request holds the prompts that it started with.

    Args:
        base: a causal LM of transformers, in evaluation mode; it is not changed.
        max_bytes: how much memory the prompts may take. Those that were used least recently are written to disk and
            read again when they are asked for. None: no limit.
        folder: where; None: a temporary folder that goes with the bank.

    Raises:
        TypeError: another kind of model.
        ValueError: a model whose weights are not in memory.
        NotImplementedError: a model that gives another answer in a mixed batch than alone; asked of it here.
    """

    def __init__(
        self, base: PreTrainedModel, *, max_bytes: int | None = None, folder: str | os.PathLike[str] | None = None
    ) -> None:
        if not isinstance(base, PreTrainedModel):
            raise TypeError(f"base must be a model of transformers, got {type(base).__name__}; take its base model")
        if max_bytes is not None and max_bytes < 0:
            raise ValueError(f"max_bytes must not be negative, got {max_bytes}")
        self.base, self.max_bytes, self.fingerprint = base, max_bytes, fingerprint(base)
        self._mixed = mixed_model(base)
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # the least recently used first
        self._lock = threading.RLock()
        self._folder = None if folder is None else Path(folder)
        self._temporary: tempfile.TemporaryDirectory | None = None

    def add(
        self, name: str, prompt: CompiledPrompt | str | os.PathLike[str], *, task_id: int | None = None
    ) -> CompiledPrompt:
        """Put a prompt into the bank; one of that name is replaced, for requests that start from now on.

        Args:
            name: what requests call it.
            prompt: compiled, the file of a compiled one, or the folder of an adapter, which is compiled here.
            task_id: of an adapter's folder with several tasks or prompts, which.

        Returns:
            The compiled prompt.

        Raises:
            TypeError, ValueError, FileNotFoundError: no prompt, or one of another model.
            NotImplementedError: a prompt of embeddings before a model that looks more up by token id.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"name must be a string that is not empty, got {name!r}")
        compiled = self._compiled(prompt, task_id)
        compiled.check(self.fingerprint)
        if not self._mixed.takes_prompts and compiled.method not in LEARNED:
            raise NotImplementedError(
                f"a {type(self.base).__name__} looks more up by token id than embeddings, and a prompt of embeddings "
                f"({compiled.method}) has no ids"
            )
        compiled = replace(compiled, state=compiled.state.to(self.base))
        with self._lock:
            if name in self._entries:
                self.remove(name)
            self._entries[name] = _Entry(compiled)
            self._evict()
        return compiled

    def remove(self, name: str) -> None:
        """Take a prompt out of the bank; requests that run keep it until they end.

        Raises:
            KeyError: there is none of that name.
        """
        with self._lock:
            entry = self._entries.pop(name)
            if entry.file is not None:
                entry.file.unlink(missing_ok=True)

    @property
    def names(self) -> list[str]:
        """The names of all prompts, in order."""
        with self._lock:
            return sorted(self._entries)

    @property
    def nbytes(self) -> int:
        """The memory that the prompts take now."""
        with self._lock:
            return sum(entry.compiled.nbytes for entry in self._entries.values() if entry.in_memory)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> CompiledPrompt:
        """A prompt, read again if it was written to disk; it counts as used.

        Raises:
            KeyError: there is none of that name.
            OSError: it was written to disk, and cannot be read again.
        """
        with self._lock:
            entry = self._entries[name]
            self._entries.move_to_end(name)
            if not entry.in_memory:
                loaded = self._read(name, entry.file)
                entry.compiled = replace(loaded, state=loaded.state.to(self.base))
                entry.in_memory = True
            compiled = entry.compiled
            self._evict()
            return compiled

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        prompts: Sequence[str | None] | str | None = None,
        **options: Any,
    ) -> Any:
        """``base.generate``, each row behind the prompt that it names, as if it stood there alone.

        Greedy, sampling and beams, several sequences a row, streamers, processors and stopping criteria, dynamic and
        static caches, assisted and prompt-lookup decoding (one row, as in transformers), chunks of the prefill. For
        another turn, call it with all of the text, that of earlier turns too, and the ``past_key_values`` that an
        earlier call with ``return_dict_in_generate=True`` returned.

        Args:
            input_ids: ``[B, S]``.
            attention_mask: ``[B, S]``; padding may stand on any side. None: everything is text.
            prompts: a name, or None, for each row; one name for all; None: no prompt (or those of the earlier turns).
            options: those of ``base.generate``.

        Returns:
            ``[B, S + new]`` token ids, the input as it was given in front; or what ``return_dict_in_generate`` returns.

        Raises:
            ValueError, TypeError, NotImplementedError: an unknown name, or an option that cannot be done; before
                anything is run.
            OSError: a prompt that was written to disk cannot be read again; before that, too.
        """
        goes_on = any(options.get(name) is not None for name in ("past_key_values", "cache", "cache_params"))
        if goes_on:
            names = None if prompts is None else self._names(prompts, len(input_ids))
            return self._mixed.generate(None, input_ids, attention_mask, prompts=names, **options)
        names = self._names(prompts, len(input_ids))
        return self._mixed.generate(self._states(names), input_ids, attention_mask, prompts=names, **options)

    def logprobs(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        completions: Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]],
        prompts: Sequence[str | None] | str | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """How probable completions are behind each row's prompt and text.

        Args:
            input_ids, attention_mask, prompts: see :meth:`generate`.
            completions: K completions for every row, the ids of one or more tokens each; or such a list for each row.

        Returns:
            ``[B, K]`` fp32 log-probabilities, summed over the tokens of a completion; or a list of ``[K_b]``.
        """
        names = self._names(prompts, len(input_ids))
        table: Any = self.base.get_input_embeddings()
        vocabulary = len(table.weight)
        alike = _are_completions(completions, vocabulary)
        rows: Any = [completions] * len(input_ids) if alike else completions
        given = isinstance(rows, Sequence) and len(rows) == len(input_ids)
        if not given or not all(_are_completions(row, vocabulary) for row in rows):
            raise ValueError(
                f"completions must be lists of token ids from 0 to {vocabulary - 1}, at least one each, for all or for "
                f"each of the {len(input_ids)} rows"
            )
        found = logprobs(self._mixed, self._states(names), input_ids, attention_mask, rows)
        return torch.stack(found) if alike else found

    def classify(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        verbaliser: Mapping[str, Sequence[int]],
        prompts: Sequence[str | None] | str | None = None,
    ) -> list[str]:
        """The label of each row whose word, ``verbaliser[label]`` in token ids, is the most probable one behind it."""
        labels = list(verbaliser)
        words = [verbaliser[label] for label in labels]
        scores: Any = self.logprobs(input_ids, attention_mask, completions=words, prompts=prompts)
        return [labels[best] for best in scores.argmax(1).tolist()]

    def length(self, name: str) -> int:
        """P of a prompt, which is not read for it. Raises KeyError if there is none of that name."""
        return self._entries[name].compiled.length

    def _read(self, name, file):
        try:
            return CompiledPrompt.load(file)
        except (OSError, ValueError) as error:
            raise OSError(f"the prompt {name!r} was written to disk, and cannot be read again: {error}") from error

    def _compiled(self, prompt, task_id):
        if isinstance(prompt, CompiledPrompt) or (isinstance(prompt, (str, os.PathLike)) and not Path(prompt).is_dir()):
            if task_id is not None:
                raise ValueError(f"task_id must be None for a compiled prompt, got {task_id!r}")
            if isinstance(prompt, CompiledPrompt):
                return prompt
            loaded = CompiledPrompt.load(prompt)
            loaded.check(self.fingerprint)
            if self._one_token is not None:
                loaded.check_shapes(self._one_token)
            return loaded
        if not isinstance(prompt, (str, os.PathLike)):
            raise TypeError(
                f"prompt must be a CompiledPrompt, a file or an adapter's folder, got {type(prompt).__name__}"
            )
        return compile_folder(self.base, prompt, task_id=task_id, of=self.fingerprint)

    @cached_property
    def _one_token(self):
        """What a prompt of one token leaves in the model; None if that takes none at its input."""
        table: Any = self.base.get_input_embeddings()
        try:
            return PromptState.of_rows(self.base, table(torch.zeros(1, dtype=torch.int64, device=table.weight.device)))
        except Exception:  # it takes learned keys and values alone
            return None

    def _names(self, prompts, batch):
        """A name or None for each row."""
        names = [prompts] * batch if prompts is None or isinstance(prompts, str) else list(prompts)
        if len(names) != batch:
            raise ValueError(f"prompts must have one entry for each of the {batch} rows, got {len(names)}")
        return names

    def _states(self, names):
        """What the rows start from. Held by the caller from now on, whatever becomes of the bank."""
        with self._lock:
            unknown = sorted({str(name) for name in names if name is not None and name not in self._entries})
            if unknown:
                raise ValueError(f"prompts must be None or among the {len(self)} of the bank, got {unknown}")
            states = {name: self[name].state for name in dict.fromkeys(names) if name is not None}
        return [NO_PROMPT if name is None else states[name] for name in names]

    def _evict(self):
        """Write the least recently used prompts to disk until the others fit."""
        if self.max_bytes is None:
            return
        held = self.nbytes
        for entry in self._entries.values():
            if held <= self.max_bytes:
                return
            if entry.in_memory:
                held -= entry.compiled.nbytes
                self._write(entry)

    def _write(self, entry):
        if entry.file is None:
            if self._folder is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="fastprompt-bank-")
                self._folder = Path(self._temporary.name)
            file = self._folder / f"{uuid.uuid4().hex}.safetensors"
            entry.compiled.save(file)
            entry.file = file
        entry.compiled = replace(entry.compiled, state=PromptState(entry.compiled.length))
        entry.in_memory = False


def _are_completions(given: Any, vocabulary: int) -> bool:
    """Are they one or more lists of one or more token ids?"""

    def is_id(token):
        return isinstance(token, Integral) and not isinstance(token, bool) and 0 <= token < vocabulary

    lists = given if isinstance(given, Sequence) else []
    return bool(lists) and all(isinstance(x, Sequence) and len(x) > 0 and all(map(is_id, x)) for x in lists)
