"""Encoder-decoders against PEFT itself: no padding runs in encoder, decoder or cross-attention, and nothing differs."""

import warnings

import pytest
import torch
import transformers as hf
from budget import assert_within
from covering import covering_array
from faults import assert_found
from needs import cases, needs_t5
from parity import PREFIXES, P
from tiny_models import T5, VOCABULARY
from tiny_pairs import (
    OF_T5,
    PAIRS,
    SOURCES,
    TARGETS,
    assert_outputs_equal,
    assert_pairs_equal,
    both_of_each_pair,
    both_pairs,
    build_pair,
    pair_batch,
    pair_model,
    pair_step,
)

import fastprompt
from benchmarks.budget import Budget
from fastprompt import PromptTuning, SoftPromptModel
from fastprompt.hf.cache_names import cache_in
from fastprompt.peft.renamed_cache import right_generation

PADDED = "fastprompt runs PEFT's own padded forward: "


@pytest.mark.parametrize("name", cases(PAIRS, OF_T5))
def test_same_as_peft(name):
    batches = [pair_batch(padding) for padding in ("right", "none")]
    for (plain, fast), inputs in zip(both_of_each_pair(pair_model(name), batches), batches, strict=True):
        assert_pairs_equal(plain, fast, inputs)


@pytest.mark.parametrize("method", ["p_tuning_lstm", "p_tuning_mlp", "multitask", *PREFIXES])
@pytest.mark.parametrize("name", cases(["t5", "umt5", "bart"], OF_T5))
def test_every_method(name, method):
    inputs = pair_batch(labelled="part", method=method)
    assert_pairs_equal(*both_pairs(pair_model(name, method), inputs), inputs)


@pytest.mark.parametrize("name", cases(["t5", "bart"], OF_T5))
def test_prompts_of_the_encoder_alone(name):
    """Multitask Prompt Tuning's prompts stand in front of the decoder's tokens, too, unless the adapter says no."""
    inputs = pair_batch(method="multitask")
    model = pair_model(name, "multitask", num_transformer_submodules=1)
    assert_pairs_equal(*both_pairs(model, inputs), inputs)


@pytest.mark.parametrize("name", cases(["t5_scaled", "bart"], OF_T5))
def test_shapes(name):
    shapes = [((1,) * 4, (1,) * 4), ((7,), (3,)), ((2, 8, 1, 8), (1, 1, 9, 1))]
    batches = [pair_batch(sources=sources, targets=targets) for sources, targets in shapes]
    for (plain, fast), inputs in zip(both_of_each_pair(pair_model(name), batches), batches, strict=True):
        assert_pairs_equal(plain, fast, inputs)


@pytest.mark.parametrize("given", ["decoder_input_ids", "decoder_inputs_embeds"])
@pytest.mark.parametrize("name", cases(["flan_t5", "mbart"], OF_T5))
def test_tokens_of_the_decoder(name, given):
    model, inputs = pair_model(name), pair_batch()
    ids = torch.randint(3, VOCABULARY, inputs["labels"].shape, generator=torch.Generator().manual_seed(3))
    inputs[given] = ids if given == "decoder_input_ids" else model.word_embeddings(ids).detach()
    inputs["decoder_attention_mask"] = (torch.arange(ids.shape[1]) < torch.tensor(TARGETS)[:, None]).long()
    assert_pairs_equal(*both_pairs(model, inputs), inputs)


@pytest.mark.parametrize("name", cases(["t5", "t5_scaled", "flan_t5", "bart"], OF_T5))
def test_many_labels(name):
    """So many that the loss is computed without all of their logits."""
    sources, targets = (3, 8, 5, 4), (70, 69, 71, 68)
    config = PAIRS[name]
    if name == "bart":
        config = hf.BartConfig(**{**config.to_dict(), "max_position_embeddings": 80})
    model = pair_model(name, base=build_pair(name, config=config))
    inputs = pair_batch(sources=sources, targets=targets)
    assert_pairs_equal(*both_pairs(model, inputs), inputs)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_mlp"])
@pytest.mark.parametrize("name", cases(["t5", "umt5", "bart"], OF_T5))
def test_gradient_checkpointing(name, method):
    model, inputs = pair_model(name, method), pair_batch()
    plain = pair_step(model, inputs)
    fastprompt.accelerate(model)
    for reentrant in (False, True):
        model.base_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_pairs_equal(plain, pair_step(model, inputs), inputs)
    assert fastprompt.stats(model).padded == {}


