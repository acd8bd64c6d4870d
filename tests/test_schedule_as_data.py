"""The schedule of a batch as tensors: sizes that batches have in common, and nothing read behind the plan."""

import copy
from dataclasses import fields, replace
from unittest import mock

import pytest
import torch
from needs import cases, needs_states
from parity import METHODS, TASKS, B, P, batch, peft_model, trained
from tiny_hybrids import build_hybrid
from tiny_models import build
from tiny_pairs import build_pair
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastprompt
from fastprompt import Sequences, native, prefix_attention
from fastprompt.hf.engine import Engine
from fastprompt.hf.masks import PackedRows
from fastprompt.hf.shared_state import SharedState
from fastprompt.layout import branches, plan_packed_input, plan_padded_input
from fastprompt.ops.prefix_attention.api import scheduled_attention
from fastprompt.ops.prefix_attention.scheduled import Shape, make_schedule
from fastprompt.peft.state import state_of

LENGTHS = torch.Generator().manual_seed(0)


def assert_same_step(models, inputs):
    """Loss and gradients, and logits of an evaluation."""
    (found, gradients), (loss, expected) = (trained(model, inputs) for model in models)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 2e-5 * gradient.norm(), name
    without = {name: x for name, x in inputs.items() if name != "labels"}
    with torch.no_grad():
        logits, exact = (model.eval()(**without).logits for model in models)
    torch.testing.assert_close(logits, exact)


def with_dead_rows(build, multiple=16):
    """The same model twice; the rows of the first are padded."""
    models = [fastprompt.accelerate(build(), pad_rows_to=n) for n in (multiple, None)]
    for model in models:
        assert state_of(model).engine.refusal is None
    return models


def rows_of(model):
    return fastprompt.stats(model).rows


@pytest.mark.parametrize("method", METHODS)
def test_dead_rows_change_nothing(method):
    models = with_dead_rows(lambda: peft_model("llama", method))
    assert_same_step(models, batch("left", method=method))
    assert fastprompt.stats(models[0]).packed == 2 and rows_of(models[0]) % 16 == 0 < rows_of(models[1]) % 16


@pytest.mark.parametrize(
    "name",
    cases(["gemma2", "gpt_oss", "qwen3_5_text", "bamba"], dict.fromkeys(["qwen3_5_text", "bamba"], needs_states)),
)
def test_dead_rows_behind_windows_and_states(name):
    def build():
        if name in ("gemma2", "gpt_oss"):
            return peft_model(name)
        base = build_hybrid(name)
        base.config.use_cache = False
        return peft_model(None, base=base)

    assert_same_step(with_dead_rows(build), batch("right"))


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix"])
def test_dead_rows_behind_trees_and_rows_left_out(method):
    inputs = batch("right", labelled="last", common=2)
    inputs["input_ids"][1:3, :4] = inputs["input_ids"][1, :4]
    models = with_dead_rows(lambda: peft_model("llama", method))
    for model in models:
        state_of(model).engine.node_cost = 1
    assert_same_step(models, inputs)


def test_a_copy_pads_its_rows():
    model = copy.deepcopy(fastprompt.accelerate(peft_model("llama"), pad_rows_to=64))
    model.train()(**batch("right"))
    assert rows_of(model) == 64


