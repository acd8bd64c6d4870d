"""What ``make gpu-evidence`` reads and counts: binaries of small kernels, costs small enough to count by hand."""

import csv
import gc
from dataclasses import replace

import pytest
import torch
from needs import needs

pytest.importorskip("triton")

import triton.language as tl
from fastprompt.kernels import launch
from triton.backends.compiler import GPUTarget

from benchmarks.gpu import binary, compile_matrix, counts, launch_cost, model, rotary_model, traffic
from benchmarks.gpu.cases import Case, _attention
from benchmarks.gpu.chips import CHIPS, Device
from benchmarks.gpu.rivals import uneven

needs_stub = needs("triton", "3.7", "launches without what the stub stands in for")
pytestmark = pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter compiles nothing")

OPTIONS = launch.Options()


@launch.Kernel
def matmul(x, y, out, stride_x, stride_y, stride_out, inner, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, inner, BK):
        a = tl.load(x + m[:, None] * stride_x + start + k[None, :])  # [BM, BK]
        b = tl.load(y + (start + k)[:, None] * stride_y + n[None, :])  # [BK, BN]
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(out + m[:, None] * stride_out + n[None, :], total)


def run_matmul(dtype=torch.bfloat16, m=64, n=64, k=32, options=OPTIONS):
    x, y, out = (torch.empty(64, 256, dtype=d, device="meta") for d in (dtype, dtype, torch.float32))
    matmul((1,), options, x, y, out, 256, 256, 256, 256, BM=m, BN=n, BK=k)


def contents(chip, **arguments):
    with launch.capture(CHIPS[chip].target) as launches:
        run_matmul(**arguments)
    return binary.inspect(launches[0].compile(CHIPS[chip].target))


@pytest.mark.parametrize("chip", CHIPS)
def test_a_half_precision_product_uses_the_matrix_instructions_of_the_chip(chip):
    found = contents(chip)
    assert list(found.matrix) == [CHIPS[chip].matrix] and found.fma == 0
    assert (found.half_dots, found.float_dots, found.scalar_dots) == (1, 0, 0)
    assert 0 < found.wide_loads <= found.loads and found.code > 0 and found.registers > 0
    assert compile_matrix.problems(found, CHIPS[chip], native=True) == []


def test_an_exact_fp32_product_is_made_of_multiply_adds_and_that_is_right():
    found = contents("sm_80", dtype=torch.float32)
    assert not found.matrix and found.fma >= 64 * 64 * 32 / 128 and (found.half_dots, found.float_dots) == (0, 1)
    assert found.scalar_dots > 0 and compile_matrix.problems(found, CHIPS["sm_80"]) == []


def test_a_half_precision_product_of_multiply_adds_is_a_problem():
    found = contents("gfx942", dtype=torch.float16, m=4, n=4, k=4)
    assert not found.matrix and found.half_dots == 1
    assert "multiply-adds" in compile_matrix.problems(found, CHIPS["gfx942"])[0]
    mixed = replace(contents("sm_80"), scalar_dots=1)  # one of two products was left to multiply-adds
    assert compile_matrix.problems(mixed, CHIPS["sm_80"])
    assert not compile_matrix.problems(replace(mixed, float_dots=1), CHIPS["sm_80"])


@pytest.mark.parametrize("chip, m, n", [("sm_80", 64, 128), ("gfx942", 128, 256)])
def test_spills_are_found(chip, m, n):
    found = contents(chip, m=m, n=n, k=16, options=launch.Options(num_warps=1))
    assert found.spills > 0 and any("spills" in problem for problem in compile_matrix.problems(found, CHIPS[chip]))


def test_shared_memory_over_the_limit_is_found_on_the_chip_that_has_less():
    found = contents("sm_80", m=128, n=128, k=64, options=launch.Options(num_warps=8, num_stages=5))
    assert CHIPS["sm_120"].shared < found.shared <= CHIPS["sm_80"].shared
    assert compile_matrix.problems(found, CHIPS["sm_80"]) == []
    assert "shared memory" in compile_matrix.problems(found, CHIPS["sm_120"])[0]