@pytest.mark.parametrize("name", cases(["t5", "bart"], OF_T5))
def test_no_padding_runs(name):
    model, inputs = fastprompt.accelerate(pair_model(name)), pair_batch()
    rows = {"encoder": set(), "decoder": set()}
    for part, seen in rows.items():
        stack = getattr(model.base_model, f"get_{part}")()
        for layer in getattr(stack, "block", None) or stack.layers:
            layer.register_forward_hook(lambda module, args, output, seen=seen: seen.add(args[0].shape[:2]))
    model(**inputs).loss.backward()
    batch = len(SOURCES)
    assert rows == {"encoder": {(1, batch * P + sum(SOURCES))}, "decoder": {(1, sum(TARGETS))}}


@needs_t5
def test_what_no_label_sees_is_not_run():
    """Behind the last label of a row nothing has to run; an evaluation has logits of every column."""
    model, inputs = fastprompt.accelerate(pair_model("t5")), pair_batch("none")
    inputs["labels"][0, 2:] = -100
    inputs["labels"][1] = -100
    seen = []
    model.base_model.decoder.block[0].register_forward_hook(lambda m, args, output: seen.append(args[0].shape[1]))
    model(**inputs)
    model.eval()
    model(**inputs)
    columns = max(TARGETS)
    assert seen == [2 + 0 + 2 * columns, 4 * columns]


@pytest.mark.parametrize("name", cases(["t5_scaled", "bart"], OF_T5))
def test_logits_of_a_training_step(name):
    model, inputs = pair_model(name), pair_batch()
    labelled = inputs["labels"] != -100

    def logits_and_gradient():
        model.zero_grad()
        output = model(**inputs)
        logits = output.logits[labelled]
        (output.loss + logits.square().mean() + output.encoder_last_hidden_state[:, 0].square().mean()).backward()
        return logits.detach(), model.prompt_encoder["default"].embedding.weight.grad.clone()

    plain = logits_and_gradient()
    fastprompt.accelerate(model)
    fast = logits_and_gradient()
    torch.testing.assert_close(fast[0], plain[0], rtol=1e-4, atol=1e-4)
    assert (fast[1] - plain[1]).norm() <= 1e-4 * plain[1].norm()


@pytest.mark.parametrize("layers", [(2, 3), (3, 1)])
@pytest.mark.parametrize("name", cases(["t5", "umt5", "bart"], OF_T5))
def test_an_evaluation_without_labels(name, layers):
    """Logits, and a cache as the model's own: of the decoder's tokens, and of the encoder's."""
    config = PAIRS[name].to_dict()
    names = ("num_layers", "num_decoder_layers") if "num_layers" in config else ("encoder_layers", "decoder_layers")
    base = build_pair(name, config=type(PAIRS[name])(**{**config, **dict(zip(names, layers))}))
    model, inputs = pair_model(None, base=base).eval(), pair_batch()
    inputs["decoder_input_ids"] = inputs.pop("labels").clamp(min=3)
    with torch.no_grad():
        plain, fast = model(**inputs), fastprompt.accelerate(model)(**inputs)
    assert fastprompt.stats(model).packed == 1
    assert_outputs_equal(fast, plain, inputs)
    ours, theirs = cache_in(fast), cache_in(plain)
    assert len(ours) == layers[1] and ours.is_updated == theirs.is_updated


@pytest.mark.parametrize("name", cases(["t5", "flan_t5", "bart"], OF_T5))
def test_bf16_within_the_rounding_of_peft(name):
    """Against float64, what rounding the result of every operation to bf16 may do."""
    inputs = pair_batch()
    low, high = (pair_model(name, dtype=dtype) for dtype in (torch.bfloat16, torch.float64))
    with torch.no_grad():
        pairs = zip((*high.parameters(), *high.buffers()), (*low.parameters(), *low.buffers()))
        for target, source in pairs:
            target.copy_(source)  # the rounded weights

    def results(taken):
        loss, gradients, output = taken
        return [loss, next(iter(gradients.values())), output.logits]

    budget = Budget.of(
        lambda _: results(pair_step(high, inputs)), torch.bfloat16, results=torch.bfloat16, operands=False
    )
    plain, fast = (results(taken) for taken in both_pairs(low, inputs))
    assert_within(budget, fast)
    assert_within(budget, plain)  # the budget is one of bf16 at all
    half = dict(inputs, attention_mask=inputs["attention_mask"].clone())
    half["attention_mask"][0, 3] = 0
    faults = {
        "a dropped key": pair_step(high, half),
        "a shifted label": pair_step(high, dict(inputs, labels=inputs["labels"].roll(1, 1))),
    }
    assert_found(budget, {fault: results(taken) for fault, taken in faults.items()})


