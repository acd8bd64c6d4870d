"""linear_cross_entropy against torch's own cross-entropy over all logits at once."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastprompt import linear_cross_entropy
from fastprompt.ops.linear_cross_entropy import blocked
from fastprompt.ops.linear_cross_entropy.api import LinearCrossEntropy

BACKENDS = ["reference", "blocked"]
EXACT = dict(rtol=1e-10, atol=1e-10)


def inputs(rows=7, vocabulary=9, width=5, dtype=torch.float64, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, width), (vocabulary, width), (vocabulary,))
    tensors = [(torch.randn(*s, generator=generator, dtype=torch.float64) * scale).to(dtype) for s in shapes]
    return *tensors, torch.randint(vocabulary, (rows,), generator=generator)


def plain(hidden, weight, bias, labels, ignore_index=-100):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return torch.nn.functional.cross_entropy(logits, labels.long(), reduction="sum", ignore_index=ignore_index)


def run(function, *tensors, needs=(True, False, False), factor=0.3, **options):
    """The loss, and the gradients of hidden, weight and bias that are needed."""
    *real, labels = tensors
    leaves = [None if x is None else x.clone().requires_grad_(need) for x, need in zip(real, needs)]
    loss = function(*leaves, labels, **options)
    if any(needs) and len(labels):
        (loss * factor).backward()
    return [loss.detach(), *(None if x is None else x.grad for x in leaves)]


def assert_same(got, expected, **tolerance):
    for x, y in zip(got, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y.to(x.dtype), **tolerance)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setitem(blocked.ROWS_AND_COLUMNS, "cpu", (4, 3))


@pytest.mark.parametrize("rows", [0, 1, 1024, 1030])
@pytest.mark.parametrize("vocabulary", [5, 2048, 5000])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_cross_entropy(rows, vocabulary, with_bias):
    """More rows and columns than a block holds, and fewer; large logits."""
    hidden, weight, bias, labels = inputs(rows, vocabulary, 16, scale=5)
    tensors = hidden, weight, bias if with_bias else None, labels
    assert_same(run(linear_cross_entropy, *tensors, backend="blocked"), run(plain, *tensors), **EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_every_gradient_that_is_asked_for(backend, needs, dtype, small_blocks):
    *tensors, labels = inputs(10, 11)
    labels[[0, 3, 9]] = -100
    assert_same(
        run(linear_cross_entropy, *tensors, labels.to(dtype), needs=needs, backend=backend),
        run(plain, *tensors, labels, needs=needs),
        **EXACT,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [True, False])
def test_classes_without_a_chance(backend, frozen, small_blocks):
    """A bias of -inf over the first block, over a later one, over both; with labels there the loss is infinite."""
    needs = (True, not frozen, not frozen)
    hidden, weight, bias, labels = inputs(10, 11)
    for out in ([0, 1, 2], [3, 4, 5], [0, 1, 2, 6, 7, 8], list(range(10))):
        ruled_out = bias.clone()
        ruled_out[out] = -torch.inf
        left = torch.full_like(labels, 10)
        got, expected = (
            run(f, hidden, weight, ruled_out, left, needs=needs, **options)
            for f, options in ((linear_cross_entropy, dict(backend=backend)), (plain, {}))
        )
        assert_same(got, expected, **EXACT)
        assert all(x.isfinite().all() for x in got if x is not None)
        got = run(linear_cross_entropy, hidden, weight, ruled_out, labels * 0, needs=needs, backend=backend)
        assert torch.isinf(got[0]) == (0 in out) and got[1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label", [0, 2, 4, 10])
def test_all_labels_in_one_block(backend, label, small_blocks):
    *tensors, labels = inputs(10, 11)
    labels = torch.full_like(labels, label)
    got = run(linear_cross_entropy, *tensors, labels, needs=(True,) * 3, backend=backend)
    assert_same(got, run(plain, *tensors, labels, needs=(True,) * 3), **EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [True, False])
def test_rows_without_a_label_count_for_nothing(backend, frozen, small_blocks):
    """Not even where what they would give is nan."""
    needs = (True, not frozen, not frozen)
    hidden, weight, bias, labels = inputs()
    dirty = hidden.clone()
    dirty[3] = torch.nan
    labels[3] = -1
    got = run(linear_cross_entropy, dirty, weight, bias, labels, needs=(True, False, False), ignore_index=-1)
    assert got[0].isfinite() and got[1].isfinite().all() and not got[1][3].any()
    got = run(linear_cross_entropy, hidden, weight, bias, labels, needs=needs, ignore_index=-1, backend=backend)
    assert_same(got, run(plain, hidden, weight, bias, labels, needs=needs, ignore_index=-1), **EXACT)
    labels = torch.full_like(labels, 4)  # a class that is to be ignored
    got = run(linear_cross_entropy, hidden, weight, bias, labels, needs=needs, ignore_index=4, backend=backend)
    assert not got[0] and not got[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [(True, False, False), (True, True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precision(backend, needs, dtype):
    """Half precision is summed in fp32 and rounded once: within half a unit of what fp32 would give."""
    tensors = inputs(300, 3000, 64, dtype, scale=0.5)
    got = run(linear_cross_entropy, *tensors, needs=needs, backend=backend)
    exact = run(plain, *(x.double() for x in tensors[:3]), tensors[3], needs=needs)
    assert got[0].dtype == torch.float32
    assert abs(got[0].item() / exact[0].item() - 1) < 1e-6
    for x, y in zip(got[1:], exact[1:]):
        if x is not None:
            assert x.dtype == dtype
            rounding = (
                torch.finfo(dtype).eps / 2 * y.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            )
            assert ((x.double() - y).abs() <= 1.01 * rounding + 2e-6 * y.abs().max()).all()


def test_a_loss_that_half_precision_could_not_hold():
    """Large logits, and a sum over all rows that is beyond what fp16 can hold."""
    hidden, weight, bias, labels = inputs(600, 4000, 64, torch.float16, scale=8)
    loss = linear_cross_entropy(hidden, weight, bias, labels)
    exact = plain(hidden.double(), weight.double(), bias.double(), labels)
    assert 65504 < exact and abs(loss.item() / exact.item() - 1) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, small_blocks):
    *tensors, labels = inputs(5, 7, 3)
    labels[1] = -100
    for needs in ((True, True, True), (True, False, False)):
        leaves = [x.clone().requires_grad_(need) for x, need in zip(tensors, needs)]
        assert torch.autograd.gradcheck(lambda *x: linear_cross_entropy(*x, labels, backend=backend), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [(True, False, False), (True, True, True)])
def test_any_strides(backend, needs, small_blocks):
    """Inputs that are transposed, cut out or expanded, and an expanded gradient."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(5, 8, generator=generator, dtype=torch.float64).t()
    weight = torch.randn(11, 10, generator=generator, dtype=torch.float64)[:, ::2]
    bias = torch.randn(1, generator=generator, dtype=torch.float64).expand(11)
    labels = torch.arange(16)[::2] % 11
    results = []
    for tensors in ((hidden, weight, bias, labels), [x.contiguous() for x in (hidden, weight, bias, labels)]):
        leaves = [x.detach().requires_grad_(need) for x, need in zip(tensors, needs)]
        loss = linear_cross_entropy(*leaves, tensors[3], backend=backend)
        loss.expand(3).sum().backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    assert_same(*results, **EXACT)
    one_row = hidden[:1].expand(8, 5)
    got = linear_cross_entropy(one_row, weight, bias, labels, backend=backend)
    torch.testing.assert_close(got, plain(one_row, weight, bias, labels), **EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [(True, False, False), (True, True, True)])
