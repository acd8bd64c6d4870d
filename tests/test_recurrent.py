"""Models with recurrent or convolution layers: a prompt's state is computed once, and every sequence starts from it."""

import copy
import pickle
import warnings

import pytest
import torch
import transformers as hf
from budget import assert_within
from needs import needs_states
from parity import TASKS, B, P, assert_equal, assert_identical, batch, peft_model, step
from tiny_hybrids import PACKED, REFUSED, build_hybrid
from tiny_models import VOCABULARY

import fastprompt
from benchmarks.budget import Budget
from fastprompt.hf.cache import content
from fastprompt.hf.shared_state import layers_with_keys

pytestmark = needs_states
ONE_OF_EACH = ["qwen3_5_text", "lfm2", "bamba"]  # a gated delta rule, a short convolution, Mamba 2


def hybrid(name, dtype=torch.float32, method="prompt_tuning", length=P, **changes):
    """An adapter on a tiny hybrid that returns no cache."""
    base = build_hybrid(name, dtype, **changes)
    base.config.use_cache = False
    return peft_model(None, method, dtype, base=base, length=length)


def accelerated(model):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprompt runs PEFT's own padded forward")
        return fastprompt.accelerate(model)


@pytest.mark.parametrize("name, length", [(name, 1 if i % 2 else 9) for i, name in enumerate(PACKED)])
def test_same_as_peft(name, length):
    """Whatever the padding, with checkpoints of either kind; one row has one token."""
    model = hybrid(name, length=length)
    inputs = {padding: batch(padding) for padding in ("right", "none", "left", "mixed")}
    plain = {padding: step(model, x) for padding, x in inputs.items()}
    accelerated(model)
    for padding, x in inputs.items():
        assert_equal(plain[padding], step(model, x), x)
    for reentrant in (False, True):
        model.base_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_equal(plain["right"], step(model, inputs["right"]), inputs["right"])
    assert fastprompt.stats(model).padded == {}


@pytest.mark.parametrize("name", PACKED)
def test_tasks_with_common_text(name):
    """Of the three tasks of the batch one has two rows, which begin alike; one of them is nothing but that."""
    model = hybrid(name, method="multitask")
    inputs = batch("right", "last", common=3, method="multitask", lengths=(9, 4, 3, 6))
    plain = step(model, inputs)
    assert_equal(plain, step(accelerated(model), inputs), inputs)
    assert fastprompt.stats(model).padded == {}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_common_text_is_run_once(name):
    model = hybrid(name)
    inputs = batch("right", common=3, lengths=(9, 4, 5, 6))
    plain = step(model, inputs)
    accelerated(model)
    assert_equal(plain, step(model, inputs), inputs)
    # The step of training leaves the last tokens out, which predict nothing.
    assert fastprompt.stats(model).rows == 2 * (P + 9 + 4 + 5 + 6 - 3 * 3) - B


@pytest.mark.parametrize(
    "name, changes",
    [
        ("qwen3_5_text", dict(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])),
        ("falcon_h1", dict(num_hidden_layers=1)),
    ],
)
def test_bf16_within_the_rounding_of_peft(name, changes):
    inputs = batch("right")
    low, high = (hybrid(name, dtype=dtype, **changes) for dtype in (torch.bfloat16, torch.float64))
    with torch.no_grad():
        for target, source in zip(high.parameters(), low.parameters()):
            target.copy_(source)  # the rounded weights
    real = torch.cat([torch.ones(B, P), inputs["attention_mask"]], 1).bool()

    def results(taken):
        loss, gradients, logits = taken
        return [loss, next(iter(gradients.values())), logits[real]]

    budget = Budget.of(lambda _: results(step(high, inputs)), torch.bfloat16, results=torch.bfloat16, operands=False)
    plain = step(low, inputs)
    fast = step(accelerated(low), inputs)
    assert_within(budget, results(plain))
    assert_within(budget, results(fast))


_SHARED_MODULES = dict(num_hidden_layers=3, hybrid_layer_ids=[0, 2], layers_block_type=["hybrid", "mamba", "hybrid"])


