"""fastprompt.training: data to batches, exactness, repeatability, being killed, and errors before anything is written."""

import csv
import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_llama import save_gguf, save_model, save_words
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastprompt.training import (
    Encoded,
    Example,
    InputError,
    Task,
    TrainedAdapter,
    TrainingConfig,
    TrainingRun,
    collate,
    completion_log_probs,
    encode,
    encode_examples,
    features,
    plan_batches,
    read_rows,
    split_rows,
    train,
)

WORDS = {"A": "animal", "P": "plant"}

# What each method changes in the fixture `config`.
METHODS = {
    "prompt-tuning": {},
    "prefix-tuning": {"method": "prefix-tuning", "init": "random"},
    "prefix-tuning zero": {"method": "prefix-tuning", "init": "zero"},
    "prefix-tuning text": {"method": "prefix-tuning", "init": "text", "init_text": "Word: cat"},
    "prefix-tuning projection": {
        "method": "prefix-tuning",
        "init": "random",
        "projection": True,
        "encoder_hidden_size": 8,
    },
    "prefix-tuning projection zero": {"method": "prefix-tuning", "init": "zero", "projection": True},
    "p-tuning lstm": {"method": "p-tuning", "init": "random", "encoder_hidden_size": 8},
    "p-tuning mlp": {"method": "p-tuning", "init": "random", "encoder": "mlp"},
    "multitask": {"method": "multitask", "task_column": "topic", "num_ranks": 2},
}
every_method = pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    data = save_words(folder / "words.csv")
    rows = read_rows(data)
    with open(data, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([*rows[0], "topic"])
        writer.writerows([*row.values(), ("y", "x", "z")[i % 3]] for i, row in enumerate(rows))
    return {"model": save_model(folder / "model"), "data": data}


@pytest.fixture(scope="module")
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


def losses(history):
    return [entry["loss"] for entry in history if "loss" in entry]


def adapter_of(config):
    return load_file(Path(config.output, "adapter_model.safetensors"))["prompt_embeddings"]


def encoder_of(run):
    return run.model.prompt_encoder["default"]


# Data


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", '\ufefftext,label\n"two, with\na break",1\nü,2\n'),
        ("a.TSV", 'text\tlabel\n"two, with\na break"\t1\nü\t2\n'),
        ("a.jsonl", '{"text": "two, with\\na break", "label": 1}\n\n{"text": "ü", "label": "2"}\n'),
    ],
)
def test_reads_every_format(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    rows = read_rows(str(tmp_path / name))
    assert rows == [{"text": "two, with\na break", "label": "1"}, {"text": "ü", "label": "2"}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.xlsx", b"x", r"'\.xlsx'; expected \.csv, \.tsv or \.jsonl"),
        ("a.csv", b"", "no rows"),
        ("a.csv", b"text,label\n", "no rows"),
        ("a.csv", b"text,label\nonly\n", "line 2: expected 2 fields"),
        ("a.csv", b"text,label\n1,2,3\n", "line 2: expected 2 fields"),
        ("a.csv", b"text\n\xff\xfe\n", "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', "line 2: not JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "line 2: expected an object"),
    ],
)
def test_unreadable_data_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        read_rows(str(tmp_path / name), "eval_data")
    assert caught.value.argument == "eval_data"


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.csv' is not a file"):
        read_rows(str(tmp_path / "nowhere.csv"))


def test_split_is_seeded_and_complete():
    train_rows, held_out = split_rows(range(100), 0.25, seed=3)
    assert len(held_out) == 25 and sorted(train_rows + held_out) == list(range(100))
    assert (train_rows, held_out) == split_rows(range(100), 0.25, seed=3)
    assert held_out != split_rows(range(100), 0.25, seed=4)[1]


def test_rows_become_prompts_and_words():
    task = Task("question", "kind", template="{topic}: {text} ", verbaliser={"1": "one"})
    row = {"question": "how {many}?", "kind": "1", "topic": "maths"}
    assert task.examples([row]) == [Example("maths: how {many}?", " one", "1")]
    # Behind a line break a word starts without a space.
    assert dataclasses.replace(task, template="{text}\n").examples([row])[0].completion == "one"
    # Without a verbaliser labels are their own words.
    assert Task("question", "kind").with_words_of([row]).examples([row]) == [Example("how {many}?", " 1", "1")]
    free = Task(prompt_column="question", completion_column="kind")
    assert free.examples([row]) == [Example("how {many}?", "1", None)]


