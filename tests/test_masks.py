"""Masks: what is read off a mask function holds on all pairs; a mask of another form is never taken for it."""

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from needs import cases, needs
from parity import batch, peft_model
from test_patch_attention import IDS, MASK, calls, prefix_model  # noqa: F401 (a fixture)
from tiny_models import VOCABULARY, build
from transformers import masking_utils as masking
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import fastprompt
from fastprompt.hf.mask_patterns import Pattern, find_pattern, read_pattern
from fastprompt.hf.masks import PackedRows, UnsupportedAttention
from fastprompt.layout import plan_padded_input

needs_blocks = needs("transformers", "5.9", "has no bidirectional blocks in masks, nor models that are asked for them")
HAS_BLOCKS = hasattr(masking, "blockwise_overlay")

POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1], [3, 4, 5, 6, 7, 0, 1, 2, 3]])
PACKED = masking.find_packed_sequence_indices(POSITIONS)
WIDTH = POSITIONS.shape[1]
NO_BLOCKS = torch.full((2, WIDTH), -1)
BLOCKS = NO_BLOCKS.index_fill(1, torch.tensor([2, 3, 4]), 0)
WINDOW = masking.sliding_window_causal_mask_function(3)
REMAPS = hasattr(masking, "remap_positions_for_packed_sequence")  # older transformers know no other positions


def remapped(mask_function, positions):
    return masking.remap_positions_for_packed_sequence(mask_function, positions) if REMAPS else mask_function


def packed_as_transformers_does(mask_function, positions, segments):
    return masking.and_masks(remapped(mask_function, positions), masking.packed_sequence_mask_function(segments))


ANY_PAIR = (lambda: lambda *args: torch.tensor(True, dtype=torch.bool))()  # of Falcon, before transformers 5.15
READ = {
    "causal": masking.causal_mask_function,
    "causal, and any pair": masking.and_masks(masking.causal_mask_function, ANY_PAIR),
    "bidirectional": masking.bidirectional_mask_function,
    "window": WINDOW,
    "window of one": masking.sliding_window_causal_mask_function(1),
    "bidirectional window": masking.sliding_window_bidirectional_mask_function(3),
    "two windows": masking.and_masks(WINDOW, masking.sliding_window_bidirectional_overlay(4)),
    "packed": packed_as_transformers_does(masking.causal_mask_function, POSITIONS, PACKED),
    "packed window": packed_as_transformers_does(WINDOW, POSITIONS, PACKED),
    "packed by the model": masking.and_masks(
        masking.bidirectional_mask_function, masking.packed_sequence_mask_function(PACKED)
    ),
    "chunks": masking.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.int64)),
}
UNREAD = {
    "sequences in no order": masking.packed_sequence_mask_function(PACKED.flip(1)),
    "a function of the model's own": lambda b, h, q, k: k <= q,
    "a constant that may change": (lambda: lambda *args: torch.tensor(WIDTH > 0, dtype=torch.bool))(),
}
if HAS_BLOCKS:
    READ["no blocks"] = masking.or_masks(masking.causal_mask_function, masking.blockwise_overlay(NO_BLOCKS))
    READ["packed, then no blocks"] = masking.and_masks(
        masking.or_masks(remapped(WINDOW, POSITIONS), masking.blockwise_overlay(NO_BLOCKS)),
        masking.packed_sequence_mask_function(PACKED),
    )
    UNREAD["blocks"] = masking.or_masks(masking.causal_mask_function, masking.blockwise_overlay(BLOCKS))
if REMAPS:
    UNREAD["positions in other steps"] = packed_as_transformers_does(WINDOW, 2 * POSITIONS, PACKED)


def all_pairs(mask_function, real=None):
    """``[B, S, S]`` of what transformers makes of a mask function, False where a token is padding."""
    seen = masking.sdpa_mask(
        batch_size=2, q_length=WIDTH, kv_length=WIDTH, mask_function=mask_function, allow_is_causal_skip=False
    )[:, 0]
    return seen if real is None else seen & real[:, :, None] & real[:, None, :]


def said(pattern, real=None):
    """``[B, S, S]`` of what a pattern says."""
    seen = all_pairs(pattern.sees)
    if pattern.segments is not None:
        seen = seen & (pattern.segments[:, :, None] == pattern.segments[:, None, :])
    if pattern.chunk is not None:
        chunk = torch.arange(WIDTH) // pattern.chunk
        seen = seen & (chunk[:, None] == chunk)
    return seen if real is None else seen & real[:, :, None] & real[:, None, :]


@pytest.mark.parametrize("name", READ)
def test_what_is_read_off_a_mask_function_holds_on_all_pairs(name):
    assert torch.equal(said(read_pattern(READ[name])), all_pairs(READ[name]))