@pytest.mark.parametrize("name", cases(["t5", "bart"], OF_T5))
def test_sources_padded_on_the_left(name):
    """Nothing stands between a prefix and the decoder's tokens, wherever the encoder's are."""
    model, inputs = pair_model(name, "prefix"), pair_batch()
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    assert_pairs_equal(*both_pairs(model, inputs), inputs)


def leaked(x, share):
    """Every row with a share of the one before it."""
    return x + share * torch.nn.functional.pad(x[:, :-1], (0, 0, 1, 0))


def in_the_encoder(model, share):
    model.encoder.block[1].layer[-1].register_forward_hook(lambda module, args, output: leaked(output, share))


def in_the_decoder(model, share):
    model.decoder.block[1].layer[-1].register_forward_hook(lambda module, args, output: leaked(output, share))


def in_cross_attention(model, share):
    attention = model.decoder.block[0].layer[1].EncDecAttention
    attention.k.register_forward_hook(lambda module, args, output: leaked(output, share))


def by_a_forward_of_its_own(model, share):
    attention = model.decoder.block[0].layer[1].EncDecAttention
    attention.forward = lambda x, original=attention.forward, **kwargs: original(leaked(x, share), **kwargs)


def by_position(model, share):
    """A table of distances that tells the rows of a batch apart."""
    attention = model.encoder.block[0].layer[0].SelfAttention
    original = attention.compute_bias

    def compute_bias(*args, **kwargs):
        bias = original(*args, **kwargs)
        return bias + share * torch.arange(bias.shape[-1])

    attention.compute_bias = compute_bias


LEAKS = [in_the_encoder, in_the_decoder, in_cross_attention, by_a_forward_of_its_own, by_position]


@pytest.mark.parametrize("leak, dtype, share", covering_array(LEAKS, [torch.float32, torch.bfloat16], [1e-3, 1e-1]))
def test_a_leak_between_sequences_is_found(leak, dtype, share):
    base = build_pair("t5", dtype)
    leak(base, share)
    model, inputs = pair_model(None, base=base), pair_batch()
    plain = pair_step(model, inputs)
    with pytest.warns(UserWarning, match=PADDED):
        fastprompt.accelerate(model)
    fast = pair_step(model, inputs)
    assert torch.equal(plain[0], fast[0]) and torch.equal(plain[2].logits, fast[2].logits)


def left_padded(inputs):
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)


def with_holes(inputs):
    inputs["attention_mask"][0, 3] = 0


def with_a_label_on_padding(inputs):
    inputs["decoder_attention_mask"] = torch.ones_like(inputs["labels"])
    inputs["decoder_attention_mask"][0, 1:] = 0


def with_targets_padded_on_the_left(inputs):
    mask = torch.arange(max(TARGETS)) >= max(TARGETS) - torch.tensor(TARGETS)[:, None]
    inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] == -100, 3).masked_fill(~mask, -100)
    inputs["decoder_attention_mask"] = mask.long()


def with_hidden_states(inputs):
    inputs["output_hidden_states"] = True


REFUSED = {
    left_padded: "left padding between the prompt and the text",
    with_holes: "the attention mask has holes",
    with_a_label_on_padding: "the decoder's padding has labels other than -100",
    with_targets_padded_on_the_left: "the decoder's tokens are padded on the left",
    with_hidden_states: "output_hidden_states given",
}


@pytest.mark.parametrize("name", cases(["t5", "bart"], OF_T5))
@pytest.mark.parametrize("change", REFUSED)
def test_what_packed_rows_cannot_say_runs_peft_itself(name, change):
    model, inputs = pair_model(name).eval(), pair_batch()
    change(inputs)
    plain = model(**inputs)
    fastprompt.accelerate(model)
    with pytest.warns(UserWarning, match=PADDED + REFUSED[change]):
        fast = model(**inputs)
    assert torch.equal(plain.logits, fast.logits) and fastprompt.stats(model).packed == 0


@pytest.mark.parametrize("method", ["prompt_tuning", "multitask", "prefix"])
@pytest.mark.parametrize("name", ["t5", "umt5", "bart"])
def test_generation_is_peft_s(name, method):
    model, inputs = pair_model(name, method).eval(), pair_batch(method=method)
    inputs.pop("labels")
    options = dict(max_new_tokens=5, do_sample=False)
    with right_generation(model):
        plain = model.generate(**inputs, **options)
    fastprompt.accelerate(model)
    assert torch.equal(model.generate(**inputs, **options), plain)


