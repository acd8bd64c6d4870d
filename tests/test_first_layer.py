"""The first layer gives gradients to the rows of prompts alone, unless somebody wants those of tokens."""

from contextlib import contextmanager

import pytest
import torch
from parity import P, assert_same_steps, batch, peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import fastprompt

TOKENS = 20 - 4  # of the batch; the last ones of its rows predict nothing and are not run


def first_layer(model):
    return model.base_model.model.layers[0]


class Flops(TorchDispatchMode):
    """Counts the arithmetic of matrix products, attention's apart; torch's own counter reads logits."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        self.total += 0 if count is None else count(*args, **(kwargs or {}), out_val=output)
        return output


def flops(model, inputs):
    """Of a training step."""
    with Flops() as counter:
        model.train()(**inputs).loss.backward()
    return counter.total


@contextmanager
def hooked(module):
    hook = module.register_forward_hook(lambda module, args, output: None)
    yield
    hook.remove()


def saved(model, inputs):
    """How much less arithmetic a step is than one in which a hook looks at the first layer."""
    with hooked(first_layer(model)):
        whole = flops(model, inputs)
    return whole - flops(model, inputs)


def projections(model):
    attention = first_layer(model).self_attn
    return sum(x.weight.numel() for x in (attention.q_proj, attention.k_proj, attention.v_proj))


@pytest.mark.parametrize("method", ["prompt_tuning", "multitask"])
def test_projections_run_backward_on_the_rows_of_prompts(method):
    model, inputs = fastprompt.accelerate(peft_model("llama", method)), batch("right", method=method)
    assert saved(model, inputs) == 2 * TOKENS * projections(model)


def test_text_that_all_rows_share_counts_as_the_prompt():
    model, inputs = peft_model("llama"), batch("right", common=3, lengths=(9, 4, 3, 6))
    assert_same_steps(model, [inputs])
    assert saved(fastprompt.accelerate(model), inputs) == 2 * (5 + 0 + 0 + 2) * projections(model)


def test_behind_learned_keys_no_projection_runs_backward():
    model, inputs = fastprompt.accelerate(peft_model("llama", "prefix")), batch("right")
    assert saved(model, inputs) == 0
    seen = []
    for linear in (first_layer(model).self_attn.q_proj, first_layer(model).mlp.up_proj):
        linear.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    model.train()(**inputs)
    assert seen == [False, True]


def test_hooks_in_the_layer_see_gradients_of_all_rows():
    model, inputs, seen = fastprompt.accelerate(peft_model("llama")), batch("right"), []
    for module in (first_layer(model).self_attn.v_proj, first_layer(model).input_layernorm):
        hook = module.register_full_backward_hook(lambda module, to_inputs, to_outputs: seen.append(to_inputs[0]))
        model.train()(**inputs).loss.backward()
        hook.remove()
    assert len(seen) == 2 and all((gradient[0, P:] != 0).any() for gradient in seen)


@pytest.mark.parametrize("part", ["input_layernorm", "self_attn.q_proj"])
def test_a_part_that_trains_gets_its_gradient_from_all_rows(part):
    model, inputs = peft_model("llama"), batch("right")
    first_layer(model).get_submodule(part).weight.requires_grad_()
    assert_same_steps(model, [inputs])


def test_embeddings_that_train_get_their_gradient():
    model, inputs = peft_model("llama"), batch("right")
    embeds = model.base_model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    gradients = []

    def keep(model, inputs):
        embeds.grad = None
        model.train()(**inputs).loss.backward()
        gradients.append(embeds.grad)

    inputs["inputs_embeds"] = embeds
    keep(model, inputs)
    keep(fastprompt.accelerate(model), inputs)
    expected, found = gradients
    real = inputs["attention_mask"].bool()
    assert (found - expected)[real].norm() <= 1e-4 * expected[real].norm()


def test_the_loss_is_that_of_all_rows_bit_for_bit():
    model, inputs = fastprompt.accelerate(peft_model("llama")), batch("right")
    with hooked(first_layer(model)):
        expected = model.train()(**inputs).loss
    assert torch.equal(model.train()(**inputs).loss, expected)
