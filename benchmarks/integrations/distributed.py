"""Runs of two processes on one machine, over gloo: DistributedDataParallel and FSDP2."""

import os
import tempfile
import warnings
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastprompt

from .loops import Run, gradient_norm
from .setting import Setting

RANKS = 2
KINDS = ("DDP", "FSDP2")


def two_processes(setting, method, accelerated, *, kind):
    """The run of rank 0, or what it raised."""
    found = _all_runs(setting.folder)[kind, method, accelerated]
    if isinstance(found, Exception):
        raise found
    return found


@cache
def _all_runs(folder):
    """Every kind and method, with and without fastprompt, by one pair of processes."""
    with tempfile.TemporaryDirectory() as shared:
        multiprocessing.spawn(_rank, args=(folder, shared), nprocs=RANKS)
        return torch.load(Path(shared, "runs"), weights_only=False)


def _rank(rank, folder, shared):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    store = f"file://{shared}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    setting, runs = Setting(folder), {}
    for kind in KINDS:
        for method in ("Prompt Tuning", "Prefix-Tuning"):
            for accelerated in (False, True):
                try:
                    runs[kind, method, accelerated] = _train(setting, rank, kind, method, accelerated)
                except Exception as error:  # becomes an entry of the table
                    runs[kind, method, accelerated] = RuntimeError(f"{type(error).__name__}: {error}")
    if rank == 0:
        torch.save(runs, Path(shared, "runs"))
    dist.barrier()
    # No destructors: that of DDP's reducer destroys the gloo group, waiting with the GIL for a thread that needs the
    # GIL.
    os._exit(0)


def _train(setting, rank, kind, method, accelerated):
    model = setting.peft_model(method).train()
    if accelerated:
        fastprompt.accelerate(model)
    runs = model
    if kind == "DDP":
        runs = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in model.base_model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    numbers = []
    for batch in setting.batches():
        loss = runs(**{name: x[rank::RANKS] for name, x in batch.items()}).loss
        loss.backward()
        numbers += [loss.item(), gradient_norm(model)]
        optimizer.step()
        optimizer.zero_grad()
    return Run(numbers, fastprompt.stats(model) if accelerated else None)