@pytest.mark.parametrize(
    ("changes", "argument", "said"),
    [
        ({"text_column": "no"}, "text_column", "no column 'no'; expected one of"),
        ({"label_column": "no"}, "label_column", "no column 'no'"),
        ({"template": "{no}"}, "template", r"asks for 'no'; expected fields of \['text', 'x', 'y'\]"),
        ({"verbaliser": {"2": "two"}}, "verbaliser", r"row 1 of data has label '1'; expected one of \['2'\]"),
    ],
)
def test_rows_that_do_not_fit_the_task_are_named(changes, argument, said):
    task = dataclasses.replace(Task("x", "y", verbaliser={"1": "one"}), **changes)
    with pytest.raises(InputError, match=said) as caught:
        task.examples([{"x": "a", "y": "1"}])
    assert caught.value.argument == argument


def test_tasks_are_sorted_and_have_labels_of_their_own():
    rows = [{"x": "1", "y": "b", "t": "two"}, {"x": "2", "y": "a", "t": "one"}, {"x": "3", "y": "a", "t": "two"}]
    task = Task("x", "y", task_column="t").with_words_of(rows).with_tasks_of(rows)
    assert task.tasks == {"one": ["a"], "two": ["a", "b"]} and list(task.tasks) == ["one", "two"]
    assert [task.task_id(example.task) for example in task.examples(rows)] == [1, 0, 1]
    assert task.labels("one") == ["a"]
    with pytest.raises(InputError, match=r"row 1 of data has task 'three'; expected one of \['one', 'two'\]"):
        task.examples([{**rows[0], "t": "three"}])
    with pytest.raises(InputError, match=r"has label 'b'; task 'one' has \['a'\]"):
        task.examples([{**rows[0], "t": "one"}])
    free = Task(prompt_column="x", completion_column="y", task_column="t").with_tasks_of(rows)
    assert free.tasks == {"one": [], "two": []} and free.examples(rows)[0].task == "two"


# Token ids and batches


def test_labels_stand_on_the_completion(tokenizer):
    texts = ["Word: cat kind:", "Word: oak, moss kind:"], [" animal", " plant"]
    encoded = encode(tokenizer, *texts)
    for (prompt, completion), text, word in zip(encoded, *texts):
        assert tokenizer.decode(prompt + completion) == text + word
        assert tokenizer.decode(completion) == word
    batch = collate(features(encoded))
    for i, (prompt, completion) in enumerate(encoded):
        length = len(prompt) + len(completion)
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        assert batch["input_ids"][i, :length].tolist() == prompt + completion
        assert batch["labels"][i][batch["labels"][i] != -100].tolist() == completion
        assert batch["labels"][i, len(prompt)] == completion[0]


def test_free_text_ends_with_the_end_token(tokenizer):
    (row,) = encode_examples(tokenizer, [Example("a", " b")])
    assert row.completion[-1] == tokenizer.eos_token_id
    (row,) = encode_examples(tokenizer, [Example("a", " b", label="b")])
    assert row.completion[-1] != tokenizer.eos_token_id


def test_long_rows_lose_the_start_of_their_prompt(tokenizer):
    example = Example("Word: cat dog horse kind:", " animal", "A")
    (whole,) = encode_examples(tokenizer, [example])
    (cut,) = encode_examples(tokenizer, [example], max_length=6)
    assert cut.completion == whole.completion and whole.prompt[-len(cut.prompt) :] == cut.prompt
    assert len(cut.prompt) + len(cut.completion) == 6
    with pytest.raises(InputError, match="max_length"):
        encode_examples(tokenizer, [example], max_length=len(whole.completion))


@pytest.mark.parametrize("size", [{"batch_size": 7}, {"tokens_per_batch": 50}])
def test_each_epoch_has_each_row_once(size):
    lengths = [random.Random(0).randint(1, 50) for _ in range(40)]
    once = plan_batches(lengths, seed=1, epochs=1, **size)
    twice = plan_batches(lengths, seed=1, epochs=2, **size)
    assert sorted(sum(once, [])) == list(range(40))
    assert twice[: len(once)] == once and sorted(sum(twice, [])) == sorted([*range(40), *range(40)])
    assert sum(twice[len(once) :], []) != sum(once, [])
    assert plan_batches(lengths, seed=1, steps=len(once) + 2, **size) == twice[: len(once) + 2]
    assert plan_batches(lengths, seed=2, epochs=1, **size) != once
    assert sum(map(len, plan_batches(lengths, seed=1, epochs=1.5, **size))) == 60


