"""Attention to the keys that an indexer chooses: plain causal attention while a row sees no more keys than that."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from parity import B, P, assert_equal, assert_identical, assert_same_steps, batch, is_packed, peft_model, step
from test_parity import assert_within_rounding
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as glm

import fastprompt
from benchmarks.tiny_families import families, tiny_model
from fastprompt.hf.masks import UnsupportedAttention
from fastprompt.layout import CannotPack
from fastprompt.peft.renamed_cache import right_generation

TOPK = 13  # the keys that are chosen: those of P virtual tokens and eight of text
ABOVE = f"an indexer chooses {TOPK} keys, and a row of the batch sees more"
SHARED = dict(indexer_types=["full", "shared"])  # a layer that takes another's choice
FAMILIES = {
    "deepseek_v32": {},
    "glm_moe_dsa": SHARED,
    "axk2": {},
    "hy_v4": SHARED,
    "dots3_note_text": dict(layer_types=["indexed_attention", "sliding_attention"]),
}
pytestmark = pytest.mark.skipif(not set(FAMILIES) <= families(), reason="this transformers does not have all of them")


def tiny(name, **changes):
    return tiny_model(name, **{"index_topk": TOPK, "num_hidden_layers": 2, **FAMILIES[name], **changes}).train()


def model(name, dtype=torch.float32, **changes):
    return peft_model(None, dtype=dtype, base=tiny(name, **changes).to(dtype))


def cut(inputs, width):
    """The first columns of a batch."""
    return {name: x if x is None else x[:, :width] for name, x in inputs.items()}


RIGHT = batch("right", lengths=(8, 4, 1, 6))  # a column of padding more than the indexer chooses
FITTING = [RIGHT, batch("mixed", "part", common=3, lengths=(7, 4, 3, 6)), cut(batch("none"), 8), cut(batch("none"), 1)]
LONGER = [batch("left", "part"), batch("none", "last")]


@pytest.mark.parametrize("name", FAMILIES)
def test_same_as_peft(name):
    """Up to the keys that are chosen, and bit for bit PEFT's forward in a batch with a longer row, one by one."""
    tuned, given = model(name), dict(RIGHT, labels=None)
    real = torch.cat([torch.ones(B, P), RIGHT["attention_mask"]], 1).bool()
    above = [step(tuned, inputs) for inputs in LONGER]
    with torch.no_grad():
        bare, cache = tuned.base_model(**LONGER[0]).logits, tuned(**given).past_key_values
    assert_same_steps(tuned, FITTING)
    fastprompt.accelerate(tuned)
    with pytest.warns(UserWarning, match=ABOVE):
        for expected, inputs in zip(above, LONGER, strict=True):
            assert_identical(expected, step(tuned, inputs))
    assert fastprompt.stats(tuned).padded == {ABOVE: 2 * len(LONGER)}
    with torch.no_grad():
        assert torch.equal(tuned.base_model(**LONGER[0]).logits, bare)
        assert_same_cache(tuned(**given).past_key_values, cache, real)
    assert fastprompt.stats(tuned).packed == 1


def assert_same_cache(got, expected, real):
    """The keys of indexers, too."""
    for ours, theirs in zip(got.layers, expected.layers, strict=True):
        for kind in ("keys", "values", "indexer_keys"):
            x, y = getattr(ours, kind, None), getattr(theirs, kind, None)
            assert (x is None) == (y is None)
            if x is not None:
                x, y = (t if kind == "indexer_keys" else t.transpose(1, 2) for t in (x, y))
                seen = real[:, -y.shape[1] :]
                torch.testing.assert_close(x[seen], y[seen], rtol=1e-4, atol=1e-4)


def test_a_row_that_is_longer_behind_its_last_label():
    """Its logits may be read; where all rows fit, those that no label depends on are left out."""
    tuned, inputs = fastprompt.accelerate(model("deepseek_v32")), batch("right")
    inputs["labels"][:, 4:] = -100
    with pytest.warns(UserWarning, match=ABOVE):
        assert not is_packed(tuned, inputs)
    inputs = cut(inputs, 8)
    assert tuned(**inputs).logits.shape[:2] == (B, P + 8)


def test_generation_and_copies():
    """Of a model that is attached, choosing among keys."""
    tuned, inputs = model("glm_moe_dsa").eval(), batch("left")
    given = dict(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    generate = dict(max_new_tokens=3, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        expected = tuned.base_model(**inputs).logits
        with right_generation(tuned):
            text = tuned.generate(**given, **generate)
        fastprompt.accelerate(tuned)
        assert torch.equal(tuned.generate(**given, **generate), text)
        for copied in (copy.deepcopy(tuned.base_model), pickle.loads(pickle.dumps(tuned.base_model))):
            assert torch.equal(copied(**inputs).logits, expected)


def test_gradient_checkpointing():
    tuned = model("glm_moe_dsa")
    plain = step(tuned, RIGHT)
    fastprompt.accelerate(tuned)
    for reentrant in (False, True):
        tuned.base_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_equal(plain, step(tuned, RIGHT), RIGHT)
    assert fastprompt.stats(tuned).padded == {}


def test_bf16_within_the_rounding_of_peft():
    """All experts run, as rounding would choose others."""
    experts = dict(num_experts_per_tok=4, experts_implementation="eager")
    low, high = (model("deepseek_v32", dtype, **experts) for dtype in (torch.bfloat16, torch.float64))
    assert_within_rounding(low, high, RIGHT)


def test_packed_samples():
    """Of each the length counts, and not their sum; there is no padded forward for longer ones."""
    soft = fastprompt.SoftPromptModel(tiny("axk2"), fastprompt.PromptTuning(P, 64))
    rows = {name: x[:3] for name, x in cut(batch("none"), 8).items() if x is not None}
    flat = {name: x.reshape(1, -1) for name, x in rows.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprompt runs")
        torch.testing.assert_close(soft(**flat, cu_seqlens=torch.tensor([0, 8, 16, 24])).loss, soft(**rows).loss)
    with pytest.raises(CannotPack, match=ABOVE):
        soft(**flat, cu_seqlens=torch.tensor([0, 9, 16, 24]))


def by_a_subclass(base, monkeypatch):
    class Indexer(glm.GlmMoeDsaIndexer):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)[..., :-1]

    base.model.layers[0].self_attn.indexer.__class__ = Indexer


def by_another_attention_of_the_class(base, monkeypatch):
    original = glm.GlmMoeDsaAttention.forward

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    monkeypatch.setattr(glm.GlmMoeDsaAttention, "forward", forward)


@pytest.mark.parametrize("change", [by_a_subclass, by_another_attention_of_the_class])
def test_keys_that_are_chosen_in_another_way_are_left_to_peft(change, monkeypatch):
    tuned = model("glm_moe_dsa")
    change(tuned.base_model, monkeypatch)
    plain = step(tuned, RIGHT)
    with pytest.warns(UserWarning, match="keys that are chosen in a way that is not known"):
        fastprompt.accelerate(tuned)
    assert_identical(plain, step(tuned, RIGHT))


def test_padded_batches_of_a_patched_model_are_refused():
    with pytest.raises(UnsupportedAttention, match="an indexer chooses the keys of DeepseekV32Attention"):
        fastprompt.patch_attention(tiny("deepseek_v32"))
