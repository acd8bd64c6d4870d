"""What the tests against PEFT share: tiny PEFT models of every method, batches, a training step, how to compare."""

import inspect
import warnings
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import peft
import torch
from tiny_models import VOCABULARY, build

import fastprompt

P, B, S = 5, 4, 9
LENGTHS = (9, 4, 1, 6)
TASKS = torch.tensor([2, 0, 2, 1])

_P_TUNING = dict(encoder_hidden_size=12, encoder_dropout=0.0)

# method -> (PEFT's config class, arguments)
METHODS = {
    "prompt_tuning": (peft.PromptTuningConfig, {}),
    "p_tuning_lstm": (
        peft.PromptEncoderConfig,
        dict(_P_TUNING, encoder_reparameterization_type="LSTM", encoder_num_layers=2),
    ),
    "p_tuning_mlp": (peft.PromptEncoderConfig, dict(_P_TUNING, encoder_reparameterization_type="MLP")),
    "multitask": (peft.MultitaskPromptTuningConfig, dict(num_tasks=3, num_ranks=2)),
    "prefix": (peft.PrefixTuningConfig, {}),
    "prefix_mlp": (peft.PrefixTuningConfig, dict(prefix_projection=True, encoder_hidden_size=12)),
    "cartridge": (peft.CartridgeConfig, dict(num_frozen_tokens=2)),
    "cpt": (
        peft.CPTConfig,
        dict(cpt_token_ids=[4, 8, 15, 16, 23], cpt_mask=[1] * 5, cpt_tokens_type_mask=[1, 2, 2, 3, 4]),
    ),
}
PREFIXES = ("prefix", "prefix_mlp", "cartridge")


def peft_model(
    name,
    method="prompt_tuning",
    dtype=torch.float32,
    *,
    task_type="CAUSAL_LM",
    base=None,
    length=P,
    sizes=None,
    **changes,
):
    """A PEFT model whose adapter was drawn large enough that a mistake in it shows.

    ``sizes`` of the model where PEFT does not find them.
    """
    config_class, arguments = METHODS[method]
    if method != "cpt":
        arguments = dict(arguments, num_virtual_tokens=length)
    base = build(name, dtype, **changes) if base is None else base
    torch.manual_seed(1)
    model = peft.get_peft_model(base, config_class(task_type=task_type, **arguments, **(sizes or {})))
    with torch.no_grad():
        for encoder in model.prompt_encoder.values():
            for parameter in encoder.parameters():
                scale = 0.5 if parameter.dim() < 2 or parameter.shape[0] <= 3 * P else parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape) * scale)
    return model.to(dtype)


