"""Evaluation and generation, of a run and of the adapter that it left."""

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from needs import needs
from tiny_llama import save_gguf
from training_runs import METHODS, WORDS, encoder_of, every_method, losses
from transformers import AutoModelForCausalLM

from fastprompt.training import (
    Encoded,
    InputError,
    TrainedAdapter,
    TrainingConfig,
    TrainingRun,
    collate,
    completion_log_probs,
    encode,
    features,
    train,
)


@pytest.mark.parametrize("words", [WORDS, {"A": "animal cat", "P": "dog"}], ids=["one token", "several tokens"])
@every_method
def test_evaluation_is_what_peft_computes(config, words, changes):
    config = dataclasses.replace(config, **changes, verbaliser=words, eval_data=config.data)
    run = TrainingRun(config, accelerated=False)
    task_ids = [run.data.task.task_id(example.task) for example in run.data.held_out]
    scores = []
    with torch.no_grad():
        if config.method == "multitask":  # tasks of their own must matter
            encoder_of(run).prefix_task_cols.add_(torch.arange(3)[:, None, None])
        for example, task_id in zip(run.data.held_out, task_ids):
            row = []
            for label in words:
                (pair,) = encode(run.tokenizer, [example.prompt], [run.data.task.completion(example.prompt, label)])
                mean = run.model(**collate(features([pair], [task_id]))).loss
                row.append(-mean.item() * len(pair.completion))
            scores.append(row)
    right = [list(words).index(example.label) for example in run.data.held_out]
    tokens = sum(len(row.completion) for row in run.data.held_out_ids)
    result = run.evaluate()
    assert result["accuracy"] == sum(max(row) == row[i] for row, i in zip(scores, right)) / len(right)
    assert result["loss"] == pytest.approx(-sum(row[i] for row, i in zip(scores, right)) / tokens, rel=1e-5)
    assert result["rows"] == len(right)
    for name, part in result.get("tasks", {}).items():
        rows = [i for i, example in enumerate(run.data.held_out) if example.task == name]
        assert part["accuracy"] == sum(max(scores[i]) == scores[i][right[i]] for i in rows) / len(rows)
        assert part["rows"] == len(rows)


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning", "multitask"])
def test_prompt_from_text_starts_as_that_hard_prompt(config, tokenizer, method):
    text = "Word: cat dog"
    length = len(tokenizer(text)["input_ids"])
    start = {"method": method, "init": "text", "init_text": text, "num_virtual_tokens": length}
    run = TrainingRun(dataclasses.replace(config, **start))
    pair = run.data.train_ids[0]
    hard = tokenizer(text)["input_ids"] + pair.prompt + pair.completion
    logits = AutoModelForCausalLM.from_pretrained(config.model)(torch.tensor([hard])).logits[0].log_softmax(-1)
    expected = sum(logits[len(hard) - len(pair.completion) + i - 1, token] for i, token in enumerate(pair.completion))
    assert completion_log_probs(run.model, [pair]).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("interrupted", [False, True])
