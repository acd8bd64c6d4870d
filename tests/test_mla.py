"""Models whose values are narrower than their keys: multi-head latent attention, and MiMo."""

import warnings

import pytest
import torch
import transformers as hf
from needs import cases, needs
from parity import P, assert_same_steps, batch, peft_model
from tiny_models import VOCABULARY, drawn

import fastprompt
from fastprompt import PrefixTuning, PromptTuning, SoftPromptModel, patch_attention, prefix_of_text
from fastprompt.hf.masks import UnsupportedAttention

_COMMON = dict(vocab_size=VOCABULARY, hidden_size=48, num_attention_heads=4, pad_token_id=0, use_cache=False)
_DENSE = dict(_COMMON, num_hidden_layers=2, num_key_value_heads=4, intermediate_size=80)
_EXPERTS = dict(moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1)
_GROUPS = dict(_EXPERTS, n_group=1, topk_group=1)
_LATENT = dict(kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12)

LATENT = {
    "deepseek_v2": ("DeepseekV2", dict(**_DENSE, **_LATENT, **_EXPERTS)),
    "deepseek_v3": ("DeepseekV3", dict(**_DENSE, **_LATENT, **_GROUPS)),
    "minicpm3": ("MiniCPM3", dict(**_DENSE, **_LATENT)),
    "glm4_moe_lite": ("Glm4MoeLite", dict(**_DENSE, **_LATENT, **_GROUPS)),
    "mistral4": ("Mistral4", dict(**_DENSE, **_LATENT, **_GROUPS)),
    "longcat_flash": (
        "LongcatFlash",
        dict(
            **_COMMON, **_LATENT, head_dim=8, num_layers=1, ffn_hidden_size=80, expert_ffn_hidden_size=24,
            n_routed_experts=4, zero_expert_num=2, moe_topk=2,
        ),
    ),
}  # fmt: skip
MIMO = (
    "MiMoV2Flash",
    {**_DENSE, **_EXPERTS, **dict(num_key_value_heads=2, head_dim=24, v_head_dim=12, sliding_window=6)},
)
FAMILIES = {**LATENT, "mimo_v2_flash": MIMO}
NEWER = dict.fromkeys(["minicpm3", "mimo_v2_flash"], needs("transformers", "5.13", "does not have the model"))
TWO = cases(["deepseek_v3", "mimo_v2_flash"], NEWER)


def base(family, **changes):
    """A model in training mode; ``changes`` are of its config."""
    name, sizes = family
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**{**sizes, **changes})
    return drawn(getattr(hf, f"{name}ForCausalLM")(config)).train()


@pytest.mark.parametrize("name", cases(FAMILIES, NEWER))
def test_same_as_peft_on_packed_rows(name):
    batches = [batch(padding, "part") for padding in ("right", "left")]
    assert_same_steps(peft_model(name, base=base(FAMILIES[name])), batches)


@pytest.mark.parametrize("name", TWO)
def test_a_cache_is_that_of_the_model(name):
    """One of latents, too."""
    model = peft_model(name, base=base(FAMILIES[name], use_cache=True)).eval()
    inputs = {name: x for name, x in batch("right").items() if name != "labels"}
    with torch.no_grad():
        expected = model(**inputs)
        fastprompt.accelerate(model)
        got = model(**inputs)
    assert fastprompt.stats(model).packed == 1
    real = torch.cat([torch.ones(len(got.logits), P), inputs["attention_mask"]], 1).bool()
    torch.testing.assert_close(got.logits[real], expected.logits[real], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        for x, y in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert x.shape == y.shape
            seen = real[:, -y.shape[2] :]
            torch.testing.assert_close(x.transpose(1, 2)[seen], y.transpose(1, 2)[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TWO)
def test_a_soft_prompt_model(name):
    method = PromptTuning(P, 48)
    model, inputs = SoftPromptModel(base(FAMILIES[name]), method), batch("right")
    peft = peft_model(name, base=base(FAMILIES[name]))
    with torch.no_grad():
        peft.prompt_encoder["default"].embedding.weight.copy_(method.prompt[0])
    expected = peft(**inputs).loss
    expected.backward()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprompt runs")
        loss = model(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    gradient = peft.prompt_encoder["default"].embedding.weight.grad
    assert (method.prompt.grad[0] - gradient).norm() <= 1e-4 * gradient.norm()


@pytest.mark.parametrize("name", TWO)
def test_patched_attention(name):
    model, inputs = base(FAMILIES[name], use_cache=True).eval(), batch("left")
    inputs.pop("labels")
    generate = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        expected, text = model(**inputs).logits, model.generate(**inputs, **generate)
        patch_attention(model)
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(model(**inputs).logits[real], expected[real], rtol=1e-4, atol=1e-4)
        assert torch.equal(model.generate(**inputs, **generate), text)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("deepseek_v3", "its cache holds latents"),
        pytest.param("mimo_v2_flash", "its keys are 24 wide and its values 12", marks=NEWER["mimo_v2_flash"]),
    ],
)
def test_learned_keys_and_values_are_refused_by_name(name, reason):
    """One tensor of keys and values has one width. PEFT's own forward fails on it."""
    family = FAMILIES[name]
    for method in (PrefixTuning(P, 2, 4, 24), PrefixTuning(P, 2, 4, 12)):
        with pytest.raises(
            ValueError, match=f"at the input for a {family[0]}ForCausalLM, got a PrefixTuning: {reason}"
        ):
            SoftPromptModel(base(family), method)
    with pytest.raises(ValueError, match=f"must keep the keys and values .* but {reason}"):
        prefix_of_text(base(family), [1, 2, 3])
    heads = family[1]["num_key_value_heads"]
    patched = patch_attention(base(family), torch.zeros(2, 2, P, heads, 24))
    with pytest.raises(UnsupportedAttention, match=rf"values of \(heads, width\) \[{heads}, 12\], its prefix"):
        patched(input_ids=torch.ones(1, 3, dtype=torch.int64))
    model, inputs = peft_model(name, "prefix", base=base(family)), batch("right")
    with pytest.raises(RuntimeError) as expected:
        model(**inputs)
    with pytest.warns(UserWarning, match=reason):
        fastprompt.accelerate(model)
    with pytest.raises(RuntimeError) as got:
        model(**inputs)
    assert str(got.value) == str(expected.value)