@pytest.mark.parametrize("name", UNREAD)
def test_what_cannot_be_read_is_not_guessed(name):
    assert read_pattern(UNREAD[name]) is None


@given(
    ahead=st.sampled_from([0, 1, 4, WIDTH]),
    behind=st.sampled_from([0, 2, 5, WIDTH]),
    first=st.tuples(st.integers(0, WIDTH), st.integers(0, WIDTH)),
    length=st.tuples(st.integers(0, WIDTH), st.integers(0, WIDTH)),
    changed=st.none() | st.tuples(st.integers(0, 1), st.integers(0, WIDTH - 1), st.integers(0, WIDTH - 1)),
)
def test_a_pattern_is_found_if_and_only_if_it_holds_on_all_pairs_of_real_tokens(ahead, behind, first, length, changed):
    column = torch.arange(WIDTH)
    first, last = torch.tensor(first)[:, None], (torch.tensor(first) + torch.tensor(length))[:, None]
    real = (column >= first) & (column < last)
    table = ((column - column[:, None] <= ahead) & (column[:, None] - column <= behind)).repeat(2, 1, 1)
    if changed is not None:
        table[changed] ^= True
    seen = table & real[:, :, None] & real[:, None, :]
    pattern = find_pattern(lambda b, h, q, k: table[b, q, k], real)
    if pattern is not None:
        assert torch.equal(said(pattern, real), seen)
    else:
        bounds = [*range(WIDTH), None]
        assert not any(torch.equal(said(Pattern(a, b), real), seen) for a in bounds for b in bounds)


def test_pairs_are_looked_at_in_blocks(monkeypatch):
    monkeypatch.setattr("fastprompt.hf.mask_patterns._CELLS", 2 * WIDTH * 2)
    everywhere = torch.ones(2, WIDTH, dtype=torch.bool)
    assert find_pattern(WINDOW, everywhere).window == 3
    assert find_pattern(lambda b, h, q, k: (k <= q) | (k + q == 2), everywhere) is None


# Whole models, whose patched forward has to give what the model itself gives.

_TEXT = dict(vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2)
_TEXT |= dict(intermediate_size=80, head_dim=8)
_ENCODER = dict(vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=64)
TYPES = torch.zeros_like(IDS).index_fill(1, torch.tensor([2, 3, 4]), 1)


def drawn(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model.eval()


def prefix_lm():
    config = hf.AutoConfig.for_model(
        "hrm_text", **_TEXT | dict(num_hidden_layers=1), H_cycles=1, L_cycles=1, embedding_scale=1.0
    )
    return drawn(hf.AutoModelForCausalLM.from_config(config))


def image_blocks():
    vision = hf.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = hf.Gemma3TextConfig(**_TEXT, sliding_window=4, query_pre_attn_scalar=8)
    config = hf.Gemma3Config(text_config=text, vision_config=vision, image_token_id=96, mm_tokens_per_image=4)
    return drawn(hf.Gemma3ForConditionalGeneration(config))


def chunks(layers=4):
    config = hf.Llama4TextConfig(
        **_TEXT | dict(num_hidden_layers=layers), intermediate_size_mlp=80, num_local_experts=2, attention_chunk_size=5
    )
    return drawn(hf.Llama4ForCausalLM(config))


def embedding_gemma():
    return drawn(
        hf.Gemma3TextModel(
            hf.Gemma3TextConfig(**_TEXT, sliding_window=4, query_pre_attn_scalar=8, use_bidirectional_attention=True)
        )
    )


def encoder_decoder():
    sizes = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=6, decoder_attention_heads=6)
    config = hf.BartConfig(vocab_size=VOCABULARY, d_model=48, encoder_ffn_dim=64, decoder_ffn_dim=64, **sizes)
    return drawn(hf.BartForConditionalGeneration(config))


def decoder_of_bert():
    return drawn(hf.BertModel(hf.BertConfig(**_ENCODER, is_decoder=True, add_cross_attention=True)))


def local_encoder():
    tokens = dict(pad_token_id=0, bos_token_id=1, cls_token_id=1, sep_token_id=2, eos_token_id=2)
    return drawn(hf.ModernBertModel(hf.ModernBertConfig(**_ENCODER, local_attention=4, **tokens)))


def told_not_to_be_causal():
    """What turns a decoder into an encoder: where no token is padding, transformers goes by this flag alone."""
    model = drawn(build("llama"))
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model


