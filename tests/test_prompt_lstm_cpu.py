"""The C++ kernel of prompt_lstm against float64, with every instruction set this machine has."""

import csv
import math

import pytest
import torch
from budget import assert_within
from covering import covering_array
from faults import assert_found, lstm_faults
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_prompt_lstm import gradients, inputs, random_grad

from benchmarks import prompt_lstm as benchmark
from benchmarks.budget import DRAWS, FEW, Budget
from fastprompt import native, prompt_lstm

pytestmark = pytest.mark.skipif(native.missing is not None, reason=str(native.missing))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def ours(x, weights, **options):
    return prompt_lstm(x, weights, backend="cpu", **options)


def reference(x, weights, **options):
    return prompt_lstm(x, weights, backend="reference", **options)


def budget_of(x, weights, grad, seed=0, **options):
    """What fp32 throughout and one rounding at the end may give."""
    exact = x.double(), [w.double() for w in weights], grad.double()

    def evaluate(stored):
        torch.manual_seed(seed)  # the same dropout masks
        return gradients(reference, *exact, **options)

    draws = DRAWS if len(x) * weights[1].numel() < 2000 else FEW
    return Budget.of(evaluate, x.dtype, operands=False, draws=draws)


def compare(every_isa, x, weights, grad, seed=0, **options):
    budget = budget_of(x, weights, grad, seed, **options)
    for _ in every_isa():
        torch.manual_seed(seed)
        results = gradients(ours, x, weights, grad, **options)
        assert all(a.dtype == x.dtype and a.is_contiguous() for a in results)
        assert_within(budget, results)


def compare_sizes(every_isa, dtype=torch.float32, dropout=0.0, **sizes):
    x, weights, options = inputs(dtype=dtype, **sizes)
    compare(every_isa, x, weights, random_grad(x, weights, **options), dropout=dropout, training=True, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [3, 17, 64])
def test_the_budget_finds_planted_faults(hidden, dtype):
    x, weights, options = inputs(steps=20, size=33, hidden=hidden, dtype=dtype)
    grad = random_grad(x, weights, **options)

    def run(x, weights, grad):
        return gradients(reference, x.double(), [w.double() for w in weights], grad.double(), **options)

    assert_found(budget_of(x, weights, grad, **options), lstm_faults(run, x, weights, grad))


@pytest.mark.parametrize("hidden", [1, 3, 17, 64, 100, 257])
@pytest.mark.parametrize(
    "layers, bidirectional, bias", [(1, False, True), (2, True, True), (3, True, False), (2, False, False)]
)
def test_every_depth_and_direction(every_isa, poisoned, hidden, layers, bidirectional, bias):
    compare_sizes(every_isa, steps=20, size=33, hidden=hidden, layers=layers, bidirectional=bidirectional, bias=bias)


@pytest.mark.parametrize("dtype, hidden, steps", covering_array(DTYPES, [1, 17, 64, 100], [1, 2, 20, 130]))
def test_every_length_and_dtype(every_isa, poisoned, dtype, hidden, steps):
    compare_sizes(every_isa, dtype, steps=steps, size=65, hidden=hidden)


@pytest.mark.parametrize("bias", [True, False])
def test_no_steps(cpu_isa, bias):
    x, weights, options = inputs(steps=0, bias=bias, dtype=torch.float32)
    out, dx, *dweights = gradients(ours, x, weights, torch.zeros(0, 10), **options)
    assert out.shape == (0, 10) and dx.shape == (0, 6)
    assert all(d.shape == w.shape and not d.any() for d, w in zip(dweights, weights, strict=True))


def test_no_inputs(every_isa):
    x, weights, options = inputs(size=1, dtype=torch.float32)
    weights = [w[:, :0] if w.shape[-1] == 1 else w for w in weights]
    compare(every_isa, x[:, :0], weights, random_grad(x, weights, **options), **options)


