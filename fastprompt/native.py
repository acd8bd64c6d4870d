"""Loads the C++ library of CPU kernels, whose operators are then in ``torch.ops.fastprompt``."""

from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_cpu.abi3.so")


def _load():
    if not LIBRARY.exists():
        return "the C++ library was not compiled when fastprompt was installed"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"the C++ library cannot be loaded: {error}"
    return None


missing: str | None = _load()
"""None if the library's operators are there, else the reason why not."""


def unsupported(device_type, dtype):
    """None if the library's kernels can run such a call, else the reason why not."""
    if missing:
        return missing
    if device_type != "cpu":
        return f"the C++ kernels run on a CPU, not on {device_type}"
    return "the C++ kernels have no float64" if dtype == torch.float64 else None
