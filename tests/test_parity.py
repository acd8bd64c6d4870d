"""accelerate() against PEFT itself: the same loss, gradients and logits, for every method, on every architecture."""

import warnings

import peft
import pytest
import torch
from budget import assert_within
from faults import assert_found
from parity import (
    METHODS,
    PREFIXES,
    B,
    P,
    S,
    assert_equal,
    assert_identical,
    assert_same_steps,
    batch,
    both,
    peft_model,
    step,
)
from tiny_models import MODELS, build

import fastprompt
from benchmarks.budget import Budget

PACKED = [name for name, (_, _, packed) in MODELS.items() if packed]
FALLBACK = [name for name, (_, _, packed) in MODELS.items() if not packed]


@pytest.mark.parametrize("name", PACKED)
def test_same_as_peft(name):
    """Whatever the padding and the labels; of one row, too."""
    batches = [batch(padding) for padding in ("right", "left", "mixed", "none")]
    batches += [batch("right", "last"), batch("right", "part"), {k: x[:1] for k, x in batch("right").items()}]
    assert_same_steps(peft_model(name), batches)


# What a method gives a model is rows of one prompt, rows of several, or keys and values: each model is shown each of
# these, and each method. Those that give the same take turns.
OTHERS = ["p_tuning_lstm", "prefix_mlp", "p_tuning_mlp", "cartridge", "cpt"]
WITH_METHODS = [(name, method) for i, name in enumerate(PACKED) for method in ("multitask", "prefix", OTHERS[i % 5])]


@pytest.mark.parametrize("name, method", WITH_METHODS)
def test_every_kind_of_method(name, method):
    assert_same_steps(peft_model(name, method), [batch("right", method=method)])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_every_method_and_padding(name, method):
    batches = [batch(padding, "part", method=method) for padding in ("left", "mixed", "none")]
    assert_same_steps(peft_model(name, method), [*batches, batch("right", method=method)])


@pytest.mark.parametrize("padding, changed", [("left", None), ("right", 1)])
def test_a_prefix_before_a_model_that_counts_tokens_by_their_ids(padding, changed):
    """RoBERTa's positions pass over padding, and over text with its id: not those of packed rows."""
    model, inputs = peft_model("roberta", "prefix"), batch(padding)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 1)
    if changed is not None:
        inputs["input_ids"][0, 2] = changed
    plain = step(model, inputs)
    with pytest.warns(UserWarning, match="the model counts positions by token ids"):
        assert_identical(plain, step(fastprompt.accelerate(model), inputs))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "mistral_window", "opt"])
