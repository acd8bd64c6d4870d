"""share_prefixes: the gradients of plain training with LoRA or of all weights, and the model as it was afterwards."""

import copy
import pickle
import warnings

import peft
import pytest
import torch
import transformers as hf
from needs import needs_states
from parity import assert_equal, assert_identical, step
from test_trees import batch, rows_of, rows_without
from tiny_hybrids import build_hybrid
from tiny_models import build

import fastprompt


def lora(name="llama", base=None, **changes):
    base = build(name) if base is None else base
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], **changes)
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def shared(model):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprompt runs the model's own")
        return fastprompt.share_prefixes(model)


def outputs(model, inputs):
    """What assert_equal compares, of an evaluation without a cache: a tensor for each of the outputs."""
    return step(model, dict(inputs, use_cache=False))


@pytest.mark.parametrize("padding, labelled", [("right", "all"), ("left", "last")])
@pytest.mark.parametrize("name", ["llama", "mistral_window", "gemma2"])
def test_lora_gets_its_gradients(name, padding, labelled):
    model, inputs = lora(name), batch(padding, labelled)
    plain = outputs(model, inputs)
    fast = outputs(shared(model), inputs)
    assert_equal(plain, fast, inputs)
    assert fastprompt.stats(model).padded == {}
    assert rows_of(model, inputs) < rows_without(inputs, 0)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_all_weights_get_their_gradients(name):
    model, inputs = build(name), batch()
    plain = outputs(model, inputs)
    assert_equal(plain, outputs(shared(model), inputs), inputs)
    assert fastprompt.stats(model).packed == 2


@needs_states
def test_recurrent_layers_share_too():
    model, inputs = lora(base=build_hybrid("qwen3_5_text")), batch()
    plain = outputs(model, inputs)
    assert_equal(plain, outputs(shared(model), inputs), inputs)
    assert fastprompt.stats(model).padded == {}


@pytest.mark.parametrize("wrapped", [True, False])
def test_chosen_logits_have_a_gradient(wrapped):
    """What GRPO asks for: logits of the last columns, without labels."""
    model, inputs = lora() if wrapped else build("llama"), batch()
    labels = inputs.pop("labels")

    def gradients():
        model.zero_grad()
        logits = model(**inputs, logits_to_keep=8, use_cache=False).logits
        real = inputs["attention_mask"][:, -8:].bool()
        loss = torch.nn.functional.cross_entropy(logits[real], labels[:, -8:].clamp(min=0)[real])
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return loss.detach(), found, logits.detach()[real]

    plain, (fast, again) = gradients(), (shared(model) and (gradients(), gradients()))
    assert_equal(plain, fast, dict(attention_mask=None))
    assert_identical(fast, again)
    assert fastprompt.stats(model).padded == {}


def test_packed_samples_share():
    model, inputs = lora(), batch()
    real = inputs["attention_mask"].bool()
    lengths = real.sum(1).tolist()
    row = dict(
        input_ids=inputs["input_ids"][real][None],
        labels=inputs["labels"][real][None],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
    )
    plain = outputs(model, inputs)
    shared(model)
    loss = model(**row).loss
    torch.testing.assert_close(loss, plain[0], rtol=1e-5, atol=0)
    assert fastprompt.stats(model).packed == 1


def test_disabled_and_merged_adapters_count():
    model, inputs = lora().eval(), batch()
    with torch.no_grad(), model.disable_adapter():
        plain = model(**inputs).loss
        assert torch.allclose(shared(model)(**inputs).loss, plain, rtol=1e-5)
    assert not torch.allclose(model(**inputs).loss, plain, rtol=1e-3)


def test_restore_gives_back_the_model():
    model, inputs = lora(), batch()
    before, config = step(model, inputs), model.config
    state = {name: dict(vars(module)) for name, module in model.named_modules()}
    fastprompt.restore(shared(model))
    assert model.config is config and model.base_model.model.config is config
    assert {name: dict(vars(module)) for name, module in model.named_modules()}.keys() == state.keys()
    for name, module in model.named_modules():
        assert vars(module).keys() == state[name].keys(), name
    assert_identical(before, step(model, inputs))


