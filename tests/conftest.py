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


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_bf16"])
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
