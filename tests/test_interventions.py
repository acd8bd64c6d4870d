"""What others give to a model's modules after accelerate: it is honoured, on packed rows or by PEFT's own forward."""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from parity import assert_equal, batch, is_packed, peft_model, step
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import build

import fastprompt
from fastprompt import PromptTuning, SoftPromptModel
from fastprompt.peft.renamed_cache import right_generation


def leaks_into_the_next_row(layer):
    def leak(module, args, kwargs):
        return (args[0] + 0.1 * F.pad(args[0][:, :-1], (0, 0, 1, 0)), *args[1:]), kwargs

    layer.register_forward_pre_hook(leak, with_kwargs=True)


@torch.no_grad()
def writes_into_the_last_row(module, args, output):
    output[:, -1].mul_(2)


def steers_the_last_row(layer):
    layer.mlp.register_forward_hook(lambda module, args, output: torch.cat([output[:, :-1], output[:, -1:] + 3], 1))


def writes_in_place(layer):
    layer.self_attn.o_proj.register_forward_hook(writes_into_the_last_row)


def has_another_forward(layer):
    forward = layer.mlp.forward
    layer.mlp.forward = functools.wraps(type(layer.mlp).forward)(lambda x: forward(x).roll(1, 1))


def steers_every_row(layer):
    layer.register_forward_hook(lambda module, args, output: output + 0.3)


CHANGES = {
    leaks_into_the_next_row: False,
    steers_the_last_row: False,
    writes_in_place: False,
    has_another_forward: False,
    steers_every_row: True,
}


@pytest.mark.parametrize("change, packed", CHANGES.items())
def test_what_is_given_later_counts(change, packed):
    model, inputs = fastprompt.accelerate(peft_model("llama")), batch("right")
    step(model, inputs)
    change(model.base_model.model.layers[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = step(model, inputs)
        assert is_packed(model, inputs) == packed
    assert_equal(step(fastprompt.restore(model), inputs), fast, inputs)


def test_what_is_switched_on_later_counts_and_what_is_taken_away_does_not():
    base, on = build("llama"), []
    hook = base.model.layers[1].register_forward_hook(lambda module, args, output: output.flip(1) if on else None)
    model, inputs = fastprompt.accelerate(peft_model(None, base=base)), batch("right")
    assert is_packed(model, inputs)
    on.append(True)
    with pytest.warns(UserWarning, match="packed rows give another output"):
        fast = step(model, inputs)
    assert_equal(step(fastprompt.restore(model), inputs), fast, inputs)
    fastprompt.accelerate(model)
    hook.remove()
    assert is_packed(model, inputs)


def test_who_only_watches_sees_what_runs():
    model, inputs = fastprompt.accelerate(peft_model("llama")), batch("right")
    rows = []
    model.base_model.model.layers[0].register_forward_hook(lambda module, args, output: rows.append(output.shape[:2]))
    model(**inputs)
    assert len(rows) == 1 and rows[0][0] == 1


@pytest.mark.parametrize("share", [False, True])
def test_without_peft(share):
    """In a SoftPromptModel, and in a model that shares the text that its rows begin with."""
    base, inputs = build("llama"), batch("right", common=3)
    prompt = PromptTuning(5, 48, init=torch.randn(5, 48, generator=torch.Generator().manual_seed(0)))
    model = fastprompt.share_prefixes(base) if share else SoftPromptModel(base, prompt).train()
    model(**inputs)
    steers_the_last_row(base.model.layers[1])
    with pytest.warns(UserWarning, match="packed rows give another output"):
        loss = model(**inputs).loss
    if share:
        fastprompt.restore(model)
        assert torch.equal(model(**inputs).loss, loss)
        return
    mask = F.pad(inputs["attention_mask"], (5, 0), value=1)
    embeds = torch.cat([prompt.prompt.expand(4, -1, -1), base.get_input_embeddings()(inputs["input_ids"])], 1)
    plain = model.release()(
        inputs_embeds=embeds, attention_mask=mask, labels=F.pad(inputs["labels"], (5, 0), value=-100)
    )
    torch.testing.assert_close(loss, plain.loss)


def of_all_weights(base):
    base.model.layers[1].self_attn.k_proj.weight.data.mul_(-1)  # unseen by autograd


def of_a_buffer(base):
    base.model.rotary_emb.inv_freq.mul_(2)


def of_an_adapter(base):
    use_adapter(base, "other")


def use_adapter(base, name):
    """As transformers' ``set_adapter``, which asks for a newer PEFT than there is on transformers 5.24."""
    for module in base.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(name)


GENERATION = [of_all_weights, of_a_buffer, of_an_adapter]


@pytest.mark.parametrize("change", [*GENERATION, steers_every_row, steers_the_last_row])
def test_generation_runs_a_prompt_again_after_a_change(change):
    base = build("llama")
    if change is of_an_adapter:
        lora = LoraConfig(r=2, init_lora_weights=False, target_modules=["k_proj", "v_proj"])
        for name in ("first", "other"):
            inject_adapter_in_model(lora, base, name)
        use_adapter(base, "first")
    model = fastprompt.accelerate(peft_model(None, base=base)).eval()
    ids = batch("none")["input_ids"]

    def logits():
        options = dict(max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = model.generate(input_ids=ids, output_logits=True, return_dict_in_generate=True, **options)
        return torch.stack(found.logits)

    before = logits()
    change(base if change in GENERATION else base.model.layers[0])
    after = logits()
    with right_generation(fastprompt.restore(model)):
        expected = logits()
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, atol=1e-2)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_mlp"])
def test_a_transform_of_torch_func(method):
    """Its tensors have no memory that kernels could read."""
    model, inputs = peft_model("llama", method), batch("right")
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def gradients():
        return torch.func.grad(lambda given: torch.func.functional_call(model, given, (), inputs).loss)(parameters)

    plain = gradients()
    with pytest.warns(UserWarning, match="a transform of torch.func is at work"):
        fastprompt.accelerate(model)
        fast = gradients()
    assert all(torch.equal(fast[name], x) for name, x in plain.items())


def test_a_base_without_versions_generates():
    with torch.inference_mode():
        base = build("llama")
    model = fastprompt.accelerate(peft_model(None, base=base)).eval()
    ids = batch("none")["input_ids"]
    options = dict(max_new_tokens=2, do_sample=False, pad_token_id=0)
    fast = model.generate(input_ids=ids, **options)
    with right_generation(fastprompt.restore(model)):
        assert torch.equal(fast, model.generate(input_ids=ids, **options))
