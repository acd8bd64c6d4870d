"""One training script under DDP (Accelerate) and FSDP2: two gloo ranks end with the parameters of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("distributed_worker.py")


def train(mode, method, result, processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [*command, str(WORKER), mode, method, str(result)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(result)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_lstm", "multitask", "prefix"])
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_ranks_equal_one_process(mode, method, tmp_path):
    one = train("one", method, tmp_path / "one", 1)
    two = train(mode, method, tmp_path / mode, 2)
    assert one.keys() == two.keys() and one
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-4, atol=1e-6)
