"""Mixed batches: each row as if it stood alone behind its prompt, whatever generate is asked for."""

import pytest
import torch
import transformers as hf
from needs import cases, needs, needs_states
from serving_models import (
    NEW,
    PROMPTS,
    WIDTH,
    assert_greedy,
    assert_logits,
    bank_of,
    embeddings,
    frozen,
    greedy_alone,
    ready,
    texts,
)
from tiny_hybrids import PACKED
from tiny_models import drawn
from transformers.generation.streamers import BaseStreamer

from fastprompt import PrefixTuning, SoftPromptModel, compile_prompt
from fastprompt.serving.bank import PromptBank

FAMILIES = ["gpt2", "mistral_window", "gemma2", "gemma3", "gpt_oss", "bloom", "falcon", "opt"]


@pytest.fixture(scope="module")
def llama():
    return bank_of(frozen("llama"))


@pytest.fixture(scope="module")
def window():
    return bank_of(frozen("mistral_window"))


@pytest.fixture(scope="module")
def hybrid():
    return bank_of(frozen("qwen3_5_text"))


@pytest.fixture(params=cases(["llama", "window", "hybrid"], {"hybrid": needs_states}))
def bank(request):
    """A model that sees no padding, one with windows shorter than a prompt, and one whose layers keep states."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("name", cases([*FAMILIES, *PACKED], dict.fromkeys(PACKED, needs_states)))
def test_every_family(name):
    base = frozen(name)
    ids, mask = texts()
    sequences = bank_of(base).generate(ids, mask, prompts=PROMPTS, max_new_tokens=NEW, do_sample=False)
    assert_greedy(base, sequences, ids, mask)


@pytest.mark.parametrize("padding", ["left", "right", "holes", "none"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padding_anywhere(bank, padding, cache):
    ids, mask = texts(padding)
    given = None if padding == "none" else mask
    options = dict(max_new_tokens=NEW, do_sample=False, cache_implementation=cache)
    assert_greedy(bank.base, bank.generate(ids, given, prompts=PROMPTS, **options), ids, mask)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunked_prefill(bank, chunk):
    ids, mask = texts()
    sequences = bank.generate(ids, mask, prompts=PROMPTS, max_new_tokens=NEW, do_sample=False, prefill_chunk_size=chunk)
    assert_greedy(bank.base, sequences, ids, mask)


@pytest.mark.parametrize("options", [dict(), dict(num_return_sequences=3), dict(cache_implementation="static")])
def test_sampling(bank, options):
    ids, mask = texts()
    torch.manual_seed(0)
    asked = dict(do_sample=True, top_k=0, max_new_tokens=NEW, output_logits=True, return_dict_in_generate=True)
    output = bank.generate(ids, mask, prompts=PROMPTS, **asked, **options)
    times = options.get("num_return_sequences", 1)
    ids, mask = (x.repeat_interleave(times, 0) for x in (ids, mask))
    prompts = [prompt for prompt in PROMPTS for _ in range(times)]
    assert torch.equal(output.sequences[:, :WIDTH], ids)
    assert len(output.sequences[:, WIDTH:].unique()) > NEW
    assert_logits(bank.base, output, ids, mask, prompts)


@pytest.mark.parametrize("returned", [1, 3])
def test_beams(bank, returned):
    """Those of the row alone, by the model's own generate of its embeddings."""
    ids, mask = texts()
    options = dict(num_beams=3, num_return_sequences=returned, max_new_tokens=NEW, do_sample=False)
    sequences = bank.generate(ids, mask, prompts=PROMPTS, **options)
    for row, prompt in enumerate(PROMPTS):
        embeds = bank.base.get_input_embeddings()(ids[row, mask[row].bool()][None])
        if prompt is not None:
            embeds = torch.cat([embeddings(bank.base)[prompt][None], embeds], 1)
        expected = bank.base.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), **options)
        assert torch.equal(sequences[row * returned : (row + 1) * returned, WIDTH:], expected), row


