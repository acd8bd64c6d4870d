"""A training step leaves out rows that its loss does not depend on, and nobody who reads its logits is misled."""

import pytest
import torch
from parity import assert_same_steps, batch, both, peft_model
from tiny_models import build

import fastprompt

# Those whose last layer has no state, whatever stands between its input and its attention, and behind that.
FAMILIES = ["llama", "gpt2", "gemma3", "gpt_neox", "olmo2", "opt", "mixtral", "gpt_oss"]


def rows_of(model, module, inputs):
    """How many rows a module runs in a step."""
    rows = []
    hook = module.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[-2]))
    model.train()(**inputs).loss.backward()
    hook.remove()
    return rows


def last_mlp(model):
    return model.base_model.model.layers[-1].mlp


def rows_run(model, inputs):
    before = fastprompt.stats(model).rows
    model.train()(**inputs)
    return fastprompt.stats(model).rows - before


@pytest.mark.parametrize("name", FAMILIES)
def test_the_step_is_the_same(name):
    assert_same_steps(peft_model(name), [batch("right", labelled) for labelled in ("last", "part")])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix"])
def test_the_step_is_the_same_with_gradient_checkpointing(method, reentrant):
    inputs, model = batch("right", "last"), peft_model("llama", method)
    expected, _ = both(model, inputs)
    model = fastprompt.accelerate(model)
    model.base_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected[0], rtol=1e-5, atol=0)
    for name, p in model.named_parameters():
        if name in expected[1]:
            assert (p.grad - expected[1][name]).norm() <= 1e-4 * expected[1][name].norm()


def test_the_last_layer_runs_labelled_rows_and_no_layer_runs_what_follows_them():
    model, inputs = fastprompt.accelerate(peft_model("llama")), batch("right", "last")
    assert rows_of(model, last_mlp(model), inputs) == [4]
    assert rows_of(model, model.base_model.model.layers[0].mlp, inputs) == [5 + 20 - 4]  # prompt, tokens, last tokens
    assert rows_run(model, inputs) == 5 + 20 - 4


def test_a_row_that_predicts_a_label_of_every_sequence_runs_once():
    model, inputs = fastprompt.accelerate(peft_model("llama")), batch("right")
    inputs["labels"][:, 1:] = -100
    assert rows_of(model, last_mlp(model), inputs) == [1]  # that of the prompt's last token


def test_all_rows_run_where_random_numbers_are_drawn():
    model, inputs = fastprompt.accelerate(peft_model("llama", attention_dropout=0.1)), batch("right", "last")
    assert rows_of(model, last_mlp(model), inputs) == [5 + 20]


def test_a_hook_that_changes_embeddings_sees_all_rows():
    base = build("llama")
    base.get_input_embeddings().register_forward_hook(lambda module, args, output: output + torch.rand(1))
    model, inputs = fastprompt.accelerate(peft_model(None, base=base)), batch("right", "last")
    assert rows_of(model, last_mlp(model), inputs) == [5 + 20]


def test_a_hook_of_the_backbone_sees_all_rows():
    model, inputs = fastprompt.accelerate(peft_model("llama")), batch("right", "last")
    assert rows_of(model, model.base_model.model.layers[0], inputs) == [5 + 20 - 4]
    model.base_model.model.register_forward_hook(lambda module, args, output: None)
    assert rows_of(model, last_mlp(model), inputs) == [5 + 20]


def test_who_reads_logits_once_pays_once():
    model, inputs = fastprompt.accelerate(peft_model("llama")), batch("right", "last")
    assert rows_run(model, inputs) == 21
    model(**inputs).logits.sum()
    assert rows_run(model, inputs) == 25
    assert rows_of(model, last_mlp(model), inputs) == [25]


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix", "multitask"])
def test_logits_are_read_after_restore(method):
    model, inputs = fastprompt.accelerate(peft_model("llama", method)), batch("right", "last", method=method)
    output = model.train()(**inputs)
    fastprompt.restore(model)
    mask = inputs["attention_mask"].bool()
    front = output.logits.shape[1] - mask.shape[1]
    with torch.no_grad():
        expected = model(**inputs).logits[:, front:][mask]
    torch.testing.assert_close(output.logits[:, front:][mask], expected, rtol=1e-4, atol=1e-5)
    assert model.base_model.config._attn_implementation == "sdpa"


def test_a_layer_with_another_forward_runs_all_rows():
    base = build("llama")
    model, inputs = fastprompt.accelerate(peft_model(None, base=base)), batch("right", "last")
    layer = base.model.layers[-1]
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)
    model(**inputs)  # the model is asked again
    assert rows_of(model, layer.mlp, inputs) == [21]


def test_layers_in_another_order_run_all_rows():
    base = build("llama")
    model, inputs = fastprompt.accelerate(peft_model(None, base=base)), batch("right", "last")
    base.model.layers = torch.nn.ModuleList(reversed(base.model.layers))
    loss = model(**inputs).loss
    torch.testing.assert_close(loss, fastprompt.restore(model)(**inputs).loss, rtol=1e-5, atol=0)


def test_embeddings_that_train_get_the_gradient_of_logits_that_are_read():
    model, inputs = peft_model("llama"), batch("right", "last")
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    embeds = model.base_model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()

    def gradients():
        embeds.grad = None
        model.zero_grad()
        model.train()(inputs_embeds=embeds, **inputs).logits.sin().sum().backward()
        return embeds.grad, next(model.prompt_encoder.parameters()).grad.clone()

    expected = gradients()
    fastprompt.accelerate(model)
    for got, exact in zip(gradients(), expected):
        assert (got - exact).norm() <= 1e-4 * exact.norm()
