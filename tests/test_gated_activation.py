"""gated_activation against autograd over the activation and the product: the same bits, with less saved, or the C++
kernels' rounding."""

from functools import partial

import pytest
import torch
from budget import assert_within
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from benchmarks.budget import Budget
from fastprompt import gated_activation
from fastprompt.backends import available
from fastprompt.ops.gated_activation.api import GatedActivation

NAMED = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}
CONSTANT = torch.ones(4, 5)
FUNCTIONS = {
    "SiLU": torch.nn.SiLU(),
    "identity": torch.nn.Identity(),
    "view": lambda x: x.view_as(x),
    "in place": torch.nn.SiLU(inplace=True),
    "in place by hand": lambda x: x.mul_(2.0).clamp_(max=1.0),
    "composed": lambda x: 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.04 * x.pow(3)))),
    "step": lambda x: (x > 0).to(x.dtype),
    "constant": lambda x: CONSTANT.to(x.dtype),
    "with a parameter": torch.nn.Threshold(0.1, 0.0),
}
ACTIVATIONS = [*NAMED, *(pytest.param(function, id=name) for name, function in FUNCTIONS.items())]


def inputs(dtype=torch.float64, shape=(4, 5)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def plain(gate, up, activation):
    return NAMED.get(activation, activation)(gate * 1) * up  # a copy to work in


def run(function, gate, up, grad, activation):
    leaves = [x.detach().requires_grad_() for x in (gate, up)]
    out = function(*leaves, activation)
    out.backward(grad)
    return out.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_same_bits_as_autograd_and_nothing_is_written_into(activation, dtype):
    gate, up, grad = inputs(dtype)
    before = [x.clone() for x in (gate, up, grad, CONSTANT)]
    reference = partial(gated_activation, backend="reference")
    got, expected = (run(f, gate, up, grad, activation) for f in (reference, plain))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((gate, up, grad, CONSTANT), before))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_twice(activation):
    """What is saved is not written into; a second backward and a derivative of the derivative raise."""
    gate, up, grad = inputs()
    leaves = gate.requires_grad_(), up.requires_grad_()
    out = gated_activation(*leaves, activation)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(out, leaves, grad)))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, leaves, grad)
    out = gated_activation(*leaves, activation)
    (dup,) = torch.autograd.grad(out, up, grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dup.sum().backward()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", torch.nn.SiLU(), torch.nn.Identity()])
def test_gradcheck(activation):
    gate, up, _ = inputs()
    leaves = gate.requires_grad_(), up.requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: gated_activation(*x, activation), leaves)


@pytest.mark.parametrize("activation", ["silu", torch.nn.SiLU(inplace=True)])
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_wanted_gradients(activation, needs):
    gate, up, grad = inputs()
    leaves = [x.requires_grad_(need) for x, need in zip((gate, up), needs)]
    out = gated_activation(*leaves, activation)
    assert out.requires_grad == any(needs)
    if any(needs):
        out.backward(grad)
    assert [x.grad is not None for x in leaves] == list(needs)


@pytest.mark.parametrize("activation", ["silu", torch.nn.SiLU(), torch.nn.SiLU(inplace=True)])
def test_any_shape_and_strides(activation):
    """Transposed, cut out, expanded, empty and scalar inputs, and an expanded gradient."""
    base = inputs(shape=(3, 4, 8))[0]
    pairs = [
        (base.transpose(0, 2), base.transpose(0, 2) + 1),
        (base[..., ::2], base[..., 1::2]),
        (base[:1].expand(3, 4, 8), base),
        (base[:0], base[:0]),
        (base[0, 0, 0], base[0, 0, 1]),
    ]
    for gate, up in pairs:
        before = base.clone()
        grad = torch.ones((), dtype=base.dtype).expand(gate.shape)
        got, expected = (run(f, gate, up, grad, activation) for f in (gated_activation, plain))
        for a, b in zip(got, expected, strict=True):  # torch's vectors and its loop over odd strides round differently
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
        assert torch.equal(base, before)


def budget_of(gate, up, grad, activation, dtype):
    def evaluate(stored):
        def definition(gate, up, activation):
            return Product.apply(gate, up, activation, stored)

        out, *grads = run(definition, gate.double(), up.double(), grad.double(), activation)
        return [stored(x) for x in (out, *grads)]

    return Budget.of(evaluate, dtype, operands=False)


class Product(torch.autograd.Function):
    """The definition, rounded where PyTorch's own operations in a narrow dtype round."""

    @staticmethod
    def forward(ctx, gate, up, activation, stored):
        with torch.enable_grad():
            ctx.leaf = gate.detach().requires_grad_()
            ctx.activated = NAMED[activation](ctx.leaf)
        ctx.up, ctx.stored = up, stored
        return stored(ctx.activated.detach()) * up

    @staticmethod
    def backward(ctx, grad):
        (dgate,) = torch.autograd.grad(ctx.activated, ctx.leaf, ctx.stored(grad * ctx.up))
        return dgate, ctx.stored(ctx.activated.detach()) * grad, None, None


CPP = pytest.mark.skipif(available("gated_activation")["cpu"] is not None, reason="there is no C++ library")


@CPP
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_kernels_within_the_budget(activation, dtype, every_isa):
    gate, up, grad = inputs(dtype, (3, 67))
    gate[0, :9] = torch.tensor([0.0, -0.0, 20.0, -20.0, 95.0, -95.0, 3e4, -3e4, 1e-4])
    budget = budget_of(gate, up, grad, activation, dtype)
    cpu = partial(gated_activation, backend="cpu")
    for _ in every_isa():
        assert_within(budget, run(cpu, gate, up, grad, activation))
    faults = [(gate.roll(1), up, grad), (gate, up.roll(1), grad), (gate, up, grad.roll(1))]
    for fault in faults:
        assert budget.ratio(run(cpu, *fault, activation)) > 1
    assert budget.ratio(run(cpu, gate, up, grad, {"silu": "gelu_tanh"}.get(activation, "silu"))) > 1