_STATES = torch.randn(3, 8, 48, generator=torch.Generator().manual_seed(2))
WHOLE = {
    "prefix-LM": (prefix_lm, dict(token_type_ids=TYPES)),
    "prefix-LM without a prefix": (prefix_lm, {}),
    "image blocks": (image_blocks, dict(token_type_ids=TYPES)),
    "chunks": (chunks, {}),
    "window by the model's own function": (embedding_gemma, {}),
    "encoder-decoder": (encoder_decoder, dict(decoder_input_ids=IDS.flip(0))),
    "cross-attention": (decoder_of_bert, dict(encoder_hidden_states=_STATES, encoder_attention_mask=MASK.flip(0))),
    "encoder with a window": (local_encoder, {}),
    "is_causal False": (told_not_to_be_causal, {}),
}


def first(output):
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize("name", cases(WHOLE, dict.fromkeys(["prefix-LM", "prefix-LM without a prefix"], needs_blocks)))
def test_a_patched_model_gives_what_it_gave(name):
    make, inputs = WHOLE[name]
    model = make()
    batches = [dict(inputs, input_ids=IDS, **extra) for extra in ({}, dict(attention_mask=MASK))]
    with torch.no_grad():
        expected = [first(model(**inputs)) for inputs in batches]
        fastprompt.patch_attention(model)
        found = [first(model(**inputs)) for inputs in batches]
    padded = torch.ones_like(MASK) if model.config.is_encoder_decoder else MASK  # only the encoder's text is padded
    for real, want, got in zip((torch.ones_like(MASK), padded), expected, found):
        torch.testing.assert_close(got[real.bool()], want[real.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("types", [torch.zeros_like(IDS), None])
def test_a_model_with_image_blocks_runs_on_prefix_attention_where_a_batch_has_none(types, calls):  # noqa: F811
    model = image_blocks()
    fastprompt.patch_attention(model)
    calls.clear()
    model(input_ids=IDS, attention_mask=MASK, token_type_ids=types)
    assert len(calls) == 3


def test_short_rows_of_a_model_with_chunks_run_on_prefix_attention(calls):  # noqa: F811
    model = chunks()
    fastprompt.patch_attention(model)
    calls.clear()
    model(input_ids=IDS[:, :5])
    assert len(calls) == 4


PREFIX = torch.zeros(3, 2, 4, 2, 8)


def test_chunks_leave_no_place_for_a_prefix():
    patched = fastprompt.patch_attention(chunks(3), PREFIX)
    with pytest.raises(UnsupportedAttention, match="attention in chunks leaves no place for a prefix"):
        patched(input_ids=IDS)


@needs_blocks
def test_blocks_leave_no_place_for_a_prefix():
    patched = fastprompt.patch_attention(image_blocks(), PREFIX)
    patched(input_ids=IDS, token_type_ids=0 * TYPES)
    with pytest.raises(UnsupportedAttention, match="attention both ways within blocks leaves no place for a prefix"):
        patched(input_ids=IDS, token_type_ids=TYPES)


@needs_blocks
def test_holes_behind_a_prefix_in_a_model_that_knows_blocks():
    model, text = image_blocks(), IDS[:1, :4]
    mask = MASK.clone()
    mask[0, 3] = 0
    whole = torch.cat([text.expand(3, -1), IDS], 1)
    with torch.no_grad():
        front = torch.cat([torch.ones_like(IDS[:, :4]), mask], 1)
        expected = model(input_ids=whole, attention_mask=front, token_type_ids=torch.zeros_like(whole)).logits[:, 4:]
        fastprompt.patch_attention(model, fastprompt.prefix_of_text(model, text))
        got = model(input_ids=IDS, attention_mask=mask, token_type_ids=0 * TYPES).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


# Planned rows.


def ask(mask_function, causal=True, rows=None, **other):
    """What a model gets that asks for a mask while planned rows run: two sequences behind a prompt, 2 + 5 + 3 rows."""
    plan = plan_padded_input(2, 5, 2, attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]))
    rows = rows or plan.sequences.rows
    return PackedRows(plan, causal).mask(
        "sdpa", batch_size=1, q_length=rows, kv_length=rows, mask_function=mask_function, **other
    )


