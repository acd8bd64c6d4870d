"""A folder of compiled prompts, one safetensors file a prompt. The name of a prompt is that of its file."""

import hashlib
import json
import os
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

FORMAT, VERSION, SUFFIX = "fastprompt-compiled-prompt", "1", ".safetensors"
SALT = "fastprompt-"  # what the salts of prompts begin with
_TENSOR = re.compile(r"layers\.(\d+)\.(keys|values)")
_LONGEST_HEADER = 2**24
_FLOATS = {"F64", "F32", "F16", "BF16"}

Shapes = tuple[tuple[list[int], list[int]], ...]  # of the keys and of the values of every layer


class PromptError(ValueError):
    """A prompt, or a request for one, that cannot be served; the message says why."""


@dataclass(frozen=True)
class PromptInfo:
    """What is known of a compiled prompt without its tensors.

    Attributes:
        name: what requests call it.
        digest: hash of the file's bytes.
        length: virtual tokens P.
        shapes: of each layer's keys and values, ``([P, Hkv, Dh], [P, Hkv, Dv])``.
        metadata: the file's own entries.
    """

    name: str
    digest: str
    length: int
    shapes: Shapes
    metadata: dict[str, str]

    @property
    def salt(self) -> str:
        """What keeps this prompt's blocks apart from all others in a prefix cache; begins with ``SALT``."""
        return SALT + self.digest

    def is_salt(self, salt: str | None) -> bool:
        """Whether a request's ``cache_salt`` is this prompt's, by itself or with ``-`` and a salt of the client's."""
        return salt is not None and (salt == self.salt or salt.startswith(self.salt + "-"))