def test_token_budget_is_kept_and_used():
    lengths = [random.Random(0).randint(1, 50) for _ in range(40)]
    batches = plan_batches(lengths, seed=0, epochs=1, tokens_per_batch=50)
    tokens = [sum(lengths[row] for row in batch) for batch in batches]
    assert max(tokens) <= 50
    # No batch ends while the next one's first row would still fit.
    assert all(now + lengths[batches[i + 1][0]] > 50 for i, now in enumerate(tokens[:-1]))
    # A longer row has a batch of its own.
    assert sorted(plan_batches([1, 51, 1], seed=0, epochs=1, tokens_per_batch=50), key=len)[0] == [1]


# Exactness


@every_method
def test_losses_follow_plain_peft(config, tmp_path, changes):
    config = dataclasses.replace(config, **changes)
    fast = TrainingRun(config).train()
    plain = TrainingRun(dataclasses.replace(config, output=str(tmp_path / "plain")), accelerated=False).train()
    assert losses(fast) == pytest.approx(losses(plain), abs=1e-4)
    assert len(losses(fast)) == 6


def test_the_same_seed_gives_the_same_bits(config, tmp_path):
    # Evaluations on the way change nothing either.
    again = dataclasses.replace(config, output=str(tmp_path / "b"), eval_data=config.data, eval_steps=2, eval_rows=8)
    other = dataclasses.replace(config, output=str(tmp_path / "c"), seed=1)
    assert losses(train(config)) == losses(train(again)) != losses(train(other))
    assert torch.equal(adapter_of(config), adapter_of(again))


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_gradient_checkpointing_changes_nothing(config, tmp_path, method):
    config = dataclasses.replace(config, **METHODS[method])
    saving = dataclasses.replace(config, output=str(tmp_path / "b"), gradient_checkpointing=True)
    assert losses(train(config)) == pytest.approx(losses(train(saving)), rel=1e-5)


def test_plain_peft_cannot_checkpoint_a_prefix(config):
    config = dataclasses.replace(config, **METHODS["prefix-tuning"], gradient_checkpointing=True)
    with pytest.raises(InputError, match="plain PEFT") as caught:
        TrainingRun(config, accelerated=False)
    assert caught.value.argument == "gradient_checkpointing"


def test_prompt_stays_fp32_on_bf16_weights(config):
    run = TrainingRun(dataclasses.replace(config, precision="bf16"))
    assert run.model.get_base_model().dtype == torch.bfloat16
    start = run.model.prompt_encoder["default"].embedding.weight.detach().clone()
    assert all(torch.tensor(losses(run.train())).isfinite())
    assert adapter_of(run.config).dtype == start.dtype == torch.float32
    assert not torch.equal(adapter_of(run.config), start)


@pytest.mark.parametrize("init", ["random", "vocab", "text"])
def test_initialisation(config, init):
    text = "Word: cat" if init == "text" else None
    run = TrainingRun(dataclasses.replace(config, init=init, init_text=text))
    prompt = run.model.prompt_encoder["default"].embedding.weight
    table = run.model.get_input_embeddings().weight
    known = (prompt[:, None] == table[None]).all(-1).any(-1)
    assert known.all() if init != "random" else not known.any()
    if init == "text":
        ids = (run.tokenizer(text)["input_ids"] * 4)[:4]
        assert torch.equal(prompt, table[ids])


def test_prefix_from_zero_has_zero_values(config):
    for name in ("prefix-tuning zero", "prefix-tuning projection zero"):
        cache = TrainingRun(dataclasses.replace(config, **METHODS[name])).model.get_prompt(batch_size=1)
        assert not any(layer.values.any() for layer in cache.layers)


@pytest.mark.parametrize("ranks", [1, 3])
def test_each_task_starts_from_the_shared_prompt(config, ranks):
    changes = {**METHODS["multitask"], "num_ranks": ranks, "init": "text", "init_text": "Word: cat"}
    run = TrainingRun(dataclasses.replace(config, **changes))
    prompts = run.model.get_prompt(batch_size=3, task_ids=torch.arange(3))
    ids = (run.tokenizer("Word: cat")["input_ids"] * 4)[:4]
    assert torch.equal(prompts, run.model.get_input_embeddings().weight[ids].expand(3, -1, -1))
    # The ranks must not move in step, or they would be one.
    gradient = torch.autograd.grad(run.model(**run.batch(0)).loss, encoder_of(run).prefix_task_cols)[0]
    assert ranks == 1 or not torch.allclose(gradient[..., 0], gradient[..., 1])


