"""accelerate() and restore() as a user's script meets them: in place, undone without a trace, never a wrong number."""

import copy
import warnings

import pytest
import torch
from parity import B, P, S, assert_equal, assert_identical, batch, both, is_packed, peft_model, step
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny_models import VOCABULARY, build
from transformers import AutoModelForCausalLM, DynamicCache, Llama4TextConfig, LlamaConfig

import fastprompt
from fastprompt.hf.cache_names import CACHE_NAME
from fastprompt.peft.renamed_cache import right_generation

PADDED = "fastprompt runs PEFT's own padded forward: "


def test_works_in_place_and_is_undone_without_a_trace():
    model, inputs = peft_model("llama"), batch("right")
    before_keys, before_dict = list(model.state_dict()), set(vars(model))
    plain = step(model, inputs)
    assert fastprompt.accelerate(model) is model
    assert list(model.state_dict()) == before_keys
    assert fastprompt.accelerate(model) is model  # a second time changes nothing
    assert fastprompt.restore(model) is model and set(vars(model)) == before_dict
    assert model.config._attn_implementation == "sdpa"
    assert_identical(plain, step(model, inputs))
    assert fastprompt.restore(model) is model  # not accelerated: left alone


def test_training_runs_the_head_on_labelled_rows_only():
    model, inputs = fastprompt.accelerate(peft_model("llama")), batch("right", "last")
    rows = []
    model.base_model.model.norm.register_forward_hook(lambda m, i, o: rows.append(o.shape[1]))
    head_rows = []
    model.base_model.lm_head.register_forward_hook(lambda m, i, o: head_rows.append(o.shape[1]))
    output = model(**inputs)
    assert rows == [P + sum((9, 4, 1, 6)) - B]  # the prompt once, the tokens that predict something, no padding
    assert head_rows == [B]  # a head with a hook is called, not read
    assert output.logits.shape == (B, P + S, VOCABULARY) and head_rows == [B]  # its shape is known
    assert output.logits.isfinite().all() and head_rows == [B, rows[1]] and rows[1:] == [P + sum((9, 4, 1, 6))]


def test_a_prefix_is_asked_for_before_the_first_step():
    model, calls = fastprompt.accelerate(peft_model("llama", "prefix")), []
    model.base_model.model.norm.register_forward_hook(lambda m, i, o: calls.append(1))
    for _ in range(2):
        model.train()(**batch("right"))
    assert len(calls) == 2


def test_logits_in_evaluation_without_labels_and_on_request():
    model, inputs = peft_model("llama"), batch("right")
    shape = (B, P + S, VOCABULARY)
    fastprompt.accelerate(model)
    assert model(input_ids=inputs["input_ids"]).logits.shape == shape
    model.eval()
    assert model(**inputs).logits.shape == shape and model(**inputs).loss is not None
    model.train()
    fastprompt.accelerate(model)
    output = model(**inputs)
    assert output.logits.shape == shape
    padding = inputs["attention_mask"] == 0
    assert not output.logits[:, P:][padding].any()  # no values are made up where no row was run


@pytest.mark.parametrize("name", ["llama", "granite", "gemma2"])
def test_many_labelled_rows(name):
    """Enough for the loss in chunks where the head is plain; Granite scales its logits and Gemma 2 caps them."""
    inputs = {k: v.repeat(20, 1) for k, v in batch("right").items()}
    inputs["input_ids"] = torch.randint(
        3, VOCABULARY, inputs["input_ids"].shape, generator=torch.Generator().manual_seed(9)
    )
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    assert_equal(*both(peft_model(name), inputs), inputs)
    assert_equal(*both(peft_model(name), dict(inputs, num_items_in_batch=111)), inputs)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_inputs_embeds_give_the_same(name):
    model, inputs = peft_model(name), batch("right")
    embeds = model.word_embeddings(inputs.pop("input_ids"))
    assert_equal(*both(model, dict(inputs, inputs_embeds=embeds.detach())), inputs)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda i: i["attention_mask"].__setitem__((0, 3), 0), "the attention mask has holes"),
        (
            lambda i: i.update(attention_mask=torch.tril(torch.ones(B, 1, P + S, P + S)).bool()),
            "the attention mask has 4 dimensions",
        ),
        (lambda i: i.update(output_hidden_states=True), "output_hidden_states given"),
        (lambda i: i.update(output_router_logits=True), "output_router_logits given"),
        (lambda i: i["labels"].__setitem__((1, 8), 5), "a label follows a padding token"),
    ],
)
def test_what_cannot_be_packed_runs_peft_and_says_why_once(change, reason):
    model, inputs = peft_model("llama"), batch("right")
    change(inputs)
    four_dimensional = inputs["attention_mask"].dim() == 4
    expected = None if four_dimensional else model(**inputs)  # PEFT itself cannot extend a 4-D mask
    fastprompt.accelerate(model)
    with pytest.warns(UserWarning, match=PADDED + reason):
        if four_dimensional:
            with pytest.raises(RuntimeError):
                model(**inputs)
            return
        got = model(**inputs)
    assert set(got) == set(expected) and torch.equal(got.logits, expected.logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs)


