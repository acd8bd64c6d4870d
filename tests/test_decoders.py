"""The decoders of encoder-decoders, alone as language models: they count positions themselves."""

import warnings

import pytest
import torch
import transformers as hf
from parity import P, S, assert_equal, assert_same_steps, batch, peft_model, step
from tiny_models import VOCABULARY, drawn

import fastprompt
from fastprompt.peft.renamed_cache import right_generation

_SIZES = dict(
    vocab_size=VOCABULARY,
    d_model=48,
    encoder_layers=2,  # by which transformers makes the cache
    decoder_layers=2,
    encoder_attention_heads=6,
    decoder_attention_heads=6,
    encoder_ffn_dim=80,
    decoder_ffn_dim=80,
    max_position_embeddings=64,
    dropout=0.0,
    pad_token_id=0,
    forced_eos_token_id=None,
)
# learned positions behind an offset, sinusoidal ones, learned ones, and block sparse attention in the encoder alone
FAMILIES = {
    "bart": hf.BartConfig,
    "pegasus": hf.PegasusConfig,
    "blenderbot_small": hf.BlenderbotSmallConfig,
    "bigbird_pegasus": hf.BigBirdPegasusConfig,
}


def base(name):
    torch.manual_seed(0)
    config = FAMILIES[name](**_SIZES)
    config.is_decoder, config.is_encoder_decoder = True, False
    return drawn(hf.AutoModelForCausalLM.from_config(config)).train()


@pytest.mark.parametrize("name", FAMILIES)
def test_same_as_peft(name):
    batches = [batch(padding) for padding in ("right", "left", "mixed", "none")]
    assert_same_steps(peft_model(None, base=base(name)), batches)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_and_tasks(reentrant):
    model, inputs = peft_model(None, "multitask", base=base("bart")), batch("right", common=3, method="multitask")
    plain = step(model, inputs)
    fastprompt.accelerate(model)
    model.base_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_equal(plain, step(model, inputs), inputs)


@pytest.mark.parametrize("name", ["bart", "pegasus"])
def test_a_cache_and_generation_are_peft_s(name):
    model = peft_model(None, base=base(name)).eval()
    inputs = {name: x for name, x in batch("right").items() if name != "labels"}
    real = torch.cat([torch.ones(len(inputs["input_ids"]), P), inputs["attention_mask"]], 1).bool()
    generate = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        plain = model(**inputs, use_cache=True).past_key_values
        with right_generation(model):
            text = model.generate(**inputs, **generate)
        fastprompt.accelerate(model)
        fast = model(**inputs, use_cache=True).past_key_values
        assert torch.equal(model.generate(**inputs, **generate), text)
    assert fastprompt.stats(model).padded == {}
    for ours, theirs in zip(fast.layers, plain.layers, strict=True):
        for x, y in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(x.transpose(1, 2)[real], y.transpose(1, 2)[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bart", "pegasus"])
def test_positions_behind_a_prefix(name):
    """In whole forwards, packed and padded, and token by token."""
    method = fastprompt.PrefixTuning(P, 2, 6, 8)
    torch.nn.init.normal_(method.prefix)
    model, text = fastprompt.SoftPromptModel(base(name), method).eval(), batch("none")["input_ids"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprompt")
        generated = model.generate(text, max_new_tokens=4, do_sample=False, eos_token_id=None)
        logits = model(input_ids=generated).logits
    assert torch.equal(logits[:, S - 1 : -1].argmax(-1), generated[:, S:])
    model.release()
    with torch.no_grad(), pytest.warns(UserWarning, match="the model was released"):
        torch.testing.assert_close(model(input_ids=generated).logits, logits, rtol=1e-4, atol=1e-4)


def test_a_cache_of_another_kind_takes_peft_s_forward():
    """RoCBERT's has room for cross-attention."""
    config = hf.RoCBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=80,
        enable_pronunciation=False,
        enable_shape=False,
        is_decoder=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    model, inputs = peft_model(None, base=drawn(hf.RoCBertForCausalLM(config))), batch("right")
    fastprompt.accelerate(model)
    assert model.train()(**inputs).loss.isfinite() and fastprompt.stats(model).padded == {}
    with torch.no_grad(), pytest.warns(UserWarning, match="its cache holds other values"):
        model.eval()(**inputs, use_cache=True)