def batch(padding, labelled="all", common=0, method="prompt_tuning", lengths=LENGTHS):
    """A batch of uneven rows, whose first ``common`` tokens are the same."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (B, S), generator=generator)
    ids[:, :common] = ids[0, :common]
    real = torch.ones(B, S, dtype=torch.int64)
    for row, length in enumerate(lengths):
        if padding == "right":
            real[row, length:] = 0
        elif padding == "left" or (padding == "mixed" and row % 2):
            real[row, : S - length] = 0
        elif padding == "mixed":
            real[row, length:] = 0
    labels = ids.masked_fill(real == 0, -100)
    if padding in ("left", "mixed"):  # a padding token would have to predict the first label
        first = real.argmax(1)
        labels[torch.arange(B)[first > 0], first[first > 0]] = -100
    if labelled == "last":
        last = S - 1 - real.flip(1).argmax(1)
        only = torch.full_like(labels, -100)
        only[torch.arange(B), last] = labels[torch.arange(B), last]
        labels = only
    elif labelled == "part":
        labels[0, 2:5] = labels[1] = -100
    inputs = dict(input_ids=ids, attention_mask=None if padding == "none" else real, labels=labels)
    return dict(inputs, task_ids=TASKS) if method == "multitask" else inputs


def trained(model, inputs):
    """Loss and gradients of everything that trains, of a training step."""
    model.zero_grad()
    model.train()
    loss = model(**inputs).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return loss.detach(), gradients


def step(model, inputs):
    """Loss, gradients of everything that trains (of a training step) and the output of an evaluation."""
    loss, gradients = trained(model, inputs)
    model.eval()
    targets = ("labels", "start_positions", "end_positions")
    with torch.no_grad():
        output = model(**{k: v for k, v in inputs.items() if k not in targets})
    model.train()
    return loss, gradients, next(x for x in output.values() if isinstance(x, torch.Tensor))


@contextmanager
def known_names():
    """PEFT's classifiers find the cache among a model's arguments; they look for its name before transformers 5.24."""

    def signature(function):
        found = inspect.signature(function)
        names = ["past_key_values" if name == "cache" else name for name in found.parameters]
        return SimpleNamespace(parameters=dict(zip(names, found.parameters.values())))

    with mock.patch.object(peft.peft_model, "inspect", SimpleNamespace(signature=signature)):
        yield


def plain_step(model, inputs):
    """:func:`step` by PEFT."""
    with known_names():
        return step(fastprompt.restore(model), inputs)


def both(model, inputs):
    """The step by PEFT and by fastprompt, which must have run packed rows without a warning."""
    return both_of_each(model, [inputs])[0]


def both_of_each(model, batches):
    """:func:`both` of each batch, with a model that is accelerated once."""
    plain = [plain_step(model, inputs) for inputs in batches]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprompt runs PEFT's own padded forward")
        fastprompt.accelerate(model)
        fast = [step(model, inputs) for inputs in batches]
    fastprompt.restore(model)
    return list(zip(plain, fast))


def assert_same_steps(model, batches):
    """Each of the batches gives the same by PEFT and by fastprompt, on packed rows without a warning."""
    for (plain, fast), inputs in zip(both_of_each(model, batches), batches, strict=True):
        assert_equal(plain, fast, inputs)


def assert_equal(plain, fast, inputs, loss_rtol=1e-5, gradient_rtol=1e-4, output_rtol=1e-4):
    torch.testing.assert_close(fast[0], plain[0], rtol=loss_rtol, atol=0)
    assert plain[1] and fast[1].keys() == plain[1].keys()
    # A gradient that is zero but for rounding (a bias before a softmax) is measured against the largest one.
    floor = 1e-3 * max(x.norm() for x in plain[1].values())
    for name, expected in plain[1].items():
        error = (fast[1][name] - expected).norm() / expected.norm().clamp(min=floor)
        assert error <= gradient_rtol, f"gradient of {name} differs by {error:.1e}"
    assert fast[2].shape == plain[2].shape
    if plain[2].dim() < 3 or inputs["attention_mask"] is None:
        real = torch.ones(plain[2].shape[:1], dtype=torch.bool)
    else:
        text = inputs["attention_mask"].bool()
        real = torch.cat([text.new_ones(len(text), plain[2].shape[1] - text.shape[1]), text], 1)
    difference = (fast[2] - plain[2])[real].abs().max() / plain[2][real].abs().max()
    assert difference <= output_rtol, f"outputs differ by {difference:.1e}"


def assert_identical(plain, fast):
    """Bit for bit the same step."""
    assert torch.equal(plain[0], fast[0]) and torch.equal(plain[2], fast[2])
    assert plain[1].keys() == fast[1].keys() and all(torch.equal(plain[1][name], fast[1][name]) for name in plain[1])


def is_packed(model, inputs):
    """Does this call run on packed rows?"""
    before = fastprompt.stats(model).packed
    model(**inputs)
    return fastprompt.stats(model).packed > before


def assert_checkpoints_change_nothing(reentrant):
    """A step of an accelerated model whose layers run a second time is the step without: their kernels run again."""
    model, inputs = fastprompt.accelerate(peft_model("llama")), batch("right")
    expected, gradients, _ = step(model, inputs)
    model.base_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss, again, _ = step(model, inputs)
    assert torch.equal(loss, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient)