@CPP
def test_kernels_take_any_strides_and_what_is_not_a_number():
    base = inputs(torch.float32, (6, 4, 8))[0]
    cpu = partial(gated_activation, backend="cpu")
    for gate, up in [
        (base.transpose(0, 2), base.transpose(0, 2) + 1),
        (base[..., ::2], base[..., 1::2]),
        (base[:1].expand(6, 4, 8), base),
        (base[:0], base[:0]),
        (base[0, 0, 0], base[0, 0, 1]),
    ]:
        grad = torch.ones(()).expand(gate.shape)
        for a, b in zip(*(run(f, gate, up, grad, "silu") for f in (cpu, plain)), strict=True):
            torch.testing.assert_close(a, b)
    extremes = torch.tensor([torch.inf, -torch.inf, torch.nan])
    for activation in ("silu", "gelu_tanh"):
        got, expected = (f(extremes, torch.ones(3), activation) for f in (cpu, plain))
        assert torch.equal(got.isnan(), expected.isnan()) and got[0] == torch.inf


@pytest.mark.parametrize("activation", ["silu", torch.nn.SiLU(), torch.nn.SiLU(inplace=True), torch.nn.Identity()])
def test_modes(activation):
    """Without gradients, in inference mode, and under autocast, which the backward would not see."""
    gate, up, grad = inputs(torch.bfloat16)
    expected, before = run(gated_activation, gate, up, grad, activation), gate.clone()
    with torch.no_grad():
        assert torch.equal(gated_activation(gate, up, activation), expected[0])
    with torch.inference_mode():
        assert torch.equal(gated_activation(gate, up, activation), expected[0])
    assert torch.equal(gate, before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(gated_activation, gate, up, grad, activation)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_only_gate_and_up_are_saved():
    for activation in ("silu", torch.nn.SiLU()):
        gate, up, _ = (x.requires_grad_() for x in inputs())
        saved = set()

        def pack(x, saved=saved):
            saved.add(x.data_ptr())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = gated_activation(gate, up, activation)
        assert out.requires_grad and saved == {gate.data_ptr(), up.data_ptr()}


def test_opcheck():
    gate, up, grad = inputs(torch.float32)
    torch.library.opcheck(torch.ops.fastprompt.gated_activation.default, (gate, up, "silu", "auto"))
    arguments = (grad, gate, up, "gelu", True, False, "auto")
    torch.library.opcheck(torch.ops.fastprompt.gated_activation_backward.default, arguments)
    gate, up, grad = (x.t() for x in (gate, up, grad))
    torch.library.opcheck(torch.ops.fastprompt.gated_activation.default, (gate, up, "silu", "auto"))
    arguments = (grad, gate, up, "silu", True, True, "auto")
    torch.library.opcheck(torch.ops.fastprompt.gated_activation_backward.default, arguments)


@pytest.mark.parametrize("activation", ["gelu_tanh", functional.silu])
def test_compiles_whole(activation):
    tensors = inputs(torch.float32)
    compiled = torch.compile(gated_activation, fullgraph=True, backend="aot_eager")
    got, expected = (run(f, *tensors, activation) for f in (compiled, gated_activation))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


def test_fake_tensors_take_the_registered_operator():
    mode = FakeTensorMode()
    gate, up, _ = (mode.from_tensor(x) for x in inputs())
    with mode:
        gated_activation(gate.requires_grad_(), up.requires_grad_(), "silu").sum().backward()
    assert gate.grad.shape == up.grad.shape == (4, 5)


def test_the_autograd_function_is_public():
    gate, up, _ = inputs()
    assert torch.equal(GatedActivation.apply(gate, up, "silu", "auto"), functional.silu(gate) * up)


def fails(x):
    raise RuntimeError("a failure of its own")


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(gate=[1.0]), TypeError, "gate must be a torch.Tensor"),
        (dict(gate=torch.zeros(4, 5).int()), TypeError, "gate must have one of the dtypes"),
        (dict(up=torch.zeros(4, 4).double()), ValueError, r"up must have shape \[4, 5\], got \[4, 4\]"),
        (dict(up=torch.zeros(5).double()), ValueError, r"up must have shape \[4, 5\], got \[5\]"),
        (dict(up=torch.zeros(4, 5)), TypeError, "up must have dtype torch.float64 like gate"),
        (dict(up=torch.zeros(4, 5, device="meta").double()), ValueError, "up must be on cpu like gate"),
        (dict(activation="swish"), ValueError, "activation must be one of .*'silu'.* or a function, got 'swish'"),
        (dict(activation=None), TypeError, "activation must be a name or a function, got NoneType"),
        (dict(activation=lambda x: x.sum(-1)), ValueError, "activation must be elementwise"),
        (dict(activation=lambda x: x.float()), ValueError, "activation must be elementwise"),
        (dict(activation=fails), RuntimeError, "a failure of its own"),
        (dict(backend="fast"), ValueError, "backend of gated_activation must be 'auto' or one of"),
        (dict(backend="cpu"), RuntimeError, "'cpu' of gated_activation cannot run this call: .* no float64"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    gate, up, _ = inputs()
    with pytest.raises(error, match=message):
        gated_activation(**{**dict(gate=gate, up=up, activation="silu"), **change})
