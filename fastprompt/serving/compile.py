"""compile_prompt: a trained prompt as the keys, values and states that it leaves in its frozen model."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from ..hf.compiled_prompts import prompt_of_method
from ..hf.fingerprint import fingerprint
from ..hf.model import SoftPromptModel
from ..hf.prompt_cache import fill
from ..hf.prompt_state import Prompt, PromptState
from ..hf.shared_state import KeysValues, text_config
from ..hf.states import StateKey
from ..peft.prompts import is_peft_model, prompt_of_adapter, prompt_of_folder

FORMAT, VERSION = "fastprompt-compiled-prompt", "1"
LEARNED = ("prefix-tuning", "cartridge")  # methods without embeddings
_KINDS = {"conv_state": "conv", "recurrent_state": "recurrent"}


class CompiledLayer(NamedTuple):
    """What a prompt leaves in one layer; None where the layer keeps nothing of the kind.

    ``keys, values [P, Hkv, Dh]``, the keys behind the rotary embedding of positions 0 to P - 1; states as the layer
    keeps them, without a dimension of the batch (the first of each kind, where it has several).
    """

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    conv_state: torch.Tensor | None = None
    recurrent_state: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class CompiledPrompt:
    """A trained prompt without its encoder: what it leaves in every layer of one frozen model.

    Attributes:
        method: how it was trained: "prompt-tuning", "p-tuning", "prefix-tuning", "multitask-prompt-tuning", ...
        state: its keys, values and states.
        fingerprint: of the model; see :func:`fastprompt.hf.fingerprint.fingerprint`.
        base_model: the model's name, for people; may be empty.
        dtype: of the keys and values.
    """

    method: str
    state: PromptState = field(repr=False)
    fingerprint: str
    base_model: str = ""
    dtype: torch.dtype = torch.float32

    @property
    def length(self) -> int:
        """P, how many positions it takes."""
        return self.state.length

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        return self.state.nbytes

    @property
    def layers(self) -> tuple[CompiledLayer, ...]:
        """What it leaves, layer by layer."""
        held, states = self.state.keys_values, self.state.states
        count = 1 + max([*held, *(key.layer for key in states)], default=-1)
        return tuple(
            CompiledLayer(
                *held.get(layer, (None, None)),
                *(states.get(StateKey(kind, layer, 0)) for kind in _KINDS.values()),
            )
            for layer in range(count)
        )

    def check(self, model_fingerprint: str) -> None:
        """Raises ValueError if it was compiled for another model than that of ``model_fingerprint``."""
        if self.fingerprint != model_fingerprint:
            raise ValueError(
                f"the prompt was compiled for a model with fingerprint {self.fingerprint}"
                f"{f' ({self.base_model})' if self.base_model else ''}, this one has {model_fingerprint}"
            )

    def check_shapes(self, other: PromptState) -> None:
        """Raises ValueError if it does not hold, layer by layer, what another prompt left in its model."""
        found, expected = (_shapes(state, self.method) for state in (self.state, other))
        if found != expected:
            raise ValueError(f"the prompt must hold states of shapes {expected} for the model, got {found}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it into one safetensors file, aside and then renamed, so that nobody reads half of it.

        Tensors ``layers.{i}.keys`` and ``.values`` ``[P, Hkv, Dh]``, ``.conv_state`` and ``.recurrent_state`` (a second
        one of a layer: ``.conv_state.1``); metadata ``format``, ``version``, ``method``, ``length``, ``dtype``,
        ``fingerprint``, ``base_model``.
        """
        tensors = {}
        for layer, both in self.state.keys_values.items():
            tensors[f"layers.{layer}.keys"], tensors[f"layers.{layer}.values"] = both
        for key, x in self.state.states.items():
            number = f".{key.number}" if key.number else ""
            tensors[f"layers.{key.layer}.{key.kind}_state{number}"] = x
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "method": self.method,
            "length": str(self.length),
            "dtype": _name_of(self.dtype),
            "fingerprint": self.fingerprint,
            "base_model": self.base_model,
        }
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CompiledPrompt":
        """Read what :meth:`save` wrote; onto the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no compiled prompt, or not a whole one.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"path must name a compiled prompt, got {str(path)!r}")
        try:
            with safe_open(path, "pt") as file:
                metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"path must name a safetensors file, got {str(path)!r}: {error}") from None
        if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
            found = metadata.get("format"), metadata.get("version")
            raise ValueError(f"{str(path)!r} must hold a {FORMAT} of version {VERSION}, got {found[0]} {found[1]}")
        try:
            dtype = getattr(torch, metadata["dtype"])
            state = _state_of(tensors, int(metadata["length"]), dtype)
            return cls(metadata["method"], state, metadata["fingerprint"], metadata.get("base_model", ""), dtype)
        except (KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} must hold a whole {FORMAT}: {error}") from None

    def to_past_key_values(self, model: PreTrainedModel, batch_size: int = 1) -> DynamicCache:
        """A plain cache of transformers that starts with the prompt in each of ``batch_size`` rows.

        Call the model with it, ids of the text, and an attention mask that has P ones in front of the text's.

        Raises:
            ValueError: another model.
        """
        self.check(fingerprint(model))
        state = self.state.to(model)
        return fill(DynamicCache(config=text_config(model.config)), [state] * batch_size)


def compile_prompt(model: nn.Module, adapter_name: str | None = None, *, task_id: int | None = None) -> CompiledPrompt:
    """Run a trained prompt through its frozen model, once, and keep what it leaves in every layer.

    Nothing of the encoder is needed afterwards (P-Tuning's LSTM, the factors of Multitask Prompt Tuning, the MLP of
    Prefix-Tuning), and a request behind the prompt runs none of its rows.

    Args:
        model: a causal LM: a ``PeftModel``, accelerated or not, or a :class:`SoftPromptModel`.
        adapter_name: which adapter of a ``PeftModel``; None: the active one.
        task_id: the task of Multitask Prompt Tuning, or which of the prompts of a :class:`SoftPromptModel`; None: the
            only one.

    Raises:
        TypeError: another model or method.
        ValueError: no such adapter or task, or a model that does not keep what a prompt leaves in a cache.
    """
    base, prompt = prompt_of(model, adapter_name, task_id)
    return compiled(base, prompt, fingerprint(base))


def compile_folder(
    base: PreTrainedModel, folder: str | os.PathLike[str], *, task_id: int | None = None, of: str | None = None
) -> CompiledPrompt:
    """:func:`compile_prompt` of an adapter's folder, without a wrapper around ``base``.

    Args:
        base: the frozen model.
        folder: an adapter, of PEFT or of ``SoftPromptModel.save_pretrained``.
        task_id: see :func:`compile_prompt`.
        of: the fingerprint of ``base``, if it is known.
    """
    return compiled(base, prompt_of_folder(base, folder, task_id), fingerprint(base) if of is None else of)


def compiled(base: PreTrainedModel, prompt: Prompt, of: str) -> CompiledPrompt:
    """``prompt`` in ``base``, whose fingerprint is ``of``."""
    state = prompt.state(base)
    dtype = next((layer.keys.dtype for layer in state.keys_values.values()), base.dtype)
    return CompiledPrompt(prompt.method, state, of, str(getattr(base.config, "_name_or_path", "") or ""), dtype)


def prompt_of(
    model: nn.Module, adapter_name: str | None = None, task_id: int | None = None
) -> tuple[PreTrainedModel, Prompt]:
    """The frozen model and the prompt of an argument of :func:`compile_prompt`."""
    if is_peft_model(model):
        peft_model: Any = model
        return peft_model.get_base_model(), prompt_of_adapter(peft_model, adapter_name, task_id)
    if not isinstance(model, SoftPromptModel):
        raise TypeError(f"model must be a PeftModel or a SoftPromptModel, got {type(model).__name__}")
    if adapter_name is not None:
        raise ValueError(f"adapter_name must be None for a SoftPromptModel, got {adapter_name!r}")
    return model.base, prompt_of_method(model.base, model.method, task_id)


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, written aside and renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as aside:
        written = Path(aside, path.name)
        content = save({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, metadata=metadata)
        written.write_bytes(content)  # save_file would keep it from everybody else, as a server under another name
        os.replace(written, path)


def _state_of(tensors, length, dtype):
    """The PromptState of a file's tensors."""
    layers: dict[int, dict[str, torch.Tensor]] = {}
    states = {}
    for name, x in tensors.items():
        first, layer, kind, *number = name.split(".")
        if first != "layers" or len(number) > 1 or kind not in ("keys", "values", *_KINDS):
            raise ValueError(f"it has a tensor {name}")
        if not x.is_floating_point() or (kind not in _KINDS and x.dtype != dtype):
            raise ValueError(f"{name} must be of {dtype}, got {x.dtype}")
        if not bool(x.float().isfinite().all()):
            raise ValueError(f"{name} must hold finite numbers, got inf or nan")
        if kind in _KINDS:
            states[StateKey(_KINDS[kind], int(layer), int(*number))] = x
            continue
        if x.dim() != 3 or len(x) != length:
            raise ValueError(f"{name} must have shape [{length}, Hkv, Dh], got {list(x.shape)}")
        layers.setdefault(int(layer), {})[kind] = x
    keys_values = {layer: KeysValues(both["keys"], both["values"]) for layer, both in layers.items()}
    return PromptState(length, keys_values, states)


def _shapes(state, method):
    """The shapes of what a prompt leaves in each layer, its length apart."""
    shapes = {f"layers.{layer}": [list(x.shape[1:]) for x in both] for layer, both in state.keys_values.items()}
    if method not in LEARNED:  # those leave no other states
        shapes |= {f"layers.{key.layer}.{key.kind}.{key.number}": [list(x.shape)] for key, x in state.states.items()}
    return dict(sorted(shapes.items()))


def _name_of(dtype):
    return str(dtype).removeprefix("torch.")
