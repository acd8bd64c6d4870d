"""The CUDA kernels of prompt_lstm without a GPU: compiled for the emulation in csrc/cuda/host."""

import ctypes
from dataclasses import dataclass

import pytest
import torch
from budget import assert_within
from faults import assert_found, lstm_faults

from benchmarks.budget import Budget
from benchmarks.gpu import cuda_matrix, lstm_plan
from benchmarks.gpu.lstm_plan import CLUSTER, GRID, POINTER, Args, Chip, Problem
from fastprompt import backends, native
from fastprompt.ops.prompt_lstm import reference
from fastprompt.ops.prompt_lstm.api import prompt_lstm

pytestmark = pytest.mark.skipif(not lstm_plan.COMPILER, reason="there is no C++ compiler")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # in the order of the enum


CHIPS = {
    "A100": Chip(108, 163 * 1024, 0),
    "H100": Chip(132, 227 * 1024, 16),
    "H100, clusters of 8": Chip(132, 227 * 1024, 8),
    "B200": Chip(148, 227 * 1024, 16),
    "RTX 5090": Chip(170, 99 * 1024, 8),
    "RTX 3060": Chip(28, 99 * 1024, 0),
}


@dataclass(frozen=True)
class Variant:
    """A plan to force.

    registers: whether they hold weights; chunks: of each row in shared memory, None: all that are left.
    """

    cluster: bool
    blocks: int
    registers: bool = True
    chunks: int | None = None

    def plan(self, library, problem):
        room = 226 * 1024
        if self.chunks is not None:
            bare = lstm_plan.make(library, problem, self.cluster, self.blocks, 0, self.registers)
            rows = bare.tiles * 4 * (1 if problem.backward else 4)
            room = bare.shared + rows * 16 * self.chunks
        plan = lstm_plan.make(library, problem, self.cluster, self.blocks, room, self.registers)
        plan.warps = min(plan.tiles + 1, 8)  # as few as show what can go wrong: one without a tile
        return plan


VARIANTS = {
    "cluster, registers": Variant(True, 2), "cluster, shared": Variant(True, 4, registers=False),
    "grid, registers": Variant(False, 3), "grid, shared": Variant(False, 3, registers=False),
    "streaming": Variant(False, 2, registers=False, chunks=0),
    "streaming a part": Variant(False, 1, registers=False, chunks=32),
}  # fmt: skip


def build(folder, *flags):
    library = lstm_plan.build(folder / f"emulated{'_'.join(flags)}.so", "prompt_lstm.cpp", "plan.cpp", flags=flags)
    library.run_emulated.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulation")


@pytest.fixture(scope="session")
def library(folder):
    return build(folder)


class Emulation:
    """The operator of the CUDA library on a CPU: by a library of emulated kernels, a variant and a thread order."""

    def __init__(self):
        self.ops = torch.library.Library("fastprompt", "FRAGMENT")
        if native.missing_cuda:
            self.ops.define(
                "prompt_lstm_recurrence_cuda(Tensor[] matrices, Tensor input, Tensor(a!) steps, Tensor(b!) output, "
                "Tensor(c!) words, bool backward) -> ()"
            )
        self.ops.impl("prompt_lstm_recurrence_cuda", self.recurrence, "CPU")

    def use(self, library, variant, seed=0):
        self.library, self.variant, self.seed = library, variant, seed
        return self

    def recurrence(self, matrices, given, steps, output, words, backward):
        tensors = [*matrices, given, steps, output, words]
        assert all(t.is_contiguous() for t in tensors) and all(t.dtype == torch.float32 for t in tensors[-4:-1])
        directions, count, _, hidden = steps.shape
        problem = Problem(hidden, directions, matrices[0].element_size(), backward)
        pointers = [t.data_ptr() for t in tensors]
        for matrix in matrices:
            assert matrix.shape == (
                hidden if backward else 4 * hidden,
                lstm_plan.chunks(problem) * 16 // problem.element,
            )
            assert matrix.data_ptr() % 16 == 0
        args = Args(
            (POINTER * 2)(*pointers[:directions]),
            *pointers[directions:],
            count,
            hidden,
            directions,
            plan=self.variant.plan(self.library, problem),
        )
        dtype = DTYPES.index(matrices[0].dtype)
        error = self.library.run_emulated(ctypes.byref(args), dtype, backward, ctypes.c_uint64(self.seed))
        if error:
            raise RuntimeError(error.decode())