def test_every_module_gets_its_own_mode_back_after_an_evaluation(config, monkeypatch, interrupted):
    model = TrainingRun(config).model
    model.train().get_base_model().eval()  # what people do to a frozen model with dropout
    before = {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 2
    pairs, seen = [Encoded([1, 2], [3]), Encoded([1], [2, 3])], []

    def record(module, args):
        seen.append(any(module.training for module in model.modules()))
        if interrupted:
            raise KeyboardInterrupt

    model.get_base_model().register_forward_pre_hook(record)
    with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
        completion_log_probs(model, pairs)
    assert seen and not any(seen)
    assert {name: module.training for name, module in model.named_modules()} == before


@every_method
def test_trained_adapter_evaluates_what_the_run_held_out(config, changes):
    history = train(dataclasses.replace(config, **changes, eval_fraction=0.25))
    adapter = TrainedAdapter(config.output)
    result = adapter.evaluate()
    held_out = {name: value for name, value in history[-1].items() if name != "step"}
    found = {f"eval_{name}": value for name, value in result.items()}
    torch.testing.assert_close(found, held_out, rtol=1e-6, atol=0)
    assert adapter.evaluate(config.data)["rows"] == 64


@every_method
def test_generates_the_most_probable_tokens(config, changes):
    train(dataclasses.replace(config, **changes))
    adapter = TrainedAdapter(config.output)
    task = "z" if "task_column" in changes else None
    prompt = adapter.task.prompt("cat")
    ids = start = adapter.tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(3):
            logits = adapter.model(ids, torch.ones_like(ids), task_ids=torch.tensor([2 if task else 0])).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    expected = adapter.tokenizer.decode(ids[0, start.shape[1] :], skip_special_tokens=True)
    assert adapter.generate(prompt, max_new_tokens=3, task=task) == expected


def test_one_task_of_a_multitask_run(config):
    history = train(dataclasses.replace(config, **METHODS["multitask"], eval_fraction=0.5))
    adapter = TrainedAdapter(config.output)
    assert list(json.loads(Path(config.output, "run.json").read_text())["tasks"]) == ["x", "y", "z"]
    everything, one = adapter.evaluate(), adapter.evaluate(task="y")
    assert one["tasks"] == {"y": everything["tasks"]["y"]} and one["rows"] == everything["tasks"]["y"]["rows"]
    assert history[-1]["eval_tasks"] == everything["tasks"]
    for wrong in (None, "w"):
        with pytest.raises(InputError, match=rf"expected one of \['x', 'y', 'z'\], got {wrong!r}") as caught:
            adapter.generate("cat", task=wrong)
        assert caught.value.argument == "task"
    with pytest.raises(InputError, match="expected one of"):
        adapter.evaluate(task="w")


def test_a_run_without_tasks_takes_none(config):
    train(config)
    with pytest.raises(InputError, match="the run has no tasks, got 'x'"):
        TrainedAdapter(config.output).generate("cat", task="x")


@needs("transformers", "5.5", "reads other weights from a GGUF file")
def test_gguf_trains_like_the_folder_it_was_made_of(config, tmp_path):
    pytest.importorskip("gguf")
    folder = tmp_path / "gguf"
    folder.mkdir()
    save_gguf(config.model, folder / "tiny.gguf")
    start = {"init": "text", "init_text": "Word: cat", "eval_data": config.data}
    packed = {**start, "model": str(folder), "gguf_file": "tiny.gguf", "output": str(tmp_path / "b")}
    history = train(dataclasses.replace(config, **start))
    packed_history = train(dataclasses.replace(config, **packed))
    assert losses(packed_history) == pytest.approx(losses(history), rel=1e-5)
    assert TrainedAdapter(packed["output"]).evaluate()["loss"] == pytest.approx(history[-1]["eval_loss"], rel=1e-5)


def test_free_text_learns_to_stop(files, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"q": "cat", "a": " animal"}\n{"q": "oak", "a": " plant"}\n')
    config = TrainingConfig(
        model=files["model"], data=str(data), output=str(tmp_path / "out"), prompt_column="q", completion_column="a",
        num_virtual_tokens=16, init="vocab", lr=0.1, steps=60, max_grad_norm=0, eval_data=str(data),
    )  # fmt: skip
    history = train(config)
    assert history[-1]["eval_loss"] < losses(history)[0] / 2 and "eval_accuracy" not in history[-1]
    adapter = TrainedAdapter(config.output)
    assert adapter.generate("cat", max_new_tokens=2) == adapter.generate("cat", max_new_tokens=2)
    sampled = adapter.generate("cat", max_new_tokens=8, temperature=5.0, seed=1)
    assert sampled == adapter.generate("cat", max_new_tokens=8, temperature=5.0, seed=1)