@given(
    steps=st.integers(1, 30),
    size=st.integers(1, 50),
    hidden=st.integers(1, 50),
    layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    dropout=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(every_isa, steps, size, hidden, layers, bidirectional, bias, dtype, dropout, seed):
    compare_sizes(
        every_isa,
        dtype,
        dropout,
        steps=steps,
        size=size,
        hidden=hidden,
        layers=layers,
        bidirectional=bidirectional,
        bias=bias,
        seed=seed,
    )


@pytest.mark.parametrize("dropout", [0.3, 1.0])
def test_dropout_has_the_masks_of_the_reference(every_isa, dropout):
    compare_sizes(every_isa, dropout=dropout, steps=11, hidden=23, layers=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision_is_rounded_once(cpu_isa, dtype):
    """Computed in fp32 throughout: within half a step of the float64 result of the same inputs."""
    x, weights, options = inputs(steps=40, size=24, hidden=17, dtype=dtype)
    grad = random_grad(x, weights, **options)
    expected = gradients(reference, x.double(), [w.double() for w in weights], grad.double(), **options)
    for a, b in zip(gradients(ours, x, weights, grad, **options), expected, strict=True):
        half_step = torch.finfo(dtype).eps / 2 * b.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        sums = 64 * torch.finfo(torch.float32).eps * b.abs().max()
        assert ((a.double() - b).abs() <= half_step + sums).all()


def test_large_gates_saturate(cpu_isa):
    """Beyond the range of exp, and infinite: sigmoid and tanh are 0, 1 or -1 there, and nothing is nan."""
    _, weights, options = inputs(size=1, hidden=20, layers=1, dtype=torch.float32)
    for scale in (50, 1e3, 1e30):
        x = torch.tensor([[-scale], [scale], [0.0]])
        got, expected = (gradients(f, x, weights, torch.ones(3, 40), **options) for f in (ours, reference))
        assert all(torch.isfinite(g).all() for g in got)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)


def test_nan_is_passed_on(cpu_isa):
    x, weights, options = inputs(steps=9, hidden=20, layers=1, bidirectional=False, dtype=torch.float32)
    clean = ours(x, weights, **options)
    x[4, 0] = math.nan
    out = ours(x, weights, **options)
    assert torch.equal(out[:4], clean[:4]) and out[4:].isnan().all()


@pytest.mark.parametrize(
    "steps, hidden, bidirectional",
    [(40, 40, True), (40, 100, False), (20, 257, True), (20, 257, False), (3, 730, True)],
)  # the last too large for both directions at once
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_with_any_number_of_threads(cpu_isa, steps, hidden, bidirectional, dtype):
    x, weights, options = inputs(steps=steps, size=90, hidden=hidden, bidirectional=bidirectional, dtype=dtype)
    grad, before, results = random_grad(x, weights, **options), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            results.append(gradients(ours, x, weights, grad, **options))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_only_wanted_gradients():
    """Each alone, and some together: the same bits as if all were asked for, and no other is computed."""
    x, weights, options = inputs(steps=9, hidden=20, layers=2, dtype=torch.float32)
    grad = random_grad(x, weights, **options)
    every = gradients(ours, x, weights, grad, **options)[1:]
    _, steps = torch.ops.fastprompt.prompt_lstm(x, weights, [], 2, True, "cpu")
    count = 1 + len(weights)
    for wanted in [
        *({at} for at in range(count)),
        {0, 5},
        {2, 13},
        {3, 4, 9},
        set(range(9, count)),
        set(range(1, count)),
    ]:
        leaves = [t.clone().requires_grad_(at in wanted) for at, t in enumerate((x, *weights))]
        ours(leaves[0], leaves[1:], **options).backward(grad)
        needs = [at in wanted for at in range(count)]
        computed = torch.ops.fastprompt.prompt_lstm_backward(grad, x, weights, [], steps, 2, True, needs, "cpu")
        assert [g.numel() > 0 for g in computed] == needs
        for at, leaf in enumerate(leaves):
            assert torch.equal(leaf.grad, every[at]) if at in wanted else leaf.grad is None, (wanted, at)


def test_strided_inputs_and_expanded_gradients(cpu_isa):
    x, weights, options = inputs(size=33, hidden=20, dtype=torch.float32)
    expected = gradients(ours, x, weights, torch.ones(7, 40), **options)

    def strided(x, weights, **options):
        weights = [w.t().contiguous().t() if w.dim() == 2 else w.repeat_interleave(2)[::2] for w in weights]
        assert not any(w.is_contiguous() for w in weights)
        return ours(x.t().contiguous().t(), weights, **options)

    got = gradients(strided, x, weights, torch.ones(1, 1).expand(7, 40), **options)  # as .sum() sends it
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    x = x[:1]  # expanded: its gradients are added up by autograd
    got = gradients(lambda x, w, **o: ours(x.expand(7, 33), w, **o), x, weights, torch.ones(7, 40), **options)

    def exactly(stored):
        doubled = x.double(), [w.double() for w in weights], torch.ones(7, 40).double()
        return gradients(lambda x, w, **o: reference(x.expand(7, 33), w, **o), *doubled, **options)

    assert_within(Budget.of(exactly, torch.float32), got)


def guarded(x):
    """``x`` in memory of its own between nan, at an address that no vector is aligned to."""
    room = torch.full([x.numel() + 33], math.nan, dtype=x.dtype)
    return room[17 : 17 + x.numel()].view(x.shape).copy_(x)


def test_nothing_beside_the_inputs_is_read_and_every_result_is_written(cpu_isa, poisoned):
    x, weights, options = inputs(steps=14, size=21, hidden=37, layers=3, dtype=torch.float32)
    grad = random_grad(x, weights, **options)
    expected = gradients(ours, x, weights, grad, **options)
    leaves = [guarded(t).requires_grad_() for t in (x, *weights)]
    out = ours(leaves[0], leaves[1:], **options)
    got = [out, *torch.autograd.grad(out, leaves, guarded(grad), retain_graph=True)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    again = torch.autograd.grad(out, leaves, guarded(grad))  # nothing that was saved has been written to
    assert all(torch.equal(a, b) for a, b in zip(again, expected[1:], strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


@pytest.mark.parametrize("wrong", [False, True])
def test_the_benchmark_gives_a_speed_up_only_for_right_results(wrong, tmp_path, monkeypatch, capsys):
    if wrong:
        call, factor = benchmark.Encoder.__call__, {"cpu": 1 + 1e-3, "torch": 1, "reference": 1}
        monkeypatch.setattr(benchmark.Encoder, "__call__", lambda self: [x * factor[self.backend] for x in call(self)])
    monkeypatch.setattr(benchmark, "SECONDS", 0.0)
    monkeypatch.setattr(benchmark, "INPUTS", 24)
    monkeypatch.setattr(benchmark.Gemm, "size", 16)
    monkeypatch.setattr(benchmark.Read, "size", 1 << 10)
    assert benchmark.run(tmp_path, sizes=[(16, 3), (8, 5)]) != wrong
    printed = capsys.readouterr().out
    assert ("WRONG" in printed) == wrong and ("geometric mean" in printed) != wrong
    with open(tmp_path / "prompt_lstm.csv") as stream:
        records = list(csv.DictReader(line for line in stream if not line.startswith("#")))
    assert records and all((record["speed-up"] == "WRONG") == wrong for record in records)
