"""Runs of a training loop of one's own: three steps, on whatever model and batches a row of the table is about."""

from contextlib import nullcontext
from dataclasses import dataclass

import peft
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import LlamaForCausalLM

import fastprompt
from fastprompt.hf.stats import Stats

from .setting import ROWS


@dataclass
class Run:
    """What a run gave.

    Attributes:
        numbers: the loss and the norm of the gradient of every step.
        stats: how the calls of an accelerated model were run.
    """

    numbers: list[float]
    stats: Stats | None = None


def gradient_norm(model):
    """The norm of the gradient of everything that trains."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    whole = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in gradients]  # of FSDP2's shards
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(x.float()) for x in whole])).item()


def loss_of(model, batch):
    """The loss that the model computes."""
    return model(**batch).loss


def loop(setting, method, accelerated, *, base=None, batches=None, prepare=None, wrap=None, step=loss_of,
         context=nullcontext, by_get_peft_model=False):  # fmt: skip
    """Train by SGD.

    Args:
        setting, method, accelerated: what is tried, and whether by fastprompt.
        base: setting -> the frozen model.
        batches: setting -> the batches.
        prepare: changes the PEFT model before it is accelerated.
        wrap: what the loop calls in place of the accelerated model.
        step: the loss of a model for a batch.
        context: in which the forward runs.
        by_get_peft_model: accelerate by ``fastprompt.get_peft_model`` in place of PEFT's.
    """
    get = fastprompt.get_peft_model if accelerated and by_get_peft_model else peft.get_peft_model
    model = setting.peft_model(method, None if base is None else base(setting), get)
    if prepare is not None:
        prepare(model)
    model.train()
    if accelerated and not by_get_peft_model:
        fastprompt.accelerate(model)
    runs = model if wrap is None else wrap(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    numbers = []
    for batch in setting.batches() if batches is None else batches(setting):
        with context():
            loss = step(runs, batch)
        loss.backward()
        numbers += [loss.item(), gradient_norm(model)]
        optimizer.step()
        optimizer.zero_grad()
    return Run(numbers, fastprompt.stats(model) if accelerated else None)


def accelerate_loop(setting, method, accelerated):
    """A loop with Accelerate, which collects the gradient of two batches."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = setting.peft_model(method).train()
    if accelerated:
        fastprompt.accelerate(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    numbers = []
    for batch in setting.batches() * 2:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            numbers += [loss.item(), gradient_norm(model)]
            optimizer.step()
            optimizer.zero_grad()
    return Run(numbers, fastprompt.stats(model) if accelerated else None)


class OwnLoss(LlamaForCausalLM):
    """A model with a loss of its own on labelled rows."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, **kwargs)
        if labels is not None:
            logits, labels = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            output.loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        return output


class LossOfPadding(LlamaForCausalLM):
    """A model with a loss of its own on all rows, padding among them."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, labels=labels, **kwargs)
        if labels is not None:
            output.loss = output.loss + 0.01 * output.logits.logsumexp(-1).square().mean()
        return output


def loss_of_logits(model, batch):
    """A loss that the loop computes, from ``outputs.logits`` of a call with labels."""
    logits = model(**batch).logits
    logits = logits[:, logits.shape[1] - batch["labels"].shape[1] :]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def loss_of_last_logits(model, batch):
    """The same from the last five columns alone."""
    logits = model(batch["input_ids"], batch["attention_mask"], logits_to_keep=5).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, -4:].flatten())


def add_adapters(model):
    """A second adapter beside the first; both train."""
    model.add_adapter("second", model.peft_config["default"])
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.prompt_encoder["second"].parameters():
            parameter.normal_()
    model.prompt_encoder.requires_grad_(True)


def loss_by_row(model, batch):
    """Each row behind the prompt of its own adapter."""
    names = ["default", "second"] * (ROWS // 2)
    return model(**batch, adapter_names=names).loss


def loss_row_by_row(model, batch):
    """The same by PEFT: one row a call, with its adapter active."""
    total = torch.zeros(())
    count = int((batch["labels"][:, 1:] != -100).sum())
    for row, name in enumerate(["default", "second"] * (ROWS // 2)):
        model.set_adapter(name)
        one = {key: value[row : row + 1] for key, value in batch.items()}
        total = total + model(**one, num_items_in_batch=count).loss
    return total
