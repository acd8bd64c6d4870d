"""What callers hand over on another device than the model's, beside the tokens: brought to them, whatever it is."""

import warnings

import pytest
import torch
from parity import TASKS, B, P, S, batch, peft_model, trained
from test_heads import build as build_with_head
from test_heads import inputs_for
from tiny_models import build
from tiny_pairs import pair_batch, pair_model
from torch.utils import _pytree as pytree

import fastprompt
from fastprompt.layout import plan_packed_input, plan_padded_input


class Elsewhere(torch.Tensor):
    """A tensor on another device than the CPU's: operators take no tensors of both, and ``to`` brings a copy."""

    @staticmethod
    def __new__(cls, content):
        new = torch.Tensor._make_wrapper_subclass(
            cls, content.shape, strides=content.stride(), dtype=content.dtype, device="meta"
        )
        new.content = content
        return new

    def tolist(self):
        return self.content.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        flat, structure = pytree.tree_flatten((args, kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.dim() and not isinstance(x, cls) for x in flat):
            raise RuntimeError(f"{function} expects all tensors on the same device")
        brought = torch.device("cpu") in flat
        flat = [x.content if isinstance(x, cls) else x for x in flat]
        args, kwargs = pytree.tree_unflatten(flat, structure)
        if kwargs.get("device") == torch.device("meta"):
            kwargs["device"] = torch.device("cpu")
        out = function(*args, **kwargs)
        return out if brought else pytree.tree_map_only(torch.Tensor, cls, out)


def moved(inputs):
    """All tensors but the tokens."""
    return {name: x if name == "input_ids" or x is None else Elsewhere(x) for name, x in inputs.items()}


def assert_same(model, inputs):
    """The loss and the gradients of a step, on packed rows. How memory is aligned may decide how sums are rounded."""
    model.train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprompt runs")
        (loss, gradients), (expected, exact) = trained(model, moved(inputs)), trained(model, inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert gradients.keys() == exact.keys()
    assert all((gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() for name, gradient in exact.items())


def test_no_operator_takes_both():
    x = torch.ones(2)
    with pytest.raises(RuntimeError, match="same device"):
        Elsewhere(x) == x  # noqa: B015
    assert type(Elsewhere(x).to(x.device)) is torch.Tensor


def test_tasks():
    """And those of samples that come packed, or of a text that is generated."""
    model, inputs = fastprompt.accelerate(peft_model("llama", "multitask")), batch("right", method="multitask")
    assert_same(model, inputs)
    assert_same(model, inputs | {"task_ids": TASKS[:1], "num_items_in_batch": torch.tensor(7)})
    samples = {name: inputs[name][:1] for name in ("input_ids", "labels")}
    samples["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    with pytest.warns(UserWarning, match="packed samples are kept apart"):
        assert_same(model, samples | {"task_ids": TASKS[:3]})
    model.eval()
    text = dict(input_ids=torch.tensor([[3, 4, 5], [6, 7, 8]]), task_ids=torch.tensor([2, 1]))
    for mask in ([[1, 1, 1], [1, 1, 1]], [[0, 1, 1], [1, 1, 1]]):  # the latter by PEFT's own generate
        given = text | {"attention_mask": torch.tensor(mask)}
        found, expected = (model.generate(**x, max_new_tokens=2, do_sample=False) for x in (moved(given), given))
        assert torch.equal(found, expected)


def test_cpt_s_types():
    model, inputs = fastprompt.accelerate(peft_model("llama", "cpt")), batch("right")
    model.peft_config["default"].opt_weighted_loss_type = "decay"
    assert_same(model, inputs | {"input_type_mask": torch.tensor([4, 4, 8, 8, 1, 2, 12, 12, 12]).repeat(B, 1)})
    with model.disable_adapter():
        torch.testing.assert_close(model(**moved(inputs)).loss, model(**inputs).loss, rtol=1e-6, atol=0)


def test_token_types():
    model = fastprompt.accelerate(peft_model(None, task_type="SEQ_CLS", base=build_with_head("bert", "SEQ_CLS")))
    types = (torch.arange(S) > 2).long().repeat(B, 1)
    assert_same(model, inputs_for("SEQ_CLS", "right", "prompt_tuning") | {"token_type_ids": types})


def test_an_encoder_decoder():
    assert_same(fastprompt.accelerate(pair_model("bart", "multitask")), pair_batch(method="multitask"))


def test_a_model_without_a_prompt():
    model, inputs = fastprompt.share_prefixes(build("llama")), batch("right")
    torch.testing.assert_close(model(**moved(inputs)).loss, model(**inputs).loss, rtol=1e-6, atol=0)
    assert fastprompt.stats(model).packed == 2


@pytest.mark.parametrize("kind", [fastprompt.PromptTuning, fastprompt.PrefixTuning])
def test_models_with_a_prompt_of_ours(kind):
    base, ids = build("llama"), torch.tensor([2, 0, 2, 0])
    size = (P, 48, 3) if kind is fastprompt.PromptTuning else (P, 3, 2, 8)
    options = {} if kind is fastprompt.PromptTuning else dict(num_prompts=3)
    model, inputs = fastprompt.SoftPromptModel(base, kind(*size, **options)), batch("right")
    if kind is fastprompt.PromptTuning:
        inputs["virtual_tokens"] = torch.full((B, S), -1)
        inputs["virtual_tokens"][:, :P] = torch.arange(P)
    assert_same(model, inputs | {"prompt_ids": ids})
    text = torch.tensor([[3, 4, 5], [6, 7, 8]])
    options = dict(attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]), prompt_ids=torch.tensor([2, 1]))
    greedy = dict(max_new_tokens=2, do_sample=False)
    assert torch.equal(model.generate(text, **moved(options), **greedy), model.generate(text, **options, **greedy))


def test_plans():
    mask, ids = torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([[5, 6, 7], [5, 6, 0]])
    given = dict(attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), token_ids=ids)
    given |= dict(prompt_ids=torch.tensor([1, 0]), virtual_tokens=torch.tensor([[0, -1, -1], [0, -1, -1]]))
    plain = plan_padded_input(2, 3, 1, **given)
    other = plan_padded_input(2, 3, 1, **{name: Elsewhere(x) for name, x in given.items()}, device="cpu")
    del given["attention_mask"]
    flat = {name: x if name == "prompt_ids" else x.flatten() for name, x in given.items()}
    flat_plan = plan_packed_input([0, 3, 6], 1, **flat)
    flat_other = plan_packed_input([0, 3, 6], 1, **{name: Elsewhere(x) for name, x in flat.items()}, device="cpu")
    for found, expected in ((other, plain), (flat_other, flat_plan)):
        for name in ("source", "position_ids", "grid", "labels", "predicting", "places"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
