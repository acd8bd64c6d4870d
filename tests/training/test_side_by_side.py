"""Many prompts at once: each is what a run of its own gives."""

import dataclasses
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from training_runs import METHODS, adapter_of, alone, assert_equal_adapters, assert_equal_runs, losses, write_tasks
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

import fastprompt
from fastprompt.cli import main
from fastprompt.training import (
    InputError,
    StackedAdamW,
    TrainedAdapter,
    TrainingRun,
    read_rows,
    sweep,
    train,
    train_tasks,
)
from fastprompt.training.data import rows_by_task
from fastprompt.training.encoding import collate
from fastprompt.training.member import Member
from fastprompt.training.run_data import Data
from fastprompt.training.side_by_side import SideBySide
from fastprompt.training.stacked_adamw import gradient_norms
from fastprompt.training.tasks import folder_names

TASKS = ["a/b", "a b", "Ü", "[x]", "../y"]  # names that are no folders
THREE = {
    name: METHODS[name]
    for name in METHODS
    if name not in ("multitask", "prefix-tuning zero", "prefix-tuning projection zero")
}


@pytest.fixture(scope="session")
def data(files, tmp_path_factory):
    rows = read_rows(files["data"])
    sizes = [4, 9, 6, 13, 8]  # epochs of different numbers of steps
    tasks = [task for task, size in zip(TASKS, sizes) for _ in range(size)]
    return write_tasks(tmp_path_factory.mktemp("tasks") / "tasks.csv", rows[: len(tasks)], lambda i: tasks[i])


@pytest.fixture
def config(config, data):
    """Everything on that a step can have."""
    return dataclasses.replace(
        config, data=data, task_column="task", num_virtual_tokens=4, eval_fraction=0.3, eval_steps=2, batch_size=3,
        steps=None, epochs=2, warmup=2, schedule="cosine", max_grad_norm=0.5, weight_decay=0.1,
    )  # fmt: skip


@pytest.mark.parametrize("changes", THREE.values(), ids=THREE)
def test_each_task_is_a_run_of_its_own(config, tmp_path, changes):
    config = dataclasses.replace(config, **changes)
    trained = train_tasks(config)
    assert [prompt.name for prompt in trained] == sorted(TASKS)
    assert len({prompt.steps for prompt in trained}) > 2
    all_of_them = changes in (METHODS["prompt-tuning"], METHODS["prefix-tuning"], METHODS["p-tuning lstm"])
    for number, prompt in enumerate(trained if all_of_them else trained[1:3]):
        own = alone(config, prompt.name, tmp_path / str(number))
        assert_equal_runs(prompt.history, train(own))
        folder = Path(config.output, prompt.folder)
        assert_equal_adapters(folder, own)
        record, theirs = (json.loads(Path(x, "run.json").read_text()) for x in (folder, own.output))
        assert {**record["config"], "output": own.output} == theirs["config"]
        assert {**record, "config": None} == {**theirs, "config": None}


def by_plain_peft(run, config, rows):
    """Log and adapter of a run of its own on some rows, by PEFT's forward and torch's optimiser.

    ``run`` lends its model, whose prompt is as it was afterwards.
    """
    data, (prompt,) = Data(config, rows), [x for x in run.model.parameters() if x.requires_grad]
    data.encode(run.tokenizer)
    start, history = prompt.detach().clone(), []
    optimizer = torch.optim.AdamW([prompt], lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, config.warmup, data.steps)
    for step, batch in enumerate(data.batches, 1):
        optimizer.zero_grad()
        loss = run.model(**collate([data.features[row] for row in batch])).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([prompt], config.max_grad_norm)
        rate = schedule.get_last_lr()[0]
        history.append({"loss": float(loss), "grad_norm": float(norm), "learning_rate": rate, "step": step})
        optimizer.step()
        schedule.step()
    adapter = prompt.detach().clone()
    prompt.data.copy_(start)
    return history, adapter


