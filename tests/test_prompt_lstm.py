"""prompt_lstm against nn.LSTM, with gradients, for every depth, direction and kind of input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprompt import native
from fastprompt.backends import available, choose
from fastprompt.ops.prompt_lstm.api import PromptLstm, prompt_lstm

RUNNING = ["reference", "torch"]
WITH_CPU = RUNNING if native.missing else [*RUNNING, "cpu"]  # which has no float64


def inputs(steps=7, size=6, hidden=5, layers=2, bidirectional=True, bias=True, dtype=torch.float64, seed=0):
    """An input, nn.LSTM's weights, and the options to run them with."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lstm = torch.nn.LSTM(size, hidden, layers, bias=bias, bidirectional=bidirectional, dtype=torch.float64)
        x = torch.randn(steps, size, dtype=torch.float64)
    weights = [w.detach().to(dtype) for w in lstm.parameters()]
    return x.to(dtype), weights, dict(num_layers=layers, bidirectional=bidirectional)


def nn_lstm(x, weights, *, num_layers, bidirectional, dropout=0.0, training=False):
    """nn.LSTM itself, run with these weights."""
    with torch.random.fork_rng():  # the initialisation must not move the dropout masks
        lstm = torch.nn.LSTM(
            x.shape[1],
            weights[1].shape[1],
            num_layers,
            bidirectional=bidirectional,
            dropout=dropout,
            dtype=x.dtype,
            bias=any(w.dim() == 1 for w in weights),
        ).train(training)
    named = dict(zip((name for name, _ in lstm.named_parameters()), weights, strict=True))
    return torch.func.functional_call(lstm, named, x.unsqueeze(1))[0].squeeze(1)


def gradients(function, x, weights, grad, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (x, *weights)]
    out = function(leaves[0], leaves[1:], **options)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def random_grad(x, weights, bidirectional, **_):
    generator = torch.Generator().manual_seed(1)
    width = weights[1].shape[1] * (2 if bidirectional else 1)
    return torch.randn(len(x), width, generator=generator, dtype=torch.float64).to(x.dtype)


