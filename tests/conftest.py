import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the suite may depend on a network

triton_installed = find_spec("triton") is not None
if not triton_installed:  # with tests/ on the path tests/triton would pass for an empty package of that name
    sys.modules["triton"] = None
sys.path.insert(0, str(Path(__file__).parent))

# Triton kernels run on a GPU or in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/triton
triton_runs = triton_installed and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1")
collect_ignore = [] if triton_runs else ["triton"]
