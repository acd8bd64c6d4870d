"""What tests/test_distributed.py runs on every rank: a few training steps on this rank's rows of each batch."""

import os
import sys

import torch
import torch.distributed as dist
from accelerate import Accelerator
from parity import batch, peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastprompt

RANKS = 2
METHODS = ["prompt_tuning", "p_tuning_lstm", "multitask", "prefix"]
MODES = ["ddp", "fsdp2"]


def trained(method, mode=None, accelerator=None):
    """What a method has trained, by name: in one process, or in one of the ranks of a mode."""
    model = fastprompt.accelerate(peft_model("llama", method))
    if mode == "fsdp2":  # what Accelerate calls for it, which does so on accelerators only
        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in model.base_model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    if mode == "ddp":
        model, optimizer = accelerator.prepare(model, optimizer)
    inputs = batch("right", method=method)
    parts = [{name: x[rank::RANKS] for name, x in inputs.items()} for rank in range(RANKS)]
    mine = parts if mode is None else [parts[dist.get_rank()]]
    for _ in range(3):
        for part in mine:
            (model(**part).loss / len(mine)).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = fastprompt.stats(model)
    assert found.packed and not found.padded, found
    result = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
    return {name: (p.full_tensor() if mode == "fsdp2" else p).detach().clone() for name, p in result.items()}


def main(file):
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    results = {(mode, method): trained(method, mode, accelerator) for mode in MODES for method in METHODS}
    if accelerator.is_main_process:
        torch.save(results, file)
    dist.barrier()
    # No destructors: that of DDP's reducer destroys the gloo group, waiting with the GIL for a thread that needs the
    # GIL.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