def test_backward_twice(backend, needs, small_blocks):
    """What is saved is not written into; a second backward and a derivative of the derivative raise."""
    *tensors, labels = inputs()
    leaves = [x.requires_grad_(need) for x, need in zip(tensors, needs)]
    wanted = [x for x in leaves if x.requires_grad]
    loss = linear_cross_entropy(*leaves, labels, backend=backend)
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, wanted)))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, wanted)
    loss = linear_cross_entropy(*leaves, labels, backend=backend)
    (gradient,) = torch.autograd.grad(loss, wanted[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time(backend):
    tensors = inputs(1100, 2100, 16, torch.float32)
    first, second = (run(linear_cross_entropy, *tensors, needs=(True,) * 3, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [(True, False, False), (True, True, True)])
def test_the_loss_of_each_row(backend, needs, small_blocks):
    """With a gradient of its own for each of them."""
    hidden, weight, bias, labels = inputs(rows=9)
    labels[3] = -100
    factor = torch.arange(1.0, 10, dtype=torch.float64)

    def plain_rows(hidden, weight, bias, labels):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    results = []
    for function in (lambda *x: linear_cross_entropy(*x, reduction="none", backend=backend), plain_rows):
        leaves = [x.clone().requires_grad_(need) for x, need in zip((hidden, weight, bias), needs)]
        losses = function(*leaves, labels)
        losses.backward(factor)
        results.append([losses.detach(), *(x.grad for x in leaves)])
    assert_same(*results, **EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    tensors = inputs(dtype=torch.float32)
    expected = run(linear_cross_entropy, *tensors, needs=(True,) * 3, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(linear_cross_entropy, *tensors, needs=(True,) * 3, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    hidden, weight, bias, labels = inputs(dtype=torch.float32)
    for given, need in ((bias, True), (None, False)):
        arguments = (hidden, weight, given, labels, -100, need, backend)
        torch.library.opcheck(torch.ops.fastprompt.linear_cross_entropy.default, arguments)
        arguments = (torch.ones(7), hidden, weight, given, labels, torch.zeros(7), -100, need, True, True, backend)
        torch.library.opcheck(torch.ops.fastprompt.linear_cross_entropy_backward.default, arguments)


@pytest.mark.parametrize("needs", [(True, False, False), (True, True, True)])
def test_compiles_whole(needs):
    tensors = inputs(dtype=torch.float32)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    got, expected = (run(f, *tensors, needs=needs) for f in (compiled, linear_cross_entropy))
    assert_same(got, expected)


def test_fake_tensors_take_the_registered_operator():
    mode = FakeTensorMode()
    hidden, weight, bias, labels = (mode.from_tensor(x) for x in inputs(dtype=torch.bfloat16))
    with mode:
        loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), bias, labels)
        loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32 and weight.grad.shape == weight.shape and bias.grad is None


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation made."""

    def __init__(self, known):
        super().__init__()
        self.known, self.bytes = known, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, torch.Tensor) and x.shape not in self.known:
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, vocabulary, width", [(9000, 13000, 4096), (5000, 9000, 16384)])
def test_buffers_are_bounded_on_any_device(rows, vocabulary, width, dtype):
    """Beside the gradients nothing larger than 33 MiB. Meta tensors take no memory."""
    hidden = torch.empty(rows, width, dtype=dtype, device="meta")
    weight = hidden.new_empty(vocabulary, width)
    bias = hidden.new_empty(vocabulary)
    labels = hidden.new_empty(rows, dtype=torch.int64)
    counted = hidden.new_empty(rows, dtype=torch.bool)
    with Largest({hidden.shape, weight.shape, weight.t().shape}) as largest:
        _, lse, _ = blocked.forward(hidden, weight, bias, labels, counted, True)
        blocked.backward(lse, hidden, weight, bias, labels, counted, lse, (True, True, True))
    assert 1 << 20 < largest.bytes <= 33 << 20


def test_the_autograd_function_is_public():
    hidden, weight, bias, labels = inputs()
    losses = LinearCrossEntropy.apply(hidden, weight, bias, labels, -100, "auto")
    torch.testing.assert_close(losses.sum(), plain(hidden, weight, bias, labels))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(labels=torch.tensor([0, 9])), ValueError, r"labels must lie in \[0, 9\), got values from 0 to 9"),
        (dict(labels=torch.tensor([0, -1])), ValueError, r"labels must lie in \[0, 9\), got values from -1 to 0"),
        (dict(labels=torch.tensor([0.0, 1.0])), TypeError, "labels must have one of the dtypes"),
        (dict(labels=torch.tensor([0])), ValueError, r"labels must have shape \[2\], got \[1\]"),
        (dict(hidden=torch.zeros(2, 5).int()), TypeError, "hidden must have one of the dtypes"),
        (dict(hidden=torch.zeros(5)), ValueError, r"hidden must have shape \[M, D\], got \[5\]"),
        (dict(weight=torch.zeros(9, 4)), ValueError, r"weight must have shape \[V, 5\], got \[9, 4\]"),
        (dict(weight=torch.zeros(9, 5)), TypeError, "weight must have dtype torch.float64 like hidden"),
        (dict(bias=torch.zeros(8).double()), ValueError, r"bias must have shape \[9\], got \[8\]"),
        (dict(weight=torch.zeros(0, 5).double(), bias=None), ValueError, "weight must have a row for every class"),
        (dict(weight=torch.zeros(9, 5, device="meta").double()), ValueError, "weight must be on cpu like hidden"),
        (dict(reduction="mean"), ValueError, 'reduction must be "sum" or "none", got \'mean\''),
        (dict(backend="fast"), ValueError, "backend of linear_cross_entropy must be 'auto' or one of"),
        (dict(backend="cpu"), RuntimeError, "'cpu' of linear_cross_entropy cannot run this call"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    named = dict(zip(("hidden", "weight", "bias", "labels"), inputs(rows=2)))
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**named, **change})
