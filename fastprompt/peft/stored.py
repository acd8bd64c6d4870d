"""The files of one adapter as PEFT writes them, read and checked."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import load_peft_weights
from safetensors import SafetensorError, safe_open

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PICKLED = "adapter_model.bin"  # as older versions of PEFT wrote them
_PROMPT = "prompt_embeddings"
_OF_TASKS = ("prefix_task_cols", "prefix_task_rows")


def read_config(folder: Path) -> Any:
    """An adapter's config.

    Raises:
        ValueError: its file holds none.
    """
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG} must hold an adapter's config, got {error!r}") from None


def read_weights(folder: Path, config: Any = None) -> dict[str, torch.Tensor]:
    """The tensors of an adapter that learns a prompt, ``prompt_embeddings [P, width]`` among them, on the CPU.

    Args:
        folder: of the adapter.
        config: the adapter's, that its prompt has to be of; None: that is not looked at.

    Raises:
        FileNotFoundError: there are none.
        ValueError: no file of tensors, or tensors that are no prompt, or not that of the config.
    """
    if not any((folder / name).is_file() for name in (WEIGHTS, _PICKLED)):
        raise FileNotFoundError(f"{folder} must hold {WEIGHTS}")
    with _named(folder / WEIGHTS):
        found = load_peft_weights(str(folder), device="cpu")
    if config is None:
        return found
    tasks = config.peft_type == "MULTITASK_PROMPT_TUNING"
    for name in (_PROMPT, *(_OF_TASKS if tasks else ())):
        if name not in found:
            raise ValueError(f"{folder} must hold a tensor {name}, got {sorted(found)}")
        x, dims = found[name], 2 if name == _PROMPT else 3
        if x.dim() != dims or not x.is_floating_point():
            raise ValueError(
                f"{folder} must hold {name} of {dims} dimensions and floats, got {list(x.shape)} {x.dtype}"
            )
        if not bool(x.float().isfinite().all()):
            raise ValueError(f"{folder} must hold finite numbers, got inf or nan in {name}")
    length = config.num_virtual_tokens
    if length is not None and length != len(found[_PROMPT]):
        raise ValueError(f"{folder} must hold {length!r} virtual tokens as its config says, got {len(found[_PROMPT])}")
    if tasks:
        (rows, cols), prompt = (list(found[name].shape) for name in _OF_TASKS), found[_PROMPT]
        expected = [rows[0], len(prompt), rows[2]], [rows[0], rows[2], prompt.shape[1]]
        if (rows, cols) != expected:
            raise ValueError(f"{folder} must hold factors of tasks {expected[0]} and {expected[1]}, got {rows}, {cols}")
    return found


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file of safetensors. Raises ValueError if it is none."""
    with _named(path), safe_open(path, "pt") as file:
        yield file


@contextmanager
def _named(path):
    """Errors of safetensors with the name of the file."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole file of safetensors, got one that is not: {error}") from None
