"""SoftPromptModel with every method: against PEFT with the same parameters, on every kind of batch and model."""

import pytest
import torch
from parity import METHODS, PREFIXES, B, P, S, assert_equal, batch, peft_model, step
from peft import PeftModel
from test_heads import build as build_with_head
from test_heads import inputs_for
from tiny_models import build

from fastprompt import (
    MultitaskPromptTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    SoftPromptModel,
    prefix_of_text,
)
from fastprompt.peft.renamed_cache import right_generation

OURS = [method for method in METHODS if method not in ("cpt", "cartridge")]


def method_of(model, method):
    """Our module with the parameters of a PEFT model's encoder, and the names of its parameters over there."""
    encoder = model.prompt_encoder["default"]
    state = encoder.state_dict()
    config = model.active_peft_config
    if method == "prompt_tuning":
        return PromptTuning(P, config.token_dim, init=state["embedding.weight"]), {"prompt": "embedding.weight"}
    if method.startswith("p_tuning"):
        ours = PTuning(P, config.token_dim, encoder=method.split("_")[-1], hidden_size=12)
    elif method == "multitask":
        ours = MultitaskPromptTuning(P, config.token_dim, 3, num_ranks=2)
        names = {"shared": "embedding.weight", "rows": "prefix_task_cols", "cols": "prefix_task_rows"}
        ours.load_state_dict({name: state[theirs] for name, theirs in names.items()})
        return ours, names
    else:
        sizes = (config.num_layers, config.num_attention_heads, config.token_dim // config.num_attention_heads)
        if method == "prefix":
            ours = PrefixTuning(P, *sizes)
            ours.load_state_dict({"prefix": state["embedding.weight"][None]})
            return ours, {"prefix": "embedding.weight"}
        ours = PrefixTuning(P, *sizes, projection=12)
    ours.load_state_dict(state)
    return ours, {name: name for name in state}


def assert_same_steps(name, method, batches):
    """Each of the batches gives the same by a PEFT model and by ours with the same parameters."""
    theirs = peft_model(name, method)
    module, names = method_of(theirs, method)
    ours = SoftPromptModel(build(name), module)
    for inputs in batches:
        given = dict(inputs)
        plain_loss, plain, plain_output = step(theirs, given)
        if method == "multitask":
            given["prompt_ids"] = given.pop("task_ids")
        loss, gradients, output = step(ours, given)
        gradients = {key.removeprefix("method."): x for key, x in gradients.items()}
        plain = {key.removeprefix("prompt_encoder.default."): x for key, x in plain.items()}
        expected = {key: plain[of_theirs].reshape(gradients[key].shape) for key, of_theirs in names.items()}
        assert_equal((plain_loss, expected, plain_output), (loss, gradients, output), inputs)


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_every_method_equals_peft(name, method):
    assert_same_steps(name, method, [batch(padding, method=method) for padding in ("right", "left", "none")])


@pytest.mark.parametrize("method", OURS)
@pytest.mark.filterwarnings("ignore:fastprompt runs the model's own padded forward")
def test_every_method_on_a_model_that_cannot_be_packed(method):
    if method in PREFIXES:
        pytest.skip("PEFT gives Bloom's prefix in a format of its own; see test_a_prefix_on_the_padded_path")
    assert_same_steps("openai_gpt", method, [batch("right", method=method)])


def test_a_prefix_on_the_padded_path():
    """A router's noise keeps a batch from being packed; no layer here reads it, so nothing changes."""
    inputs = batch("right")
    module, _ = method_of(peft_model("llama", "prefix"), "prefix")
    model = SoftPromptModel(build("llama"), module)
    packed = step(model, inputs)
    model.base.model.layers[0].mlp.router_jitter_noise = 0.1
    with pytest.warns(UserWarning, match="router_jitter_noise = 0.1 is at work in the base model"):
        assert_equal(step(model, inputs), packed, inputs)


@pytest.mark.parametrize("method", OURS)
def test_common_text_is_run_once(method):
    assert_same_steps("llama", method, [batch("right", common=3, method=method, lengths=(9, 4, 5, 6))])


def prefixes(count, projection=None):
    torch.manual_seed(5)
    return PrefixTuning(P, 3, 2, 8, num_prompts=count, projection=projection)


def one_at_a_time(model, inputs, ids):
    """Logits of every row run alone, without padding."""
    rows = []
    for row, prompt in enumerate(ids.tolist()):
        real = inputs["attention_mask"][row].bool()
        rows.append(model(inputs["input_ids"][row][real][None], prompt_ids=torch.tensor([prompt])).logits[0])
    return rows


@pytest.mark.parametrize("common", [0, 3])
def test_a_batch_mixes_prefixes(common):
    model = SoftPromptModel(build("llama"), prefixes(3)).eval()
    inputs = batch("right", common=common, lengths=(9, 4, 5, 6))
    ids = torch.tensor([2, 0, 2, 2])
    together = model(inputs["input_ids"], inputs["attention_mask"], prompt_ids=ids).logits
    for row, alone in enumerate(one_at_a_time(model, inputs, ids)):
        torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)


