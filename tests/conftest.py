import gc
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the suite may depend on a network
sys.path.insert(0, str(Path(__file__).parent))

# Triton kernels run on a GPU or in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/gpu
kernels_run = find_spec("triton") and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1")
collect_ignore = [] if kernels_run else ["gpu"]
if find_spec("vllm") is None:  # it has an environment of its own: make vllm-test
    collect_ignore.append("with_vllm")
if find_spec("hypothesis"):  # the same shapes on every machine; others with pytest --hypothesis-profile=default
    from hypothesis import settings

    settings.register_profile("same everywhere", derandomize=True)
    settings.load_profile("same everywhere")


def pytest_collection_finish():
    """What the libraries made when they were imported lives on: no collection of garbage has to look at it again.

    Trainer asks for a collection in every run, which is a third of a short one otherwise.
    """
    gc.collect()
    gc.freeze()


INSTRUCTION_SETS = ["portable", "avx2", "avx512", "avx512_bf16"]


def pytest_terminal_summary(terminalreporter):
    """Which instruction sets the tests ran on, and which this machine has not."""
    from fastprompt import native

    ran = []
    if native.missing is None:
        highest = torch.ops.fastprompt.cpu_isa()
        ran = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(highest) + 1]
    skipped = [name for name in INSTRUCTION_SETS if name not in ran]
    terminalreporter.write_line(
        f"instruction sets: C++ kernels ran {', '.join(ran) or 'none'}; skipped {', '.join(skipped) or 'none'}; "
        f"torch {torch.backends.cpu.get_cpu_capability()}; numpy's OpenBLAS {_openblas_core()}"
    )


def _openblas_core():
    """The processor that numpy's matrix product was written for, as OPENBLAS_CORETYPE names it."""
    import ctypes

    import numpy

    for library in Path(numpy.__file__).parent.with_name("numpy.libs").glob("*openblas*"):
        name = getattr(ctypes.CDLL(str(library)), "scipy_openblas_get_corename64_", None)
        if name is not None:
            name.restype = ctypes.c_char_p
            return name().decode()
    return "unknown"


@pytest.fixture
def fresh_graphs():
    """torch.compile has no graphs of what other tests compiled: it takes a limited number for each function."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def every_isa():
    """A function that iterates over the instruction sets that there are, each in force for its turn."""
    from fastprompt import native

    if native.missing:
        pytest.skip(native.missing)
    highest = torch.ops.fastprompt.cpu_isa()

    def in_turn():
        for name in INSTRUCTION_SETS[: INSTRUCTION_SETS.index(highest) + 1]:
            torch.ops.fastprompt.limit_cpu_isa(name)
            yield name

    yield in_turn
    torch.ops.fastprompt.limit_cpu_isa(highest)


@pytest.fixture(params=INSTRUCTION_SETS)
def cpu_isa(request):
    """Each instruction set that the C++ library and this CPU have, in turn."""
    from fastprompt import native

    if native.missing:
        pytest.skip(native.missing)
    highest = torch.ops.fastprompt.cpu_isa()
    torch.ops.fastprompt.limit_cpu_isa(request.param)
    if torch.ops.fastprompt.cpu_isa() != request.param:
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    torch.ops.fastprompt.limit_cpu_isa(highest)


@pytest.fixture
def poisoned():
    """New memory is full of nan, so what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