def packed(mask_function, positions):
    positions = torch.tensor([positions])
    segments = (positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(1)
    return packed_as_transformers_does(mask_function, positions, segments)


OWN_POSITIONS = [0, 1, 2, 3, 4, 5, 6, 2, 3, 4]


def test_planned_rows_take_the_direction_and_window_from_the_mask():
    for function, window in ((masking.causal_mask_function, None), (WINDOW, 3)):
        for asked in (function, packed(function, OWN_POSITIONS)):
            mask = ask(asked)
            assert mask.causal and mask.window == window
    mask = ask(masking.sliding_window_bidirectional_mask_function(3), causal=False)
    assert not mask.causal and mask.window == 4
    assert ask(masking.causal_mask_function, attention_mask=torch.ones(1, 10, dtype=torch.bool)).causal


@pytest.mark.parametrize(
    "mask_function, options, reason",
    [
        pytest.param(UNREAD.get("blocks"), {}, "attention both ways within blocks has no form", marks=needs_blocks),
        (packed(READ["chunks"], OWN_POSITIONS), {}, "attention in chunks has no form for packed rows"),
        (UNREAD["a function of the model's own"], {}, "the mask function <lambda> has no form for packed rows"),
        (masking.sliding_window_overlay(3), {}, "has no form for packed rows"),
        (masking.causal_mask_function, dict(rows=9), "9 queries and 9 keys for 10 packed rows"),
        (
            masking.causal_mask_function,
            dict(attention_mask=torch.arange(10)[None] > 0),
            "masks some of the packed rows",
        ),
        (packed(masking.causal_mask_function, [0, 1, 2, 3, 0, 1, 2, 0, 1, 2]), {}, "splits a sequence"),
    ],
)
def test_planned_rows_refuse_a_mask_they_were_not_told_about(mask_function, options, reason):
    with pytest.raises(UnsupportedAttention, match=reason):
        ask(mask_function, **options)


def test_a_mask_that_is_not_causal_is_refused_where_attention_meets_it():
    """Decoders ask for one over the states of an encoder that they have none of."""
    mask = ask(masking.bidirectional_mask_function)
    states = torch.zeros(1, 2, 10, 8)
    with pytest.raises(UnsupportedAttention, match="its attention is not causal"):
        ALL_ATTENTION_FUNCTIONS["fastprompt"](torch.nn.Module(), states, states, states, mask)


@pytest.mark.parametrize(
    "make, reason",
    [
        (chunks, "attention in chunks has no form for packed rows"),
        (told_not_to_be_causal, "a row's output depends on the batch it stands in"),
        (embedding_gemma, "(the mask function .*|a combination of masks) has no form for packed rows"),
    ],
)
def test_a_soft_prompt_before_such_a_model_takes_the_padded_path(make, reason):
    model, prompt = make(), fastprompt.PromptTuning(4, 48)
    embeds = torch.cat([prompt().expand(3, -1, -1), model.get_input_embeddings()(IDS)], 1)
    with torch.no_grad():
        expected = first(model(inputs_embeds=embeds))
        with pytest.warns(UserWarning, match=reason):
            wrapped = fastprompt.SoftPromptModel(model, prompt).eval()
        got = first(wrapped(input_ids=IDS))
    torch.testing.assert_close(got, expected[:, -got.shape[1] :], rtol=1e-4, atol=1e-5)


@needs_blocks
def test_a_mask_that_only_one_batch_asks_for_sends_that_batch_the_padded_way():
    model, prompt = prefix_lm().model, fastprompt.PromptTuning(4, 48)
    before = torch.cat([TYPES.new_zeros(3, 4), TYPES], 1)
    embeds = torch.cat([prompt().expand(3, -1, -1), model.get_input_embeddings()(IDS)], 1)
    with torch.no_grad():
        expected = [first(model(inputs_embeds=embeds, token_type_ids=types))[:, 4:] for types in (0 * before, before)]
        wrapped = fastprompt.SoftPromptModel(model, prompt).eval()
        assert wrapped._engine.refusal is None
        plain = first(wrapped(IDS, token_type_ids=0 * TYPES))
        with pytest.warns(UserWarning, match="attention both ways within blocks has no form for packed rows"):
            blocks = first(wrapped(IDS, token_type_ids=TYPES))
    assert not torch.allclose(*expected, atol=0.1)
    for got, want in zip((plain, blocks), expected):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@needs_blocks
def test_so_it_does_before_peft_s_own_forward(monkeypatch):
    whole = []  # what the model sees both ways, from a certain call on

    def create_mask(**arguments):
        blocks = torch.zeros(arguments["inputs_embeds"].shape[:2], dtype=torch.int64) if whole else None
        return masking.create_causal_mask(**arguments, block_sequence_ids=blocks)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", create_mask)
    model, inputs = peft_model("llama").eval(), batch("right")
    fastprompt.accelerate(model)
    assert model._fastprompt.engine.refusal is None
    with torch.no_grad():
        causal = model(**inputs).loss
        whole.append(True)
        with pytest.warns(UserWarning, match="attention both ways within blocks has no form for packed rows"):
            got = model(**inputs).loss
        expected = fastprompt.restore(model)(**inputs).loss
    assert torch.equal(got, expected) and not torch.allclose(got, causal)
