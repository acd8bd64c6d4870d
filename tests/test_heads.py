"""accelerate() on models with another head than a language model's, decoders and encoders, against PEFT itself."""

import warnings

import pytest
import torch
import transformers as hf
from covering import covering_array
from needs import needs
from parity import (
    PREFIXES,
    B,
    P,
    S,
    assert_equal,
    assert_identical,
    assert_same_steps,
    batch,
    both,
    peft_model,
    plain_step,
    step,
)
from tiny_models import MODELS, VOCABULARY

import fastprompt

_SIZES = dict(vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, intermediate_size=80)
_LLAMA = dict(_SIZES, num_key_value_heads=2, pad_token_id=0, classifier_dropout=0.0)
_BERT = dict(_SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

DECODERS = {
    "llama": (hf.LlamaConfig, _LLAMA),
    "qwen2": (hf.Qwen2Config, _LLAMA),
    "gpt2": (
        hf.GPT2Config,
        dict(MODELS["gpt2"][1], classifier_dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=1),
    ),
}
ENCODERS = {
    "bert": (hf.BertConfig, _BERT),
    "roberta": (hf.RobertaConfig, dict(_BERT, pad_token_id=1, max_position_embeddings=64)),
    "electra": (hf.ElectraConfig, dict(_BERT, embedding_size=48)),
    "modernbert": (
        hf.ModernBertConfig,
        dict(
            _SIZES,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            cls_token_id=1,
            sep_token_id=1,
            global_attn_every_n_layers=2,
            local_attention=6,
        ),
    ),
}
OWN = {"deberta": (hf.DebertaV2Config, dict(_BERT, pooler_dropout=0.0))}  # attention of its own: PEFT's padded forward
ALL = DECODERS | ENCODERS | OWN

_AUTO = {
    "SEQ_CLS": hf.AutoModelForSequenceClassification,
    "TOKEN_CLS": hf.AutoModelForTokenClassification,
    "QUESTION_ANS": hf.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": hf.AutoModel,
}


def build(name, task_type, num_labels=3, **changes):
    config_class, arguments = ALL[name]
    config = config_class(**{**arguments, **changes})
    config.num_labels = 2 if task_type == "QUESTION_ANS" else num_labels
    torch.manual_seed(0)
    model = _AUTO[task_type].from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.train()


def inputs_for(task_type, padding, method):
    """A batch with the targets that PEFT's class expects: those of tokens cover the virtual ones in front too."""
    inputs = batch(padding, method=method)
    del inputs["labels"]
    mask = torch.ones(B, S, dtype=torch.int64) if padding == "none" else inputs["attention_mask"]
    inputs["input_ids"] = inputs["input_ids"].masked_fill(mask == 0, 0)
    generator = torch.Generator().manual_seed(4)
    if task_type == "SEQ_CLS":
        inputs["labels"] = torch.randint(3, (B,), generator=generator)
    elif task_type == "TOKEN_CLS":
        inputs["labels"] = torch.randint(3, (B, S), generator=generator).masked_fill(mask == 0, -100)
        if method not in PREFIXES:
            inputs["labels"] = torch.cat([torch.full((B, P), -100), inputs["labels"]], 1)
    else:
        inputs["start_positions"], inputs["end_positions"] = torch.tensor([1, 2, 0, 3]), torch.tensor([3, 3, 0, 5])
    return inputs


def assert_same_classifiers(task_type, name, method, paddings):
    model = peft_model(None, method, task_type=task_type, base=build(name, task_type))
    assert_same_steps(model, [inputs_for(task_type, padding, method) for padding in paddings])


@pytest.mark.parametrize(
    "task_type, name, method",
    covering_array(["SEQ_CLS", "TOKEN_CLS"], list(DECODERS), ["prompt_tuning", "p_tuning_lstm", "multitask", "prefix"]),
)
def test_classifiers_on_decoders(task_type, name, method):
    pools_padding = task_type == "SEQ_CLS" and method != "prefix"  # PEFT, on the right; see test_heads_of_text.py
    assert_same_classifiers(task_type, name, method, ["left", "none"] if pools_padding else ["right", "left", "none"])


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_mlp", "multitask", "prefix", "prefix_mlp"])
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS"])
def test_classifiers_on_encoders(task_type, name, method):
    if name == "modernbert" and method in PREFIXES:
        pytest.skip("PEFT refuses: the model takes no past_key_values")
    assert_same_classifiers(task_type, name, method, ["right", "none"])


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_question_answering(name, method):
    inputs = inputs_for("QUESTION_ANS", "none", method)
    model = peft_model(None, method, task_type="QUESTION_ANS", base=build(name, "QUESTION_ANS"))
    front = 0 if method == "prefix" else P  # PEFT counts virtual tokens
    counted = {key: x + front if key.endswith("positions") else x for key, x in inputs.items()}
    plain = plain_step(model, counted)
    assert_equal(plain, step(fastprompt.accelerate(model), inputs), inputs)
    assert_equal(plain, step(fastprompt.accelerate(model, heads="peft"), counted), inputs)
    assert fastprompt.stats(model).padded == {}


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_lstm", "prefix"])
@pytest.mark.parametrize("name", ["llama", "bert", "roberta"])
def test_feature_extraction(name, method):
    model = peft_model(None, method, task_type="FEATURE_EXTRACTION", base=build(name, "FEATURE_EXTRACTION"))
    inputs = batch("right", method=method)
    del inputs["labels"]
    real = torch.cat([torch.ones(B, 0 if method in PREFIXES else P), inputs["attention_mask"]], 1)[..., None]

    def result():
        model.zero_grad()
        states = model(**inputs).last_hidden_state
        (states.square() * real).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return (states.square() * real).sum().detach(), gradients, states.detach()

    plain = result()
    fastprompt.accelerate(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprompt runs PEFT's own padded forward")
        assert_equal(plain, result(), inputs)


@pytest.mark.parametrize(
    "name, task_type, padding, reason",
    [
        ("llama", "SEQ_CLS", "right", "the model reads what stands in the last column"),
        ("bert", "SEQ_CLS", "left", "the model does not see left-padded rows as packed rows would"),
        ("bert", "QUESTION_ANS", "right", "an answer's probabilities are over all columns, padding among them"),
        ("deberta", "TOKEN_CLS", "right", "DebertaV2Model does not ask transformers' attention interface for a mask"),
    ],
)
def test_a_head_that_reads_padding_runs_peft_itself(name, task_type, padding, reason):
    model = peft_model(None, task_type=task_type, base=build(name, task_type))
    inputs = inputs_for(task_type, padding, "prompt_tuning")
    plain = step(model, inputs)
    with pytest.warns(UserWarning, match="fastprompt runs PEFT's own padded forward: " + reason):
        fastprompt.accelerate(model, heads="peft")
        fast = step(model, inputs)
    assert_identical(plain, fast)


@pytest.mark.parametrize(
    "name, ids, mask, reason",
    [
        ("llama", [[5, 6, 7], [5, 6, 0]], [[1, 1, 1], [1, 1, 0]], None),
        (
            "llama",
            [[5, 6, 7], [5, 0, 0]],
            [[1, 1, 1], [1, 1, 0]],
            None,
        ),  # a real token with the id of padding: not the last
        ("llama", [[5, 6, 7], [5, 6, 9]], [[1, 1, 1], [1, 1, 0]], "by its token ids, the model reads"),
        ("roberta", [[5, 6, 7], [5, 6, 1]], [[1, 1, 1], [1, 1, 0]], None),
        ("roberta", [[5, 1, 7], [5, 6, 1]], [[1, 1, 1], [1, 1, 0]], "the model counts positions by token ids"),
    ],
)
def test_models_that_find_padding_by_its_id(name, ids, mask, reason):
    """Behind a learned prefix they see the token ids; what they make of them is what PEFT gives."""
    model = peft_model(None, "prefix", task_type="SEQ_CLS", base=build(name, "SEQ_CLS"))
    inputs = dict(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), labels=torch.tensor([0, 2]))
    plain = plain_step(model, inputs)
    fastprompt.accelerate(model, heads="peft")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_equal(step(model, inputs), plain, inputs)
    reasons = {str(w.message) for w in caught if "fastprompt" in str(w.message)}
    assert not reasons if reason is None else all(reason in text for text in reasons) and reasons


@needs("peft", "0.21", "loses embeddings in front of a classifier behind a prefix")
@pytest.mark.parametrize("name", ["bert", "roberta", "llama"])
@pytest.mark.filterwarnings("ignore:fastprompt runs PEFT's own padded forward")
def test_embeddings_behind_a_prefix(name):
    """RoBERTa numbers positions another way when it is not told the token ids."""
    model = peft_model(None, "prefix", task_type="TOKEN_CLS", base=build(name, "TOKEN_CLS"))
    inputs = inputs_for("TOKEN_CLS", "right", "prefix")
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    plain = plain_step(model, inputs)
    assert_equal(plain, step(fastprompt.accelerate(model), inputs), inputs)


def test_rows_of_equal_ids_and_other_token_types_share_nothing():
    """GPT-2 adds an embedding of the type to that of the token."""
    model = peft_model(None, task_type="SEQ_CLS", base=build("gpt2", "SEQ_CLS"))
    ids, types = torch.tensor([[5, 6, 7], [5, 6, 8]]), torch.tensor([[0, 0, 0], [1, 1, 1]])
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=types, labels=torch.tensor([0, 2]))
    assert_equal(*both(model, inputs), inputs)


def test_labels_at_padding_run_peft_itself():
    model = fastprompt.accelerate(peft_model(None, task_type="TOKEN_CLS", base=build("bert", "TOKEN_CLS")))
    inputs = inputs_for("TOKEN_CLS", "right", "prompt_tuning")
    inputs["labels"] = inputs["labels"].clamp(min=0)
    with pytest.warns(UserWarning, match="padding has labels other than -100"):
        fast = model(**inputs).loss
    assert torch.equal(fast, fastprompt.restore(model)(**inputs).loss)


def test_the_head_s_own_dropout_is_drawn_as_peft_draws_it():
    """It stands behind the padded states, so packed rows change nothing about it."""
    model = peft_model(None, task_type="TOKEN_CLS", base=build("bert", "TOKEN_CLS", classifier_dropout=0.5))
    inputs = inputs_for("TOKEN_CLS", "right", "prompt_tuning")

    def seeded():
        torch.manual_seed(3)
        return step(model, inputs)

    plain = seeded()
    fastprompt.accelerate(model)
    assert_equal(plain, seeded(), inputs)