def test_three_hundred_prompts_in_one_run(config, files, tmp_path):
    rows = read_rows(files["data"]) * 10
    data = write_tasks(tmp_path / "many.csv", rows, lambda i: f"customer {min(i % 320, 299)}")
    config = dataclasses.replace(
        config, data=data, num_virtual_tokens=8, eval_fraction=None, eval_steps=None, epochs=2, batch_size=2, warmup=0
    )
    trained = train_tasks(config)
    assert len(trained) == 300 and len({prompt.folder for prompt in trained}) == 300
    assert max(prompt.steps for prompt in trained) > 10 * min(prompt.steps for prompt in trained)
    own_rows = rows_by_task(read_rows(data), "task")
    plain = TrainingRun(alone(config, trained[0].name, tmp_path / "plain"), accelerated=False)
    for prompt in trained:
        own = alone(config, prompt.name, tmp_path / "own")
        history, adapter = by_plain_peft(plain, own, own_rows[prompt.name])
        assert_equal_runs(prompt.history, history)
        ours = adapter_of(dataclasses.replace(config, output=str(Path(config.output, prompt.folder))))
        torch.testing.assert_close(ours, adapter, rtol=0, atol=1e-4)
    some = random.choice(trained)
    own = alone(config, some.name, tmp_path / "alone")
    assert_equal_runs(some.history, train(own))
    assert_equal_adapters(Path(config.output, some.folder), own)


def test_each_stops_early_by_itself_and_keeps_its_best(config, tmp_path):
    every = dict(eval_steps=1, save_steps=1, keep_checkpoints=100, epochs=None, steps=7, lr=0.5, warmup=0)
    config = dataclasses.replace(config, **every)
    trained = train_tasks(dataclasses.replace(config, patience=2))
    assert len({prompt.steps for prompt in trained}) > 1 and "stopped early" in {prompt.ended for prompt in trained}
    for number, prompt in enumerate(trained[:4]):
        own = alone(config, prompt.name, tmp_path / str(number))
        history = train(own)
        scores = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        best = 0
        for step, score in enumerate(scores):
            best = step if score < scores[best] else best
            if step - best == 2:
                break
        assert (prompt.steps, prompt.kept_step) == (step + 1, best + 1)
        assert_equal_runs(prompt.history[:-1], history[: len(prompt.history) - 1])
        assert prompt.history[-1]["eval_loss"] == pytest.approx(scores[best], abs=1e-4)
        kept = dataclasses.replace(own, output=str(Path(own.output, f"checkpoint-{best + 1}")))
        assert_equal_adapters(Path(config.output, prompt.folder), kept)
        if number == 0:  # a single run can do the same
            single = alone(config, prompt.name, tmp_path / f"single {number}", patience=2)
            assert_equal_runs(train(single), prompt.history)
            assert_equal_adapters(single.output, kept)


def test_the_best_is_that_of_the_same_rows(config):
    """Evaluations on the way and at the end score the rows that they have in common; then all are scored."""
    config = dataclasses.replace(config, keep_best=True, eval_rows=1, lr=0.5, epochs=6)
    for prompt in train_tasks(config):
        *scored, last = [entry for entry in prompt.history if "eval_loss" in entry]
        assert {entry["eval_rows"] for entry in scored} == {1} and scored[-1]["step"] == last["step"] == prompt.steps
        assert prompt.kept_step == min(scored, key=lambda entry: entry["eval_loss"])["step"]
        adapter = TrainedAdapter(str(Path(config.output, prompt.folder)))
        assert adapter.evaluate()["loss"] == pytest.approx(prompt.eval_loss, rel=1e-5)
        assert adapter.evaluate(config.data)["rows"] > last["eval_rows"]  # of its task alone
    with pytest.raises(InputError, match="holds several runs; expected the folder of one of them: adapters/"):
        TrainedAdapter(config.output)