@pytest.mark.parametrize("value, error", [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_what_is_no_number_of_rows_is_refused(value, error):
    with pytest.raises(error, match="pad_rows_to must be"):
        fastprompt.accelerate(peft_model("llama"), pad_rows_to=value)
    with pytest.raises(ValueError, match="pad_rows_to needs the layout"):
        plan_padded_input(2, 3, 1, layout="padded", pad_rows_to=8)


def test_an_encoder_decoder_refuses_dead_rows():
    with pytest.raises(ValueError, match="pad_rows_to must be None for an encoder-decoder"):
        Engine(build_pair("bart"), pad_rows_to=64)


def tables(shared=None, prefix_length=0):
    """The shapes of all that attention of compiled layers is given of the sequences, of twenty batches of 128 rows."""
    found = []
    for _ in range(20):
        count = int(torch.randint(4, 10, (), generator=LENGTHS))
        lengths = torch.randint(1, 12, (count,), generator=LENGTHS)
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        options = dict(prefix_length=prefix_length, pad_rows_to=128)
        plan = plan_packed_input(bounds, 0 if shared else 5, **options)
        given = PackedRows(plan, True, shared, None, None, {Shape(4, 2, 16, 16)}, torch.float32)
        schedules = given._packed(plan.sequences, None, True, given.shared).schedules
        found.append((plan.source.shape, {key: x.shape for key, x in schedules.items()}))
    return found


@pytest.mark.skipif(native.missing is not None, reason=str(native.missing))
@pytest.mark.parametrize("prefix", [False, True])
def test_batches_of_as_many_rows_have_schedules_of_one_shape(prefix):
    shared = SharedState.of_tensor(torch.zeros(2, 2, 5, 2, 16)) if prefix else None
    found = tables(shared, 5 if prefix else 0)
    assert found[0][1] and all(x == found[0] for x in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # float64: of backends that look at sequences
@pytest.mark.parametrize("options", [dict(causal=True, window=3), dict(causal=False, window=None)], ids=str)
def test_the_operator_gives_what_prefix_attention_gives(dtype, options):
    seq = Sequences.runs([0, 4, 9], [4, 3, 2], 12, [0, -1, 1], [3, 2], [0, 1, 0])
    shapes = (12, 4, 8), (12, 2, 8), (12, 2, 6), (2, 3, 2, 8), (2, 3, 2, 6), (4,)
    inputs = [torch.randn(shape, dtype=dtype, generator=LENGTHS, requires_grad=True) for shape in shapes]
    *tensors, sinks = inputs
    shape, place = Shape.of(*tensors[:3]), dict(prefixes=2, room=3, dtype=dtype, device=torch.device("cpu"))
    schedule = make_schedule(seq, shape, **place, **options)
    given = dict(options, softcap=5.0, sinks=sinks)
    out = scheduled_attention(*tensors, schedule, scale=0.3, dropout_p=0.0, **given)
    expected, _ = prefix_attention(*tensors, seq, scale=0.3, **given)
    grad = torch.randn(out.shape, dtype=dtype, generator=LENGTHS)
    torch.testing.assert_close(out, expected)
    for found, exact in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad)):
        torch.testing.assert_close(found, exact)


class Reads(TorchDispatchMode):
    """Counts what waits for a device to tell a value, or how many there are."""

    OPERATORS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "equal", "masked_select", "is_nonzero"}
    INDEXING = {"index", "index_put", "index_put_"}

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator._opname in self.OPERATORS
        if operator._opname in self.INDEXING:
            self.count += any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        return operator(*args, **(kwargs or {}))


def soft_model(kind):
    sizes = (P, 48) if kind is fastprompt.PromptTuning else (P, 3, 2, 8)
    return fastprompt.SoftPromptModel(build("llama"), kind(*sizes, num_prompts=5), pad_rows_to=16)


def with_adapters(method):
    model = peft_model("llama", method)
    model.add_adapter("second", model.peft_config["default"])
    return fastprompt.accelerate(model, pad_rows_to=16)


def cpt_model():
    model = fastprompt.accelerate(peft_model("llama", "cpt"), pad_rows_to=16)
    model.peft_config["default"].opt_weighted_loss_type = "decay"
    encoder = model.prompt_encoder["default"]
    lengths = encoder.get_epsilon()  # of the config: reads tensors, but those that are on the host on any device
    encoder.get_epsilon = lambda: lengths
    return model