@pytest.fixture(scope="session")
def emulation():
    return Emulation()


def inputs(hidden, count, directions, dtype, layers=1, size=5, bias=True, seed=0):
    """An input, nn.LSTM's weights, the gradient of the output, and the options to run them with."""
    generator = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weights = []
    for layer in range(layers):
        for _ in range(directions):
            columns = directions * hidden if layer else size
            weights += [new(4 * hidden, columns) / columns**0.5, new(4 * hidden, hidden) / hidden**0.5]
            weights += [new(4 * hidden), new(4 * hidden)] if bias else []
    tensors = [new(count, size), *weights, new(count, directions * hidden)]
    x, *weights, grad = (t.to(dtype) for t in tensors)
    return x, weights, grad, (layers, directions == 2)


def run(backend, x, weights, grad, options, keep=(), needs=None):
    """The output and the gradients, by the operators themselves: the backend "cuda" on CPU tensors."""
    keep, needs = list(keep), needs or [True] * (1 + len(weights))
    out, steps = torch.ops.fastprompt.prompt_lstm(x, weights, keep, *options, backend)
    return [out, *torch.ops.fastprompt.prompt_lstm_backward(grad, x, weights, keep, steps, *options, needs, backend)]


def exactly(x, weights, grad, options, keep=(), needs=None):
    """As :func:`run`, in float64."""
    x, grad, weights, keep = x.double(), grad.double(), [w.double() for w in weights], [k.double() for k in keep]
    out, steps = reference.forward(x, weights, keep, *options)
    needs = needs or [True] * (1 + len(weights))
    return [out, *reference.backward(grad, x, weights, keep, steps, *options, needs)]