def test_instructions_of_an_older_chip_are_a_problem_only_where_a_full_tile_is_expected():
    found = replace(contents("sm_90"), matrix={"HMMA": 4})
    assert compile_matrix.problems(found, CHIPS["sm_90"]) == []
    assert compile_matrix.problems(found, CHIPS["sm_90"], native=True) == ["uses HMMA, not HGMMA"]


@pytest.mark.parametrize("n, warps, code", [(64, 4, 0), (128, 1, 1)])
def test_the_exit_status_and_the_name_tell_of_a_variant_that_spills(n, warps, code, monkeypatch, tmp_path, capsys):
    def run():
        run_matmul(n=n, k=16, options=launch.Options(num_warps=warps))

    monkeypatch.setattr(compile_matrix.cases, "sample", lambda: [Case("toy", "forward", "bf16", run)] * 2)
    file = tmp_path / "matrix.csv"
    assert compile_matrix.main(["--target", "80", "--jobs", "1", "--out", str(file)]) == code
    printed = capsys.readouterr().out
    assert ("FAILED toy matmul [forward bf16] on sm_80" in printed) == bool(code) and "1 variants of 2 cases" in printed
    (row,) = csv.DictReader(line for line in file.open() if not line.startswith("#"))
    assert (row["verdict"] == "ok") == (code == 0) and row["constants"] == f"BM=64 BN={n} BK=16"


def test_a_row_is_kept_for_as_long_as_its_code_is_the_same(monkeypatch, tmp_path, capsys):
    """The constants and the name of a case may be the same where the code is another one."""
    arguments = ["--target", "80", "--jobs", "1", "--out", str(tmp_path / "matrix.csv")]
    for stages, kept in ((2, 0), (2, 1), (1, 0)):
        options = launch.Options(num_stages=stages)
        case = Case("toy", "forward", "bf16", lambda options=options: run_matmul(options=options))
        monkeypatch.setattr(compile_matrix.cases, "sample", lambda case=case: [case])
        assert compile_matrix.main(arguments) == 0
        assert f"1 variants of 1 cases for sm_80, {kept} kept, 0 failed" in capsys.readouterr().out
    assert compile_matrix.main([*arguments, "--anew"]) == 0 and ", 0 kept" in capsys.readouterr().out


def test_a_variant_that_does_not_compile_is_a_failure(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        compile_matrix.cases, "sample", lambda: [Case("toy", "forward", "odd", lambda: run_matmul(m=48))]
    )
    assert compile_matrix.main(["--target", "80", "--jobs", "1", "--out", str(tmp_path / "matrix.csv")]) == 1
    assert "does not compile" in capsys.readouterr().out


def test_cases_take_turns_among_the_targets_and_a_variant_is_compiled_once():
    alone = [Case("toy", "forward", str(m), lambda m=m: run_matmul(m=m)) for m in (16, 32, 64)]
    jobs = compile_matrix.select([*alone, alone[0]], ["sm_80", "sm_90", "sm_100"], everywhere=False)
    assert [(job.case.label, job.chip) for job in jobs] == [("16", "sm_80"), ("32", "sm_90"), ("64", "sm_100")]
    jobs = compile_matrix.select([replace(alone[0], everywhere=True), alone[1]], ["sm_80", "sm_90"], everywhere=False)
    assert [(job.case.label, job.chip) for job in jobs] == [("16", "sm_80"), ("16", "sm_90"), ("32", "sm_80")]