@pytest.fixture
def source(config, tmp_path):
    config = dataclasses.replace(config, **METHODS["multitask"], output=str(tmp_path / "source"))
    train(config)
    return load_file(tmp_path / "source/adapter_model.safetensors")


@pytest.mark.parametrize("how", [{}, {"source_init": "exact", "source_task": "y"}, {"source_init": "shared"}], ids=str)
def test_target_starts_from_its_source(config, tmp_path, source, how):
    target = {"method": "multitask", "init": "random", "num_ranks": 2, "source": str(tmp_path / "source"), **how}
    run = TrainingRun(dataclasses.replace(config, **target))
    factors = torch.ones(())
    if how.get("source_init") != "shared":
        cols, rows = source["prefix_task_cols"], source["prefix_task_rows"]
        factors = cols[1] @ rows[1] if how else cols.mean(0) @ rows.mean(0)
    prompt = run.model.get_prompt(batch_size=1, task_ids=torch.tensor([0]))[0]
    assert torch.allclose(prompt, source["prompt_embeddings"] * factors, rtol=1e-6)
    run.train()
    shutil.rmtree(tmp_path / "source")
    assert "tasks" not in TrainedAdapter(run.config.output).evaluate(config.data)


@pytest.mark.parametrize(
    ("changes", "argument", "said"),
    [
        ({"source": "nowhere"}, "source", r"holds no adapter_config\.json"),
        ({"num_virtual_tokens": 5}, "num_virtual_tokens", "expected 4 like the source, got 5"),
        ({"num_ranks": None}, "num_ranks", "expected 2 like the source, got 1"),
        ({"task_column": "topic"}, "source_init", "'average' starts one task, and the data has 3; expected 'shared'"),
        ({"source_init": "exact", "source_task": "w"}, "source_task", r"expected one of \['x', 'y', 'z'\], got 'w'"),
    ],
)
def test_unusable_sources_are_named(config, tmp_path, source, changes, argument, said):
    target = {"method": "multitask", "init": "random", "num_ranks": 2, "source": str(tmp_path / "source"), **changes}
    with pytest.raises(InputError, match=said) as caught:
        TrainingRun(dataclasses.replace(config, **target))
    assert caught.value.argument == argument


def test_only_a_multitask_run_is_a_source(config, tmp_path):
    train(config)
    target = {"method": "multitask", "init": "random", "source": config.output, "output": str(tmp_path / "target")}
    with pytest.raises(InputError, match="holds a PROMPT_TUNING adapter; expected a multitask run"):
        TrainingRun(dataclasses.replace(config, **target))


def test_a_loss_of_ones_own(config, tmp_path):
    twice, steps = TrainingRun(dataclasses.replace(config, output=str(tmp_path / "b"))), []

    def loss(model, batch, step):
        assert torch.equal(batch["input_ids"], twice.batch(step)["input_ids"])
        steps.append(step)
        return 2 * model(**batch).loss

    history = twice.train(loss=loss)
    assert steps == list(range(6)) and losses(history)[0] == pytest.approx(2 * losses(train(config))[0])


@pytest.mark.parametrize(
    ("schedule", "rates"), [("linear", [0, 1, 0.5]), ("constant", [0, 1, 1]), ("cosine", [0, 1, 0.5])]
)
def test_schedule_and_warmup(config, schedule, rates):
    history = train(dataclasses.replace(config, schedule=schedule, warmup=1, steps=3, lr=0.1))
    assert [entry["learning_rate"] / 0.1 for entry in history] == pytest.approx(rates)


def test_epochs_with_a_token_budget(config):
    config = dataclasses.replace(config, steps=None, epochs=1, batch_size=None, tokens_per_batch=60)
    run = TrainingRun(config)
    assert len(losses(run.train())) == len(run.batches) == run.steps
    assert all(run.batch(step)["attention_mask"].sum() <= 60 for step in range(run.steps))