def check(x, weights, grad, options, keep=(), needs=None):
    budget = Budget.of(lambda _: exactly(x, weights, grad, options, keep, needs), x.dtype)
    assert_within(budget, run("cuda", x, weights, grad, options, keep, needs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_budget_finds_planted_faults(dtype):
    x, weights, grad, options = inputs(10, 5, 2, dtype)
    budget = Budget.of(lambda _: exactly(x, weights, grad, options), dtype)
    assert_found(budget, lstm_faults(lambda *arguments: exactly(*arguments, options), x, weights, grad))


# 40 units: more tiles than a block has warps, and rows of more than 32 chunks. 2 and 9 steps: both buffers, and again.
@pytest.mark.parametrize("hidden, count, directions", [(1, 1, 2), (7, 9, 1), (10, 5, 2), (40, 2, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_equal_the_reference(variant, dtype, hidden, count, directions, library, emulation):
    emulation.use(library, VARIANTS[variant], seed=hidden)
    check(*inputs(hidden, count, directions, dtype, seed=count))


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_rows_in_registers_and_shared_memory_and_streamed(dtype, library, emulation):
    hidden = 3 * 32 * 16 // dtype.itemsize + 8  # two chunks a lane in registers, one in shared memory
    emulation.use(library, Variant(False, -(-hidden // 32), chunks=32))
    for backward in (False, True):
        problem = Problem(hidden, 1, dtype.itemsize, backward)
        plan = emulation.variant.plan(library, problem)
        assert plan.held == (256 if backward else 64) and plan.kept == 32 and plan.held + 32 < lstm_plan.chunks(problem)
    check(*inputs(hidden, 2, 1, dtype))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_order_of_the_threads_changes_no_bit(variant, library, emulation):
    given = inputs(20, 4, 2, torch.float32)
    results = [run("cuda", *given) for seed in range(20) if emulation.use(library, VARIANTS[variant], seed)]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "flag, variant",
    [("-DEMULATION_WITHOUT_CLUSTER_SYNC", "cluster, registers"), ("-DEMULATION_WITHOUT_SYNCTHREADS", "grid, shared")],
)
def test_a_missing_barrier_is_found(flag, variant, folder, library, emulation):
    """The same sources without a barrier: in every order of the threads the result differs, or the kernel fails."""
    given = inputs(20, 4, 2, torch.float32)
    right = run("cuda", *given) if emulation.use(library, VARIANTS[variant]) else None
    broken = build(folder, flag)
    for seed in range(5):
        emulation.use(broken, VARIANTS[variant], seed)
        try:
            wrong = run("cuda", *given)
        except RuntimeError as error:
            assert "a block that has ended" in str(error) or "a word that nobody writes" in str(error)
        else:
            assert not all(torch.equal(a, b) for a, b in zip(right, wrong, strict=True))


def test_a_wait_without_an_end_is_found(library, emulation):
    """Half of a grid is launched as if it were all."""

    class Half(Variant):
        def plan(self, library, problem):
            plan = super().plan(library, problem)
            plan.blocks //= 2
            return plan

    emulation.use(library, Half(False, 2, registers=False))
    with pytest.raises(RuntimeError, match="all threads wait for a word that nobody writes"):
        run("cuda", *inputs(9, 4, 1, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_with_dropout(bias, directions, dtype, library, emulation):
    emulation.use(library, VARIANTS["grid, registers"])
    given = inputs(6, 5, directions, dtype, layers=3, bias=bias)
    generator = torch.Generator().manual_seed(0)
    keep = [2.0 * (torch.rand(5, 6 * directions, generator=generator) < 0.5) for _ in range(2)]
    check(*given, keep)


def test_only_the_gradients_that_are_asked_for(library, emulation):
    emulation.use(library, VARIANTS["cluster, shared"])
    given = inputs(6, 5, 2, torch.float32, layers=2)
    everything = run("cuda", *given)
    for asked in range(1 + len(given[1])):
        needs = [at == asked for at in range(1 + len(given[1]))]
        _, *grads = run("cuda", *given, needs=needs)
        assert [g.numel() > 0 for g in grads] == needs and torch.equal(grads[asked], everything[1 + asked])


def test_odd_tensors(library, emulation):
    """Weights that are not contiguous or aligned, an expanded gradient, an input of no rows."""
    emulation.use(library, VARIANTS["grid, shared"])
    x, weights, grad, options = inputs(6, 5, 2, torch.float32)
    strided = [w.t().contiguous().t() if w.dim() == 2 else w.repeat_interleave(2)[::2] for w in weights]
    strided[1] = torch.cat([torch.zeros(1), weights[1].flatten()])[1:].view(24, 6)  # not at a multiple of 16 bytes
    check(x, strided, torch.ones(1, 1).expand_as(grad), options)
    out, dx, *dweights = run("cuda", x[:0], weights, grad[:0], options)
    assert out.shape == (0, 12) and dx.shape == (0, 5) and not any(d.any() for d in dweights)


@pytest.mark.parametrize("variant", ["cluster, registers", "grid, registers"])
def test_large_numbers_and_nan(variant, library, emulation):
    """Gates that are saturated, and what is not a number reaches just what it reaches in the reference."""
    emulation.use(library, VARIANTS[variant])
    x, weights, grad, options = inputs(7, 6, 2, torch.float32)
    x[1], x[3] = 1e4, -1e4
    check(x, weights, grad, options)
    x[2, 0] = torch.nan
    for got, expected in zip(
        run("cuda", x, weights, grad, options), run("reference", x, weights, grad, options), strict=True
    ):
        assert torch.equal(got.isnan(), expected.isnan()) and expected.isnan().any()


def test_it_runs_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(native, "missing_cuda", None)
    assert backends.available("prompt_lstm", ["cuda"])["cuda"] is None
    assert backends.choose("prompt_lstm", "auto", "cuda") == "torch"
    x, weights, _, _ = inputs(4, 3, 2, torch.float32)
    with pytest.raises(RuntimeError, match="'cuda' of prompt_lstm cannot run this call: the CUDA kernels run on a GPU"):
        prompt_lstm(x, weights, num_layers=1, backend="cuda")
    monkeypatch.setattr(native, "missing_cuda", "the reason")
    with pytest.raises(RuntimeError, match="cannot run this call: the reason"):
        prompt_lstm(x, weights, num_layers=1, backend="cuda")


# Which kernel runs.


def choose(library, chip, hidden, element, backward=False, directions=2):
    return lstm_plan.choose(library, CHIPS[chip], Problem(hidden, directions, element, backward))


@pytest.mark.parametrize("chip", CHIPS)
def test_plans_keep_to_the_chip(chip, library):
    limits = CHIPS[chip]
    for element, backward, directions in ((4, False, 2), (4, True, 2), (2, False, 1), (2, True, 2)):
        for hidden in (*range(1, 70), *range(71, 2100, 7)):
            plan = choose(library, chip, hidden, element, backward, directions)
            assert plan.blocks * plan.tiles * 4 >= hidden and plan.shared <= limits.shared and plan.warps == 8
            assert plan.blocks * directions <= limits.processors  # all run at once
            assert plan.held == 0 or plan.tiles <= 8
            chunks = lstm_plan.chunks(Problem(hidden, directions, element, backward))
            assert plan.held + plan.kept == chunks or plan.exchange == GRID and plan.held % 32 == plan.kept % 32 == 0
            assert plan.exchange == GRID or plan.blocks <= limits.cluster


# Hidden sizes, multiples of 8, up to which a cluster is taken, and up to which nothing is streamed, by both passes.
RANGES = {
    ("A100", 4): (0, 800), ("A100", 2): (0, 1168), ("H100", 4): (512, 1024), ("H100", 2): (640, 1472),
    ("H100, clusters of 8", 4): (320, 1024), ("H100, clusters of 8", 2): (448, 1472), ("B200", 4): (512, 1024),
    ("B200", 2): (640, 1480), ("RTX 5090", 4): (256, 680), ("RTX 5090", 2): (288, 1024),
}  # fmt: skip


@pytest.mark.parametrize("chip, element", RANGES)
def test_the_ranges_that_are_written_down(chip, element, library):
    """Those of csrc/cuda/prompt_lstm.h."""

    def both(holds, hidden):
        problems = [Problem(hidden, 2, element, backward) for backward in (False, True)]
        return all(
            holds(lstm_plan.choose(library, CHIPS[chip], problem), lstm_plan.chunks(problem)) for problem in problems
        )

    rules = [lambda plan, chunks: plan.exchange == CLUSTER, lambda plan, chunks: plan.held + plan.kept == chunks]
    for holds, end in zip(rules, RANGES[chip, element], strict=True):
        assert [h for h in range(8, 2000, 8) if both(holds, h)] == list(range(8, end + 1, 8))


# What is tabled of them.


def test_the_table_of_compiled_kernels_finds_spills():
    log = """\
ptxas info    : Compiling entry function '{}' for 'sm_80'
ptxas info    : Function properties for it
    {} bytes stack frame, {} bytes spill stores, 0 bytes spill loads
ptxas info    : Used {} registers, used 1 barriers
"""
    mangled = "_ZN10fastprompt4lstm10recurrenceINS0_{}NS0_12GridExchangeEEEvNS0_4ArgsE"
    names = [mangled.format(kernel) for kernel in ("7ForwardE6__half", "8BackwardEf")]
    text = "".join(log.format(kernel, *found) for kernel in names for found in ((0, 0, 255), (8, 4, 257)))
    rows = cuda_matrix.records(text)
    assert [tuple(row.values())[1:7] for row in rows[::2]] == [
        ("backward", "fp32", "grid", "sm_80", 256, 255),
        ("forward", "fp16", "grid", "sm_80", 256, 255),
    ]
    wrong = "spills 4 bytes; has a stack of 8 bytes; needs 257 registers a thread"
    assert [row["verdict"] for row in rows] == ["ok", wrong, "ok", wrong]
    with pytest.raises(ValueError, match="unknown kernel"):
        cuda_matrix.records(text.replace("recurrence", "other"))


def test_predicted_times(library):
    """A cluster's step by hand, and what has to hold for any figures."""
    pytest.importorskip("triton")
    from benchmarks.gpu import lstm_model

    plan = choose(library, "H100", 256, 4)  # 8 tiles of 16 rows of 256, in registers
    cycles = 2 * lstm_model.CLUSTER_CYCLES + lstm_model.STEP_CYCLES + 8 * 16 * 256 / 128
    seconds = lstm_model.recurrence_seconds("H100 SXM", plan, 256, False, 10)
    assert seconds == pytest.approx(lstm_model.LAUNCH_SECONDS + 10 * cycles / 1.75e9)
    rows = lstm_model.predict(library, "H100 SXM", 256, 20) + lstm_model.predict(library, "A100 SXM 80 GB", 1024, 20)
    chosen = [row["implementation"] for row in rows if row["chosen"]]
    assert chosen == ["cluster", "cluster", "streaming", "streaming"]
    assert all(row["streamed"] == "0.00" for row in rows if row["implementation"] in ("cluster", "grid"))
