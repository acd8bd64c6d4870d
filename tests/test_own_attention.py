"""Models that compute attention in code of their own: run packed where that code is known, else left alone."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
import transformers as hf
from needs import cases, needs
from parity import P, assert_equal, assert_identical, batch, both, peft_model, step
from test_abilities import leaked
from test_parity import assert_within_rounding
from tiny_models import GPT, VOCABULARY, drawn
from transformers.models.gpt_neo import modeling_gpt_neo

import fastprompt
from fastprompt.hf import attention
from fastprompt.peft.renamed_cache import right_generation

_GPT = dict(GPT, n_head=4, n_ctx=64, rotary_dim=8)
_FALCON = dict(
    vocab_size=VOCABULARY,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=6,
    attention_dropout=0.0,
    alibi=False,
)
# name -> (config class, arguments)
FAMILIES = {
    "gptj": (hf.GPTJConfig, _GPT),
    "codegen": (hf.CodeGenConfig, _GPT),
    "gpt_neo": (  # a window in every other layer
        hf.GPTNeoConfig,
        dict(
            vocab_size=VOCABULARY,
            hidden_size=48,
            num_layers=4,
            num_heads=6,
            attention_types=[[["global", "local"], 2]],
            window_size=6,
            max_position_embeddings=64,
        ),
    ),
    "gpt_neox_japanese": (
        hf.GPTNeoXJapaneseConfig,
        dict(
            vocab_size=VOCABULARY,
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=6,
            intermediate_multiple_size=2,
            attention_dropout=0.0,
            hidden_dropout=0.0,
        ),
    ),
    "falcon_multi_query": (hf.FalconConfig, dict(_FALCON, multi_query=True)),
    "falcon_serial": (hf.FalconConfig, dict(_FALCON, multi_query=False, parallel_attn=False, num_kv_heads=6)),
    "falcon_eager": (
        hf.FalconConfig,
        dict(_FALCON, new_decoder_architecture=True, num_kv_heads=2, attn_implementation="eager"),
    ),
    "bloom_power_of_two": (
        hf.BloomConfig,
        dict(vocab_size=VOCABULARY, hidden_size=48, n_layer=3, n_head=4, hidden_dropout=0.0, attention_dropout=0.0),
    ),
    "roformer": (
        hf.RoFormerConfig,
        dict(
            vocab_size=VOCABULARY,
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=6,
            intermediate_size=80,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            is_decoder=True,
        ),
    ),
    "xglm": (
        hf.XGLMConfig,
        dict(
            vocab_size=VOCABULARY,
            d_model=48,
            num_layers=3,
            attention_heads=6,
            ffn_dim=80,
            max_position_embeddings=64,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
        ),
    ),
    "mpt": (hf.MptConfig, dict(vocab_size=VOCABULARY, d_model=48, n_layers=3, n_heads=6, max_seq_len=64)),
}
NEWER = {
    "xglm": needs("transformers", "5.15", "writes XGLM's attention in another way"),
    "roformer": needs("transformers", "5.18", "does not ask for RoFormer's mask"),
}
KNOWN = ("_attn", "forward")


def base(name, **changes):
    config_class, arguments = FAMILIES[name]
    torch.manual_seed(0)
    return drawn(hf.AutoModelForCausalLM.from_config(config_class(**{**arguments, **changes}))).train()


def model(name, method="prompt_tuning", **changes):
    sizes = dict(num_attention_heads=6, num_layers=3, token_dim=48)  # PEFT does not find MPT's
    return peft_model(None, method, base=base(name, **changes), sizes=sizes)


def replaced(model):
    return [module for module in model.modules() if any(name in vars(module) for name in KNOWN)]


@pytest.mark.parametrize("padding", ["right", "left", "mixed", "none"])
@pytest.mark.parametrize("name", cases(FAMILIES, NEWER))
def test_same_as_peft(name, padding):
    inputs = batch(padding)
    assert_equal(*both(model(name), inputs), inputs)


@pytest.mark.parametrize("method", ["multitask", "p_tuning_mlp"])
@pytest.mark.parametrize("name", cases(FAMILIES, NEWER))
def test_tasks_and_few_labels(name, method):
    inputs = batch("right", "part", common=3, method=method)
    assert_equal(*both(model(name, method), inputs), inputs)


@pytest.mark.parametrize("name", ["gptj", "mpt"])
def test_bf16_within_the_rounding_of_peft(name):
    low, high = (model(name).to(dtype) for dtype in (torch.bfloat16, torch.float64))
    assert_within_rounding(low, high, batch("right"))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", cases(FAMILIES, NEWER))
def test_gradient_checkpointing(name, reentrant):
    tuned, inputs = model(name), batch("right")
    if not tuned.base_model.supports_gradient_checkpointing:
        pytest.skip("the model has none")
    plain = step(tuned, inputs)
    fastprompt.accelerate(tuned)
    tuned.base_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_equal(plain, step(tuned, inputs), inputs)
    assert fastprompt.stats(tuned).padded == {}


@pytest.mark.parametrize("name", cases(FAMILIES, NEWER))
def test_a_cache_and_generation_are_peft_s(name):
    tuned = model(name).eval()
    inputs = {name: x for name, x in batch("left").items() if name != "labels"}
    generate = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
    real = torch.cat([torch.ones(len(inputs["input_ids"]), P), inputs["attention_mask"]], 1).bool()
    with torch.no_grad():
        plain = tuned(**inputs, use_cache=True).past_key_values
        with right_generation(tuned):
            text = tuned.generate(inputs["input_ids"], **generate)
        fastprompt.accelerate(tuned)
        fast = tuned(**inputs, use_cache=True).past_key_values
        assert torch.equal(tuned.generate(inputs["input_ids"], **generate), text)
    assert fastprompt.stats(tuned).padded == {}
    for ours, theirs in zip(fast.layers, plain.layers, strict=True):
        for x, y in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(x.transpose(1, 2)[real], y.transpose(1, 2)[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", cases(FAMILIES, NEWER))
def test_patched_attention(name, monkeypatch):
    plain, inputs = base(name).eval(), batch("mixed")
    calls = []
    original = attention.prefix_attention
    monkeypatch.setattr(attention, "prefix_attention", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = plain(**inputs).logits
        patched = fastprompt.patch_attention(plain)
        calls.clear()
        torch.testing.assert_close(patched(**inputs).logits[real], expected[real], rtol=1e-4, atol=1e-4)
        assert len(calls) == plain.config.num_hidden_layers
        fastprompt.unpatch_attention(patched)
        assert torch.equal(plain(**inputs).logits, expected) and not replaced(plain)


@pytest.mark.parametrize("name", ["gptj", "gpt_neo", "falcon_serial", "bloom_power_of_two", "mpt"])
def test_generation_behind_a_prefix(name):
    """Token by token behind a cache as by whole forwards, which run packed."""
    heads = FAMILIES[name][1].get("num_heads") or FAMILIES[name][1].get("n_heads") or 4
    heads = 6 if name == "falcon_serial" else heads
    layers = 4 if name == "gpt_neo" else 3
    method = fastprompt.PrefixTuning(P, layers, heads, 48 // heads)
    torch.nn.init.normal_(method.prefix)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprompt")
        tuned = fastprompt.SoftPromptModel(base(name, use_cache=True), method).eval()
        text = batch("none")["input_ids"]
        generated = tuned.generate(text, max_new_tokens=4, do_sample=False, eos_token_id=None)
        for _ in range(4):
            text = torch.cat([text, tuned(input_ids=text).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, text)


@pytest.mark.parametrize("name", ["gptj", "gpt_neo", "gpt_neox_japanese", "bloom_power_of_two"])
def test_attention_weights_are_dropped(name):
    rate = {"attn_pdrop" if name == "gptj" else "attention_dropout": 0.5}
    tuned, inputs = fastprompt.accelerate(model(name, **rate)), batch("right")
    tuned.train()
    assert tuned(**inputs).loss != tuned(**inputs).loss
    tuned.eval()
    assert tuned(**inputs).loss == tuned(**inputs).loss
    assert fastprompt.stats(tuned).padded == {}


@pytest.mark.parametrize("name", cases(FAMILIES, NEWER))
def test_an_attached_model_itself_computes_what_it_did(name):
    tuned, inputs = model(name), batch("right")
    with torch.no_grad():
        expected = tuned.base_model(**inputs).logits
        config = tuned.base_model.config
        fastprompt.accelerate(tuned)
        assert torch.equal(tuned.base_model(**inputs).logits, expected)
        for copied in (copy.deepcopy(tuned.base_model), pickle.loads(pickle.dumps(tuned.base_model))):
            assert torch.equal(copied(**inputs).logits, expected)
        fastprompt.restore(tuned)
        assert torch.equal(tuned.base_model(**inputs).logits, expected)
    assert not replaced(tuned) and tuned.base_model.config is config


@pytest.mark.parametrize("name", ["gpt_neo", "falcon_multi_query", "bloom_power_of_two", "mpt"])
def test_a_leak_is_found(name):
    leaking = base(name)
    layers = getattr(leaking.transformer, "h", None) or leaking.transformer.blocks
    layers[1].register_forward_pre_hook(lambda module, args: (leaked(args[0], 1e-3), *args[1:]))
    sizes = dict(num_attention_heads=6, num_layers=3, token_dim=48)
    with pytest.warns(UserWarning, match="packed rows give another output"):
        fastprompt.accelerate(peft_model(None, base=leaking, sizes=sizes))


class _OfASubclass(modeling_gpt_neo.GPTNeoSelfAttention):
    def _attn(self, query, key, value, attention_mask=None):
        return super()._attn(query, 2 * key, value, attention_mask)


def by_a_subclass(model, monkeypatch):
    for block in model.transformer.h:
        block.attn.attention.__class__ = _OfASubclass


def by_another_method_of_the_class(model, monkeypatch):
    original = modeling_gpt_neo.GPTNeoSelfAttention._attn

    @functools.wraps(original)
    def _attn(self, query, key, value, attention_mask=None):
        return original(self, query, 2 * key, value, attention_mask)

    monkeypatch.setattr(modeling_gpt_neo.GPTNeoSelfAttention, "_attn", _attn)


@pytest.mark.parametrize("change", [by_a_subclass, by_another_method_of_the_class])
def test_another_method_is_left_alone(change, monkeypatch):
    changed, inputs = base("gpt_neo"), batch("right")
    change(changed, monkeypatch)
    tuned = peft_model(None, base=changed)
    plain = step(tuned, inputs)
    with pytest.warns(UserWarning, match="GPTNeoForCausalLM computes attention in code of its own"):
        fastprompt.accelerate(tuned)
    assert_identical(plain, step(tuned, inputs))
    assert not replaced(changed)


def test_a_method_that_was_replaced_meanwhile_is_not_passed_over():
    """A user's own method of one module stays, and calls take PEFT's forward."""
    tuned, inputs = fastprompt.accelerate(model("gpt_neo")), batch("right")
    module = tuned.base_model.transformer.h[1].attn.attention
    mine = functools.partial(type(module)._attn, module)
    module._attn = mine
    with pytest.warns(UserWarning, match="GPTNeoSelfAttention was given another method"):
        tuned(**inputs)
    fastprompt.restore(tuned)
    assert module._attn is mine


def test_falcon_with_alibi_is_refused():
    with pytest.warns(UserWarning, match="Falcon rounds ALiBi or not, by the dtype of the mask"):
        fastprompt.accelerate(model("falcon_multi_query", alibi=True))
