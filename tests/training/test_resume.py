"""Runs that are killed and go on: to the same bits as without the break."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import adapter_of, every_method, losses

from fastprompt.training import train

KILLED_WHILE_SAVING = """
import json, os, signal, sys
import torch
from fastprompt.training import TrainingConfig, train

save, calls = torch.save, 0

def save_or_die(*arguments, **options):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return save(*arguments, **options)

torch.save = save_or_die
train(TrainingConfig(**json.loads(sys.argv[1])))
"""


# A checkpoint is three calls of torch.save: the second one dies in the middle of the first checkpoint, the fifth in
# the middle of the second.
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize(("call", "complete"), [(2, []), (5, ["checkpoint-2"])])
def test_killed_and_resumed_gives_the_same_bits(config, tmp_path, call, complete):
    uninterrupted = train(dataclasses.replace(config, output=str(tmp_path / "uninterrupted")))
    arguments = [json.dumps(dataclasses.asdict(config)), str(call)]
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, *arguments], capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    out = Path(config.output)
    assert [path.name for path in out.glob("checkpoint-*")] == complete
    assert any((out / ".incomplete").rglob("adapter_model.safetensors"))  # it did die in the middle
    assert not (out / "adapter_config.json").exists()

    history = train(dataclasses.replace(config, resume=True))
    assert history == uninterrupted
    assert torch.equal(
        adapter_of(config), load_file(tmp_path / "uninterrupted/adapter_model.safetensors")["prompt_embeddings"]
    )
    assert not (out / ".incomplete").exists()


@every_method
def test_resumes_what_is_trained(config, changes):
    config = dataclasses.replace(config, **changes)
    history = train(config)
    before = load_file(Path(config.output, "adapter_model.safetensors"))
    shutil.rmtree(Path(config.output, "checkpoint-6"))
    assert train(dataclasses.replace(config, resume=True)) == history
    after = load_file(Path(config.output, "adapter_model.safetensors"))
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_resuming_a_finished_run_changes_nothing(config):
    history = train(config)
    before = adapter_of(config)
    assert train(dataclasses.replace(config, resume=True)) == history
    assert torch.equal(adapter_of(config), before)


def test_resume_starts_where_there_is_nothing_yet(config):
    assert len(losses(train(dataclasses.replace(config, resume=True)))) == 6