def test_adapters_are_those_of_plain_peft(config):
    prompt = train_tasks(dataclasses.replace(config, method="p-tuning", init="random", encoder_hidden_size=8))[0]
    folder = str(Path(config.output, prompt.folder))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model), folder)
    torch.testing.assert_close(model.get_prompt(1)[0], TrainedAdapter(folder).model.get_prompt(1)[0])


@pytest.mark.parametrize("halve_at", [None, [2, 3]])
def test_candidates_of_a_sweep_are_runs_of_their_own(config, tmp_path, halve_at):
    config = dataclasses.replace(config, task_column=None, seed=3, epochs=1)
    candidates = sweep(config, [0.3, 0.003], seeds=2, halve_at=halve_at)
    assert {(candidate.lr, candidate.seed) for candidate in candidates} == {
        (lr, seed) for lr in (0.3, 0.003) for seed in (3, 4)
    }
    steps = max(candidate.trained.steps for candidate in candidates)
    halvings = [steps * k // 3 for k in (1, 2)] if halve_at is None else halve_at
    own, logs = {}, {}
    for candidate in candidates:
        key = candidate.lr, candidate.seed
        changes = dict(lr=key[0], seed=key[1], data_seed=3, eval_steps=1, output=str(tmp_path / str(key)))
        own[key] = dataclasses.replace(config, **changes)
        history = train(own[key])
        logs[key] = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
        expected = [entry for entry in history if entry["step"] <= candidate.trained.steps]
        assert losses(candidate.trained.history) == pytest.approx(losses(expected), abs=1e-4)
    left, ended = list(own), {}
    for step in halvings:
        left.sort(key=lambda key: logs[key][step])
        for key in left[(len(left) + 1) // 2 :]:
            ended[key] = step
        left = left[: (len(left) + 1) // 2]
    best = min(left, key=lambda key: logs[key][steps])
    assert {(c.lr, c.seed): c.trained.steps for c in candidates} == {key: ended.get(key, steps) for key in own}
    assert (candidates[0].lr, candidates[0].seed) == best
    assert_equal_adapters(Path(config.output, "best"), own[best])
    table = read_rows(str(Path(config.output, "candidates.csv")))
    assert [float(row["lr"]) for row in table] == [candidate.lr for candidate in candidates]
    result = TrainedAdapter(str(Path(config.output, "best"))).evaluate()
    assert result["loss"] == pytest.approx(candidates[0].trained.eval_loss, rel=1e-5)


def test_a_sweep_of_one_task(config):
    config = dataclasses.replace(config, only_task="a/b")
    best = sweep(config, [0.01, 0.02])[0]
    record = json.loads(Path(config.output, "best", "run.json").read_text())
    assert record["config"]["only_task"] == "a/b" and record["config"]["lr"] == best.lr


def bits(folder):
    """Everything that a run leaves but its checkpoints."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and "checkpoint" not in str(path)]
    return {path.relative_to(folder): path.read_bytes() for path in files if path.suffix != ".md"}


@pytest.mark.parametrize(("method", "of_sweep"), [("p-tuning lstm", False), ("prompt-tuning", True)])
def test_resumed_gives_the_same_bits(config, method, of_sweep):
    changes = dict(save_steps=3, keep_checkpoints=10, lr=0.3, keep_best=True, epochs=4)
    config = dataclasses.replace(config, **METHODS[method], **changes)
    if of_sweep:
        config = dataclasses.replace(config, only_task="[x]")

    def run(config):
        sweep(config, [0.1, 0.3], seeds=2, halve_at=[4, 5]) if of_sweep else train_tasks(config)

    run(config)
    before = bits(config.output)
    checkpoints = sorted(Path(config.output).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(checkpoints) > 2
    for path in [*checkpoints[1:], *Path(config.output).glob("adapters*"), Path(config.output, "best")]:
        shutil.rmtree(path, ignore_errors=True)
    run(dataclasses.replace(config, resume=True))
    after = bits(config.output)
    assert after.keys() == before.keys()
    assert [path for path in after if after[path] != before[path]] == [Path("run.json")]  # which says "resume"
    with pytest.raises(InputError, match="already holds a run"):
        run(config)
    with pytest.raises(InputError, match="has 2, got 1"):  # they choose the weights here
        run(dataclasses.replace(config, resume=True, eval_steps=1))


def side_by_side(config, tasks):
    """The runs of some tasks as the library trains them."""
    from fastprompt.training import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    members = [Member(task, own, Data(own)) for task in tasks for own in [alone(config, task, config.output)]]
    for member in members:
        member.data.encode(tokenizer)
    return SideBySide(config, members, tokenizer, Path(config.output))


def test_what_diverges_leaves_the_others_alone(config, tmp_path):
    run = side_by_side(config, ["a b", "[x]", "Ü"])
    run.stack.values["embedding.weight"][1, 0, 0] = math.inf
    run.train({})
    assert [member.progress.left for member in run.members] == ["finished", "diverged", "finished"]
    for member in (run.members[0], run.members[2]):
        assert_equal_runs(member.history, train(alone(config, member.name, tmp_path / member.name)))


@pytest.mark.parametrize("most", [None, 1, 2])
def test_few_prompts_meet_in_a_batch(config, most):
    config = dataclasses.replace(
        config, prompts_per_step=most, steps=2, epochs=None, eval_fraction=None, eval_steps=None
    )
    run = side_by_side(config, TASKS)
    run.train({})
    batches_of_a_round = {None: 1, 1: 5, 2: 3}[most]
    assert fastprompt.stats(run.model).packed == 2 * batches_of_a_round


@pytest.mark.parametrize("clip", [0.0, 0.7])
def test_stacked_adamw_is_adamw_of_each(clip):
    shapes = {"embedding.weight": (3, 4), "head.bias": (5,)}
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(4, *shape, generator=generator) for name, shape in shapes.items()}
    each = [{name: torch.nn.Parameter(x[i].clone()) for name, x in values.items()} for i in range(4)]
    theirs = [
        torch.optim.AdamW([{"params": [own["embedding.weight"]], "weight_decay": 0.1},
                           {"params": [own["head.bias"]], "weight_decay": 0.0}])
        for own in each
    ]  # fmt: skip
    ours = StackedAdamW(values, weight_decay=0.1, max_grad_norm=clip)
    for step in range(12):
        ids = [i for i in (3, 0, 2, 1) if (step + i) % (i + 1) == 0]
        rates = [0.1 / (step + i + 1) for i in ids]
        gradients = {name: torch.randn(len(ids), *shape, generator=generator) for name, shape in shapes.items()}
        for place, i in enumerate(ids):
            for name, parameter in each[i].items():
                parameter.grad = gradients[name][place].clone()
            if clip:
                torch.nn.utils.clip_grad_norm_(each[i].values(), clip)
            for group in theirs[i].param_groups:
                group["lr"] = rates[place]
            theirs[i].step()
        ours.step(ids, gradients, gradient_norms(gradients), rates)
    for name, x in values.items():
        torch.testing.assert_close(x, torch.stack([own[name].detach() for own in each]), rtol=1e-5, atol=1e-6)
    assert len(set(ours.steps.tolist())) > 2


@given(st.lists(st.text(max_size=80), unique=True, max_size=12))
def test_folders_have_names_everywhere(values):
    names = folder_names([*values, "CON", "con", "ß", "SS", "a" * 200, "a" * 201])
    assert len({name.casefold() for name in names.values()}) == len(names)
    for name in names.values():
        assert name and Path(name).name == name and name not in (".", "..") and not name.startswith(".")
        assert (
            len(name.encode()) <= 255 and name.lower() not in ("con", "nul") and not set(name) & set('\\/:*?"<>|\0\n')
        )


@pytest.mark.parametrize(
    ("changes", "argument", "said"),
    [
        ({"task_column": "no"}, "task_column", "row 1 of data has no column 'no'"),
        ({"task_column": None}, "task_column", "expected the column whose values have a prompt each"),
        ({"only_task": "Ü"}, "task_column", "no only_task"),
        ({"method": "multitask"}, "method", "one of prompt-tuning, prefix-tuning, p-tuning side by side"),
        ({"precision": "fp16"}, "precision", "fp16 scales the loss of all prompts at once"),
        ({"warmup": 4}, "warmup", "task 'a/b': expected at most the run's 2 steps, got 4"),
        ({"verbaliser": {"A": "animal"}}, "verbaliser", "of '../y' in data has label 'P'"),
        ({"template": "{text}" * 30}, "max_length", "the model takes 64"),
    ],
)
def test_errors_come_before_anything_is_written(config, changes, argument, said):
    config = dataclasses.replace(config, **changes)
    with pytest.raises(InputError, match=said) as caught:
        train_tasks(config)
    assert caught.value.argument == argument and not Path(config.output).exists()


def test_a_task_with_too_few_rows_is_named(config, files, tmp_path):
    data = write_tasks(tmp_path / "few.csv", read_rows(files["data"]), lambda i: "few" if i == 7 else "many")
    with pytest.raises(InputError, match=r"at least 2 rows of each task to split, got 1 of 'few'"):
        train_tasks(dataclasses.replace(config, data=data))
    with pytest.raises(InputError, match=r"expected rows of each task, got none of 'few'"):
        train_tasks(dataclasses.replace(config, data=data, eval_fraction=None, eval_data=config.data))
    with pytest.raises(InputError, match=r"no row of data has 'none'; expected one of 'few', 'many'"):
        train(alone(config, "none", config.output, data=data))
    with pytest.raises(InputError, match=r"expected only_task, or train_tasks for all"):
        train(config)


@pytest.mark.parametrize(
    ("changes", "arguments", "argument", "said"),
    [
        ({}, ([0.1, 0.2],), "task_column", "expected only_task"),
        ({"only_task": "Ü"}, ([0.1, 0.1],), "lr", "learning rates that differ"),
        ({"only_task": "Ü"}, ([0.1, -0.1],), "lr", "more than 0"),
        ({"only_task": "Ü"}, ([0.1], 0), "seeds", "at least 1, got 0"),
        ({"only_task": "Ü"}, ([0.1], 2, [3, 2]), "halve_at", "ascending steps"),
        ({"only_task": "Ü"}, ([0.1], 2, [100]), "halve_at", "steps before the last of 4, got 100"),
        ({"task_column": None, "eval_fraction": None, "eval_steps": None}, ([0.1, 0.2],), "eval_fraction", "compared"),
    ],
)
def test_errors_of_a_sweep(config, changes, arguments, argument, said):
    config = dataclasses.replace(config, **changes)
    with pytest.raises(InputError, match=said) as caught:
        sweep(config, *arguments)
    assert caught.value.argument == argument and not Path(config.output).exists()


def test_the_command_line(config, tmp_path, capsys):
    command = [
        "train", "--model", config.model, "--data", config.data, "--text-column", "text", "--label-column", "label",
        "--num-virtual-tokens", "4", "--steps", "2", "--eval-fraction", "0.5", "--task-column", "task", "--output",
    ]  # fmt: skip
    assert main([*command, str(tmp_path / "tasks")]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["prompts"] == 5 and all(task in printed.err for task in TASKS)
    table = read_rows(str(tmp_path / "tasks" / "adapters.csv"))
    assert [row["name"] for row in table] == sorted(TASKS)
    assert main(["eval", "--adapter", str(tmp_path / "tasks" / table[0]["folder"])]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(float(table[0]["eval_loss"]), rel=1e-5)
    options = ["--only-task", "a/b", "--lr", "0.1", "0.2", "--seeds", "2", "--halve-at", "1"]
    assert main([*command, str(tmp_path / "sweep"), *options]) == 0
    assert json.loads(capsys.readouterr().out)["ended"] == "finished"
    assert main([*command, str(tmp_path / "both"), "--seeds", "2"]) == 2
    assert "argument --task-column: a sweep trains candidates for one prompt" in capsys.readouterr().err
