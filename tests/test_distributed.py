"""One training script under DDP (Accelerate) and FSDP2: two gloo ranks end with the parameters of one process."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from distributed_worker import METHODS, MODES, RANKS, trained

WORKER = Path(__file__).with_name("distributed_worker.py")


def test_two_ranks_equal_one_process(tmp_path):
    """All methods and modes by one pair of ranks, most of whose time is that of starting."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = str(WORKER.parents[1])  # benchmarks has the sizes of tiny models
    run = subprocess.run(
        [*command, str(WORKER), str(tmp_path / "two")], env=environment, capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr[-3000:]
    two = torch.load(tmp_path / "two")
    assert two.keys() == {(mode, method) for mode in MODES for method in METHODS}
    for method in METHODS:
        one = trained(method)
        for mode in MODES:
            assert one and two[mode, method].keys() == one.keys()
            for name, expected in one.items():
                close = torch.allclose(two[mode, method][name], expected, rtol=1e-4, atol=1e-6)
                assert close, f"{name} of {method} by {mode}"
