"""Runs of the trainers that people use: transformers' and TRL's, with their default settings."""

import tempfile
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

import fastprompt

from .loops import Run, gradient_norm
from .setting import ROWS, STEPS

COLLATORS = {
    "right": lambda tokenizer: DataCollatorForSeq2Seq(tokenizer),
    "left": lambda tokenizer: DataCollatorForSeq2Seq(_padding_left(tokenizer)),
    "all labels": lambda tokenizer: DataCollatorForLanguageModeling(tokenizer, mlm=False),
    "flat": lambda tokenizer: DataCollatorWithFlattening(),
    "flat with cu_seq_lens": lambda tokenizer: DataCollatorWithFlattening(return_flash_attn_kwargs=True),
}


def _padding_left(tokenizer):
    tokenizer.padding_side = "left"
    return tokenizer


def _arguments(kind, folder, steps, **options):
    return kind(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        learning_rate=0.05,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        seed=3,
        use_cpu=True,
        disable_tqdm=True,
        **{"bf16": False, **options},
    )


@contextmanager
def _trainer(setting, method, accelerated, make):
    """``make(model, folder)`` and its model, in a folder for the time being."""
    model = setting.peft_model(method)
    if accelerated:
        fastprompt.accelerate(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(model, folder)
        trainer.remove_callback(PrinterCallback)
        yield trainer, model


def _run(setting, method, accelerated, make):
    with _trainer(setting, method, accelerated, make) as (trainer, model):
        torch.manual_seed(5)
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        return Run(
            [line[name] for line in lines for name in ("loss", "grad_norm")],
            fastprompt.stats(model) if accelerated else None,
        )


def transformers_trainer(setting, method, accelerated, *, collator="right", **options):
    """transformers' Trainer."""

    def make(model, folder):
        arguments = _arguments(TrainingArguments, folder, STEPS, remove_unused_columns=False, **options)
        data = setting.tokens()
        if collator == "all labels":
            data = [{"input_ids": row["input_ids"]} for row in data]
        return Trainer(model, arguments, train_dataset=data, data_collator=COLLATORS[collator](setting.tokenizer))

    try:
        return _run(setting, method, accelerated, make)
    finally:
        setting.tokenizer.padding_side = "right"


def sft(setting, method, accelerated, *, steps=STEPS, whole_texts=False, **options):
    """TRL's SFTTrainer on prompts and completions, or on whole texts."""
    return _run(setting, method, accelerated, _sft(setting, steps, whole_texts, options))


def _sft(setting, steps, whole_texts, options):
    rows = setting.texts()
    if whole_texts:
        rows = [{"text": row["prompt"] + row["completion"]} for row in rows]
    return _of_trl(setting, "SFT", rows, steps, options)


def _of_trl(setting, name, rows, steps, options, **others):
    """What makes TRL's trainer of a name on rows; ``options`` are those of its config, ``others`` its own."""
    import trl
    from datasets import Dataset

    def make(model, folder):
        arguments = _arguments(getattr(trl, f"{name}Config"), folder, steps, **options)
        given = dict(args=arguments, train_dataset=Dataset.from_list(rows), processing_class=setting.tokenizer)
        return getattr(trl, f"{name}Trainer")(model, **given, **others)

    return make


def sft_sample_by_sample(setting, method, accelerated, *, steps, **options):
    """The loss of SFTTrainer's first packed batch by PEFT, one sample a call, since PEFT takes all for one sequence."""
    seen = []
    with _trainer(setting, method, False, _sft(setting, steps, True, options)) as (trainer, model):
        model.register_forward_pre_hook(lambda module, args, given: seen.append(given), with_kwargs=True)
        torch.manual_seed(5)
        trainer.train()
    ids, labels, positions = (seen[0][name] for name in ("input_ids", "labels", "position_ids"))
    starts = [*(positions[0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
    model, total = setting.peft_model(method), 0.0
    for start, end in zip(starts, starts[1:]):
        logits = model(input_ids=ids[:, start:end]).logits[0, -(end - start) : -1]
        total = total + F.cross_entropy(logits, labels[0, start + 1 : end], reduction="sum")
    loss = total / (ids.shape[1] - len(starts) + 1)
    loss.backward()
    return Run([loss.item(), gradient_norm(model)])


def dpo(setting, method, accelerated, **options):
    """TRL's DPOTrainer; the reference model is the base model."""
    rows = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": _other(row["completion"])}
        for row in setting.texts()
    ]
    return _run(setting, method, accelerated, _of_trl(setting, "DPO", rows, STEPS, options))


def kto(setting, method, accelerated, **options):
    """TRL's KTOTrainer."""
    rows = [
        {**row, "completion": row["completion"] if i % 2 else _other(row["completion"]), "label": bool(i % 2)}
        for i, row in enumerate(setting.texts())
    ]
    return _run(setting, method, accelerated, _of_trl(setting, "KTO", rows, STEPS, options))


def grpo(setting, method, accelerated, **options):
    """TRL's GRPOTrainer; it generates by PEFT."""

    def reward(completions, **others):
        return [float(len(set(completion))) for completion in completions]

    options = dict(num_generations=2, max_completion_length=6, **options)
    rows = [{"prompt": row["prompt"]} for row in setting.texts()]
    return _run(setting, method, accelerated, _of_trl(setting, "GRPO", rows, STEPS, options, reward_funcs=reward))


def _other(answer):
    return " plant" if answer == " animal" else " animal"