@pytest.mark.parametrize("name", ["t5", "umt5", "bart", "pegasus"])
def test_restoring_leaves_no_trace(name):
    model, inputs = pair_model(name).eval(), pair_batch()
    modules = {module: dict(vars(module)) for module in model.base_model.modules()}
    with torch.no_grad():
        plain = model(**inputs).logits
        fastprompt.accelerate(model)
        model(**inputs)
        fastprompt.restore(model)
        assert torch.equal(model(**inputs).logits, plain)
    for module, before in modules.items():
        after = vars(module)
        assert after.keys() == before.keys() and all(after[key] is before[key] for key in after)


@pytest.mark.parametrize("name", cases(["t5", "bart"], OF_T5))
def test_rows_with_prompts_of_their_own_adapters(name):
    model, inputs = pair_model(name), pair_batch()
    model.add_adapter("second", model.peft_config["default"])
    model.train()
    torch.nn.init.normal_(model.prompt_encoder["second"].embedding.weight)
    names = ["second", "default", "default", "second"]
    losses = {}
    for adapter in set(names):
        model.set_adapter(adapter)
        for row in range(len(names)):
            one = {key: value[row : row + 1] for key, value in inputs.items()}
            losses[adapter, row] = model(**one).loss.detach()
    counts = (inputs["labels"] != -100).sum(1)
    expected = sum(losses[name, row] * counts[row] for row, name in enumerate(names)) / counts.sum()
    fastprompt.accelerate(model)
    torch.testing.assert_close(model(**inputs, adapter_names=names).loss.detach(), expected)


@pytest.mark.parametrize("name", cases(["t5", "bart"], OF_T5))
def test_dropout_draws_for_packed_rows(name):
    config = PAIRS[name].to_dict() | {"dropout_rate": 0.3, "dropout": 0.3, "attention_dropout": 0.3}
    base = build_pair(name, config=type(PAIRS[name])(**config))
    model, inputs = fastprompt.accelerate(pair_model(None, base=base)).train(), pair_batch()
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(float(model(**inputs).loss.detach()))
    assert losses[0] == losses[1] != losses[2] and fastprompt.stats(model).padded == {}


def soft_prompts(name):
    """A PEFT model and a SoftPromptModel with the same prompt."""
    theirs = pair_model(name)
    prompt = theirs.prompt_encoder["default"].embedding.weight
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprompt")
        ours = SoftPromptModel(build_pair(name), PromptTuning(P, 48, init=prompt.detach()[:P]))
    return theirs, ours


@pytest.mark.parametrize("name", cases(["t5", "umt5", "bart"], OF_T5))
def test_soft_prompt_model(name):
    theirs, ours = soft_prompts(name)
    inputs = pair_batch()
    plain, fast = pair_step(theirs, inputs), pair_step(ours, inputs)
    torch.testing.assert_close(fast[0], plain[0], rtol=1e-5, atol=0)
    expected = plain[1]["prompt_encoder.default.embedding.weight"][:P]
    assert (fast[1]["method.prompt"][0] - expected).norm() <= 1e-4 * expected.norm()
    torch.testing.assert_close(fast[2].logits, plain[2].logits, rtol=1e-4, atol=1e-4)
    ids = inputs["labels"].clamp(min=3)
    inputs["labels"], inputs["decoder_input_ids"] = None, ids
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(**inputs).logits, theirs.eval()(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert fastprompt.stats(ours).padded == {}
    options = dict(max_new_tokens=4, do_sample=False, attention_mask=inputs["attention_mask"])
    generated = ours.generate(inputs["input_ids"], **options)
    assert torch.equal(generated, theirs.generate(input_ids=inputs["input_ids"], **options))


@needs_t5
def test_soft_prompt_model_falls_back():
    theirs, ours = soft_prompts("t5")
    inputs = pair_batch()
    left_padded(inputs)
    plain = theirs(**inputs).loss
    with pytest.warns(
        UserWarning, match="the model's own padded forward: left padding between the prompt and the text"
    ):
        torch.testing.assert_close(ours(**inputs).loss, plain)


def test_another_head_runs_as_it_is():
    torch.manual_seed(0)
    base = hf.T5ForQuestionAnswering(hf.T5Config(**T5))
    with pytest.warns(UserWarning, match="an encoder-decoder with another head than a language model's"):
        SoftPromptModel(base, PromptTuning(P, 48))
