"""The table in docs/integrations.md: it says what was measured, what was measured still holds, and it can say WRONG."""

import csv
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks import integrations
from benchmarks.integrations.loops import Run
from benchmarks.integrations.rows import Row, rows
from benchmarks.integrations.setting import Setting
from fastprompt.hf.stats import Stats
from fastprompt.versions import is_older

ROOT = Path(__file__).parents[1]
TRIED_ON = "5.23"
SLOW = ("compile", "Trainer", "processes")  # tests of their own see these


def committed():
    with open(ROOT / "benchmarks/results/integrations.csv") as stream:
        return list(csv.DictReader(line for line in stream if not line.startswith("#")))


def test_the_document_is_the_csv():
    """After a change: python -m benchmarks integrations, where everything of the extra "integrations" is installed."""
    text = (ROOT / "docs/integrations.md").read_text(encoding="utf-8")
    (versions,) = (paragraph for paragraph in text.split("\n\n") if paragraph.startswith("torch "))
    assert text == integrations.render(committed(), versions.removesuffix("."))


def test_every_row_was_tried():
    tried = [(record["group"], record["row"], record["method"]) for record in committed()]
    assert tried == [(row.group, row.name, method) for row in rows() for method in row.methods]
    assert not [record for record in committed() if "WRONG" in record["outcome"]]


FAST = [row for row in rows() if row.group != "Collators" and not any(word in row.name for word in SLOW)]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting(tmp_path_factory.mktemp("model"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", FAST, ids=lambda row: row.name)
def test_a_row_still_holds(row, setting):
    expected = {r["method"]: r["outcome"] for r in committed() if (r["group"], r["row"]) == (row.group, row.name)}
    for method in row.methods:
        found = integrations.try_one(setting, row, method)["outcome"]
        if "not installed" in found:
            pytest.skip(found)
        same = found.partition(":")[0] == expected[method].partition(":")[0]
        if not same and "PEFT raises" in found and is_older(version("transformers"), TRIED_ON):
            pytest.skip(f"transformers before {TRIED_ON}: {found}")
        assert same, found


def outcome_of(train, **options):
    (record, _) = integrations.try_all([Row("group", "name", train, **options)])
    return record


def numbers(plain, fast, stats):
    return lambda setting, method, accelerated: Run([fast], stats) if accelerated else Run([plain])


def raises(accelerated_too, message="no"):
    def train(setting, method, accelerated):
        if accelerated or accelerated_too:
            raise ValueError(f"{message}\nmore")
        return Run([1.0])

    return train


def test_what_an_outcome_says():
    packed, padded = Stats(packed=3), Stats(padded={"because": 3})
    assert outcome_of(numbers(2.0, 2.0, packed))["outcome"] == "packed"
    assert outcome_of(numbers(2.0, 2.1, packed))["outcome"] == "WRONG: packed"
    assert outcome_of(numbers(2.0, float("nan"), packed))["outcome"] == "WRONG: packed"
    assert outcome_of(numbers(2.0, 2.1, packed), tolerance=0.1)["outcome"] == "packed"
    assert outcome_of(numbers(2.0, 2.0, padded))["outcome"] == "PEFT's forward: because"
    both = Stats(packed=1, padded={"because": 2})
    assert outcome_of(numbers(2.0, 2.0, both))["outcome"] == "packed 1 of 3 calls, else PEFT's forward: because"
    assert outcome_of(raises(False))["outcome"] == "refused: ValueError: no"
    assert outcome_of(raises(True))["outcome"] == "PEFT raises: ValueError: no"
    assert outcome_of(raises(True), needs=("no_such_package",))["outcome"] == "no_such_package is not installed"


def test_a_reference_stands_in_where_peft_is_wrong_or_raises():
    other = dict(reference=lambda setting, method, accelerated: Run([3.0]), against="another")
    found = outcome_of(numbers(2.0, 3.0, Stats(packed=1)), peft_is_wrong=True, **other)
    assert (found["outcome"], found["against"]) == ("packed", "another")
    found = outcome_of(numbers(2.0, 2.0, Stats(packed=1)), **other)
    assert (found["outcome"], found["against"]) == ("packed", "PEFT")

    def only_accelerated(setting, method, accelerated):
        if not accelerated:
            raise ValueError
        return Run([3.0], Stats(packed=1))

    found = outcome_of(only_accelerated, **other)
    assert (found["outcome"], found["against"]) == ("packed, where PEFT raises", "another")


@pytest.mark.parametrize("fast, right", [(2.0, True), (2.1, False)])
def test_a_wrong_number_is_reported(fast, right, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(integrations, "rows", lambda: [Row("Calls", "name", numbers(2.0, fast, Stats(packed=1)))])
    monkeypatch.setattr(integrations, "DOCS", tmp_path)
    assert integrations.run(tmp_path) == right
    assert ("WRONG" in capsys.readouterr().out) == (not right)
    assert ("| WRONG" in (tmp_path / "integrations.md").read_text()) == (not right)
    assert (tmp_path / "integrations.csv").exists()
