"""Tiny random-init encoder-decoders, as ``tiny_models.py`` has causal LMs, and their steps, as in ``parity.py``."""

import copy
import warnings

import torch
import transformers as hf
from needs import needs_t5
from parity import TASKS, peft_model, trained
from tiny_models import T5, VOCABULARY, drawn

import fastprompt
from fastprompt.hf.cache_names import cache_in

SOURCES, TARGETS = (9, 4, 1, 6), (5, 1, 6, 3)
B, S, T = 4, 9, 6
_BART = dict(
    vocab_size=VOCABULARY,
    d_model=48,
    encoder_layers=2,
    decoder_layers=2,
    encoder_ffn_dim=80,
    decoder_ffn_dim=80,
    encoder_attention_heads=6,
    decoder_attention_heads=6,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    max_position_embeddings=20,  # fewer than a packed batch has rows
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
    forced_eos_token_id=None,
)
_GATED = dict(T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)

# name -> config
PAIRS = {
    "t5": hf.T5Config(**T5),
    "t5_scaled": hf.T5Config(
        **T5, scale_decoder_outputs=True, relative_attention_num_buckets=4, relative_attention_max_distance=6
    ),
    "flan_t5": hf.T5Config(**_GATED),
    "mt5": hf.MT5Config(**_GATED),
    "umt5": hf.UMT5Config(**_GATED),
    "bart": hf.BartConfig(**_BART, scale_embedding=True),
    "mbart": hf.MBartConfig(**_BART),
    "plbart": hf.PLBartConfig(**_BART),
    "pegasus": hf.PegasusConfig(**_BART),
    "marian": hf.MarianConfig(**_BART),
    "blenderbot": hf.BlenderbotConfig(**_BART),
    "blenderbot_small": hf.BlenderbotSmallConfig(**_BART),
}
OF_T5 = dict.fromkeys(["t5", "t5_scaled", "flan_t5", "mt5", "umt5"], needs_t5)


def build_pair(name, dtype=torch.float32, seed=0, config=None):
    """A model of :data:`PAIRS`, or of a config like one of these, in training mode."""
    torch.manual_seed(seed)
    model = drawn(hf.AutoModelForSeq2SeqLM.from_config(copy.deepcopy(config or PAIRS[name])), seed)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model.to(dtype).train()


def pair_model(name, method="prompt_tuning", dtype=torch.float32, base=None, **changes):
    """A PEFT model of an encoder-decoder."""
    base = build_pair(name, dtype) if base is None else base
    return peft_model(None, method, dtype, task_type="SEQ_2_SEQ_LM", base=base, **changes)


def pair_batch(padding="right", labelled="all", method="prompt_tuning", sources=SOURCES, targets=TARGETS):
    """Uneven sources and targets, padded on the right, or all of one length ("none")."""
    generator = torch.Generator().manual_seed(2)
    rows, width, columns = len(sources), max(sources), max(targets)
    ids = torch.randint(3, VOCABULARY, (rows, width), generator=generator)
    labels = torch.randint(3, VOCABULARY, (rows, columns), generator=generator)
    real = torch.arange(width) < torch.tensor(sources)[:, None]
    inputs = dict(input_ids=ids, attention_mask=real.long(), labels=labels)
    if padding == "none":
        inputs["attention_mask"] = None
    else:
        labels.masked_fill_(torch.arange(columns) >= torch.tensor(targets)[:, None], -100)
    if labelled == "part":
        labels[0, 1:3] = labels[1] = -100
    return dict(inputs, task_ids=TASKS) if method == "multitask" else inputs


def pair_step(model, inputs):
    """Loss and gradients of a training step, and the loss, logits and encoder states of an evaluation."""
    loss, gradients = trained(model, inputs)
    model.eval()
    with torch.no_grad():
        output = model(**inputs)
    model.train()
    return loss, gradients, output


def both_pairs(model, inputs):
    """The step by PEFT and by fastprompt, which must have run packed rows without a warning."""
    return both_of_each_pair(model, [inputs])[0]


def both_of_each_pair(model, batches):
    """:func:`both_pairs` of each batch, with a model that is accelerated once."""
    plain = [pair_step(fastprompt.restore(model), inputs) for inputs in batches]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprompt runs PEFT's own padded forward")
        fastprompt.accelerate(model)
        fast = [pair_step(model, inputs) for inputs in batches]
    assert fastprompt.stats(model).packed == 2 * len(batches)
    fastprompt.restore(model)
    return list(zip(plain, fast))


def assert_pairs_equal(plain, fast, inputs, loss_rtol=1e-5, gradient_rtol=1e-4, output_rtol=1e-4):
    torch.testing.assert_close(fast[0], plain[0], rtol=loss_rtol, atol=0)
    assert plain[1] and fast[1].keys() == plain[1].keys()
    floor = 1e-3 * max(x.norm() for x in plain[1].values())
    for name, expected in plain[1].items():
        error = (fast[1][name] - expected).norm() / expected.norm().clamp(min=floor)
        assert error <= gradient_rtol, f"gradient of {name} differs by {error:.1e}"
    assert_outputs_equal(fast[2], plain[2], inputs, output_rtol)
    if plain[2].loss is not None:
        torch.testing.assert_close(fast[2].loss, plain[2].loss, rtol=loss_rtol, atol=0)


def assert_outputs_equal(ours, theirs, inputs, rtol=1e-4):
    """Logits, encoder states and caches of an evaluation, where a model's own are those of tokens."""
    assert list(ours) == list(theirs)
    states, mask = theirs.encoder_last_hidden_state, inputs["attention_mask"]
    real = torch.ones(states.shape[:2]) if mask is None else mask
    real = torch.nn.functional.pad(real, (states.shape[1] - real.shape[1], 0), value=1).bool()
    _assert_close(ours.encoder_last_hidden_state, states, real, rtol)
    if inputs.get("decoder_attention_mask") is not None:
        return
    everywhere = torch.ones(theirs.logits.shape[:2]).bool()
    _assert_close(ours.logits, theirs.logits, everywhere, rtol)
    ours, theirs = cache_in(ours), cache_in(theirs)
    if theirs is None:
        return
    for part, seen in (("self_attention_cache", everywhere), ("cross_attention_cache", real)):
        for mine, other in zip(getattr(ours, part), getattr(theirs, part)):
            for x, y in zip(mine[:2], other[:2]):
                columns = torch.nn.functional.pad(seen, (y.shape[2] - seen.shape[1], 0), value=True)
                _assert_close(x.transpose(1, 2), y.transpose(1, 2), columns, rtol)


def _assert_close(got, expected, real, rtol):
    assert got.shape == expected.shape
    difference = (got - expected)[real].abs().max() / expected[real].abs().max()
    assert difference <= rtol, f"outputs differ by {difference:.1e}"
