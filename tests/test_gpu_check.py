"""The check on a GPU: what of it runs without one."""

import json
import os
import sys
import time
from functools import partial

import pytest
import torch

from benchmarks import models
from benchmarks.budget import Budget
from benchmarks.gpu import check, measure, operators, record
from benchmarks.gpu.apart import apart
from benchmarks.gpu.record import Row
from benchmarks.gpu.rivals import Attention, ours, providers
from benchmarks.gpu.steps import steps
from benchmarks.workloads import Workload
from fastprompt.backends import OPERATORS


def test_it_says_at_once_that_it_needs_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main(["--out", str(tmp_path)]) == 2
    assert "needs a GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_small_calls_of_every_operator_are_right():
    rows = operators.small("cpu")
    assert {row.section for row in rows} == {"attention", "features", "decode", *OPERATORS} - {"prefix_attention"}
    for row in rows:
        assert row.right or row.provider == "FlexAttention" and "backward on CPU" in row.note, row
    assert not record.failures(rows)


@pytest.mark.parametrize("dtype, value_dim", [(torch.float32, 8), (torch.bfloat16, None)])
def test_rivals_compute_the_same_attention(dtype, value_dim):
    problem = Attention(4, 2, 16, 5, (7, 3, 12), dtype, "cpu", value_dim)
    inputs = [x.detach() for x in problem.tensors()[0]]  # FlexAttention on a CPU takes none that want gradients
    with torch.no_grad():
        budget = Budget.of(lambda _: [ours(problem, "reference")(*(x.double() for x in inputs))], dtype)
        for name, run in providers(problem).items():
            assert budget.ratio([run(*inputs)]) <= 1, name
            assert budget.ratio([run(inputs[0], inputs[1].roll(1, 0), *inputs[2:])]) > 1, name  # keys one row on


def test_steps_are_checked_and_timed():
    sizes = {**models.SIZES, "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    rows = steps("cpu", [Workload(4, (3, 5, 2), True)], sizes, ("Prompt Tuning",), rounds=1)
    assert [row.provider for row in rows] == ["PEFT", "fastprompt", "LoRA", "floor"] * 2
    assert not record.failures(rows) and len(record.speed_ups(rows)) == 2
    assert {opponent for opponent, _ in record.speed_ups(rows).values()} == {"PEFT"}


def test_a_speed_up_is_given_only_next_to_passed_checks():
    right = record.Row("attention", "a", "fastprompt", 0.5, [2.0, 1.0, 9.0], 3.0)
    wrong = record.Row("attention", "a", "SDPA", 1.5, [6.0])
    assert record.speed_ups([right, wrong]) == {} and record.failures([right, wrong]) == []
    wrong.error = 0.9
    assert record.speed_ups([right, wrong]) == {("attention", "a"): ("SDPA", 3.0)}
    for error in (1.5, float("nan"), None):
        right.error = error
        assert record.speed_ups([right, wrong]) == {}
    right.error = float("nan")
    text = record.markdown([right, wrong], {"device": "a card"})
    assert record.failures([right]) == [right] and "WRONG" in text and "none given" in text and "x over" not in text


def test_a_wrong_provider_is_found(tmp_path):
    problem = Attention(2, 1, 16, 3, (4, 6), torch.float32, "cpu")
    inputs, grad = problem.tensors()

    def off(*x):
        return ours(problem, "reference")(*x) * 1.001

    exact = measure.exactly(ours(problem, "reference"), inputs, grad)
    rows = measure.compare("attention", "a", {"fastprompt": off}, exact, inputs, grad, "cpu", rounds=1, calls=1)
    assert len(record.failures(rows)) == 2
    record.write(rows, {"device": "a card"}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a_card.json", "a_card.md"}


def test_programs_report_their_exit_status():
    good = check.outside("x", [sys.executable, "-c", "print('fine')"], 60)
    bad = check.outside("x", [sys.executable, "-c", "raise SystemExit(3)"], 60)
    assert good.right and good.note == "fine" and record.failures([good, bad]) == [bad]


def test_what_was_found_is_written_whatever_a_later_part_does(tmp_path):
    good = record.Row("attention", "a", "fastprompt", 0.5)

    def broken():
        raise RuntimeError("out of memory")

    written = []

    def write(rows, took):
        written.append(len(rows))
        record.write(rows, {"device": "a card", "took": took}, tmp_path)

    rows = check.run_parts({"a": lambda: [good], "b": broken, "c": lambda: [good]}, write)
    assert [row.error for row in rows] == [0.5, float("inf"), 0.5] and "out of memory" in rows[1].note
    assert written == [1, 2, 3] and record.failures(rows) == [rows[1]]
    assert len(json.loads((tmp_path / "a_card.json").read_text())["rows"]) == 3


def test_no_part_starts_after_the_time_is_over():
    rows = check.run_parts({"a": lambda: pytest.fail("was started")}, lambda rows, took: None, limit=-1)
    assert [row.error for row in rows] == [None] and "not run" in rows[0].note and not record.failures(rows)


def test_a_part_that_ends_its_process_or_hangs_ends_no_other():
    parts = {
        "right": partial(apart, partial(Row, "attention", "a", "fastprompt", 0.5), 60),
        "ends": partial(apart, partial(os._exit, 3), 60),
        "hangs": partial(apart, partial(time.sleep, 600), 1),
        "raises": partial(apart, partial(int, "x"), 60),
    }
    assert parts.pop("right")().right
    rows = check.run_parts(parts, lambda rows, took: None)
    notes = ["ended with status 3", "not finished after 1 s", "ValueError"]
    assert all(row.error == float("inf") and note in row.note for note, row in zip(notes, rows, strict=True))