@pytest.mark.parametrize(
    "options", [dict(repetition_penalty=3.0), dict(no_repeat_ngram_size=1), dict(min_length=WIDTH + 3)]
)
def test_processors_see_the_text(bank, options):
    """Nothing of what stands in front of it is taken for text: a padding id is not penalised."""
    ids, mask = texts()
    ids = ids.masked_fill(mask == 0, 0)
    sequences = bank.generate(ids, mask, prompts=PROMPTS, max_new_tokens=NEW, do_sample=False, **options)
    for row, prompt in enumerate(PROMPTS):
        text = ids[row, mask[row].bool()][None]
        embeds = bank.base.get_input_embeddings()(text)
        if prompt is not None:
            embeds = torch.cat([embeddings(bank.base)[prompt][None], embeds], 1)
        given = dict(max_new_tokens=NEW, do_sample=False, attention_mask=torch.ones(embeds.shape[:2]), **options)
        given.pop("min_length", None)
        expected = bank.base.generate(input_ids=text, inputs_embeds=embeds, **given)
        assert sequences[row, WIDTH:].tolist() == expected[0, text.shape[1] :].tolist(), row


@needs("transformers", "5.5", "cannot guess tokens of a text without an end")
@pytest.mark.parametrize("kind", ["lookup", "assistant"])
def test_assisted_decoding(llama, kind):
    bank = llama
    ids, mask = texts("none", lengths=(7,))
    ids[0, 3:] = ids[0, :4].clone()
    guess = dict(prompt_lookup_num_tokens=3) if kind == "lookup" else dict(assistant_model=frozen("llama", seed=1))
    for prompt in ("long", None):
        sequences = bank.generate(ids, mask, prompts=[prompt], max_new_tokens=12, do_sample=False, **guess)
        assert_greedy(bank.base, sequences, ids, mask, [prompt], 12)


class Collected(BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value)

    def end(self):
        self.ended = True