def test_common_text_is_run_once(name, method):
    lengths = [(9, 4, 5, 6), (9, 3, 9, 6)]  # in the second, one row is nothing but common text
    model = peft_model(name, method)
    rows = []
    hook = (
        model.base_model.get_decoder()
        .layers[0]
        .register_forward_hook(lambda m, args, output: rows.append(args[0].shape[1]))
    )
    assert_same_steps(model, [batch("right", common=3, method=method, lengths=n) for n in lengths])
    hook.remove()
    prompts = 3 * P if method == "multitask" else P
    if method in PREFIXES:
        prompts = 0
    # of the three tasks of the batch, one has two rows
    saved = 3 if method == "multitask" else 3 * 3
    assert {prompts + sum(n) - saved for n in lengths} <= set(rows)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_same_as_peft_in_float64(name, padding):
    """To 1e-9. Hugging Face rounds to fp32 in two places (1e-7), which both sides have to leave out for that: the loss
    is taken from the logits, and Llama's RMSNorm is torch's, the same formula in the dtype of its input."""
    model, inputs = peft_model(name, dtype=torch.float64), batch(padding)
    for module in list(model.modules()):
        for child_name, child in module.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(child.weight.shape, child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(module, child_name, norm)
    labels = torch.cat([torch.full((B, P), -100), inputs["labels"]], 1)

    def loss_and_gradient():
        model.zero_grad()
        logits = model(**inputs).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        return loss.detach(), next(model.prompt_encoder.parameters()).grad.clone()

    plain = loss_and_gradient()
    fastprompt.accelerate(model)
    fast = loss_and_gradient()
    torch.testing.assert_close(fast[0], plain[0], rtol=1e-9, atol=0)
    assert (fast[1] - plain[1]).norm() <= 1e-9 * plain[1].norm()


@pytest.mark.parametrize("name", FALLBACK)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_models_that_cannot_be_packed_run_peft_itself(name, padding):
    """Bit for bit PEFT's result, and one warning that says why."""
    model, inputs = peft_model(name), batch(padding)
    plain = step(model, inputs)
    with pytest.warns(UserWarning, match="fastprompt runs PEFT's own padded forward: .+") as caught:
        fastprompt.accelerate(model)
    assert not any("PackedMask" in str(warning.message) for warning in caught)  # a reason for users
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # not a second time
        fast = step(model, inputs)
    assert_identical(plain, fast)


@pytest.mark.parametrize(
    "name, method",
    [(name, "prompt_tuning") for name in PACKED]
    + [(name, m) for name in ("llama", "gpt2", "gemma2") for m in PREFIXES],
)
def test_gradient_checkpointing(name, method):
    """PEFT's own Prefix-Tuning refuses checkpointing, or drops the prefix unseen; the reference runs without it."""
    model, inputs = peft_model(name, method), batch("right")
    plain = step(model, inputs)
    fastprompt.accelerate(model)
    for reentrant in (False, True):
        model.base_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_equal(plain, step(model, inputs), inputs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2", "gpt_oss", "falcon", "bloom"])
def test_bf16_within_the_rounding_of_peft(name):
    """Against float64, what rounding the result of every operation to bf16 may do."""
    # transformers' eager attention gives NaN in float64 where a padding row sees nothing within its window
    inputs = batch("none" if name in ("gemma2", "gpt_oss") else "right")
    experts = {"experts_implementation": "eager"} if name == "gpt_oss" else {}  # grouped_mm has no float64
    low, high = (peft_model(name, dtype=dtype, **experts) for dtype in (torch.bfloat16, torch.float64))
    assert_within_rounding(low, high, inputs)


def assert_within_rounding(low, high, inputs):
    """A step of ``low``, in bf16, against float64 in ``high``, which is given its weights."""
    with torch.no_grad():
        for target, source in zip(high.parameters(), low.parameters()):
            target.copy_(source)  # the rounded weights
    mask = inputs["attention_mask"]
    real = torch.ones(B, S) if mask is None else mask
    real = torch.cat([torch.ones(B, P), real], 1).bool()

    def results(taken):
        loss, gradients, logits = taken
        return [loss, next(iter(gradients.values())), logits[real]]

    budget = Budget.of(lambda _: results(step(high, inputs)), torch.bfloat16, results=torch.bfloat16, operands=False)
    plain, fast = (results(taken) for taken in both(low, inputs))
    assert_within(budget, fast)
    assert_within(budget, plain)  # the budget is one of bf16 at all

    half = dict(inputs, attention_mask=real[:, P:].long())
    half["attention_mask"][0, 3] = 0
    faults = {
        "a dropped key": step(high, half),
        "a shifted label": step(high, dict(inputs, labels=inputs["labels"].roll(1, 1))),
    }
    assert_found(budget, {fault: results(taken) for fault, taken in faults.items()})


@pytest.mark.parametrize("method", PREFIXES)
def test_a_prefix_on_a_model_that_checkpoints_already(method):
    """PEFT refuses to build it; a batch that is not packed runs without checkpoints."""
    reference, inputs = peft_model("llama", method), batch("right")
    plain = step(reference, inputs)
    base = build("llama").train()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        peft.get_peft_model(base, reference.active_peft_config)
    model = fastprompt.get_peft_model(base, reference.active_peft_config)
    model.prompt_encoder.load_state_dict(reference.prompt_encoder.state_dict())
    assert_equal(plain, step(model, inputs), inputs)
    assert fastprompt.stats(model).padded == {}
    with pytest.warns(UserWarning, match="output_hidden_states given"):
        loss = model(**inputs, output_hidden_states=True).loss
    torch.testing.assert_close(loss.detach(), plain[0], rtol=1e-5, atol=0)
    assert base.is_gradient_checkpointing
    model.add_adapter("second", reference.active_peft_config)
