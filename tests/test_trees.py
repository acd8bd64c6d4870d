"""Text that groups of rows begin with is run once a group: the same loss, gradients and logits as PEFT's."""

import pytest
import torch
import transformers as hf
from needs import needs_states
from parity import assert_equal, assert_identical, both, peft_model, step
from tiny_hybrids import build_hybrid
from tiny_models import VOCABULARY, build, drawn

import fastprompt
from fastprompt.layout import plan_padded_input
from fastprompt.peft.state import engine_of

# The rows of a batch: blocks of text, each a number and a length. Two groups that share more; one of them in groups.
TEXTS = [
    [(0, 14), (1, 6)],
    [(0, 14), (2, 10), (3, 2)],
    [(0, 14), (2, 10)],  # what another row begins with
    [(0, 14), (2, 10), (4, 5)],
    [(5, 20), (6, 1)],
    [(5, 20), (7, 7)],
    [(5, 20), (7, 7)],  # the same row again
    [(8, 1)],
]


def batch(padding="right", labelled="all", common=0, method="prompt_tuning"):
    blocks = torch.randint(3, VOCABULARY, (10, 20), generator=torch.Generator().manual_seed(3))
    blocks[:, 0] = torch.arange(3, 13)  # no two begin alike
    texts = [torch.cat([blocks[9, :common], *(blocks[i, :n] for i, n in text)]) for text in TEXTS]
    width = max(map(len, texts)) + 3
    ids, mask = torch.zeros(len(texts), width, dtype=torch.int64), torch.zeros(len(texts), width, dtype=torch.int64)
    for row, text in enumerate(texts):
        # Rows of a group begin in one column, as the completions of a prompt that is padded on the left do.
        at = 0 if padding == "right" else 3 if row < 4 else 1
        ids[row, at : at + len(text)] = text
        mask[row, at : at + len(text)] = 1
    labels = ids.masked_fill(mask == 0, -100)
    labels[torch.arange(len(texts)), mask.argmax(1)] = -100
    if labelled == "last":
        last = width - 1 - mask.flip(1).argmax(1)
        labels = labels.masked_fill(torch.arange(width) != last[:, None], -100)
    inputs = dict(input_ids=ids, attention_mask=mask, labels=labels)
    return dict(inputs, task_ids=torch.tensor([0, 0, 2, 0, 1, 1, 1, 0])) if method == "multitask" else inputs


def rows_of(model, inputs):
    before = fastprompt.stats(model).rows
    model(**inputs)
    return fastprompt.stats(model).rows - before


def rows_without(inputs, length):
    """The rows of a plan that shares what all rows of a prompt begin with."""
    return len(
        plan_padded_input(
            *inputs["input_ids"].shape,
            length,
            attention_mask=inputs["attention_mask"],
            prompt_ids=inputs.get("task_ids"),
            token_ids=inputs["input_ids"],
            node_cost=None,
        ).source
    )


CASES = [
    ("llama", "prompt_tuning", "right", "all", 0),
    ("llama", "prompt_tuning", "left", "last", 0),
    ("llama", "p_tuning_lstm", "right", "last", 4),
    ("llama", "multitask", "right", "all", 0),
    ("llama", "prefix", "right", "all", 0),
    ("llama", "prefix_mlp", "left", "all", 2),
    ("mistral_window", "prompt_tuning", "right", "all", 3),
    ("mistral_window", "prompt_tuning", "left", "all", 0),
    ("mistral_window", "prefix", "right", "all", 0),
    ("gemma2", "prompt_tuning", "right", "last", 0),
    ("opt", "prompt_tuning", "left", "all", 0),
    ("gpt_oss", "prefix", "left", "all", 0),
]


@pytest.mark.parametrize("name, method, padding, labelled, common", CASES)
def test_trees_give_what_peft_gives(name, method, padding, labelled, common):
    model, inputs = peft_model(name, method), batch(padding, labelled, common, method)
    assert_equal(*both(model, inputs), inputs)
    fastprompt.accelerate(model)
    length = 0 if method.startswith("prefix") else model.active_peft_config.num_virtual_tokens
    without = rows_without(inputs, length) - len(inputs["input_ids"])  # no label depends on a last token
    assert (rows_of(model, inputs) < without) == (
        (name, padding) not in {("mistral_window", "left"), ("gpt_oss", "left")}
    )


@needs_states
@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2", "bamba"])
def test_states_are_left_by_every_node(name):
    base = build_hybrid(name)
    base.config.use_cache = False
    model = peft_model(None, base=base)
    inputs = batch()
    inputs["input_ids"], inputs["attention_mask"], inputs["labels"] = (
        torch.cat([x[:4]] * 3 + [x[4:7]] * 4) for x in (inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
    )
    assert_equal(*both(model, inputs), inputs)
    fastprompt.accelerate(model)
    assert rows_of(model, inputs) < rows_without(inputs, 5)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_run_trees_again(method, reentrant):
    model, inputs = peft_model("llama", method), batch()
    plain = step(model, inputs)
    fastprompt.accelerate(model).base_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_equal(plain, step(model, inputs), inputs)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix"])
def test_a_step_repeats_bit_for_bit(method):
    model, inputs = fastprompt.accelerate(peft_model("llama", method)), batch()
    assert_identical(step(model, inputs), step(model, inputs))


def test_caches_are_those_of_peft():
    model, inputs = peft_model("llama").eval(), batch()
    del inputs["labels"]
    with torch.no_grad():
        plain = model(**inputs, use_cache=True).past_key_values
        fast = fastprompt.accelerate(model)(**inputs, use_cache=True).past_key_values
    real = torch.cat([torch.ones(len(TEXTS), 5, dtype=torch.bool), inputs["attention_mask"].bool()], 1)
    for ours, theirs in zip(fast.layers, plain.layers):
        for x, y in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(x.transpose(1, 2)[real], y.transpose(1, 2)[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral_window"])
def test_trees_give_what_rows_give(name):
    """SoftPromptModel with two prompts in one batch, and the same without trees."""
    inputs = dict(batch(), prompt_ids=torch.tensor([0, 0, 1, 0, 1, 1, 1, 0]))
    torch.manual_seed(1)
    method = fastprompt.PromptTuning(num_virtual_tokens=3, token_dim=48, num_prompts=2)
    with torch.no_grad():
        method.prompt.copy_(torch.randn(method.prompt.shape) * 0.5)
    model = fastprompt.SoftPromptModel(build(name), method)
    trees = step(model, inputs)
    rows = fastprompt.stats(model).rows
    model._engine.node_cost = None
    assert_equal(step(model, inputs), trees, inputs)
    assert rows < fastprompt.stats(model).rows - rows


@pytest.mark.parametrize("padding", ["right", "left"])
def test_classifiers_read_trees(padding):
    base = hf.AutoModelForSequenceClassification.from_config(
        hf.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=80,
            pad_token_id=0, num_labels=3,
        )
    )  # fmt: skip
    model = peft_model(None, task_type="SEQ_CLS", base=drawn(base))
    inputs = dict(batch(padding), labels=torch.arange(len(TEXTS)) % 3)
    fastprompt.accelerate(model)
    trees = step(model, inputs)
    rows = fastprompt.stats(model).rows
    engine_of(model).node_cost = None
    plain = step(model, inputs)
    torch.testing.assert_close(trees[0], plain[0], rtol=1e-5, atol=0)
    for key, expected in plain[1].items():
        torch.testing.assert_close(trees[1][key], expected, rtol=1e-4, atol=1e-5)
    assert rows < fastprompt.stats(model).rows - rows
    assert fastprompt.stats(model).padded == {}
