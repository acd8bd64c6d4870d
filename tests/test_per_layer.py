"""Gemma 4's E models look embeddings of every layer up by token id, where a prompt has none: it has those of padding.

PEFT cannot run a prompt in front of them, so the bare model does, told what it would look up.
"""

import warnings

import pytest
import torch
import transformers as hf
from needs import needs
from parity import B, P, assert_equal, batch, peft_model, step, trained
from tiny_models import GEMMA4_E, drawn

import fastprompt
from fastprompt.serving.bank import PromptBank

pytestmark = needs("transformers", "5.11", "has no Gemma 4 that is told what to look up")
PACKED = dict(action="error", message="fastprompt runs")


def base(**changes):
    torch.manual_seed(0)
    return drawn(hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**{**GEMMA4_E, **changes})))


class Bare(torch.nn.Module):
    """The bare model behind copies of the prompt, padding and all."""

    def __init__(self, base, prompt):
        super().__init__()
        self.base, self.prompt = base.requires_grad_(False), torch.nn.Parameter(prompt.detach().clone())

    def forward(self, input_ids, attention_mask=None, labels=None):
        rows, lookup = len(input_ids), self.base.model.get_per_layer_inputs
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        front = input_ids.new_full((rows, P), self.base.config.pad_token_id)
        if labels is not None:
            labels = torch.cat([torch.full_like(front, -100), labels], 1)
        embeds = self.base.get_input_embeddings()(input_ids)
        return self.base(
            inputs_embeds=torch.cat([self.prompt.expand(rows, -1, -1), embeds], 1),
            per_layer_inputs=lookup(torch.cat([front, input_ids], 1), None),
            attention_mask=torch.cat([torch.ones_like(front), mask], 1),
            labels=labels,
            use_cache=False,
        )


def prompt_and_rest(taken):
    """A step whose only gradient is called by one name."""
    loss, gradients, logits = taken
    return loss, {"prompt": next(iter(gradients.values()))}, logits


def method():
    torch.manual_seed(1)
    return fastprompt.PromptTuning(P, 48, init=0.5 * torch.randn(P, 48))


@pytest.mark.parametrize("changes", [{}, dict(num_kv_shared_layers=0, sliding_window=6, hidden_size=40)])
@pytest.mark.parametrize("padding", ["right", "left", "mixed", "none"])
def test_same_as_the_bare_model(padding, changes):
    inputs = batch(padding)
    model = peft_model(None, base=base(**changes))
    expected = prompt_and_rest(step(Bare(base(**changes), model.prompt_encoder["default"].embedding.weight), inputs))
    with pytest.raises((RuntimeError, IndexError)):
        step(model, inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings(**PACKED)
        fastprompt.accelerate(model)
        assert_equal(expected, prompt_and_rest(step(model, inputs)), inputs)
    assert fastprompt.stats(model).padded == {}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_and_common_text(reentrant):
    inputs = batch("right", common=3)
    model = fastprompt.SoftPromptModel(base(), method())
    expected = prompt_and_rest(step(Bare(base(), model.method()), inputs))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with warnings.catch_warnings():
        warnings.filterwarnings(**PACKED)
        assert_equal(expected, prompt_and_rest(step(model, inputs)), inputs)


def test_logits_of_a_step_and_the_padded_forward():
    inputs = batch("right")
    model = fastprompt.SoftPromptModel(base(), method())
    with torch.no_grad():
        expected = Bare(base(), model.method())(**inputs).logits
        real = torch.cat([torch.ones(B, P), inputs["attention_mask"]], 1).bool()
        torch.testing.assert_close(model(**inputs).logits[real], expected[real], rtol=1e-4, atol=1e-4)
        model.release()
        with pytest.warns(UserWarning, match="the model was released"):
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_peft_s_forward_is_told_the_ids():
    """Where rows cannot be packed: a mask with holes."""
    inputs = batch("none")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, 4] = 0
    model = fastprompt.accelerate(peft_model(None, base=base()))
    expected = trained(Bare(base(), model.prompt_encoder["default"].embedding.weight), inputs)
    with pytest.warns(UserWarning, match="the attention mask has holes"):
        loss, gradients = trained(model, inputs)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(*(next(iter(x.values())) for x in (gradients, expected[1])), rtol=1e-4, atol=1e-5)


def test_embeddings_are_refused():
    inputs = batch("right")
    model = fastprompt.accelerate(peft_model(None, base=base()))
    embeds = model.word_embeddings(inputs.pop("input_ids")) + 1
    with pytest.warns(UserWarning, match="pass input_ids"), pytest.raises((RuntimeError, IndexError)):
        model(inputs_embeds=embeds, **inputs)


def test_no_padding_id():
    with pytest.warns(UserWarning, match="has no pad_token_id for a prompt"):
        fastprompt.SoftPromptModel(base(pad_token_id=None), method())


@torch.no_grad()
def test_generation():
    """Token by token what whole forwards of the bare model say, from a model that trains and from a bank."""
    model = fastprompt.SoftPromptModel(base(), method()).eval()
    bare, ids = Bare(base(), model.method()).eval(), batch("none")["input_ids"]
    options = dict(max_new_tokens=3, do_sample=False, eos_token_id=None)
    expected = ids
    for _ in range(3):
        expected = torch.cat([expected, bare(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, **options), expected)
    accelerated = fastprompt.accelerate(peft_model(None, base=base())).eval()
    accelerated.prompt_encoder["default"].embedding.weight.copy_(model.method())
    assert torch.equal(accelerated.generate(input_ids=ids, **options), expected)
    bank = PromptBank(base().eval())
    bank.add("prompt", fastprompt.compile_prompt(model))
    assert torch.equal(bank.generate(ids, prompts=["prompt"] * B, **options), expected)


@pytest.mark.parametrize("changes", [{}, dict(sliding_window=6)])
@torch.no_grad()
def test_a_padded_batch_is_generated_as_rows_alone(changes):
    """Without ``adapter_names`` it is PEFT's elsewhere, which raises here; what neither can do is refused by name."""
    model, options = peft_model(None, base=base(**changes)).eval(), dict(max_new_tokens=3, do_sample=False)
    inputs = {padding: batch(padding) for padding in ("left", "mixed")}
    with pytest.raises((RuntimeError, IndexError)):
        model.generate(input_ids=inputs["left"]["input_ids"], **options)
    fastprompt.accelerate(model, heads="peft" if changes else "text")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprompt")
        for given in inputs.values():
            ids, mask = given["input_ids"], given["attention_mask"]
            got = model.generate(input_ids=ids, attention_mask=mask, **options)
            alone = [model.generate(input_ids=x[real.bool()][None], **options)[0, -3:] for x, real in zip(ids, mask)]
            assert torch.equal(got, torch.cat([ids, torch.stack(alone)], 1))
    with pytest.raises(NotImplementedError, match="PEFT does not generate behind a prompt from a Gemma4ForCausalLM"):
        model.generate(input_ids=ids, attention_mask=mask, position_ids=mask.cumsum(1), **options)