@pytest.mark.parametrize("filled", [False, True])
def test_a_cache_that_is_given_is_used(filled):
    model, ids = peft_model("llama").eval(), batch("right")["input_ids"][:, :4]

    def run():
        cache = DynamicCache()
        if filled:
            model.base_model(input_ids=ids, **{CACHE_NAME: cache})
        return model(input_ids=ids, **{CACHE_NAME: cache}).logits, cache.get_seq_length()

    with torch.no_grad():
        expected, length = run()
        fastprompt.accelerate(model)
        with pytest.warns(UserWarning, match=PADDED + "a cache is given"):
            got, ours = run()
    assert ours == length == P + 4 * (1 + filled) and torch.equal(got, expected)


@pytest.mark.parametrize("keep", [1, 4, torch.tensor([2, 5])])
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix"])
def test_what_concerns_the_head_alone_is_left_to_the_model_s_own_forward(method, keep):
    model, inputs = peft_model("llama", method), batch("left")
    del inputs["labels"]
    expected = model(**inputs, logits_to_keep=keep).logits
    got = fastprompt.accelerate(model)(**inputs, logits_to_keep=keep).logits
    assert fastprompt.stats(model).packed == 1
    real = torch.cat([torch.ones(B, got.shape[1]), inputs["attention_mask"]], 1).bool()
    columns = torch.arange(got.shape[1]) if isinstance(keep, torch.Tensor) else slice(-keep, None)
    real = real[:, -expected.shape[1] :] if isinstance(columns, slice) else torch.zeros(B, got.shape[1]).bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-5)


def test_an_attention_that_does_not_reach_the_interface_is_found_by_the_probe():
    model = peft_model("llama")
    for layer in model.base_model.model.layers:
        attention, original = layer.self_attn, layer.self_attn.forward
        attention.forward = lambda *a, original=original, **k: (
            original(*a, **k)[0] * 1.01,
            None,
        )  # still the interface
    fastprompt.accelerate(model)
    assert model._fastprompt.engine.refusal is None
    fastprompt.restore(model)
    model.base_model.model.layers[1].self_attn.forward = lambda hidden_states, **k: (hidden_states.cumsum(1), None)
    with pytest.warns(UserWarning, match=PADDED + "packed rows give another output than the padded forward"):
        fastprompt.accelerate(model)
    inputs = batch("right")
    assert torch.equal(model(**inputs).loss, fastprompt.restore(model)(**inputs).loss)


def test_other_models_and_the_shared_config_are_left_alone():
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=80
    )
    first, second = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    assert first.config is second.config
    model = get_peft_model(first, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    fastprompt.accelerate(model)
    assert second.config._attn_implementation == "sdpa" and model.config is first.config is not second.config
    first.config.use_cache = False
    fastprompt.restore(model)
    assert model.config.use_cache is False and model.config._attn_implementation == "sdpa"


def test_a_copy_is_accelerated_and_independent():
    model, inputs = fastprompt.accelerate(peft_model("llama")), batch("right")
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.prompt_encoder.parameters()).mul_(2)
    loss, other_loss = model(**inputs).loss, other(**inputs).loss
    assert loss != other_loss
    fastprompt.restore(other)
    torch.testing.assert_close(other(**inputs).loss, other_loss)
    assert is_packed(model, inputs)


def test_adapters_can_be_disabled_added_and_switched():
    model, inputs = peft_model("llama"), batch("right")
    with torch.no_grad(), model.disable_adapter():
        base = model(**inputs).loss
    fastprompt.accelerate(model)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(**inputs).loss, base)
    first = model(**inputs).loss
    model.add_adapter("longer", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P + 2))
    model.set_adapter("longer")
    second = model(**inputs)
    assert fastprompt.stats(model).padded == {} and second.loss != first
    fastprompt.restore(model)
    torch.testing.assert_close(model(**inputs).loss, second.loss)
    model.set_adapter("default")
    torch.testing.assert_close(model(**inputs).loss, first)