def test_streaming(bank):
    ids, mask = texts()
    streamer = Collected()
    sequences = bank.generate(ids, mask, prompts=PROMPTS, max_new_tokens=NEW, do_sample=False, streamer=streamer)
    assert streamer.parts[0].shape == ids.shape and streamer.ended
    assert torch.equal(torch.stack(streamer.parts[1:], 1), sequences[:, WIDTH:])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_second_and_a_third_turn(bank, padding, cache):
    ids, mask = texts(padding)
    options = dict(max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    more = dict(cache_implementation="static", max_cache_len=64) if cache == "static" else {}
    output = bank.generate(ids, mask, prompts=PROMPTS, **options, **more)
    for turn, prompts in enumerate((PROMPTS, None)):
        new = torch.randint(3, 90, (len(ids), 3 - turn), generator=torch.Generator().manual_seed(turn))
        ids = torch.cat([output.sequences, new], 1)
        mask = torch.cat([mask, torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
        chunk = dict(prefill_chunk_size=2) if turn else {}
        output = bank.generate(ids, mask, prompts=prompts, past_key_values=output.past_key_values, **options, **chunk)
        assert_greedy(bank.base, output.sequences, ids, mask)


def test_a_second_turn_of_uneven_texts(llama):
    ids, mask = texts()
    options = dict(max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    output = llama.generate(ids, mask, prompts=PROMPTS, **options)
    new, real = texts("right")
    ids, mask = torch.cat([output.sequences, new], 1), torch.cat([mask, torch.ones(len(ids), NEW).long(), real], 1)
    mask[0, WIDTH + 2 : WIDTH + NEW] = 0  # a row that ended early
    output = llama.generate(ids, mask, past_key_values=output.past_key_values, **options)
    assert_greedy(llama.base, output.sequences, ids, mask)


def test_what_the_mask_leaves_out_of_a_second_turn_is_not_there(bank):
    ids, mask = texts()
    options = dict(max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    output = bank.generate(ids, mask, prompts=PROMPTS, **options)
    ids = torch.cat([output.sequences, ids[:, :3]], 1)
    mask = torch.cat([mask, torch.tensor([[1] * (NEW - 1) + [0, 1, 0, 1]] * len(ids))], 1)
    output = bank.generate(ids, mask, past_key_values=output.past_key_values, **options)
    assert_greedy(bank.base, output.sequences, ids, mask)


def test_a_row_that_ends_early(llama):
    ids, mask = texts()
    first = llama.generate(ids, mask, prompts=PROMPTS, max_new_tokens=NEW, do_sample=False)
    end = int(first[1, WIDTH + 1])
    sequences = llama.generate(ids, mask, prompts=PROMPTS, max_new_tokens=NEW, do_sample=False, eos_token_id=end)
    for row in range(len(ids)):
        new = first[row, WIDTH:].tolist()
        new = new[: new.index(end) + 1] if end in new else new
        assert sequences[row, WIDTH:].tolist() == (new + [0] * NEW)[: sequences.shape[1] - WIDTH]


def test_lengths_count_the_text_alone(bank):
    ids, mask = texts("right", lengths=(4, 3, 2, 1))
    sequences = bank.generate(ids, mask, prompts=PROMPTS, max_length=WIDTH + 2, do_sample=False)
    assert sequences.shape == (4, WIDTH + 2)
    with pytest.raises(ValueError, match=f"max_length must be above the {WIDTH} columns of text, got {WIDTH}"):
        bank.generate(ids, mask, prompts=PROMPTS, max_length=WIDTH)


def test_a_generation_config(llama):
    ids, mask = texts()
    config = hf.GenerationConfig(max_new_tokens=NEW, do_sample=False, cache_implementation="static")
    assert_greedy(llama.base, llama.generate(ids, mask, prompts=PROMPTS, generation_config=config), ids, mask)


@pytest.mark.parametrize("name", cases(["llama", "qwen3_5_text"], {"qwen3_5_text": needs_states}))
def test_no_prompts_at_all_and_one_for_all(name):
    bank = bank_of(frozen(name))
    ids, mask = texts()
    options = dict(max_new_tokens=NEW, do_sample=False)
    assert_greedy(bank.base, bank.generate(ids, mask, **options), ids, mask, [None] * 4)
    assert_greedy(bank.base, bank.generate(ids, mask, prompts="short", **options), ids, mask, ["short"] * 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision(dtype):
    base = frozen("llama", dtype=dtype)
    bank, (ids, mask) = bank_of(base), texts()
    options = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
    output = bank.generate(ids, mask, prompts=PROMPTS, **options)
    for row, prompt in enumerate(PROMPTS):
        one = dict(prompts=[prompt], **options)
        alone = bank.generate(ids[row, mask[row].bool()][None], None, **one)
        torch.testing.assert_close(output.logits[0][row], alone.logits[0][0], rtol=0.05, atol=0.1)


def test_a_model_that_looks_more_up_by_id():
    """Gemma 3n: the text goes in as ids; what would need embeddings of it is refused."""
    from fastprompt.hf.prompt_state import PromptState
    from fastprompt.hf.shared_state import KeysValues
    from fastprompt.serving.compile import CompiledPrompt

    base = frozen("gemma3n")
    bank, generator = PromptBank(base), torch.Generator().manual_seed(0)
    layers = {i: KeysValues(*torch.randn(2, 3, 1, 8, generator=generator)) for i in range(2)}
    bank.add("learned", CompiledPrompt("prefix-tuning", PromptState(3, layers), bank.fingerprint))
    ids, mask = texts()
    sequences = bank.generate(ids, mask, prompts=["learned", None] * 2, max_new_tokens=NEW, do_sample=False)
    for row in range(4):
        text = ids[row, mask[row].bool()][None]
        one = bank.generate(text, prompts=["learned", None][row % 2], max_new_tokens=NEW, do_sample=False)
        assert torch.equal(one[0, -NEW:], sequences[row, -NEW:])
    assert (
        bank.base.generate(text, max_new_tokens=NEW, do_sample=False)[0, -NEW:].tolist() == sequences[3, -NEW:].tolist()
    )
    options = dict(max_new_tokens=NEW, do_sample=False, prefill_chunk_size=2)
    assert torch.equal(bank.generate(ids, mask, prompts=["learned", None] * 2, **options), sequences)
    with pytest.raises(NotImplementedError, match="prefill_chunk_size cannot be used with no_repeat_ngram_size"):
        bank.generate(ids, mask, prompts=["learned", None] * 2, no_repeat_ngram_size=2, **options)
    with pytest.raises(NotImplementedError, match="looks more up by token id"):
        bank.add("rows", CompiledPrompt("prompt-tuning", PromptState(3, layers), bank.fingerprint))


REFUSED = [
    (dict(use_cache=False), "use_cache must be True"),
    (dict(inputs_embeds=torch.zeros(4, 7, 48)), "inputs_embeds cannot be used"),
    (dict(position_ids=torch.zeros(4, 7)), "position_ids cannot be used"),
    (dict(token_type_ids=torch.zeros(4, 7)), "token_type_ids cannot be used"),
    (dict(cache_implementation="quantized"), "cache_implementation must be"),
    (dict(guidance_scale=2.0), "guidance_scale cannot be used"),
    (dict(custom_generate="somebody/else"), "custom_generate cannot be used"),
    (dict(token_healing=True), "token_healing cannot be used"),
    (dict(penalty_alpha=0.6), "penalty_alpha cannot be used"),
    (dict(prompt_lookup_num_tokens=2), "input_ids must have one row for assisted decoding, got 4"),
    (dict(num_beams=2, streamer=Collected()), "streamer must be None for beams"),
    (dict(prefill_chunk_size=0), "prefill_chunk_size must be at least 1"),
    (dict(past_key_values=hf.DynamicCache()), "past_key_values must be a cache that an earlier call returned"),
    (dict(attention_mask=torch.zeros(4, 7)), "at least one token in each row, got none in rows"),
    (dict(attention_mask=torch.ones(4, 6)), "attention_mask must have shape"),
    (dict(input_ids=torch.zeros(4, 7)), "input_ids must have one of the dtypes"),
    (dict(prompts=["long"]), "prompts must have one entry for each of the 4 rows, got 1"),
    (dict(prompts=["long", "nobody", None, "other"]), r"must be None or among the 2 of the bank, got \['nobody'"),
]


@pytest.mark.parametrize("options, message", REFUSED)
def test_what_cannot_be_done_is_refused_before_anything_runs(llama, options, message):
    ids, mask = texts()
    given = dict(dict(input_ids=ids, attention_mask=mask, prompts=PROMPTS), **options)
    calls = []
    hook = llama.base.register_forward_hook(lambda *args: calls.append(1))
    try:
        with pytest.raises((ValueError, TypeError), match=message):
            llama.generate(**given)
    finally:
        hook.remove()
    assert not calls


@needs_states
def test_turns_that_do_not_fit_are_refused(llama, hybrid):
    ids, mask = texts()
    options = dict(max_new_tokens=2, do_sample=False, return_dict_in_generate=True)

    def start(bank, **more):
        return bank.generate(ids, mask, prompts=PROMPTS, **options, **more)

    def go_on(bank, output, extra=1, **changes):
        longer = torch.cat([output.sequences, ids[:, :extra]], 1)
        real = torch.cat([mask, torch.ones(4, 2 + extra).long()], 1)
        given = dict(dict(attention_mask=real, past_key_values=output.past_key_values), **options, **changes)
        return bank.generate(**{"input_ids": longer, **given})

    beams = start(llama, num_beams=2)
    with pytest.raises(ValueError, match="without beams"):
        llama.generate(beams.sequences, past_key_values=beams.past_key_values)
    with pytest.raises(ValueError, match="must begin with the text of the earlier turns"):
        go_on(llama, start(llama), extra=1, attention_mask=torch.ones(4, WIDTH + 3))
    with pytest.raises(ValueError, match="must begin with the text of the earlier turns"):
        output = start(llama)
        llama.generate(ids, mask, past_key_values=output.past_key_values)
    with pytest.raises(ValueError, match="prompts must be None or those of the earlier turns"):
        go_on(llama, start(llama), prompts=["long"] * 4)
    with pytest.raises(ValueError, match="num_beams and num_return_sequences must be 1"):
        go_on(llama, start(llama), num_beams=2)
    with pytest.raises(ValueError, match="cache_implementation must be None"):
        go_on(llama, start(llama), cache_implementation="static")
    with pytest.raises(ValueError, match="room in a static cache"):
        go_on(llama, start(llama, cache_implementation="static"), extra=7)
    with pytest.raises(ValueError, match="past_key_values must be a cache"):
        go_on(hybrid, start(llama))
    real = torch.cat([mask, torch.tensor([[0, 1, 1]] * 4)], 1)
    with pytest.raises(NotImplementedError, match="attention_mask must leave no padding between"):
        go_on(hybrid, start(hybrid), attention_mask=real)


def test_a_turn_that_grows_beyond_a_window_with_padding_inside_is_refused():
    base = frozen("mistral_window", sliding_window=24)
    bank, (ids, mask) = bank_of(base), texts()
    options = dict(do_sample=False, return_dict_in_generate=True)
    output = bank.generate(ids, mask, prompts=PROMPTS, max_new_tokens=2, **options)
    longer, real = torch.cat([output.sequences, ids[:, :1]], 1), torch.cat([mask, torch.ones(4, 3).long()], 1)
    with pytest.raises(NotImplementedError, match="attention_mask must leave no padding between"):
        bank.generate(longer, real, past_key_values=output.past_key_values, max_new_tokens=20, **options)
    output = bank.generate(longer, real, past_key_values=output.past_key_values, max_new_tokens=3, **options)
    assert_greedy(base, output.sequences, longer, real, new=3)


@needs_states
def test_learned_keys_and_values_before_layers_with_a_state():
    """Those start from nothing; a batch may mix them with prompts of embeddings."""
    base = frozen("qwen3_5_text")
    bank, (ids, mask) = bank_of(base), texts()
    learned = SoftPromptModel(frozen("qwen3_5_text"), PrefixTuning(4, 1, 2, base.config.head_dim, layers=[1]))
    bank.add("learned", compile_prompt(learned))
    prompts = ["learned", "long", None, "learned"]
    sequences = bank.generate(ids, mask, prompts=prompts, max_new_tokens=NEW, do_sample=False)
    for row in (0, 3):
        text = ids[row, mask[row].bool()][None]
        for _ in range(NEW):
            with torch.no_grad():
                text = torch.cat([text, learned(input_ids=text).logits[:, -1:].argmax(-1)], 1)
        assert text[0, -NEW:].tolist() == sequences[row, WIDTH:].tolist()
    assert sequences[1, WIDTH:].tolist() == greedy_alone(base, "long", ids[1, mask[1].bool()])


def test_chunked_attention():
    config = hf.Llama4TextConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, intermediate_size_mlp=80, num_hidden_layers=4, head_dim=8,
        num_attention_heads=6, num_key_value_heads=2, num_local_experts=2, attention_chunk_size=6,
    )  # fmt: skip
    torch.manual_seed(0)
    base = ready(drawn(hf.Llama4ForCausalLM(config)))
    bank, (ids, mask) = bank_of(base), texts()
    assert_greedy(base, bank.generate(ids, mask, prompts=PROMPTS, max_new_tokens=NEW, do_sample=False), ids, mask)


@needs_states
def test_models_that_answer_otherwise_in_a_batch_are_refused():
    for name in ("roberta", "jamba"):
        with pytest.raises(NotImplementedError, match="rows behind compiled prompts: a row's output depends"):
            PromptBank(frozen(name))


def test_positions_beyond_which_rows_depend_on_one_another_are_refused():
    rope = dict(rope_type="dynamic", factor=2.0, rope_theta=10000.0)
    base = frozen("llama", rope_parameters=rope, max_position_embeddings=24)
    bank, (ids, mask) = bank_of(base), texts()
    assert_greedy(base, bank.generate(ids, mask, prompts=PROMPTS, max_new_tokens=2, do_sample=False), ids, mask, new=2)
    with pytest.raises(NotImplementedError, match="must stay within 24 positions"):
        bank.generate(ids, mask, prompts=PROMPTS, max_new_tokens=20)


def test_the_model_is_left_as_it_was():
    base = frozen("mistral_window")
    before = {name: vars(module).copy() for name, module in base.named_modules()}
    bank = bank_of(base)
    ids, mask = texts()
    bank.generate(ids, mask, prompts=PROMPTS, max_new_tokens=2)
    assert {name: vars(module) for name, module in base.named_modules()} == before
    assert greedy_alone(base, None, ids[0])