def test_packed_input_equals_the_padded_batch():
    model, inputs = SoftPromptModel(build("llama"), prefixes(2)), batch("right")
    ids, real = torch.tensor([1, 0, 0, 1]), inputs["attention_mask"].bool()
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), real.sum(1).cumsum(0)])
    padded = model(**inputs, prompt_ids=ids).loss
    packed = model(
        inputs["input_ids"][real][None], labels=inputs["labels"][real][None], cu_seqlens=cu, prompt_ids=ids
    ).loss
    torch.testing.assert_close(packed, padded)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("projection", [None, 12])
def test_gradient_checkpointing_with_a_prefix(projection, reentrant):
    model, inputs = SoftPromptModel(build("llama"), prefixes(1, projection)), batch("right")
    plain = step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_equal(plain, step(model, inputs), inputs)
    model(**inputs).loss.backward()  # and the gradient is added, not replaced
    assert_equal(
        (plain[0], {n: 2 * g for n, g in plain[1].items()}, plain[2]),
        (plain[0], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, plain[2]),
        inputs,
    )


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_generation_behind_a_prefix_equals_peft_s(name, beams):
    theirs = peft_model(name, "prefix").eval()
    module, _ = method_of(theirs, "prefix")
    ids = batch("none")["input_ids"]
    options = dict(max_new_tokens=5, do_sample=False, num_beams=beams)
    with right_generation(theirs):
        expected = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(SoftPromptModel(build(name), module).eval().generate(ids, **options), expected)