def test_copies_share_too():
    model, inputs = shared(lora()), batch()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_identical(outputs(model, inputs), outputs(other, inputs))
        before = fastprompt.stats(other).packed
        other(**inputs)
        assert fastprompt.stats(other).packed == before + 1


def test_generation_is_the_models_own():
    for model in (lora().eval(), build("llama").eval()):
        ids = batch()["input_ids"][:2, :8]
        options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
        plain = model.generate(input_ids=ids, **options)
        assert torch.equal(shared(model).generate(input_ids=ids, **options), plain)
        assert fastprompt.stats(model).padded == {}


def test_what_cannot_be_packed_runs_as_before():
    model, inputs = build("openai_gpt"), batch()
    plain = step(model, inputs)
    with pytest.warns(UserWarning, match="fastprompt runs the model's own padded forward"):
        fastprompt.share_prefixes(model)
    assert_identical(plain, step(model, inputs))
    model = shared(lora())
    with pytest.warns(UserWarning, match="output_hidden_states given"):
        assert model(**inputs, output_hidden_states=True).hidden_states is not None


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: torch.nn.Linear(2, 2), "must be a Hugging Face model"),
        (lambda: hf.BertModel(hf.BertConfig(hidden_size=12, num_hidden_layers=1)), "must be a causal LM"),
        (
            lambda: peft.get_peft_model(
                build("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
            ),
            "must have no soft prompt",
        ),
    ],
)
def test_other_models_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        fastprompt.share_prefixes(make())


def test_dropout_of_lora_runs_packed():
    """Other numbers than in a padded batch, of the same expectation: nothing is refused."""
    model, inputs = shared(lora(lora_dropout=0.5)), batch()
    losses = torch.stack([model(**inputs).loss.detach() for _ in range(3)])
    assert losses.isfinite().all() and losses.unique().numel() == 3
    assert fastprompt.stats(model).padded == {}


# Adapters that add to the loss, or that are for some tokens of a row.
SEEING_ROWS = {
    "AdaLoraModel has a forward of its own": (peft.AdaLoraConfig, dict(total_step=9, init_r=4, target_r=2)),
    "an activated LoRA is for the tokens": (peft.LoraConfig, dict(r=4, alora_invocation_tokens=[3])),
}


def loss_of(model, inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(**inputs).loss


@pytest.mark.parametrize("message", SEEING_ROWS)
def test_adapters_that_see_rows_get_them(message):
    (kind, options), inputs = SEEING_ROWS[message], batch()
    torch.manual_seed(1)
    model = peft.get_peft_model(build("llama"), kind(task_type="CAUSAL_LM", target_modules=["q_proj"], **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    expected = loss_of(model, inputs)
    fastprompt.share_prefixes(model.get_base_model())  # inside of what it belongs to
    torch.testing.assert_close(loss_of(model, inputs), expected, rtol=1e-5, atol=0)
    fastprompt.restore(model.get_base_model())
    with pytest.warns(UserWarning, match=message):
        torch.testing.assert_close(fastprompt.share_prefixes(model)(**inputs).loss, expected, rtol=1e-5, atol=0)


def test_rows_of_several_adapters():
    model, inputs = lora(), dict(batch(), use_cache=False, adapter_names=["default", "__base__"] * 4)
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        fastprompt.share_prefixes(model.get_base_model())
        with pytest.warns(UserWarning, match="a hook changes what Linear is given"):
            torch.testing.assert_close(model(**inputs).logits, expected)
        fastprompt.restore(model.get_base_model())
        with pytest.warns(UserWarning, match="adapter_names given"):
            torch.testing.assert_close(fastprompt.share_prefixes(model)(**inputs).logits, expected)


def test_one_row_that_is_not_several_samples():
    model, ids = build("gpt2"), torch.arange(3, 10)[None]
    positions = [[0, 1, 2, 3, 6, 7, 8], [2, 3, 4, 5, 2, 3, 4], [3, 4, 5, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2]]
    calls = [dict(input_ids=ids, labels=ids, position_ids=torch.tensor([p]), use_cache=False) for p in positions]
    expected = [model(**inputs).loss for inputs in calls]
    fastprompt.share_prefixes(model)
    for inputs, loss in zip(calls, expected):
        torch.testing.assert_close(loss_of(model, inputs), loss, rtol=1e-5, atol=0)
