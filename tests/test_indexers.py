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

TOPK = 13  # the keys that are chosen: those of P virtual tokens and eight of text
ABOVE = f"an indexer chooses {TOPK} of the keys that a row sees, and a row of the batch sees more"
FAMILIES = {
    "deepseek_v32": {},
    "glm_moe_dsa": dict(indexer_types=["full", "shared", "full", "shared"]),  # layers that take another's choice
    "axk2": {},
    "hy_v4": {},
    "dots3_note_text": {},  # with a sliding window in half of its layers
}
pytestmark = pytest.mark.skipif(
    not set(FAMILIES) <= families(), reason="this transformers does not have them, or with another GLM"
)


def model(name, dtype=torch.float32, **changes):
    base = tiny_model(name, index_topk=TOPK, **FAMILIES[name], **changes)
    return peft_model(None, dtype=dtype, base=base.to(dtype).train())


def cut(inputs, width):
    """The first columns of a batch."""
    return {name: x if x is None else x[:, :width] for name, x in inputs.items()}


FITTING = [
    batch("right", lengths=(8, 4, 1, 6)),  # a column of padding more than the indexer chooses
    batch("left", "part", lengths=(7, 8, 1, 6)),
    batch("mixed", common=3, lengths=(7, 4, 3, 6)),
    batch("right", lengths=(1, 1, 1, 1)),
    cut(batch("none"), 8),
    cut(batch("none"), 1),
]
LONGER = [batch("right"), batch("left", "part"), batch("none", "last")]


@pytest.mark.parametrize("name", FAMILIES)
def test_same_as_peft_up_to_the_keys_that_are_chosen(name):
    assert_same_steps(model(name), FITTING)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_longer_batch_takes_peft_s_forward(name):
    """Bit for bit, and the next one is packed again."""
    tuned = model(name)
    plain = [step(tuned, inputs) for inputs in LONGER]
    fastprompt.accelerate(tuned)
    with pytest.warns(UserWarning, match=ABOVE):
        for expected, inputs in zip(plain, LONGER, strict=True):
            assert_identical(expected, step(tuned, inputs))
    assert fastprompt.stats(tuned).padded == {ABOVE: 2 * len(LONGER)} and is_packed(tuned, FITTING[0])


def test_a_row_that_is_longer_behind_its_last_label():
    """Its logits may be read; where all rows fit, those that no label depends on are left out."""
    tuned, inputs = fastprompt.accelerate(model("deepseek_v32")), batch("right")
    inputs["labels"][:, 4:] = -100
    with pytest.warns(UserWarning, match=ABOVE):
        assert not is_packed(tuned, inputs)
    inputs = cut(inputs, 8)
    assert tuned(**inputs).logits.shape[:2] == (B, P + 8)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_is_that_of_the_model(name):
    tuned, inputs = model(name).eval(), dict(FITTING[0], labels=None)
    real = torch.cat([torch.ones(B, P), inputs["attention_mask"]], 1).bool()
    with torch.no_grad():
        expected = tuned(**inputs).past_key_values
        fastprompt.accelerate(tuned)
        got = tuned(**inputs).past_key_values
    assert fastprompt.stats(tuned).packed == 1
    for ours, theirs in zip(got.layers, expected.layers, strict=True):
        for kind in ("keys", "values", "indexer_keys"):
            x, y = getattr(ours, kind, None), getattr(theirs, kind, None)
            assert (x is None) == (y is None)
            if x is not None:
                x, y = (t if kind == "indexer_keys" else t.transpose(1, 2) for t in (x, y))
                torch.testing.assert_close(x[real], y[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_attached_model_itself_computes_what_it_did(name):
    """Choosing among keys, and in generation."""
    tuned, inputs = model(name).eval(), batch("left")
    given = dict(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    generate = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        expected, text = tuned.base_model(**inputs).logits, tuned.generate(**given, **generate)
        fastprompt.accelerate(tuned)
        assert torch.equal(tuned.base_model(**inputs).logits, expected)
        assert torch.equal(tuned.generate(**given, **generate), text)
        for copied in (copy.deepcopy(tuned.base_model), pickle.loads(pickle.dumps(tuned.base_model))):
            assert torch.equal(copied(**inputs).logits, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["glm_moe_dsa", "dots3_note_text"])
def test_gradient_checkpointing(name, reentrant):
    tuned, inputs = model(name), FITTING[0]
    plain = step(tuned, inputs)
    fastprompt.accelerate(tuned)
    tuned.base_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_equal(plain, step(tuned, inputs), inputs)
    assert fastprompt.stats(tuned).padded == {}


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_bf16_within_the_rounding_of_peft(name):
    """With experts of one kind, as rounding would choose others."""
    low, high = (
        model(name, dtype, num_experts_per_tok=4, experts_implementation="eager")
        for dtype in (torch.bfloat16, torch.float64)
    )
    assert_within_rounding(low, high, FITTING[0])


def test_packed_samples():
    """Of each the length counts, and not their sum; there is no padded forward for longer ones."""
    method = fastprompt.PromptTuning(P, 64)
    soft, ids = fastprompt.SoftPromptModel(tiny_model("axk2", index_topk=TOPK).train(), method), batch("none")
    flat = dict(input_ids=ids["input_ids"][:3, :8].reshape(1, -1), labels=ids["labels"][:3, :8].reshape(1, -1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprompt runs")
        packed = soft(**flat, cu_seqlens=torch.tensor([0, 8, 16, 24])).loss
        torch.testing.assert_close(packed, soft(**cut({k: x[:3] for k, x in ids.items() if x is not None}, 8)).loss)
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
    tuned, inputs = model("glm_moe_dsa"), FITTING[0]
    change(tuned.base_model, monkeypatch)
    plain = step(tuned, inputs)
    with pytest.warns(UserWarning, match="keys that are chosen in a way that is not known"):
        fastprompt.accelerate(tuned)
    assert_identical(plain, step(tuned, inputs))


def test_padded_batches_of_a_patched_model_are_refused():
    with pytest.raises(UnsupportedAttention, match="an indexer chooses the keys of DeepseekV32Attention"):
        fastprompt.patch_attention(tiny_model("deepseek_v32"))