class PromptFolder:
    """The prompts of a folder. Files may come, go and be replaced; a changed file is read again.

    Args:
        folder: where the files are.
        memory: bytes of tensors that `layers` may keep; the least recently used go first.
        fingerprint: of the only model whose prompts are served; None: any.

    Raises:
        PromptError: there is no such folder.
    """

    def __init__(self, folder: str | Path, memory: int = 0, fingerprint: str | None = None) -> None:
        self.folder, self.memory, self.fingerprint = Path(folder), memory, fingerprint
        if not self.folder.is_dir():
            raise PromptError(f"prompts must be a folder of compiled prompts, got {str(folder)!r}, which is none")
        self._infos: dict[str, tuple[tuple[int, ...], PromptInfo]] = {}
        self._layers: OrderedDict[str, list[tuple[torch.Tensor, torch.Tensor]]] = OrderedDict()

    def names(self) -> list[str]:
        """The prompts there are now, in alphabetical order."""
        return sorted(path.name.removesuffix(SUFFIX) for path in self.folder.glob(f"[!.]*{SUFFIX}"))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and _is_name(name) and os.path.isfile(self._file(name))

    def served(self) -> list[str]:
        """The names whose files look like compiled prompts, told by their headers alone."""
        return [name for name in self.names() if self._has_good_header(name)]

    def info(self, name: str) -> PromptInfo:
        """What is known of a prompt.

        Raises:
            PromptError: there is none of this name, its file is not a compiled prompt of keys and values, or it is one
            of another model.
        """
        if name not in self:
            raise PromptError(f"there is no prompt {name!r} in {self.folder}")
        signature = self._signature(name)
        known = self._infos.get(name)
        if known is None or known[0] != signature:
            data = self._read(name)
            length, shapes, metadata = self._parse(name, data, len(data))
            _load(name, data)  # or a worker would be the first to find that it cannot
            known = signature, PromptInfo(name, _digest(data), length, shapes, metadata)
            self._infos[name] = known
        return known[1]

    def layers(self, info: PromptInfo) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys ``[P, Hkv, Dh]`` and values ``[P, Hkv, Dv]`` of every layer of a prompt.

        Raises:
            PromptError: the file is no longer the one that ``info`` tells of.
        """
        if info.digest not in self._layers:
            data = self._read(info.name)
            if _digest(data) != info.digest:
                raise PromptError(f"the file of prompt {info.name!r} was replaced while a request for it was waiting")
            tensors = _load(info.name, data)
            layers = range(len(info.shapes))
            self._layers[info.digest] = [(tensors[f"layers.{i}.keys"], tensors[f"layers.{i}.values"]) for i in layers]
        self._layers.move_to_end(info.digest)
        found = self._layers[info.digest]
        while self._layers and sum(map(_nbytes, self._layers.values())) > self.memory:
            self._layers.popitem(last=False)
        return found

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def _signature(self, name: str) -> tuple[int, ...]:
        try:
            stat = self._file(name).stat()
        except OSError as error:
            raise PromptError(f"prompt {name!r} cannot be read: {error}") from error
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _has_good_header(self, name: str) -> bool:
        try:
            with self._file(name).open("rb") as file:
                start = file.read(8)
                head = start + file.read(min(int.from_bytes(start, "little"), _LONGEST_HEADER))
            self._parse(name, head, self._file(name).stat().st_size)
        except (OSError, PromptError):
            return False
        return True

    def _parse(self, name: str, data: bytes, size: int) -> tuple[int, Shapes, dict[str, str]]:
        length, shapes, metadata = _parse(name, data, size)
        found = metadata.get("fingerprint")
        if self.fingerprint is not None and found != self.fingerprint:
            raise PromptError(f"prompt {name!r} is of a model with fingerprint {found}; expected {self.fingerprint}")
        return length, shapes, metadata

    def _read(self, name: str) -> bytes:
        """All of a file: what is hashed is what is served, whatever happens to the file meanwhile."""
        try:
            return self._file(name).read_bytes()
        except OSError as error:
            raise PromptError(f"prompt {name!r} cannot be read: {error}") from error


def _is_name(name: str) -> bool:
    return bool(name) and not name.startswith(".") and not set(name) & set("/\\\0")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _nbytes(layers: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in layers)


def _parse(name: str, data: bytes, size: int) -> tuple[int, Shapes, dict[str, str]]:
    """Length, shapes and metadata of a compiled prompt: of a file of ``size`` bytes that begins with ``data``."""
    header = _header(name, data, size)
    metadata = header.pop("__metadata__", {})
    kind = metadata.get("format"), metadata.get("version")
    if kind != (FORMAT, VERSION):
        expected = f"format {FORMAT!r} and version {VERSION!r}"
        raise PromptError(f"the file of prompt {name!r} has format and version {kind}; expected {expected}")
    layers = sorted({int(found[1]) for found in map(_TENSOR.fullmatch, header) if found})
    expected_names = {f"layers.{i}.{part}" for i in range(len(layers)) for part in ("keys", "values")}
    others = sorted(set(header) ^ expected_names)
    if others or not layers:
        found = f"has, or lacks, {others}" if others else "has none"
        raise PromptError(
            f"prompt {name!r} must hold the keys and values of attention layers, and nothing else; it {found}"
        )
    shapes = tuple((header[f"layers.{i}.keys"]["shape"], header[f"layers.{i}.values"]["shape"]) for i in layers)
    length = metadata.get("length", "")
    for keys, values in shapes:
        if len(keys) != 3 or keys[:2] != values[:2] or str(keys[0]) != length or keys[0] == 0:
            expected = f"keys and values of shape [{length or 'P'}, Hkv, Dh], P at least 1"
            raise PromptError(f"prompt {name!r} has keys {keys} and values {values} in a layer; expected {expected}")
    return int(length), shapes, metadata


def _header(name: str, data: bytes, size: int) -> dict[str, Any]:
    """A safetensors file begins with the length of its header, in eight bytes, and the header, as JSON."""
    begin = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:begin])
        entries = [entry for key, entry in header.items() if key != "__metadata__"]
        kinds, ends = {entry["dtype"] for entry in entries}, [entry["data_offsets"][1] for entry in entries]
        end = max(ends, default=0)
        well_formed = all(isinstance(entry["shape"], list) for entry in entries) and isinstance(
            header.get("__metadata__", {}), dict
        )
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError) as error:
        raise PromptError(f"the file of prompt {name!r} is not a safetensors file, or not all of one") from error
    if not well_formed:
        raise PromptError(f"the file of prompt {name!r} is not a safetensors file")
    if size != begin + end:
        raise PromptError(f"the file of prompt {name!r} has {size} bytes, not as many as its header says: is it whole?")
    if not kinds <= _FLOATS:
        raise PromptError(f"prompt {name!r} has tensors of {sorted(kinds)}; expected {sorted(_FLOATS)}")
    return header


def _load(name: str, data: bytes) -> dict[str, torch.Tensor]:
    try:
        return load(data)
    except SafetensorError as error:
        raise PromptError(f"the file of prompt {name!r} is not a safetensors file: {error}") from error