def test_output_is_a_peft_adapter_and_a_log(config):
    run = TrainingRun(dataclasses.replace(config, eval_fraction=0.25))
    history = run.train()
    base = AutoModelForCausalLM.from_pretrained(config.model)
    loaded = PeftModel.from_pretrained(base, config.output)
    assert torch.equal(loaded.get_prompt(1)[0], run.model.get_prompt(1)[0])
    log = json.loads(Path(config.output, "log.json").read_text())
    assert log == {"finished": True, "history": history}
    assert [entry["step"] for entry in history] == [1, 2, 3, 4, 5, 6, 6]
    assert set(history[-1]) == {"step", "eval_loss", "eval_accuracy", "eval_rows"} and history[-1]["eval_rows"] == 16
    assert sorted(path.name for path in Path(config.output).glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-6"]


# Evaluation


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


def test_training_mode_survives_evaluation(config):
    model = TrainingRun(config).model
    for mode in (True, False):
        model.train(mode)
        completion_log_probs(model, [Encoded([1, 2], [3]), Encoded([1], [2, 3])])
        assert model.training is mode


@every_method
def test_trained_adapter_evaluates_what_the_run_held_out(config, changes):
    history = train(dataclasses.replace(config, **changes, eval_fraction=0.25))
    adapter = TrainedAdapter(config.output)
    result = adapter.evaluate()
    assert {f"eval_{name}": value for name, value in result.items()} == {
        k: v for k, v in history[-1].items() if k != "step"
    }
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


# Being killed

KILLED_WHILE_SAVING = """
import json, os, signal, sys
import torch
from fastprompt.training import TrainingConfig, train

save, calls = torch.save, 0

def save_or_die(*arguments, **options):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return save(*arguments, **options)

torch.save = save_or_die
train(TrainingConfig(**json.loads(sys.argv[1])))
"""


# A checkpoint is three calls of torch.save: the second one dies in the middle of the first checkpoint, the fifth in
# the middle of the second.
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize(("call", "complete"), [(2, []), (5, ["checkpoint-2"])])
def test_killed_and_resumed_gives_the_same_bits(config, tmp_path, call, complete):
    uninterrupted = train(dataclasses.replace(config, output=str(tmp_path / "uninterrupted")))
    arguments = [json.dumps(dataclasses.asdict(config)), str(call)]
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, *arguments], capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    out = Path(config.output)
    assert [path.name for path in out.glob("checkpoint-*")] == complete
    assert any((out / ".incomplete").rglob("adapter_model.safetensors"))  # it did die in the middle
    assert not (out / "adapter_config.json").exists()

    history = train(dataclasses.replace(config, resume=True))
    assert history == uninterrupted
    assert torch.equal(
        adapter_of(config), load_file(tmp_path / "uninterrupted/adapter_model.safetensors")["prompt_embeddings"]
    )
    assert not (out / ".incomplete").exists()


@every_method
def test_resumes_what_is_trained(config, changes):
    config = dataclasses.replace(config, **changes)
    history = train(config)
    before = load_file(Path(config.output, "adapter_model.safetensors"))
    shutil.rmtree(Path(config.output, "checkpoint-6"))
    assert train(dataclasses.replace(config, resume=True)) == history
    after = load_file(Path(config.output, "adapter_model.safetensors"))
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_resuming_a_finished_run_changes_nothing(config):
    history = train(config)
    before = adapter_of(config)
    assert train(dataclasses.replace(config, resume=True)) == history
    assert torch.equal(adapter_of(config), before)


def test_resume_starts_where_there_is_nothing_yet(config):
    assert len(losses(train(dataclasses.replace(config, resume=True)))) == 6


# Errors