def assert_same(got, expected, rtol=1e-12, atol=1e-12):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("backend", RUNNING)
@given(
    steps=st.integers(1, 9),
    size=st.integers(1, 7),
    hidden=st.integers(1, 7),
    layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_output_and_gradients_are_those_of_nn_lstm(backend, steps, size, hidden, layers, bidirectional, bias, seed):
    x, weights, options = inputs(steps, size, hidden, layers, bidirectional, bias, seed=seed)
    grad = random_grad(x, weights, **options)
    expected = gradients(nn_lstm, x, weights, grad, **options)
    assert_same(gradients(prompt_lstm, x, weights, grad, backend=backend, **options), expected)


@pytest.mark.parametrize("dropout", [0.3, 1.0])
@pytest.mark.parametrize("backend", RUNNING)
def test_dropout_is_that_of_nn_lstm(backend, dropout):
    """From the same seed, the same masks as nn.LSTM: between the layers, in training only."""
    x, weights, options = inputs(steps=8, hidden=9, layers=3)
    grad = random_grad(x, weights, **options)
    plain = nn_lstm(x, weights, **options)
    for training in (True, False):
        options.update(dropout=dropout, training=training)
        torch.manual_seed(3)
        expected = gradients(nn_lstm, x, weights, grad, **options)
        torch.manual_seed(3)
        got = gradients(prompt_lstm, x, weights, grad, backend=backend, **options)
        assert_same(got, expected)
        assert torch.allclose(got[0], plain) is not training


def test_dropout_draws_anew_each_call_and_leaves_one_layer_alone():
    x, weights, options = inputs(hidden=9)
    options.update(dropout=0.5, training=True, backend="reference")
    assert not torch.equal(prompt_lstm(x, weights, **options), prompt_lstm(x, weights, **options))
    x, weights, options = inputs(layers=1)
    dropped = prompt_lstm(x, weights, dropout=0.5, training=True, backend="reference", **options)
    assert torch.equal(dropped, prompt_lstm(x, weights, backend="reference", **options))


@pytest.mark.parametrize("options", [{}, dict(layers=1, bidirectional=False, bias=False), dict(layers=3, steps=1)])
def test_gradcheck(options):
    x, weights, options = inputs(**{**dict(steps=3, size=2, hidden=2), **options})
    leaves = [t.requires_grad_() for t in (x, *weights)]

    def run(x, *weights):
        torch.manual_seed(0)  # the same masks in every evaluation
        return prompt_lstm(x, weights, dropout=0.4, training=True, backend="reference", **options)

    torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("backend", [name for name in WITH_CPU if name != "torch"])  # which has no operator
def test_opcheck(backend):
    x, weights, options = inputs(dtype=torch.float32)
    x = x.t().contiguous().t()  # outputs must be contiguous all the same
    layers, both = options.values()
    count = 1 + len(weights)
    for keep, needs in (([], [at == 9 for at in range(count)]), ([torch.rand(7, 10)], [True] * count)):
        args = x, weights, keep, layers, both, backend
        torch.library.opcheck(torch.ops.fastprompt.prompt_lstm.default, args)
        out, steps = torch.ops.fastprompt.prompt_lstm(*args)
        torch.library.opcheck(
            torch.ops.fastprompt.prompt_lstm_backward.default,
            (torch.randn_like(out), x, weights, keep, steps, layers, both, needs, backend),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_rounded_once(dtype):
    """Computed in fp32 throughout: within half a step of the float64 result of the same inputs."""
    x, weights, options = inputs(steps=40, size=24, hidden=17, dtype=dtype)
    grad = random_grad(x, weights, **options)
    expected = gradients(nn_lstm, x.double(), [w.double() for w in weights], grad.double(), **options)
    got = gradients(prompt_lstm, x, weights, grad, backend="reference", **options)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        half_step = torch.finfo(dtype).eps / 2 * b.abs()
        sums = 64 * torch.finfo(torch.float32).eps * b.abs().max()
        assert ((a.double() - b).abs() <= half_step + sums).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_backend_is_nn_lstm_to_the_bit(dtype, training):
    x, weights, options = inputs(dtype=dtype)
    options.update(training=training)
    grad = random_grad(x, weights, **options)
    expected = gradients(nn_lstm, x, weights, grad, **options)
    got = gradients(prompt_lstm, x, weights, grad, backend="torch", **options)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_torch_backend_trains_in_evaluation_mode(monkeypatch):
    """cuDNN has a backward only for what ran as training: say so whenever a gradient may be asked for."""
    x, weights, options = inputs()
    operator, trains = torch.lstm, []
    monkeypatch.setattr(torch, "lstm", lambda *a: trains.append(a[6]) or operator(*a))
    prompt_lstm(x, weights, backend="torch", **options)
    with torch.no_grad():
        prompt_lstm(x, weights, backend="torch", **options)
        prompt_lstm(x, weights, backend="torch", dropout=0.5, training=True, **options)
    assert trains == [True, False, True]


@pytest.mark.parametrize("backend", RUNNING)
def test_non_contiguous_and_expanded_inputs(backend):
    x, weights, options = inputs(size=5, hidden=5)
    grad = torch.ones(1, 1, dtype=x.dtype).expand(7, 10)  # as .sum() sends it
    x = x[:1]

    def strange(function):
        def run(x, weights, **options):
            strided = [w.t().contiguous().t() if w.dim() == 2 else w.repeat_interleave(2)[::2] for w in weights]
            assert not any(w.is_contiguous() for w in strided)
            return function(x.expand(7, 5), strided, **options)

        return run

    expected = gradients(strange(nn_lstm), x, weights, grad, **options)
    assert_same(gradients(strange(prompt_lstm), x, weights, grad, backend=backend, **options), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_no_steps(bias):
    x, weights, options = inputs(steps=0, bias=bias)
    out, dx, *dweights = gradients(prompt_lstm, x, weights, torch.zeros(0, 10, dtype=x.dtype), **options)
    assert out.shape == (0, 10) and dx.shape == (0, 6)
    assert all(d.shape == w.shape and not d.any() for d, w in zip(dweights, weights, strict=True))
    with pytest.raises(RuntimeError, match="'torch' of prompt_lstm cannot run this call: nn.LSTM takes no sequence of"):
        prompt_lstm(x, weights, backend="torch", **options)


@pytest.mark.parametrize("backend", RUNNING)
def test_each_gradient_alone(backend):
    """Only what was asked for is computed, and it is what it is when everything is asked for."""
    x, weights, options = inputs()
    everything = gradients(prompt_lstm, x, weights, random_grad(x, weights, **options), backend=backend, **options)[1:]
    for asked in range(1 + len(weights)):
        leaves = [t.detach().clone().requires_grad_(at == asked) for at, t in enumerate((x, *weights))]
        prompt_lstm(leaves[0], leaves[1:], backend=backend, **options).backward(random_grad(x, weights, **options))
        assert [t.grad is not None for t in leaves] == [at == asked for at in range(len(leaves))]
        assert torch.equal(leaves[asked].grad, everything[asked])
    if backend == "reference":
        _, steps = torch.ops.fastprompt.prompt_lstm(x, weights, [], 2, True, backend)
        for asked in range(1 + len(weights)):
            needs = [at == asked for at in range(1 + len(weights))]
            grad = random_grad(x, weights, **options)
            grads = torch.ops.fastprompt.prompt_lstm_backward(grad, x, weights, [], steps, 2, True, needs, backend)
            assert [g.numel() > 0 for g in grads] == needs


@pytest.mark.parametrize("backend", WITH_CPU)
def test_autocast_changes_nothing(backend):
    """nn.LSTM itself raises under bfloat16 autocast on a CPU."""
    x, weights, options = inputs(dtype=torch.float32)
    grad = random_grad(x, weights, **options)
    expected = gradients(prompt_lstm, x, weights, grad, backend=backend, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(prompt_lstm, x, weights, grad, backend=backend, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_nothing_uninitialised_is_read():
    """Deterministic mode fills fresh memory with NaN."""
    x, weights, options = inputs(layers=3)
    grad = random_grad(x, weights, **options)
    expected = gradients(prompt_lstm, x, weights, grad, backend="reference", **options)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        got = gradients(prompt_lstm, x, weights, grad, backend="reference", **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", WITH_CPU)
def test_second_backward_raises(backend):
    x, weights, options = inputs(dtype=torch.float32)
    x.requires_grad_()
    loss = prompt_lstm(x, weights, backend=backend, **options).square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_second_order_gradients_raise():
    x, weights, options = inputs()
    x.requires_grad_()
    loss = prompt_lstm(x, weights, backend="reference", **options).square().sum()
    (first_order,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first_order.sum().backward()


@pytest.mark.parametrize("backend", ["auto", *WITH_CPU])
def test_compiles_without_a_graph_break(backend):
    x, weights, options = inputs(steps=3, dtype=torch.float32)
    function = torch.compile(
        lambda x, weights, **o: prompt_lstm(x, weights, backend=backend, **o) * 3, fullgraph=True, backend="aot_eager"
    )
    grad = random_grad(x, weights, **options)
    expected = gradients(lambda *a, **o: nn_lstm(*a, **o) * 3, x, weights, grad, **options)
    assert_same(gradients(function, x, weights, grad, **options), expected, rtol=1e-5, atol=1e-6)


def test_compiles_with_dropout():
    x, weights, options = inputs(dtype=torch.float32)
    options.update(dropout=0.5, training=True)
    function = torch.compile(prompt_lstm, fullgraph=True, backend="aot_eager")
    grad = random_grad(x, weights, **options)
    torch.manual_seed(3)
    expected = gradients(prompt_lstm, x, weights, grad, backend="reference", **options)
    torch.manual_seed(3)
    assert_same(gradients(function, x, weights, grad, **options), expected, rtol=1e-6, atol=1e-6)


def test_auto_takes_the_faster_backend(monkeypatch):
    built = native.missing is None
    assert choose("prompt_lstm", "auto", "cuda") == "torch"
    assert choose("prompt_lstm", "auto", "cpu") == ("cpu" if built else "torch")
    assert {name for name, reason in available("prompt_lstm").items() if reason is None} == set(RUNNING) | (
        {"cpu"} if built else set()
    )

    def used(function, *args, **options):
        names = []
        monkeypatch.setattr(PromptLstm, "apply", lambda *a: names.append(a[4]) or a[0])
        function(*args, **options)
        return names[0] if names else "torch"

    def of_dtypes(**sizes):
        calls = [
            inputs(dtype=dtype, **sizes) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        ]
        return [used(prompt_lstm, x, weights, **options) for x, weights, options in calls]

    if built:
        assert of_dtypes() == of_dtypes(steps=0) == ["cpu", "reference", "cpu", "cpu"]
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert choose("prompt_lstm", "auto", "cpu") == "cpu" and choose("prompt_lstm", "auto", "cuda") == "reference"
        with pytest.raises(
            RuntimeError, match="'cpu' of prompt_lstm cannot run this call: the C.. kernels have no float64"
        ):
            x, weights, options = inputs()
            prompt_lstm(x, weights, backend="cpu", **options)
    monkeypatch.undo()
    monkeypatch.setattr(native, "missing", "no library here")
    assert of_dtypes() == ["torch", "reference", "reference", "reference"]
    assert of_dtypes(steps=0) == ["reference"] * 4
    with pytest.raises(RuntimeError, match="backend 'cpu' of prompt_lstm cannot run this call: no library here"):
        x, weights, options = inputs(dtype=torch.float32)
        prompt_lstm(x, weights, backend="cpu", **options)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choose("prompt_lstm", "auto", "cpu") == choose("prompt_lstm", "auto", "cuda") == "reference"


def changed(weights, at, value):
    return [value if i == at else w for i, w in enumerate(weights)]


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(7)), ValueError, r"x must have shape \[P, E\], got \[7\]"),
        (dict(x=torch.zeros(7, 6).int()), TypeError, "x must have one of the dtypes"),
        (dict(x=torch.zeros(7, 4).double()), ValueError, r"weights\[0\] must have shape \[20, 4\], got \[20, 6\]"),
        (dict(x=torch.zeros(7, 6)), TypeError, r"weights\[1\] must have dtype torch.float32 like x"),
        (dict(x=torch.zeros(7, 6, device="meta").double()), ValueError, r"weights\[1\] must be on meta like x"),
        (dict(weights=torch.zeros(16, 5)), TypeError, "weights must be a list of tensors"),
        (dict(num_layers=3), ValueError, "weights must hold 24 tensors, or 12 without .* num_layers=3, .* got 16"),
        (dict(bidirectional=False), ValueError, "weights must hold 8 tensors, or 4 .* bidirectional=False, got 16"),
        (dict(num_layers=0), ValueError, "num_layers must be an int of at least 1, got 0"),
        (dict(num_layers=2.0), ValueError, "num_layers must be an int of at least 1, got 2.0"),
        (dict(dropout=1.5), ValueError, r"dropout must lie in \[0, 1\], got 1.5"),
        (dict(backend="tritn"), ValueError, "backend of prompt_lstm must be 'auto' or one of"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    x, weights, options = inputs()
    with pytest.raises(error, match=message):
        prompt_lstm(**{**dict(x=x, weights=weights), **options, **change})


@pytest.mark.parametrize(
    "at, value, error, message",
    [
        (1, torch.zeros(20, 6).double(), ValueError, r"weights\[1\] must have shape \[24, 6\], got \[20, 6\]"),
        (2, torch.zeros(20), TypeError, r"weights\[2\] must have dtype torch.float64 like x, got torch.float32"),
        (3, None, TypeError, r"weights\[3\] must be a torch.Tensor of shape \[20\], got NoneType"),
        (8, torch.zeros(20, 6).double(), ValueError, r"weights\[8\] must have shape \[20, 10\], got \[20, 6\]"),
    ],
)
def test_errors_name_the_weight(at, value, error, message):
    x, weights, options = inputs()
    weights[at] = value
    with pytest.raises(error, match=message):
        prompt_lstm(x, weights, **options)


def test_weights_without_biases_are_not_taken_for_half_the_layers():
    """8 tensors fit two layers without biases and, by number, one layer with them: the options decide."""
    x, weights, _ = inputs(bias=False)
    with pytest.raises(ValueError, match=r"weights\[2\] must have shape \[20\], got \[20, 6\]"):
        prompt_lstm(x, weights, num_layers=1)
