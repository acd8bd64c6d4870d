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


def main(mode, method, result):
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model = fastprompt.accelerate(peft_model("llama", method))
    if mode == "fsdp2":  # what Accelerate calls for it, which does so on accelerators only
        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in model.base_model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    else:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        model, optimizer = accelerator.prepare(model, optimizer)
    inputs = batch("right", method=method)
    parts = [{name: x[rank::RANKS] for name, x in inputs.items()} for rank in range(RANKS)]
    mine = parts if accelerator.num_processes == 1 else [parts[accelerator.process_index]]
    for _ in range(3):
        for part in mine:
            accelerator.backward(model(**part).loss / len(mine))
        optimizer.step()
        optimizer.zero_grad()
    found = fastprompt.stats(model)
    assert found.packed and not found.padded, found
    trained = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
    trained = {name: (p.full_tensor() if mode == "fsdp2" else p).detach().clone() for name, p in trained.items()}
    if accelerator.is_main_process:
        torch.save(trained, result)
    if dist.is_initialized():
        dist.barrier()
    # No destructors: that of DDP's reducer destroys the gloo group, waiting with the GIL for a thread that needs the
    # GIL.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
