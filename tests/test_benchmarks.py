"""The benchmarks on a tiny model: they run, and they refuse to report a speed-up for a wrong result."""

import csv
from importlib.util import find_spec

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as command
from benchmarks import (
    common,
    encoder_decoder,
    hybrids,
    many_prompts,
    memory,
    methods,
    models,
    serve,
    serving_figures,
    small_ops,
    step,
    trainers,
    trees,
)
from benchmarks.integrations.setting import Setting
from benchmarks.products import Products, pairs
from benchmarks.workloads import IGNORE, Workload, all_workloads, uneven_lengths
from fastprompt import native

TINY = {
    **models.SIZES,
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_the_workloads_have_the_shapes_of_the_issue():
    workloads = all_workloads()
    assert [(w.name, w.all_labels) for w in workloads if w.uneven] == [
        (shape, labels) for labels in (False, True) for shape in ("(100, 16, 48)", "(20, 16, 64)", "(50, 32, 24)")
    ]
    for workload in workloads:
        batch = workload.batch(128)
        assert int(batch["attention_mask"].sum()) == workload.tokens
        assert int((batch["labels"] != IGNORE).sum()) == workload.labels
    assert set(workloads[-2].lengths) == {256}
    assert min(workloads[-1].lengths) == 180 and max(workloads[-1].lengths) == 260


@pytest.mark.parametrize("prompt, batch, longest", [(100, 16, 48), (20, 16, 64), (50, 32, 24), (7, 5, 9)])
def test_uneven_lengths_leave_no_remainder_for_the_floor(prompt, batch, longest):
    lengths = uneven_lengths(prompt, batch, longest)
    assert len(lengths) == batch and min(lengths) > 0 and max(lengths) == longest
    assert (prompt + sum(lengths)) % batch == 0
    assert lengths == uneven_lengths(prompt, batch, longest)


@pytest.mark.parametrize("all_labels", [False, True])
def test_every_provider_computes_what_it_stands_for(all_labels):
    workload = Workload(4, (3, 5, 2), all_labels)
    steps = step.providers(workload, TINY)
    result = step.measure(workload, 1, steps)
    assert result.right
    assert {name: len(times) for name, times in result.times.items()} == dict.fromkeys(
        ["PEFT", "fastprompt", "LoRA", "floor", "products"], 1
    )
    inputs = steps["floor"].inputs
    assert inputs.shape[:2] == (2, 7) and inputs.grad is not None  # 4 + 10 rows, 2 the divisor of 14 next to 3
    assert all(p.grad is None for p in steps["floor"].model.parameters())


def test_the_products_are_those_of_forward_and_input_gradient():
    workload, model = Workload(4, (3, 5, 2), False), models.llama(TINY)
    products = Products(model, workload)
    rows, layers = 4 + 10, TINY["num_hidden_layers"]
    seen = sum(range(1, 5)) + sum(4 + i for length in workload.lengths for i in range(1, length + 1))
    assert pairs(workload) == seen
    linear = sum(x.weight.numel() for x in model.model.modules() if isinstance(x, torch.nn.Linear))
    counted = 4 * rows * linear + 4 * 3 * model.lm_head.weight.numel()
    attention = 12 * TINY["hidden_size"] * seen * layers
    assert abs(products.flop - counted - attention) <= 2 * rows * TINY["hidden_size"] * layers  # whole columns
    with FlopCounterMode(display=False) as counter:
        products()
    assert counter.get_total_flops() == products.flop


def test_a_right_result_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step, "all_workloads", lambda quick: [Workload(4, (3, 5), True, uneven=True)])
    assert step.run(tmp_path, quick=True, sizes=TINY)
    assert "geometric mean" in capsys.readouterr().out
    with open(tmp_path / "step.csv") as stream:
        (record,) = csv.DictReader(line for line in stream if not line.startswith("#"))
    assert float(record["over PEFT"]) > 0 and float(record["overhead"]) > 0


