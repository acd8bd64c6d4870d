"""transformers 5.24 calls a cache ``cache``, older ones and PEFT 0.21 ``past_key_values``: nothing may be lost."""

import copy
import warnings

import pytest
import torch
import transformers as hf
from parity import METHODS, is_packed, peft_model, plain_step, step
from test_heads import build as build_with_head
from test_heads import inputs_for
from tiny_models import T5

import fastprompt
from fastprompt.hf.cache_names import CACHE_NAME, cache_argument, cache_in
from fastprompt.peft.renamed_cache import right_generation

NEW = 6
IDS = torch.tensor([[5, 9, 11, 20], [7, 8, 3, 30]])
GREEDY = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)


def tasks_of(method):
    return {"task_ids": torch.tensor([2, 0])} if method == "multitask" else {}


@torch.no_grad()
def greedy(model, method):
    """The most probable tokens, each by a forward of everything in front of it."""
    ids = IDS
    for _ in range(NEW):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **tasks_of(method)).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def generated(model, method):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, for a name that PEFT uses
        return model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **tasks_of(method), **GREEDY)


@pytest.mark.parametrize("method", METHODS)
def test_an_accelerated_model_generates_what_follows_step_by_step(method):
    model = fastprompt.accelerate(peft_model("gpt2", method).eval())
    expected = greedy(model, method)
    assert torch.equal(generated(model, method), expected)
    assert torch.equal(generated(copy.deepcopy(model), method), expected)
    with model.disable_adapter():
        bare = model.base_model.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY)
        assert torch.equal(model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **GREEDY), bare)
    assert not torch.equal(bare, expected)
    fastprompt.restore(model)
    assert "prepare_inputs_for_generation" not in vars(model)


@pytest.mark.parametrize("method", METHODS)
def test_generation_can_be_put_right(method):
    model = peft_model("gpt2", method).eval()
    before, of_base = {**vars(model)}, {**vars(model.base_model)}
    with right_generation(model):
        assert torch.equal(generated(model, method), greedy(model, method))
    model.base_model.__dict__.pop("prepare_inputs_for_generation", None)  # where PEFT leaves the model's own
    assert vars(model) == before and vars(model.base_model) == of_base


def test_an_encoder_decoder_generates_behind_a_prefix():
    torch.manual_seed(0)
    base = hf.AutoModelForSeq2SeqLM.from_config(hf.T5Config(**T5))
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    model, ids = peft_model(None, "prefix", task_type="SEQ_2_SEQ_LM", base=base).eval(), torch.zeros(2, 1).long()
    with torch.no_grad():
        for _ in range(NEW):
            logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), decoder_input_ids=ids).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    with right_generation(model):
        assert torch.equal(generated(model, "prefix"), ids)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fastprompt runs PEFT's own padded forward")
        fastprompt.accelerate(model)
    assert torch.equal(generated(model, "prefix"), ids)


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("packed", [True, False])
def test_classifiers_behind_a_prefix_run_whatever_the_cache_is_called(name, packed):
    """BERT's class takes no cache, so PEFT looks for the name in its backbone."""
    model = peft_model(None, "prefix", task_type="SEQ_CLS", base=build_with_head(name, "SEQ_CLS")).eval()
    inputs = inputs_for("SEQ_CLS", "right", "prefix")
    if not packed:
        inputs["output_hidden_states"] = True
    expected = plain_step(model, inputs)
    fastprompt.accelerate(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fastprompt runs PEFT's own padded forward")
        assert is_packed(model, inputs) == packed
        got = step(model, inputs)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=0)
    assert "forward" not in vars(model.base_model) and "forward" not in vars(model.base_model.base_model)


def test_either_name_is_understood():
    cache = object()
    assert cache_argument(lambda ids, cache=None: None, cache) == {"cache": cache}
    assert cache_argument(lambda ids, past_key_values=None, **kwargs: None, cache) == {"past_key_values": cache}
    assert cache_argument(lambda ids, **kwargs: None, cache) == {CACHE_NAME: cache}
    assert cache_in({"cache": cache}) is cache_in({"cache": None, "past_key_values": cache}) is cache
    assert cache_in({"input_ids": cache}) is None
