"""Bad calls of the command line: one line that names the option, exit status 2, nothing written, no model loaded for
what can be told without one."""

import csv
import json
import shutil

import pytest
import transformers
from tiny_llama import save_model, save_words

from fastprompt.cli import main


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    save_model(folder / "model")
    save_words(folder / "words.csv")
    assert main([*train(folder), "--output", str(folder / "out"), "--eval-fraction", "0.25"]) == 0
    return folder


def train(folder, **changes):
    options = {
        "model": folder / "model",
        "data": folder / "words.csv",
        "text-column": "text",
        "label-column": "label",
        "template": "Word: {text} kind:",
        "num-virtual-tokens": 2,
        "steps": 1,
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    given = ((name, value) for name, value in options.items() if value is not None)
    return ["train", *(str(part) for name, value in given for part in (f"--{name}", value))]


def fails(capsys, command, option):
    """Run a command that has to fail with one line about an option."""
    capsys.readouterr()
    try:
        status = main(command)
    except SystemExit as exit:  # argparse's own, behind the usage
        status = exit.code
    said = capsys.readouterr()
    assert status == 2 and not said.out.strip()
    lines = said.err.strip().splitlines()
    assert "Traceback" not in said.err and lines[-1].startswith(f"fastprompt {command[0]}: error: ")
    assert f"--{option}" in lines[-1], lines[-1]
    return lines[-1]


@pytest.fixture
def no_model(monkeypatch):
    """No model may be loaded."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)


COUNTS = ["num-virtual-tokens", "steps", "batch-size", "tokens-per-batch", "max-length", "save-steps"]
COUNTS += ["keep-checkpoints", "encoder-hidden-size", "num-ranks"]
BAD_COUNTS = ["0", "-1", "1.5", "x", "nan", ""]
NUMBERS = ["lr", "weight-decay", "max-grad-norm", "epochs", "eval-fraction"]
BAD_NUMBERS = ["inf", "-inf", "nan", "-1", "x", "1e999"]


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in COUNTS for value in BAD_COUNTS] + [(n, value) for n in NUMBERS for value in BAD_NUMBERS]
    + [("lr", "0"), ("lr", "1e30"), ("epochs", "0"), ("eval-fraction", "0"), ("eval-fraction", "1"),
       ("warmup", "-1"), ("seed", "-3"),
       ("warmup", "x"), ("seed", "1.5"), ("eval-steps", "1"), ("eval-rows", "1"), ("method", "lora"), ("init", "zeros"),
       ("schedule", "step"), ("precision", "fp8"), ("encoder", "gru"), ("init-text", "a text"), ("template", "{text"),
       ("template", "no field"), ("verbaliser", "A"), ("source", "nowhere"), ("source-task", "x"), ("data", "no.csv"),
       ("data", "words.txt"), ("model", "./nowhere"), ("gguf-file", "no.gguf"), ("eval-data", "no.csv"),
       ("text-column", "body"), ("label-column", "kind"), ("task-column", "topic"), ("prompt-column", "text")],
)  # fmt: skip
def test_options_of_train(files, tmp_path, capsys, no_model, name, value):
    changes = {name: value, "output": tmp_path / "out"}
    if name == "epochs":
        changes["steps"] = None
    option = {"eval-steps": "eval-steps", "prompt-column": "text-column", "source": "source"}.get(name, name)
    fails(capsys, train(files, **changes), option)
    assert not list(tmp_path.iterdir())


TABLES = {
    "two columns of a name": "text,label,label\ncat,A,A\n",
    "a field too many": "text,label\ncat,A,B\n",
    "a field too few": "text,label\ncat\n",
    "no rows": "text,label\n",
    "nothing": "",
    "an empty label": "text,label\ncat,\n",
    "an open quote": 'text,label\n"cat,A\n',
    "not UTF-8": b"text,label\n\xff\xfe,A\n",
    "another header": "body,label\ncat,A\n",
}
LINES = {
    "not JSON": "{text: 1}\n",
    "no object": "[1, 2]\n",
    "NaN": '{"text": "cat", "label": NaN}\n',
    "Infinity": '{"text": "cat", "label": Infinity}\n',
    "a name twice": '{"text": "cat", "label": "A", "label": "B"}\n',
    "null": '{"text": "cat", "label": null}\n',
    "half a line": '{"text": "cat", "la',
    "nothing": "\n\n",
    "too deep": "[" * 100_000 + "\n",
}


@pytest.mark.parametrize(
    ("suffix", "text"),
    [(".csv", text) for text in TABLES.values()] + [(".jsonl", text) for text in LINES.values()],
    ids=[*(f"csv: {name}" for name in TABLES), *(f"jsonl: {name}" for name in LINES)],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_data(files, tmp_path, capsys, request, suffix, text, command):
    data = tmp_path / f"data{suffix}"
    data.write_bytes(text if isinstance(text, bytes) else text.encode())
    if command == "train":
        request.getfixturevalue("no_model")
        said = fails(capsys, train(files, data=data, output=tmp_path / "out"), "")
        assert any(f"--{name}:" in said for name in ("data", "text-column", "label-column"))
    else:
        fails(capsys, ["eval", "--adapter", str(files / "out"), "--data", str(data)], "data")
    assert [path.name for path in tmp_path.iterdir()] == [data.name]


def test_long_fields_byte_order_marks_and_spaces_around_labels(files, tmp_path, capsys):
    rows = [("a " * 100_000, "A "), ("cat", "A"), ("oak", " P"), ("fern", "P")]
    table = tmp_path / "data.csv"
    with open(table, "w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream).writerows([("text", "label"), *rows])
    lines = tmp_path / "data.jsonl"
    text = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    lines.write_text(text, encoding="utf-8-sig")
    for data in (table, lines):
        out = tmp_path / data.suffix[1:]
        assert main(train(files, data=data, max_length=20, output=out)) == 0
        assert json.loads((out / "run.json").read_text())["verbaliser"] == {"A": "A", "P": "P"}


def test_outputs_that_cannot_be(files, tmp_path, capsys, no_model):
    file = tmp_path / "file"
    file.write_text("")
    for output in (file, file / "inside", file / "deep" / "inside"):
        fails(capsys, train(files, output=output), "output")
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("")
    fails(capsys, train(files, output=other), "output")
    fails(capsys, train(files, output=files / "out"), "output")  # without --resume
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine.txt", "other"]


def copied(files, tmp_path):
    shutil.copytree(files / "out", tmp_path / "run")
    return tmp_path / "run"


COMMANDS = {"eval": [], "generate": ["--prompt", "Word:"]}
BREAK = {
    "no run.json": lambda run: (run / "run.json").unlink(),
    "half of run.json": lambda run: (run / "run.json").write_text((run / "run.json").read_text()[:100]),
    "another run.json": lambda run: (run / "run.json").write_text("[]"),
    "an unknown option": lambda run: (run / "run.json").write_text(
        (run / "run.json").read_text().replace('"schedule"', '"scheduler"')
    ),
    "no adapter_config.json": lambda run: (run / "adapter_config.json").unlink(),
    "half of adapter_config.json": lambda run: (run / "adapter_config.json").write_text('{"peft_type": "PRO'),
    "no weights": lambda run: (run / "adapter_model.safetensors").unlink(),
    "half of the weights": lambda run: (run / "adapter_model.safetensors").write_bytes(
        (run / "adapter_model.safetensors").read_bytes()[:50]
    ),
}


@pytest.mark.parametrize("how", BREAK)
@pytest.mark.parametrize("command", COMMANDS)
def test_broken_runs(files, tmp_path, capsys, command, how):
    run = copied(files, tmp_path)
    BREAK[how](run)
    fails(capsys, [command, "--adapter", str(run), *COMMANDS[command]], "adapter")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name, value", [("adapter", "nowhere"), ("model", "./nowhere"), ("precision", "fp8")])
def test_options_of_eval_and_generate(files, capsys, no_model, command, name, value):
    fails(capsys, [command, "--adapter", str(files / "out"), f"--{name}", value, *COMMANDS[command]], name)


@pytest.mark.parametrize(
    "name, value",
    [("max-new-tokens", "0"), ("max-new-tokens", "x"), ("temperature", "nan"), ("temperature", "inf"),
     ("temperature", "-1"), ("seed", "x"), ("seed", "-1"), ("seed", str(2**32)), ("task", "x")],
)  # fmt: skip
def test_options_of_generate(files, capsys, name, value):
    fails(capsys, ["generate", "--adapter", str(files / "out"), "--prompt", "Word:", f"--{name}", value], name)


def test_rows_held_out_of_a_file_that_changed_are_not_guessed(files, tmp_path, capsys):
    data = tmp_path / "words.csv"
    shutil.copy(files / "words.csv", data)
    run = tmp_path / "run"
    assert main(train(files, data=data, eval_fraction=0.25, output=run)) == 0
    assert main(["eval", "--adapter", str(run)]) == 0
    data.write_text(data.read_text() + "moss,P\n")
    assert "changed since the run" in fails(capsys, ["eval", "--adapter", str(run)], "data")
    assert main(["eval", "--adapter", str(run), "--data", str(data)]) == 0


def other_model(folder, kind, **changes):
    save_model(folder)
    config = kind(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        eos_token_id=0, pad_token_id=0, **changes,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


OTHERS = {
    "another architecture": lambda folder: other_model(folder, transformers.Qwen2Config, num_key_value_heads=2),
    "other weights": lambda folder: other_model(folder, transformers.LlamaConfig, num_key_value_heads=2),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("command", COMMANDS)
def test_another_model_than_the_run_s(files, tmp_path, capsys, command, name):
    model = str(OTHERS[name](tmp_path / "model"))
    said = fails(capsys, [command, "--adapter", str(files / "out"), "--model", model, *COMMANDS[command]], "model")
    assert "the run was trained on" in said


def test_a_model_that_sees_what_follows(files, tmp_path, capsys):
    model = other_model(tmp_path / "bert", transformers.BertConfig)
    said = fails(capsys, train(files, model=model, output=tmp_path / "out"), "model")
    assert "expected a causal language model" in said and not (tmp_path / "out").exists()


def test_a_model_of_half_a_file(files, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(files / "model", model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    fails(capsys, train(files, model=model, output=tmp_path / "out"), "model")


def test_versions(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out.startswith("fastprompt 0.")