def test_generation_mixes_prefixes():
    model = SoftPromptModel(build("llama"), prefixes(2)).eval()
    ids, options = batch("none")["input_ids"][:3], dict(max_new_tokens=5, do_sample=False)
    mixed = model.generate(ids, prompt_ids=torch.tensor([1, 0, 1]), num_beams=2, **options)
    for row, prompt in enumerate((1, 0, 1)):
        alone = model.generate(ids[row : row + 1], prompt_ids=torch.tensor([prompt]), num_beams=2, **options)
        assert torch.equal(mixed[row : row + 1], alone)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_prefix_from_a_text_is_that_text_in_front(name):
    """Prefix-Tuning started from a text gives at first what the frozen model gives behind that text."""
    base, text, inputs = build(name).eval(), [5, 17, 40, 8], batch("none")
    prefix = prefix_of_text(base, text)
    expected = base(torch.cat([torch.tensor([text]).expand(B, -1), inputs["input_ids"]], 1)).logits[:, 4:]
    model = SoftPromptModel(base, PrefixTuning(4, *prefix.shape[:1], *prefix.shape[3:], init=prefix)).eval()
    torch.testing.assert_close(model(inputs["input_ids"]).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers, missing", [((0, 2), r"\[1\]"), ((0, 1), r"\[2\]")])
def test_a_prefix_in_some_layers_only_is_refused_before_the_model_is_touched(layers, missing):
    base = build("llama")
    with pytest.raises(ValueError, match=f"method must have a prefix in every layer .*, got none in layers {missing}"):
        SoftPromptModel(base, PrefixTuning(4, 2, 2, 8, layers=layers))
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert base.config._attn_implementation == "sdpa"


METHOD_WITH_HEAD = {
    "prompt": lambda: PromptTuning(P, 48),
    "prefix_llama": lambda: PrefixTuning(P, 3, 2, 8),
    "prefix_bert": lambda: PrefixTuning(P, 3, 6, 8),
}


@pytest.mark.parametrize("labels", [3, 8])  # 8: as many as the probe has columns
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize(
    "name, method",
    [
        ("llama", "prompt"),
        ("llama", "prefix_llama"),
        ("bert", "prompt"),
        ("bert", "prefix_bert"),
        ("deberta", "prompt"),
    ],
)
@pytest.mark.filterwarnings("ignore:fastprompt runs the model's own padded forward")
def test_a_classifier_reads_the_text_wherever_it_is_padded(name, method, padding, labels):
    """PEFT's prompts make a decoder's classifier pool padding, and an encoder's the first virtual token."""
    torch.manual_seed(6)
    base = build_with_head(name, "SEQ_CLS", num_labels=labels)
    if padding == "left":
        if name == "deberta":
            pytest.skip("its distances count the padding between prompt and text")
        for parameter_name, parameter in base.named_parameters():
            if (
                "position_embeddings" in parameter_name
            ):  # absolute positions count left padding, and a row alone has none
                parameter.data.zero_()
        if name == "llama":
            base.model.rotary_emb.inv_freq.zero_()
    model = SoftPromptModel(base, METHOD_WITH_HEAD[method]()).eval()
    inputs = batch(padding)
    together = model(inputs["input_ids"], inputs["attention_mask"]).logits
    assert together.shape == (B, labels)
    for row in range(B):
        real = inputs["attention_mask"][row].bool()
        alone = model(inputs["input_ids"][row][real][None]).logits
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert", "deberta"])
@pytest.mark.filterwarnings("ignore:fastprompt runs the model's own padded forward")
def test_token_targets_count_the_text(name):
    """As many predictions as tokens; labels and answers as in a model without a prompt."""
    torch.manual_seed(6)
    inputs = batch("right")
    labels = (inputs["input_ids"] % 3).masked_fill(inputs["attention_mask"] == 0, -100)
    model = SoftPromptModel(build_with_head(name, "TOKEN_CLS"), PromptTuning(P, 48))
    output = model(inputs["input_ids"], inputs["attention_mask"], labels)
    assert output.logits.shape == (B, S, 3)
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert model.method.prompt.grad.norm() > 0
    assert all((p.grad is not None) == n.startswith(("score", "classifier")) for n, p in model.base.named_parameters())
    answers = dict(start_positions=torch.tensor([1, 2, 0, 3]), end_positions=torch.tensor([3, 3, 0, 5]))
    model = SoftPromptModel(build_with_head(name, "QUESTION_ANS"), PromptTuning(P, 48))
    output = model(inputs["input_ids"], inputs["attention_mask"], **answers)
    assert output.start_logits.shape == (B, S)
    loss = [
        torch.nn.functional.cross_entropy(x, y)
        for x, y in zip((output.start_logits, output.end_logits), answers.values())
    ]
    torch.testing.assert_close(output.loss, sum(loss) / 2)


def test_packed_heads_equal_the_padded_path():
    """The same model, packed and with its engine switched off."""
    inputs = inputs_for("TOKEN_CLS", "right", "prefix")
    inputs["token_type_ids"] = inputs["input_ids"] % 2
    torch.manual_seed(6)
    model = SoftPromptModel(build_with_head("bert", "TOKEN_CLS"), PromptTuning(P, 48))
    packed = step(model, inputs)
    model._engine.refusal = "switched off by the test"
    with pytest.warns(UserWarning, match="switched off by the test"):
        assert_equal(step(model, inputs), packed, inputs)


def test_a_head_is_saved_with_the_prompt(tmp_path):
    torch.manual_seed(6)
    model = SoftPromptModel(build_with_head("llama", "SEQ_CLS"), PromptTuning(P, 48)).eval()
    with torch.no_grad():
        model.base.score.weight.mul_(3)
    model.save_pretrained(tmp_path)
    inputs = {k: v for k, v in batch("left").items() if k != "labels"}
    again = SoftPromptModel.from_pretrained(build_with_head("llama", "SEQ_CLS"), tmp_path).eval()
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    theirs = PeftModel.from_pretrained(build_with_head("llama", "SEQ_CLS"), tmp_path).eval()
    torch.testing.assert_close(theirs(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: SoftPromptModel(build("llama"), PrefixTuning(P, 4, 2, 8)),
            "method must have a prefix for the model's 3 layers",
        ),
        (
            lambda: SoftPromptModel(build("llama"), PrefixTuning(P, 3, 6, 8)),
            "method must have 2 key heads of width 8 like the model, got 6 of width 8",
        ),
        (
            lambda: SoftPromptModel(build("llama"), prefixes(1))(
                torch.zeros(1, 3, dtype=torch.int64), virtual_tokens=torch.zeros(1, 3, dtype=torch.int64)
            ),
            "virtual_tokens must be None with Prefix-Tuning",
        ),
        (
            lambda: SoftPromptModel(build_with_head("bert", "SEQ_CLS"), PromptTuning(P, 48))(
                torch.zeros(3, dtype=torch.int64), cu_seqlens=[0, 3]
            ),
            "cu_seqlens must be None for a BertForSequenceClassification",
        ),
        (
            lambda: SoftPromptModel(build("llama"), PromptTuning(P, 48))(
                torch.zeros(3, dtype=torch.int64), torch.ones(1, 3), cu_seqlens=[0, 3]
            ),
            "attention_mask must be None with cu_seqlens",
        ),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("argument", ["token_type_ids", "position_ids", "output_hidden_states"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_an_argument_that_would_be_ignored_is_refused(name, argument):
    base = build("llama") if name == "llama" else build_with_head("bert", "SEQ_CLS")
    if (name, argument) == ("bert", "token_type_ids"):
        pytest.skip("BERT has token types")
    with pytest.raises(TypeError, match=rf"forward got unknown arguments \['{argument}'\]"):
        SoftPromptModel(base, PromptTuning(P, 48))(
            torch.zeros(1, 3, dtype=torch.int64), **{argument: torch.zeros(1, 3)}
        )
