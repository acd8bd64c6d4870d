"""Loads the libraries of C++ and of CUDA kernels, whose operators are then in ``torch.ops.fastprompt``."""

from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_cpu.abi3.so")


def _load(library: Path, language: str) -> str | None:
    if not library.exists():
        return f"the {language} library was not compiled when fastprompt was installed"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"the {language} library cannot be loaded: {error}"
    return None


missing: str | None = _load(LIBRARY, "C++")
"""None if the operators of the C++ library are there, else the reason why not."""

missing_cuda: str | None = (
    _load(LIBRARY.with_name("_cuda.abi3.so"), "CUDA") if torch.version.cuda else "this torch is built without CUDA"
)
"""None if the operators of the CUDA library are there, else the reason why not."""
