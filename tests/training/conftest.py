import csv

import pytest
from tiny_llama import save_model, save_words
from training_runs import WORDS
from transformers import AutoTokenizer

from fastprompt.training import TrainingConfig, read_rows


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    data = save_words(folder / "words.csv")
    rows = read_rows(data)
    with open(data, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([*rows[0], "topic"])
        writer.writerows([*row.values(), ("y", "x", "z")[i % 3]] for i, row in enumerate(rows))
    return {"model": save_model(folder / "model"), "data": data}


@pytest.fixture(scope="session")
def tokenizer(files):
    return AutoTokenizer.from_pretrained(files["model"])


@pytest.fixture
def config(files, tmp_path):
    return TrainingConfig(
        **files,
        output=str(tmp_path / "out"),
        text_column="text",
        label_column="label",
        template="Word: {text} kind:",
        verbaliser=WORDS,
        num_virtual_tokens=4,
        init="vocab",
        steps=6,
        batch_size=8,
        save_steps=2,
    )