@pytest.mark.parametrize("what", ["loss", "gradient", "nan"])
def test_a_wrong_result_is_refused(what, tmp_path, monkeypatch, capsys):
    class Wrong(step.Training):
        def __call__(self):
            loss = super().__call__()
            if what == "gradient":
                self.parameters[0].grad[0, 0] += 1e-2 * self.parameters[0].grad.norm()
            return {"loss": loss * (1 + 1e-4), "gradient": loss, "nan": loss * torch.nan}[what]

    def with_a_wrong_one(workload, sizes, method):
        steps = original(workload, sizes, method)
        steps["fastprompt"].__class__ = Wrong
        return steps

    original = step.providers
    monkeypatch.setattr(step, "providers", with_a_wrong_one)
    monkeypatch.setattr(step, "all_workloads", lambda quick: [Workload(4, (3, 5), True, uneven=True)])
    assert not step.run(tmp_path, quick=True, sizes=TINY)
    printed = capsys.readouterr().out
    assert "WRONG" in printed and "geometric mean" not in printed and "x over" not in printed
    assert "wrong" in (tmp_path / "step.csv").read_text() and not (tmp_path / "step.png").exists()


def test_every_method_is_right_and_reported(tmp_path, monkeypatch, capsys):
    workload = {
        prompts: Workload(4, (3, 5, 2, 4), True, uneven=True, prompts=prompts) for prompts in (0, 1, models.TASKS)
    }
    monkeypatch.setattr(methods, "uneven_workloads", lambda prompts, quick: [workload[prompts]])
    assert methods.run(tmp_path, quick=True, sizes=TINY)
    assert capsys.readouterr().out.count("geometric mean") == 3
    assert {path.name for path in tmp_path.glob("*.csv")} == {
        "step_prefix-tuning.csv",
        "step_p-tuning.csv",
        "step_multitask_prompt_tuning.csv",
    }


def test_recurrent_layers_are_right_and_reported(tmp_path, monkeypatch, capsys):
    small = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4)
    monkeypatch.setattr(hybrids, "uneven_workloads", lambda quick: [Workload(4, (3, 5, 2, 4), True, uneven=True)])
    assert hybrids.run(tmp_path, quick=True, sizes=hybrids.SIZES | small)
    assert "geometric mean" in capsys.readouterr().out and (tmp_path / "hybrids.csv").exists()


def test_common_text_is_right_and_reported(tmp_path, capsys):
    assert common.run(tmp_path, quick=True, sizes=TINY)
    printed = capsys.readouterr().out
    assert all(method in printed for method in models.METHODS)


@pytest.mark.parametrize("method", ["Prompt Tuning", "Prefix-Tuning", "P-Tuning"])
def test_many_prompts_are_right_and_reported(method, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(many_prompts, "CASES", [(method, 2, 3)] * 4)
    assert many_prompts.run(tmp_path, quick=True, sizes=TINY)
    assert "overhead" in capsys.readouterr().out and (tmp_path / "many_prompts.csv").exists()


def test_memory_compares_two_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "METHODS", memory.METHODS[:1])
    assert memory.run(tmp_path, quick=True, sizes=TINY)
    assert "of PEFT's peak" in capsys.readouterr().out
    assert (tmp_path / "memory.csv").exists()


@pytest.mark.parametrize("right", [True, False])
def test_serving_is_reported_unless_a_row_has_other_tokens(right, tmp_path, monkeypatch, capsys):
    grouped = serve.Requests.grouped
    if not right:
        monkeypatch.setattr(serve.Requests, "grouped", lambda self, clock: grouped(self, clock) + 1)
    assert serve.run(tmp_path, quick=True, sizes=TINY, numbers=(1, 3), new=3) == right
    assert ("WRONG" in capsys.readouterr().out) != right
    assert (tmp_path / "serve.csv").exists()
    assert "## Many prompts in one batch" in serving_figures.document(tmp_path)


def test_the_figures_of_serving_are_those_of_their_csv():
    """After a change: python -m benchmarks serve serve_load."""
    written = serving_figures.DOCUMENT
    assert written.read_text(encoding="utf-8") == serving_figures.document(written.parents[1] / "benchmarks/results")