@pytest.mark.parametrize(
    "name, changes",
    [(name, {}) for name in ("qwen3_next", "lfm2", "falcon_h1", "nemotron_h", "mamba2", "zaya", "kimi_linear")]
    + [("zamba2", _SHARED_MODULES)],
)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_cache_that_is_asked_for_is_peft_s(name, changes, padding):
    """The states of a padded row are those behind its padding, as the model's own forward leaves them."""
    model = peft_model(None, base=build_hybrid(name, **changes)).eval()
    inputs = {k: x for k, x in batch(padding).items() if k != "labels"}
    real = torch.cat([torch.ones(B, P), inputs["attention_mask"]], 1).bool()

    def cache():
        with torch.no_grad():
            output = model(**inputs, use_cache=True)
        return output.get("past_key_values", output.get("cache_params"))

    plain = content(cache())
    fast = content(accelerated(model) and cache())
    assert fastprompt.stats(model).padded == {} and plain.keys() == fast.keys()
    for key, expected in plain.items():
        got = fast[key]
        if key[1] in ("keys", "values"):
            got, expected = got.transpose(1, 2)[real], expected.transpose(1, 2)[real]
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_packed_samples_run_apart(name):
    model = hybrid(name)
    ids = torch.randint(3, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(0))
    lengths = (5, 1, 6)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.clone()
    labels[0, [0, 5, 6]] = -100
    samples = list(zip(ids.split(lengths, 1), labels.split(lengths, 1)))
    losses = [model(input_ids=x, labels=y).loss * int((y[0] >= 0).sum()) for x, y in samples if (y >= 0).any()]
    expected = sum(losses) / int((labels >= 0).sum())
    (expected_gradient,) = torch.autograd.grad(expected, next(model.prompt_encoder.parameters()))
    accelerated(model)
    loss = model(input_ids=ids, position_ids=positions, labels=labels).loss
    (gradient,) = torch.autograd.grad(loss, next(model.prompt_encoder.parameters()))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert (gradient - expected_gradient).norm() <= 1e-4 * expected_gradient.norm()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_rows_of_several_adapters(name):
    model = hybrid(name)
    model.add_adapter("other", model.peft_config["default"])
    names, inputs = ["default", "other", "other", "default"], batch("right")
    model.eval()
    expected = []
    for row, adapter in enumerate(names):
        model.set_adapter(adapter)
        expected.append(model(**{k: x[row : row + 1] for k, x in inputs.items()}).loss.detach())
    model.set_adapter("default")
    accelerated(model)
    for row, loss in enumerate(expected):
        labels = torch.full_like(inputs["labels"], -100)
        labels[row] = inputs["labels"][row]
        got = model(**dict(inputs, labels=labels), adapter_names=names).loss
        torch.testing.assert_close(got, loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["qwen3_5_text", "granitemoehybrid", "lfm2", "bamba"])
def test_a_prefix_in_the_layers_with_attention(name):
    """PEFT's Prefix-Tuning does not run on such models. The reference is the model's own forward behind a cache."""
    base = build_hybrid(name)
    layers = layers_with_keys(base.config)
    method = fastprompt.PrefixTuning(
        P, len(layers), 2, base.config.hidden_size // base.config.num_attention_heads, num_prompts=3, layers=layers
    )
    inputs = batch("right")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprompt runs the model's own padded forward")
        model = fastprompt.SoftPromptModel(base, method)
    loss = model(**inputs, prompt_ids=TASKS).loss
    loss.backward()
    gradient = method.prefix.grad.clone()
    method.zero_grad()
    model.release()
    with pytest.warns(UserWarning, match="the model was released"):
        expected = model(**inputs, prompt_ids=TASKS).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert (gradient - method.prefix.grad).norm() <= 1e-4 * gradient.norm()


def test_a_classifier_sees_the_states_of_left_padded_rows():
    torch.manual_seed(0)
    config = build_hybrid("qwen3_next", num_labels=3).config
    base = hf.AutoModelForSequenceClassification.from_config(config)
    model, inputs = peft_model(None, task_type="SEQ_CLS", base=base), batch("left")
    inputs["labels"] = torch.tensor([0, 1, 2, 1])
    plain = step(model, inputs)
    assert_equal(plain, step(accelerated(model), inputs), inputs)
    assert fastprompt.stats(model).padded == {}


