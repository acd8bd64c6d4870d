"""patch_attention: Hugging Face models on prefix_attention, padded, packed, decoding, with and without a prefix."""

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from test_parity import FALLBACK, PACKED
from tiny_models import VOCABULARY, build
from transformers import BertConfig, BertModel

import fastprompt
from fastprompt.hf import attention
from fastprompt.hf.masks import UnsupportedAttention
from fastprompt.peft.renamed_cache import right_generation

IDS = torch.randint(3, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 8, [1] * 3 + [0] * 5, [0] * 4 + [1] * 4])
LABELS = IDS.masked_fill(MASK == 0, -100)
LABELS[2, 4] = -100  # a padding token would have to predict it
PACKED_POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0] * 8, [0, 1, 2, 3, 4, 5, 6, 7]])


@pytest.fixture
def calls(monkeypatch):
    """How often prefix_attention was called from Hugging Face models."""
    seen = []
    original = attention.prefix_attention
    monkeypatch.setattr(attention, "prefix_attention", lambda *a, **k: (seen.append(1), original(*a, **k))[1])
    return seen


@pytest.mark.parametrize("name", PACKED)
def test_same_result_padded_packed_and_generated(name, calls):
    model = build(name).eval()
    batches = [dict(input_ids=IDS, attention_mask=MASK), dict(input_ids=IDS)]
    if name != "opt":  # makes a mask of ones where none is given, which hides the packing from Hugging Face itself
        batches.append(dict(input_ids=IDS, position_ids=PACKED_POSITIONS, use_cache=False))
    with torch.no_grad():
        plain = [model(**b).logits for b in batches]
        generated = model.generate(IDS[2:], max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert fastprompt.patch_attention(model) is model
        calls.clear()
        patched = [model(**b).logits for b in batches]
        assert len(calls) == 3 * len(batches)  # every layer of every batch ran on prefix_attention
        assert torch.equal(model.generate(IDS[2:], max_new_tokens=6, do_sample=False, pad_token_id=0), generated)
        fastprompt.unpatch_attention(model)
        again = [model(**b).logits for b in batches]
    for b, p, q, r in zip(batches, plain, patched, again):
        real = b.get("attention_mask", torch.ones_like(IDS)).bool()
        torch.testing.assert_close(q[real], p[real], rtol=1e-4, atol=1e-4)
        assert torch.equal(p, r)


@pytest.mark.parametrize("name", FALLBACK)
def test_models_that_build_their_own_masks_are_refused_and_left_alone(name):
    model = build(name).eval()
    before = model(input_ids=IDS, attention_mask=MASK).logits
    with pytest.raises(UnsupportedAttention, match=f"{type(model).__name__} cannot run on prefix_attention: "):
        fastprompt.patch_attention(model)
    assert torch.equal(model(input_ids=IDS, attention_mask=MASK).logits, before)


def test_training_and_gradient_checkpointing():
    model = build("llama")

    def gradient():
        model.zero_grad()
        model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss.backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    plain = gradient()
    fastprompt.patch_attention(model)
    torch.testing.assert_close(gradient(), plain, rtol=1e-4, atol=1e-6)
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradient(), plain, rtol=1e-4, atol=1e-6)


def prefix_model(name):
    """PEFT's Prefix-Tuning model, and its prefix as ``[L, 2, P, Hkv, Dh]``."""
    base = build(name)
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    torch.manual_seed(5)
    weight = next(model.prompt_encoder.parameters())
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape))
    config = model.active_peft_config
    prefix = weight.detach().view(4, 3, 2, config.num_attention_heads, -1).permute(1, 2, 0, 3, 4).contiguous()
    return model, prefix.requires_grad_(), weight


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral_window", "qwen3", "gemma2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_learned_prefix_equals_peft_s_prefix_tuning(name, checkpointing):
    model, prefix, weight = prefix_model(name)
    loss = model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss
    loss.backward()
    expected = weight.grad.view(4, 3, 2, prefix.shape[3], -1).permute(1, 2, 0, 3, 4)
    patched = fastprompt.patch_attention(build(name), prefix)
    if checkpointing:  # PEFT refuses it
        patched.gradient_checkpointing_enable()
    got = patched(input_ids=IDS, attention_mask=MASK, labels=LABELS, use_cache=False).loss
    got.backward()
    torch.testing.assert_close(got, loss, rtol=1e-5, atol=0)
    assert (prefix.grad - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral_window"])
def test_generation_behind_a_learned_prefix_with_and_without_a_cache(name):
    model, prefix, _ = prefix_model(name)
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    with right_generation(model.eval()):
        expected = model.generate(input_ids=IDS, **options)
    patched = fastprompt.patch_attention(build(name).eval(), prefix.detach())
    for use_cache in (True, False):
        assert torch.equal(patched.generate(IDS, use_cache=use_cache, **options), expected)


def test_encoders():
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=64
    )
    model = BertModel(config).eval()
    with torch.no_grad():
        plain = model(input_ids=IDS, attention_mask=MASK).last_hidden_state
        patched = fastprompt.patch_attention(model)(input_ids=IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(patched[MASK.bool()], plain[MASK.bool()], rtol=1e-4, atol=1e-5)


def test_only_this_model_changes():
    first = build("llama").eval()
    second = type(first)(first.config).eval()
    before = second(input_ids=IDS).logits
    fastprompt.patch_attention(first)
    assert second.config._attn_implementation == "sdpa" and torch.equal(second(input_ids=IDS).logits, before)
    assert "forward" not in vars(first) and type(first).forward.__module__.startswith("transformers")


def test_masks_with_holes_and_ready_made_masks_keep_their_meaning():
    model = build("llama").eval()
    holes = MASK.clone()
    holes[0, 3] = 0
    ready = torch.tril(torch.ones(3, 1, 8, 8)).bool() & (torch.arange(8) != 2)
    plain = [model(input_ids=IDS, attention_mask=m).logits for m in (holes, ready)]
    fastprompt.patch_attention(model)
    for mask, expected in zip((holes, ready), plain):
        got = model(input_ids=IDS, attention_mask=mask).logits
        torch.testing.assert_close(got[0, 4:], expected[0, 4:])
    _, prefix, _ = prefix_model("llama")
    fastprompt.patch_attention(model, prefix)
    with pytest.raises(UnsupportedAttention, match="handed a ready-made mask of shape"):
        model(input_ids=IDS, attention_mask=ready)


def test_holes_behind_a_prefix_equal_peft():
    model, prefix, _ = prefix_model("llama")
    holes = MASK.clone()
    holes[0, 3] = 0
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS, attention_mask=holes).logits
        got = fastprompt.patch_attention(build("llama").eval(), prefix)(input_ids=IDS, attention_mask=holes).logits
    torch.testing.assert_close(got[holes.bool()], expected[holes.bool()], rtol=1e-4, atol=1e-4)


def test_wrong_prefixes():
    with pytest.raises(ValueError, match=r"prefix must have shape \[L, 2, P, Hkv, Dh\], got \[3, 4\]"):
        fastprompt.patch_attention(build("llama"), torch.zeros(3, 4))
    model = fastprompt.patch_attention(build("llama"), torch.zeros(2, 2, 4, 2, 8))
    with pytest.raises(UnsupportedAttention, match="no layer_idx below the prefix's 2 layers"):
        model(input_ids=IDS)
