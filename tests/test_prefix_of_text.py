"""prefix_of_text: as a prefix, what it gives is the text in front."""

import pytest
import torch
import transformers as hf
from parity import peft_model
from tiny_models import GEMMA3N, VOCABULARY, build

import fastprompt
from fastprompt import PrefixTuning, SoftPromptModel, prefix_of_text

TEXT = torch.randint(3, VOCABULARY, (12,), generator=torch.Generator().manual_seed(1)).tolist()
IDS = torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(2))
MIXED = dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"])
MODELS = {
    "full": lambda: build("llama"),
    "learned positions": lambda: build("gpt2"),
    "sliding": lambda: build("mistral_window"),
    "mixed, first sliding": lambda: build("gemma2", **MIXED),
    "mixed, first full": lambda: build("gemma3", layer_types=["full_attention", *["sliding_attention"] * 2]),
    "bf16": lambda: build("mistral_window", torch.bfloat16),
}


def behind(model, text, ids):
    """The logits of ``ids`` behind the text, which stands in front of every row."""
    whole = torch.cat([torch.tensor([text]).expand(len(ids), -1), ids], 1)
    with torch.no_grad():
        return model.eval()(input_ids=whole).logits[:, len(text) :]


def near(model):
    return dict(rtol=1e-4, atol=1e-5) if model.dtype == torch.float32 else dict(rtol=0.05, atol=0.1)


@pytest.mark.parametrize("length", [1, 4, 12])  # shorter than the window of 6, and longer
@pytest.mark.parametrize("name", MODELS)
def test_behind_the_prefix_as_behind_the_text(name, length):
    model, text = MODELS[name](), TEXT[:length]
    expected = behind(model, text, IDS)
    prefix = prefix_of_text(model, text)
    assert prefix.shape[:3] == (3, 2, length) and prefix.dtype == model.dtype and not prefix.requires_grad
    with torch.no_grad():
        got = fastprompt.patch_attention(model, prefix)(input_ids=IDS).logits
        torch.testing.assert_close(got, expected, **near(model))
        fastprompt.unpatch_attention(model)
        method = PrefixTuning(length, *prefix.shape[:1], *prefix.shape[3:], init=prefix)
        got = SoftPromptModel(model, method).eval()(IDS).logits
    torch.testing.assert_close(got, expected, **near(model))


def test_generation_behind_the_prefix_goes_on_as_behind_the_text():
    model = build("mistral_window").eval()
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    whole = torch.cat([torch.tensor([TEXT]).expand(len(IDS), -1), IDS], 1)
    expected = model.generate(whole, **options)[:, len(TEXT) :]
    fastprompt.patch_attention(model, prefix_of_text(model, TEXT))
    assert torch.equal(model.generate(IDS, **options), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_whatever_mode_the_model_is_in(reentrant):
    model = build("mistral_window", attention_dropout=0.3)
    expected = prefix_of_text(model.eval(), TEXT)
    model.train()
    model.model.layers[1].mlp.eval()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    modes = [module.training for module in model.modules()]
    assert torch.equal(prefix_of_text(model, TEXT), expected)
    assert [module.training for module in model.modules()] == modes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prefix_of_text(model, TEXT), expected)
    with pytest.raises(RuntimeError, match="interrupted"):
        model.model.norm.register_forward_hook(interrupt)
        prefix_of_text(model, TEXT)
    assert [module.training for module in model.modules()] == modes


def interrupt(module, inputs, output):
    raise RuntimeError("interrupted")


def test_a_model_that_is_patched_or_accelerated_is_the_model_it_was():
    model = build("mistral_window")
    expected = prefix_of_text(model, TEXT)
    fastprompt.patch_attention(model, torch.ones(3, 2, 4, 2, 8))
    assert torch.equal(prefix_of_text(model, TEXT), expected)
    assert model(input_ids=IDS).logits.isfinite().all() and fastprompt.unpatch_attention(model) is model
    wrapped = fastprompt.accelerate(peft_model(None, base=model))
    assert torch.equal(prefix_of_text(wrapped.base_model, TEXT), expected)
    with pytest.raises(ValueError, match="model must run the 12 tokens of the text alone, got keys of 17"):
        prefix_of_text(wrapped, TEXT)


def test_ids_of_several_kinds():
    model = build("llama")
    expected = prefix_of_text(model, TEXT)
    for ids in (torch.tensor(TEXT), torch.tensor([TEXT]), torch.tensor(TEXT, dtype=torch.int32)):
        assert torch.equal(prefix_of_text(model, ids), expected)


@pytest.mark.parametrize(
    "ids, error, message",
    [
        ([], ValueError, "token_ids must hold at least one token, got none"),
        ([3, VOCABULARY], ValueError, rf"token_ids must lie in \[0, {VOCABULARY}\), got values from 3 to {VOCABULARY}"),
        ([3.0], TypeError, "token_ids must have one of the dtypes"),
        (torch.ones(2, 3, dtype=torch.int64), ValueError, r"token_ids must have shape \[P\], got \[2, 3\]"),
    ],
)
def test_wrong_ids(ids, error, message):
    with pytest.raises(error, match=message):
        prefix_of_text(build("llama"), ids)


def hybrid():
    config = hf.Qwen3NextConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=80,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=0,
    )
    return hf.AutoModelForCausalLM.from_config(config)


def recurrent():
    return hf.AutoModelForCausalLM.from_config(
        hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2)
    )


def encoder_decoder():
    sizes = dict(encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16)
    return hf.BartForConditionalGeneration(
        hf.BartConfig(vocab_size=VOCABULARY, d_model=16, encoder_attention_heads=2, decoder_attention_heads=2, **sizes)
    )


def encoder():
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    return hf.DebertaV2Model(hf.DebertaV2Config(vocab_size=VOCABULARY, **sizes))


@pytest.mark.parametrize(
    "make, message",
    [
        (hybrid, "a Qwen3NextGatedDeltaNet keeps a recurrent or convolution state"),
        (recurrent, "a MambaMixer keeps a recurrent or convolution state"),
        (encoder_decoder, "an encoder-decoder has no place in front of its text"),
        (encoder, "0 of a DebertaV2Model did"),
    ],
)
def test_models_without_keys_and_values_of_all_tokens_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        prefix_of_text(make(), TEXT)


def test_layers_that_share_keys_and_values_have_one_prefix():
    config = hf.Gemma3nTextConfig(
        **GEMMA3N,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        sliding_window=6,
        activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    expected = behind(model, TEXT, IDS)
    prefix = prefix_of_text(model, TEXT)
    assert len(prefix) == 2
    with torch.no_grad():
        got = fastprompt.patch_attention(model, prefix)(input_ids=IDS).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