@pytest.mark.parametrize("name", REFUSED)
def test_a_state_that_cannot_be_given_is_refused(name):
    """Bit for bit PEFT's result, under the true reason."""
    model, inputs = peft_model(None, base=build_hybrid(name)), batch("right")
    plain = step(model, inputs)
    with pytest.warns(UserWarning, match=REFUSED[name]):
        fastprompt.accelerate(model)
    assert_identical(plain, step(model, inputs))


def leak_between_rows(mixer):
    """Every row of a batch with a share of the one before it."""
    mixer.register_forward_hook(lambda module, args, output: output + 1e-3 * output.roll(1, 0))


def leak_between_tokens(mixer):
    """Every packed row with a share of the one before it, of whatever sequence that is."""
    mixer.register_forward_hook(lambda module, args, output: output + 1e-3 * output.roll(1, 1))


class _Remembers(torch.nn.Module):
    """An output projection that adds what it last saw of the last token before, as a state that is never reset."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.weight, self.before = linear, linear.weight, 0.0

    def forward(self, x):
        before, self.before = self.before, x[-1:, -1:].detach()
        return self.linear(x + 1e-3 * before)


def leak_between_calls(mixer):
    mixer.out_proj = _Remembers(mixer.out_proj)


@pytest.mark.parametrize("leak", [leak_between_rows, leak_between_tokens, leak_between_calls])
@pytest.mark.parametrize("name, mixer", [("qwen3_5_text", "linear_attn"), ("lfm2", "conv"), ("bamba", "mamba")])
def test_a_leak_of_a_state_is_found(name, mixer, leak):
    base = build_hybrid(name)
    leak(getattr(base.get_decoder().layers[2], mixer))
    with pytest.warns(UserWarning, match="packed rows give another output|depends on the batch it stands in"):
        fastprompt.accelerate(peft_model(None, base=base))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_that_nobody_told_is_no_silent_error(reentrant):
    """What it recomputes would not know its batch."""
    model, inputs = accelerated(hybrid("lfm2")), batch("right")
    layer = model.base_model.model.layers[0]
    forward = layer.forward
    layer.forward = lambda x, **kwargs: torch.utils.checkpoint.checkpoint(
        lambda y: forward(y, **kwargs), x, use_reentrant=reentrant
    )
    if reentrant:
        with pytest.warns(UserWarning, match="a checkpoint that is not the model's own"):
            model(**inputs)
    else:
        with pytest.raises(torch.utils.checkpoint.CheckpointError):
            model(**inputs).loss.backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_run_packed(copied):
    model, inputs = accelerated(hybrid("lfm2")), batch("right")
    plain, twin = step(model, inputs), copied(model)
    assert_identical(plain, step(twin, inputs))
    assert fastprompt.stats(twin).padded == {}


def test_a_layer_that_is_given_another_forward_runs_padded():
    """It would take the packed rows for one sequence, and nothing else would show it."""
    model, inputs = hybrid("lfm2"), batch("right")
    plain = step(model, inputs)
    accelerated(model)
    layer = model.base_model.model.layers[0].conv
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)
    with pytest.warns(UserWarning, match="Lfm2ShortConv was given another forward"):
        assert_identical(plain, step(model, inputs))


def test_compile_gives_the_same():
    model, inputs = hybrid("mamba2", num_hidden_layers=1), batch("right")
    plain = step(model, inputs)
    accelerated(model)
    torch._dynamo.reset()
    loss = torch.compile(model, backend="eager")(**inputs).loss
    torch.testing.assert_close(loss.detach(), plain[0], rtol=1e-5, atol=0)


def test_steps_repeat_bit_for_bit():
    model, inputs = accelerated(hybrid("qwen3_5_text")), batch("right")
    first, again = step(model, inputs), step(model, inputs)
    assert_identical(first, again)