def test_save_and_generate_go_on_as_before(tmp_path):
    model, inputs = peft_model("llama"), batch("none")
    options = dict(input_ids=inputs["input_ids"], max_new_tokens=5, do_sample=False)
    with right_generation(model.eval()):
        generated = model.generate(**options)
    fastprompt.accelerate(model)
    assert torch.equal(model.generate(**options), generated)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama"), tmp_path)
    torch.testing.assert_close(again.eval()(**inputs).loss, model(**inputs).loss)


def test_two_models_on_one_base_do_not_disturb_each_other():
    inputs = batch("right")
    first = peft_model("llama")
    second = peft_model(None, "prefix", base=first.base_model)
    plain = step(first, inputs), step(second, inputs)
    fastprompt.accelerate(first)
    fastprompt.accelerate(second)
    assert_equal(plain[0], step(first, inputs), inputs)
    fastprompt.restore(second)  # which gives the base its own attention back
    assert_equal(plain[0], step(first, inputs), inputs)
    fastprompt.accelerate(second)
    fastprompt.restore(first)
    assert_equal(plain[1], step(second, inputs), inputs)


def test_another_attention_implementation_afterwards():
    model, inputs = peft_model("llama"), batch("right")
    plain = step(model, inputs)
    fastprompt.accelerate(model)
    model.base_model.set_attn_implementation("eager")
    assert_equal(plain, step(model, inputs), inputs)
    assert fastprompt.restore(model).base_model.config._attn_implementation == "eager"


def test_a_patched_base_goes_on_sharing_the_prompt():
    model, inputs = peft_model("llama"), batch("right")
    plain = step(model, inputs)
    fastprompt.accelerate(model)
    fastprompt.patch_attention(model.base_model)
    assert_equal(plain, step(model, inputs), inputs)
    fastprompt.unpatch_attention(model.base_model)
    assert_equal(plain, step(model, inputs), inputs)


def test_attention_in_chunks_runs_peft_itself():
    """Llama 4: a window's size means a chunk's there."""
    config = Llama4TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        intermediate_size_mlp=80,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        attention_chunk_size=4,
    )
    torch.manual_seed(0)
    model, inputs = peft_model(None, base=AutoModelForCausalLM.from_config(config)), batch("none")
    plain = step(model, inputs)
    with pytest.warns(UserWarning, match=PADDED + "attention in chunks"):
        fastprompt.accelerate(model)
    assert_identical(plain, step(model, inputs))


@pytest.mark.parametrize("method", ["prompt_tuning", "cpt"])
def test_labels_that_padding_would_predict_run_peft_itself(method):
    model, inputs = peft_model("llama", method), batch("left")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    plain = model(**inputs).loss
    fastprompt.accelerate(model)
    with pytest.warns(UserWarning, match=PADDED + "a label follows a padding token"):
        assert torch.equal(model(**inputs).loss, plain)


def test_one_task_for_all_rows():
    inputs = dict(batch("right"), task_ids=torch.tensor([1]))
    assert_equal(*both(peft_model("llama", "multitask"), inputs), inputs)


def test_a_label_out_of_range_is_refused_by_the_chunked_loss():
    model = fastprompt.accelerate(peft_model("llama"))
    ids = torch.randint(3, VOCABULARY, (40, 9))
    labels = ids.clone()
    labels[3, 4] = -1
    with pytest.raises(ValueError, match=rf"labels must lie in \[0, {VOCABULARY}\), got values from -1"):
        model(input_ids=ids, labels=labels)


def test_a_reparameterised_prefix_under_autocast():
    """Its encoder runs in bf16 then, and the probe, which compares in fp32, must not mind."""
    model, inputs = fastprompt.accelerate(peft_model("llama", "prefix_mlp")), batch("right")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=PADDED)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
    torch.testing.assert_close(loss, fastprompt.restore(model)(**inputs).loss, rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: build("llama"), "peft_model must be a peft.PeftModel, got LlamaForCausalLM"),
        (
            lambda: get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM")),
            "peft_model must use prompt learning, got LORA",
        ),
    ],
)
def test_refuses_other_models_and_leaves_them_alone(make, message):
    model = make()
    before = set(vars(model))
    with pytest.raises(TypeError, match=message):
        fastprompt.accelerate(model)
    assert set(vars(model)) == before