@pytest.mark.parametrize("right", [True, False])
def test_trainers_are_reported_unless_a_step_is_wrong(right, tmp_path, monkeypatch, capsys):
    def without_a_key(model):
        forward = accelerate(model).forward

        def of_less(attention_mask, **given):
            return forward(attention_mask=attention_mask.index_fill(1, torch.tensor([0]), 0), **given)

        vars(model).update(forward=of_less)

    setting, accelerate = Setting(tmp_path / "model"), trainers.fastprompt.accelerate
    if not right:
        monkeypatch.setattr(trainers.fastprompt, "accelerate", without_a_key)
    monkeypatch.setattr(trainers, "read", lambda steps: (setting.base(), setting.tokenizer, setting.texts()))
    monkeypatch.setattr(trainers, "ROWS", 4)
    monkeypatch.setattr(trainers, "TRAINERS", {"Trainer": trainers.plain_trainer})
    monkeypatch.setattr(trainers, "METHODS", {"Prefix-Tuning": trainers.METHODS["Prefix-Tuning"]})
    assert trainers.run(tmp_path, quick=True) == right
    printed = capsys.readouterr().out
    assert ("WRONG" in printed) != right and "'loss'" not in printed
    assert (tmp_path / "trainers.csv").exists()


@pytest.mark.skipif(native.missing is not None, reason=str(native.missing))
@pytest.mark.parametrize("wrong", [None, "prompt_concat", "multitask_prompt"])
def test_small_operators_are_reported_unless_they_are_wrong(wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(small_ops, "VOCABULARY", 64)
    monkeypatch.setattr(small_ops, "CONCAT", [(24, 40, 3, 4)])
    monkeypatch.setattr(small_ops, "MULTITASK", [(2, 5, 2, 40)])
    if wrong:
        right = getattr(small_ops, wrong)
        monkeypatch.setattr(small_ops, wrong, lambda *a, **options: right(*a, **options) * 1.1)
    assert small_ops.run(tmp_path, quick=True) == (wrong is None)
    with open(tmp_path / "small_ops.csv") as stream:
        records = list(csv.DictReader(line for line in stream if not line.startswith("#")))
    assert {r["operator"] for r in records if r["over PyTorch"] == "WRONG"} == ({wrong} if wrong else set())
    assert (tmp_path / "small_ops.png").exists() == (wrong is None and find_spec("matplotlib") is not None)


@pytest.mark.parametrize("right, code", [(True, 0), (False, 1)])
def test_the_exit_status_tells_of_a_wrong_result(right, code, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "BENCHMARKS", {"step": lambda out, quick: right, "memory": lambda out, quick: True})
    assert command.main(["--quick", "--out", str(tmp_path)]) == code
    with pytest.raises(SystemExit):
        command.main(["nothing"])


def test_trees_are_right_and_reported(tmp_path, capsys):
    assert trees.run(tmp_path, quick=True, sizes=TINY, groups=trees.Groups(3, 4, 24, 5))
    with open(tmp_path / "trees.csv") as stream:
        records = list(csv.DictReader(line for line in stream if not line.startswith("#")))
    assert [record["step"] for record in records] == ["trees", "trees", "LoRA trees", "trees", "LoRA trees"]
    rows = 20 + 3 * 24 + 12 * (5 - 1)  # nothing is predicted from a last token
    assert records[0]["rows"] == f"{20 + 12 * (29 - 1)} {rows}"
    assert all(float(record["ratio"]) > 0 for record in records)


@pytest.mark.parametrize("name", encoder_decoder.MODELS)
def test_encoder_decoders(name):
    sizes = dict(width=32, inner=48, layers=2, heads=4, vocabulary=128)
    workload = encoder_decoder.Pairs(4, (3, 5, 2), (2, 1, 4))
    steps = encoder_decoder.providers(encoder_decoder.MODELS[name], workload, sizes)
    assert step.measure(workload, 1, steps).right
    sources, targets = 3 * (4 + 5) / (3 * 4 + 10), 3 * 4 / 7  # padded over real rows
    assert sources < workload.ratio(steps["PEFT"].model.get_base_model()) < targets