@pytest.mark.parametrize(
    ("changes", "argument", "said"),
    [
        ({"method": "lora"}, "method", "expected one of prompt-tuning, prefix-tuning, p-tuning, multitask, got 'lora'"),
        ({"init": "zero"}, "init", "expected one of random, vocab, text with method='prompt-tuning', got 'zero'"),
        ({"method": "prefix-tuning"}, "init", "one of random, zero, text with method='prefix-tuning', got 'vocab'"),
        ({"method": "p-tuning"}, "init", "expected one of random with method='p-tuning', got 'vocab'"),
        ({"projection": True}, "projection", "only prefix-tuning can use it, got method='prompt-tuning'"),
        ({"encoder": "lstm"}, "encoder", "only p-tuning can use it"),
        ({"encoder_hidden_size": 8}, "encoder_hidden_size", "only prefix-tuning and p-tuning can use it"),
        ({"task_column": "topic"}, "task_column", "only multitask can use it"),
        ({"method": "p-tuning", "init": "random", "encoder": "gru"}, "encoder", "expected one of lstm, mlp, got 'gru'"),
        ({"method": "p-tuning", "init": "random", "encoder_hidden_size": 0}, "encoder_hidden_size", "at least 1, got 0"),
        ({**METHODS["prefix-tuning"], "encoder_hidden_size": 8}, "encoder_hidden_size", "expected projection too"),
        ({**METHODS["prefix-tuning text"], "projection": True}, "init", "got projection"),
        ({"method": "multitask", "source_init": "shared"}, "source_init", "expected a source too"),
        ({"method": "multitask", "source": "a"}, "init", "expected no init, since the prompt starts from source"),
        ({"method": "multitask", "init": "random", "source": "a", "source_init": "exact"}, "source_task", "exactly if"),
        ({"method": "multitask", "source_init": "b"}, "source_init", "expected one of average, exact, shared, got 'b'"),
        ({"precision": "fp8"}, "precision", "expected one of fp32, bf16, fp16"),
        ({"schedule": "step"}, "schedule", "expected one of linear, cosine, constant"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens", "at least 1, got 0"),
        ({"lr": 0.0}, "lr", "more than 0"),
        ({"epochs": 1.0}, "steps", "only one of steps and epochs"),
        ({"steps": None}, "steps", "steps or epochs"),
        ({"tokens_per_batch": 9}, "batch_size", "only one of"),
        ({"eval_data": "x.csv", "eval_fraction": 0.5}, "eval_data", "only one of"),
        ({"eval_fraction": 1.0}, "eval_fraction", "between 0 and 1"),
        ({"eval_steps": 5}, "eval_steps", "nothing to evaluate on"),
        ({"init": "text"}, "init_text", "exactly if init='text'"),
        ({"label_column": None}, "text_column", "got text_column='text'"),
        ({"prompt_column": "text"}, "text_column", "prompt_column and completion_column"),
        ({"template": "no field"}, "template", "has no field"),
        ({"template": "{text"}, "template", "{text"),
        ({"verbaliser": {"A": "same", "P": "same"}}, "verbaliser", "different, non-empty word"),
    ],
)  # fmt: skip
def test_unusable_configurations_are_named(config, changes, argument, said):
    with pytest.raises(InputError, match=said) as caught:
        dataclasses.replace(config, **changes)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("changes", "argument", "said"),
    [
        ({"model": "./nowhere"}, "model", "'./nowhere' is not a folder"),
        ({"gguf_file": "no.gguf"}, "gguf_file", "holds no file 'no.gguf'"),
        ({"data": "no.csv"}, "data", "is not a file"),
        (
            {"text_column": "body"},
            "text_column",
            r"row 1 of data has no column 'body'; expected one of \['text', 'label'",
        ),
        ({"verbaliser": {"A": "animal"}}, "verbaliser", "has label 'P'"),
        ({"template": "{text}" * 30}, "max_length", "with 4 virtual ones; the model takes 64"),
        ({"num_virtual_tokens": 63}, "max_length", "with 63 virtual ones; the model takes 64"),
        ({"batch_size": None, "tokens_per_batch": 2}, "tokens_per_batch", "a batch takes 2"),
        ({"warmup": 7}, "warmup", "at most the run's 6 steps"),
    ],
)
def test_nothing_is_written_before_an_error(config, changes, argument, said):
    config = dataclasses.replace(config, **changes)
    with pytest.raises(InputError, match=said) as caught:
        train(config)
    assert caught.value.argument == argument
    assert not Path(config.output).exists()


def test_output_of_something_else_is_left_alone(config, tmp_path):
    Path(config.output).mkdir()
    Path(config.output, "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        train(dataclasses.replace(config, resume=True))
    assert [path.name for path in Path(config.output).iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="is a file"):
        train(dataclasses.replace(config, output=str(Path(config.output, "thesis.txt"))))


def test_another_run_is_not_continued(config, tmp_path):
    data = tmp_path / "own.csv"
    data.write_text(Path(config.data).read_text())
    config = dataclasses.replace(config, data=str(data))
    train(config)
    before = {path: path.read_bytes() for path in Path(config.output).rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="already holds a run"):
        train(config)
    with pytest.raises(InputError, match="has 0.02, got 0.1") as caught:
        train(dataclasses.replace(config, resume=True, lr=0.1))
    assert caught.value.argument == "lr"
    data.write_text(data.read_text() + "ivy,P,x\n")
    with pytest.raises(InputError, match="contents changed"):
        train(dataclasses.replace(config, resume=True))
    assert before == {path: path.read_bytes() for path in Path(config.output).rglob("*") if path.is_file()}


def test_a_folder_without_a_run_is_no_adapter(tmp_path):
    with pytest.raises(InputError, match=r"holds no run\.json"):
        TrainedAdapter(str(tmp_path))
