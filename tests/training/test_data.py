"""Data to batches: rows of files, the task's texts, token ids, batches of an epoch."""

import dataclasses
import random

import pytest

from fastprompt.training import (
    Example,
    InputError,
    Task,
    collate,
    encode,
    encode_examples,
    features,
    plan_batches,
    read_rows,
    split_rows,
)

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