@pytest.mark.parametrize("direction", ["forward", "backward", "decode"])
def test_attention_compiles_with_and_without_dropout(direction):
    """What the interpreter takes the compiler may not: without dropout its arguments are None."""
    for options in ({}, dict(dropout=0.1), dict(value_dim=24)):
        (case,) = [c for c in _attention("bf16", 32, 2, 2, **options) if c.direction == direction]
        for job in compile_matrix.select([case], ["sm_80"]):
            result = compile_matrix.compile_job(job)
            assert result.contents is not None, result.error
            assert compile_matrix.problems(result.contents, CHIPS["sm_80"]) == []


def test_scalars_in_lanes_of_vector_registers_are_no_spills():
    assert compile_matrix.problems(replace(contents("gfx942"), lanes=9), CHIPS["gfx942"]) == []


def captured(x, y, out, *numbers):
    with launch.capture(CHIPS["sm_90"].target) as launches:
        matmul((1,), launch.Options(), x, y, out, *numbers, BM=64, BN=64, BK=32)
    return launches[0]


def test_a_launch_is_aligned_where_pointers_and_strides_allow_loads_of_16_bytes():
    x, out = torch.empty(64 * 256 + 8, dtype=torch.bfloat16), torch.empty(64, 256)
    assert captured(x, x, out, 256, 8, 256, 255).aligned  # 255: not a stride
    assert not captured(x, x, out, 256, 4, 256, 256).aligned
    assert (
        captured(x[8:], x, out, 256, 256, 256, 256).aligned and not captured(x[1:], x, out, 256, 256, 256, 256).aligned
    )


def test_a_variant_is_told_by_types_and_never_by_values():
    x, out = torch.empty(64, 256, dtype=torch.bfloat16), torch.empty(64, 256)
    one = captured(x, x, out, 256, 256, 256, 256)
    assert one == captured(x, torch.nn.Parameter(x), out, 512, 256, 1024, 1)
    assert one.types == ("*bf16", "*bf16", "*fp32", "i64", "i64", "i64", "i32")
    assert captured(x, x.half(), out, 256, 256, 256, 1.0).types == (
        "*bf16",
        "*fp16",
        "*fp32",
        "i64",
        "i64",
        "i64",
        "fp32",
    )
    assert captured(x, None, out, 256, 256, 256, 256).types[1] == "constexpr"
    with pytest.raises(ValueError):
        captured(x, x, out, 256, 256, 256)


# The cost model.

TOY = Device("sm_80", flops=1e9, bandwidth=1e6, l2=2000, processors=2)  # 1000 bytes of its cache count


def program(*touches, flops=0.0):
    return traffic.Program([traffic.Touch(*touch) for touch in touches], flops)


def test_bytes_of_a_block_that_is_read_twice():
    read = [
        program((("a",), 400, 100)),
        program((("a",), 400, 100)),
        program((("b",), 400, 400), (("c",), 400, 400, True)),
    ]
    first, second = traffic.costs([traffic.Launch("x", read), traffic.Launch("y", read[:1])], TOY, 1.0)
    assert first.l2_bytes == 100 + 100 + 400 + 400
    assert first.memory_bytes == 400 + 400 + 400  # a once, b, and c when it is written back
    assert second.memory_bytes == 400  # 1200 bytes do not stay in 1000: a, the oldest, was dropped
    assert second.seconds == pytest.approx(400 / 1e6 + 1.0)


def test_a_block_that_stays_in_the_cache_is_free_and_a_written_one_counts_once():
    steps = [program((("a",), 300, 300, True))] * 3 + [program((("a",), 300, 300))]
    (cost,) = traffic.costs([traffic.Launch("x", steps)], TOY, 0.0)
    assert cost.memory_bytes == 300 and cost.l2_bytes == 1200


def test_programs_that_run_at_once_take_turns():
    """Alone each program would find its own block again; four at a time they push each other's out."""
    programs = [program(((i,), 600, 600), ((i,), 600, 600)) for i in range(4)]
    alone = traffic.costs([traffic.Launch("x", programs, resident=1)], replace(TOY, processors=1), 0.0)[0]
    together = traffic.costs([traffic.Launch("x", programs, resident=2)], TOY, 0.0)[0]
    assert alone.memory_bytes == 4 * 600 and together.memory_bytes == 8 * 600