# name -> a model, and what its batches have row by row
FRONTS = {
    **{
        method: (lambda method=method: fastprompt.accelerate(peft_model("llama", method), pad_rows_to=16), {})
        for method in ("prompt_tuning", "prefix")
    },
    "multitask": (lambda: with_adapters("multitask"), {"task_ids": TASKS}),
    "adapters": (
        lambda: with_adapters("multitask"),
        {"task_ids": TASKS, "adapter_names": ["second", "default", "second", "second"]},
    ),
    "cpt": (cpt_model, {"input_type_mask": torch.tensor([4, 4, 8, 8, 1, 2, 12, 12, 12]).repeat(B, 1)}),
    "prompts": (lambda: soft_model(fastprompt.PromptTuning), {"prompt_ids": torch.tensor([4, 0, 4, 1])}),
    "prefixes": (lambda: soft_model(fastprompt.PrefixTuning), {"prompt_ids": torch.tensor([4, 0, 4, 1])}),
}


@pytest.mark.filterwarnings("ignore:fastprompt. adapter_names gives every row")
@pytest.mark.parametrize("front", FRONTS)
def test_the_host_reads_one_copy_a_step(front):
    """The plan's. Behind it tensors have no values (they are fake), and the step, backward included, asks for none."""
    make, of_rows = FRONTS[front]
    model, inputs = make().train(), batch("left", labelled="part", common=2) | of_rows
    to_host, ran = [], []

    def move(tensors, device):
        to_host.append(device)
        return tensors

    planned = mock.patch.object(Engine, "run", lambda *arguments: ran.append(arguments))
    with Reads() as reads, mock.patch.object(branches, "move", move), planned:
        model(**inputs)
    assert len(to_host) == 1 and reads.count == 0

    engine, request, plan, embed = ran[0]
    engine.runner.compiled = [engine.runner.backbone]
    engine.run(request, plan, embed)  # so the plan's sequences know their schedule
    with reads:  # of the encoder, which may write into itself
        prompts = None if request.prompts is None else request.prompts()
    assert reads.count == 0
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        of_plan = {field.name: getattr(plan, field.name) for field in fields(plan)}
        changed = {name: fake.from_tensor(x) for name, x in of_plan.items() if isinstance(x, torch.Tensor)}
        made = None if prompts is None else lambda: prompts
        request = replace(request, tokens=fake.from_tensor(request.tokens), prompts=made)
        with mock.patch("fastprompt.hf.attention.prefix_attention", None):  # for shapes that are not known
            loss = engine.run(request, replace(plan, **changed), embed).loss
            trainable = [p for p in model.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(loss, trainable, allow_unused=True)
    assert any(gradient is not None for gradient in gradients)


def test_the_launch_path_reads_nothing():
    """Triton's launches, on tensors without values; their grids are those of every batch of as many rows."""
    launch = pytest.importorskip("fastprompt.kernels.launch")
    if launch.INTERPRETED:
        pytest.skip("the interpreter launches nothing")
    from triton.backends.compiler import GPUTarget

    from fastprompt.ops.prefix_attention import triton

    q, k, bank = (torch.zeros(shape, device="meta") for shape in ([64, 4, 16], [64, 2, 16], [2, 5, 2, 16]))
    lse, shape, grids = torch.zeros(4, 64, device="meta"), Shape(4, 2, 16, 16), set()
    options = dict(causal=True, window=None)
    for lengths in ([60], [1, 2, 3, 40], [4] * 16):
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        seq = plan_packed_input(bounds, 0, prefix_length=5, pad_rows_to=64).sequences
        with launch.capture(GPUTarget("cuda", 90, 32)) as launches:
            packed = triton.pack(seq, shape, prefixes=2, room=5, element_size=4, device=q.device, **options)
            assert packed.is_meta
            given = dict(options, softcap=None, sinks=None, scale=1.0)
            triton.forward(q, k, k, bank, bank, triton.unpack(packed), **given)
            triton.backward(q, q, k, k, bank, bank, q, lse, triton.unpack(packed), **given)
        assert [x.kernel.name for x in launches] == ["_forward", "_backward", "_reduce"]
        grids.add(tuple(x.grid for x in launches))
    assert len(grids) == 1
