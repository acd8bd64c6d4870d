"""The command line: train, eval, generate, inspect, doctor."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftConfig
from tiny_llama import save_model, save_words

from fastprompt.cli import main
from fastprompt.training import read_rows

TRAIN = ["train", "--model", ".", "--output", "o"]
COLUMNS = ["--text-column", "t", "--label-column", "l"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    arguments = [
        "--model", save_model(folder / "model"), "--data", save_words(folder / "words.csv"),
        "--text-column", "text", "--label-column", "label", "--template", "Word: {text}\\nkind:",
        "--verbaliser", "A=animal", "P=plant", "--eval-fraction", "0.25",
        "--method", "prompt-tuning", "--num-virtual-tokens", "8", "--init", "text", "--init-text", "Word: cat",
        "--lr", "0.05", "--schedule", "cosine", "--warmup", "2", "--steps", "40", "--tokens-per-batch", "120",
        "--seed", "3", "--save-steps", "20", "--eval-steps", "20", "--eval-rows", "8", "--gradient-checkpointing",
        "--output", str(folder / "out"),
    ]  # fmt: skip
    assert main(["train", *arguments]) == 0
    return folder / "out", arguments


def test_train_leaves_adapter_log_and_configuration(trained):
    out, _ = trained
    assert PeftConfig.from_pretrained(str(out)).num_virtual_tokens == 8
    history = json.loads((out / "log.json").read_text())["history"]
    assert history[-1]["step"] == 40 and history[-1]["eval_rows"] == 16
    assert history[-1]["eval_loss"] < history[0]["loss"]
    config = json.loads((out / "run.json").read_text())["config"]
    assert config["template"] == "Word: {text}\nkind:" and config["verbaliser"] == {"A": "animal", "P": "plant"}


def test_train_resumes(trained, capsys):
    _, arguments = trained
    assert main(["train", *arguments, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 40


def test_eval_prints_json(trained, capsys):
    out, arguments = trained
    assert main(["eval", "--adapter", str(out)]) == 0
    held_out = json.loads(capsys.readouterr().out)
    assert main(["eval", "--adapter", str(out), "--data", arguments[3]]) == 0
    everything = json.loads(capsys.readouterr().out)
    assert (held_out["rows"], everything["rows"]) == (16, 64)
    assert 0 <= everything["accuracy"] <= 1 and everything["loss"] > 0


def test_generate_completes_texts(trained, capsys):
    out, _ = trained
    assert main(["generate", "--adapter", str(out), "--max-new-tokens", "1", "--text", "cat", "oak moss"]) == 0
    answers = capsys.readouterr().out
    assert (
        main(
            [
                "generate",
                "--adapter",
                str(out),
                "--max-new-tokens",
                "1",
                "--prompt",
                "Word: cat\nkind:",
                "Word: oak moss\nkind:",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out == answers and len(answers.splitlines()) == 2


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "prefix-tuning", "--init", "text", "--init-text", "Word: cat"],
        ["--method", "prefix-tuning", "--projection", "--encoder-hidden-size", "8"],
        ["--method", "p-tuning", "--encoder", "mlp", "--encoder-hidden-size", "8"],
    ],
    ids=lambda options: " ".join(options[1:3]),
)
def test_every_method_trains_and_generates(trained, tmp_path, capsys, options):
    out, arguments = str(tmp_path / "out"), trained[1]
    data = arguments[: arguments.index("--method")]
    assert main(["train", *data, *options, "--num-virtual-tokens", "4", "--steps", "2", "--output", out]) == 0
    result = json.loads(capsys.readouterr().out)
    assert main(["eval", "--adapter", out]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == result["eval_accuracy"]
    assert main(["generate", "--adapter", out, "--text", "cat", "--max-new-tokens", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_multitask_and_its_target(trained, tmp_path, capsys):
    _, arguments = trained
    data = tmp_path / "tasks.csv"
    rows = read_rows(arguments[3])
    with data.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*rows[0], "topic"])
        writer.writeheader()
        writer.writerows({**row, "topic": ("a", "b")[i % 2]} for i, row in enumerate(rows))
    common = [*arguments[: arguments.index("--method")], "--method", "multitask", "--num-virtual-tokens", "4"]
    common += ["--num-ranks", "2", "--steps", "2", "--output"]
    common[common.index("--data") + 1] = str(data)
    source, target = str(tmp_path / "source"), str(tmp_path / "target")
    assert main(["train", *common, source, "--task-column", "topic"]) == 0
    assert list(json.loads(capsys.readouterr().out)["eval_tasks"]) == ["a", "b"]
    assert main(["eval", "--adapter", source, "--task", "b"]) == 0
    assert list(json.loads(capsys.readouterr().out)["tasks"]) == ["b"]
    assert main(["generate", "--adapter", source, "--text", "cat", "--max-new-tokens", "1", "--task", "b"]) == 0
    capsys.readouterr()
    assert main(["generate", "--adapter", source, "--text", "cat"]) == 2
    assert "argument --task: expected one of ['a', 'b'], got None" in capsys.readouterr().err
    assert main(["train", *common, target, "--source", source, "--source-init", "exact", "--source-task", "b"]) == 0
    assert "eval_tasks" not in json.loads(capsys.readouterr().out)
    assert main(["generate", "--adapter", target, "--text", "cat", "--max-new-tokens", "1"]) == 0


def test_inspect_names_the_nearest_tokens(trained, capsys):
    out, _ = trained
    assert main(["inspect", "--adapter", str(out), "--top", "1", "--json"]) == 0
    (prompt,) = json.loads(capsys.readouterr().out)["prompts"]
    assert len(prompt["virtual_tokens"]) == 8 and len(prompt["virtual_tokens"][0]["nearest"]) == 1
    assert main(["inspect", "--adapter", str(out), "--top", "0"]) == 2
    assert "argument --top: expected at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["train"], ["eval"], ["generate"], ["serve"], ["inspect"]], ids=" ".join)
def test_help_answers_without_torch(command):
    run = f"import sys; sys.modules['torch'] = None; from fastprompt.cli import main; main({[*command, '--help']})"
    result = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "usage: fastprompt" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ([*TRAIN, "--data", "d.csv", "--steps", "1"], "--text-column: expected text_column"),
        ([*TRAIN, "--data", "d.csv", "--steps", "0", *COLUMNS], "--steps: expected at least 1, got 0"),
        ([*TRAIN, "--data", "d.txt", "--steps", "1", *COLUMNS], "'d.txt' ends in '.txt'"),
        (
            [*TRAIN, "--data", "d.csv", "--steps", "1", *COLUMNS, "--only-task", "t"],
            "--only-task: expected a task_column too",
        ),
        (
            [*TRAIN, "--data", "d.csv", "--steps", "1", *COLUMNS, "--halve-at", "1"],
            "--halve-at: only a sweep drops candidates; expected several --lr or --seeds",
        ),
        (["eval", "--adapter", "."], "--adapter"),
        (["inspect", "--adapter", "."], "--adapter"),
    ],
)
def test_errors_name_the_option(command, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    assert said in capsys.readouterr().err
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "command", [["train", "--steps", "many"], ["train", "--verbaliser", "A"], ["generate"], ["no"], []]
)
def test_unparsable_commands_exit_with_usage(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main(command)
    assert exit.value.code == 2 and "usage:" in capsys.readouterr().err


def test_doctor_is_called(monkeypatch):
    monkeypatch.setattr("fastprompt.doctor.main", lambda: 1)
    assert main(["doctor"]) == 1


def test_help_needs_no_torch():
    show = """
import sys
from fastprompt.cli import main
try:
    main(["--help"])
except SystemExit:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("usage: fastprompt") and done.stdout.endswith("False\n"), done.stderr