def test_arithmetic_time_counts_the_slots_that_idle():
    # Two slots: 3 and 1, then 1 and 1 beside the 3: done after 3 of 1e9 / 2 FLOP/s each.
    programs = [program(flops=flops) for flops in (3e9, 1e9, 1e9, 1e9)]
    (cost,) = traffic.costs([traffic.Launch("x", programs, resident=1)], TOY, 0.0)
    assert cost.seconds == pytest.approx(6.0) and cost.balance == pytest.approx(1.0) and cost.waves == 2
    (cost,) = traffic.costs([traffic.Launch("x", programs[:1], resident=1)], TOY, 0.0)
    assert cost.seconds == pytest.approx(6.0) and cost.balance == pytest.approx(0.5)


def tiny(**sizes):
    return counts.Workload(
        "tiny", **{"heads": 2, "kv_heads": 1, "head_dim": 64, "prefix": 3, "lengths": (4, 2)} | sizes
    )


def test_floor_and_useful_work_by_hand():
    w, row = tiny(), 64 * 2
    queries, keys = 6 * 2 * row, 2 * (6 + 3) * row
    assert w.floor("forward") == 2 * queries + keys + 4 * 12
    assert w.floor("backward") == 4 * queries + 2 * keys + 4 * 12
    assert w.floor("decode") == 2 * (2 * 2 * row) + keys + 4 * 4
    assert w.useful_flops("forward") == 4 * 64 * 2 * (6 * 3 + 10 + 3)
    assert w.useful_flops("decode") == 4 * 64 * 2 * (3 + 4 + 3 + 2)
    w = tiny(value_dim=32)
    assert w.floor("forward") == 1.5 * queries + 0.75 * keys + 4 * 12
    assert w.useful_flops("backward") == 2 * (3 * 64 + 2 * 32) * 2 * (6 * 3 + 10 + 3)


def test_our_forward_by_hand(monkeypatch):
    monkeypatch.setattr(counts, "_resident", lambda one, chip: 2)
    (one,) = counts.ours(tiny(), "forward", "sm_80")
    (only,) = one.programs  # six queries with both heads stand in one tile
    row = 64 * 2
    moved = sum(touch.bytes for touch in only.touches)
    assert (
        moved == 32 + 6 * 2 * (2 * row + 16) + 2 * (6 + 3) * row
    )  # table, q, out, lse and spans, keys and values once
    assert sum(touch.bytes for touch in only.touches if touch.write) == 6 * 2 * row
    assert only.flops >= tiny().useful_flops("forward")


@pytest.mark.parametrize("direction", ["forward", "backward", "decode"])
def test_narrower_values_move_fewer_bytes_and_take_fewer_operations(direction, monkeypatch):
    monkeypatch.setattr(counts, "_resident", lambda one, chip: 2)

    def sums(**sizes):
        programs = [p for one in counts.ours(tiny(**sizes), direction, "sm_80") for p in one.programs]
        return sum(t.bytes for p in programs for t in p.touches), sum(p.flops for p in programs)

    equal, narrow, half = sums(), sums(value_dim=32), sums(head_dim=32)
    assert all(a > b > c for a, b, c in zip(equal, narrow, half))
    most = 5 / 6 if direction == "backward" else 3 / 4  # a query item has two products over keys, one over values
    assert 3 / 4 <= narrow[1] / equal[1] <= most
    with pytest.raises(ValueError, match="values as wide as keys"):
        model.predict(model.PEFT, tiny(value_dim=32), direction, "A100 SXM 80 GB")


@pytest.mark.parametrize("direction", ["forward", "backward", "decode"])
@pytest.mark.parametrize("heads, kv_heads", [(2, 1), (3, 3)])
def test_every_implementation_moves_at_least_its_inputs_and_outputs(direction, heads, kv_heads, monkeypatch):
    monkeypatch.setattr(counts, "_resident", lambda one, chip: 2)
    w = tiny(heads=heads, kv_heads=kv_heads, lengths=(40, 70, 12))
    queries = len(w.lengths) if direction == "decode" else w.rows
    least = w.floor(direction) - 4 * queries * heads  # lse is not counted for all
    for name in model.IMPLEMENTATIONS:
        if direction == "decode" and name.startswith("FlexAttention"):
            continue
        row = model.predict(name, w, direction, "A100 SXM 80 GB")
        assert float(row["memory MB"]) * 1e6 >= 0.9 * least - 1e5, name  # printed with one digit
        assert float(row["useful"]) <= 1 and row["launches"] >= 1
    assert model.predict(model.OURS, w, direction, "H100 SXM")["launches"] <= 4


def test_the_bar_is_of_the_fused_backward_at_100_keys():
    row = {"device": "B200", "direction": "backward", "P": 100, "batch": "uneven 10-64",
           "implementation": model.OURS, "launches": 2}  # fmt: skip
    rows = [
        row | {"memory / floor": "1.30"},
        row | {"memory / floor": "1.31"},
        row | {"memory / floor": "1.0", "launches": 5},
        row | {"P": 20, "memory / floor": "9"},
        row | {"implementation": model.PEFT, "memory / floor": "9"},
    ]
    assert [met for _, met in model.bar(rows)] == [True, False, False]


def test_uneven_lengths_add_up():
    lengths = uneven(8192)
    assert sum(lengths) == 8192 and len(set(lengths)) > 40 and max(lengths) == 64 and sorted(lengths)[1] >= 10


def test_rotary_by_hand():
    given = rotary_model.tensors(2, 1, 8, 3)
    q, k, table = (2 * n for n in (3 * 2 * 8, 3 * 8, 3 * 8))
    assert rotary_model.ours(*given) == [2 * (q + table), 2 * (k + table)]
    forward, backward = rotary_model.plain(*given)
    products, negative, joined, summed = 2 * (2 * (q + k) + 2 * table), q + k, 2 * (q + k), 3 * (q + k)
    assert sum(forward) == products + negative + joined + summed and len(forward) == 2 * 5
    assert sum(backward) == sum(forward)  # cat is a view in it, and chunk a cat


# The cost of a launch.


@needs_stub
def test_a_launch_reaches_the_stub_by_both_paths():
    x, out = torch.empty(64, 256, dtype=torch.bfloat16), torch.empty(64, 256)
    arguments = (1,), launch.Options(), x, x, out, 256, 256, 256, 256
    with launch_cost.stubbed() as stub:
        matmul(*arguments, BM=64, BN=64, BK=32)
        assert stub.launches == 1
        launch_cost.through_triton(matmul, *arguments, BM=64, BN=64, BK=32)
        assert stub.launches == 2
    assert launch_cost.TARGET == GPUTarget("cuda", 90, 32)


@needs_stub
def test_a_compiled_kernel_stays_loaded_as_long_as_its_kernel_is_there():
    x, out = torch.empty(64, 256, dtype=torch.bfloat16), torch.empty(64, 256)
    kernel, unloaded = launch.Kernel(matmul.function.fn), []
    with launch_cost.stubbed() as stub:
        stub.utils.load_binary = lambda *arguments: ("module", 0, 0, 0, 1024)
        stub.utils.unload_module = unloaded.append
        kernel((1,), launch.Options(), x, x, out, 256, 256, 256, 256, BM=64, BN=64, BK=32)
        gc.collect()
        assert stub.launches == 1 and not unloaded
        del kernel
        gc.collect()
        assert unloaded == ["module"]


def test_seconds_of_a_call():
    found = launch_cost.seconds(lambda: None, rounds=3, calls=10)
    assert len(found) == 3 and all(second > 0 for second in found)
