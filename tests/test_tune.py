"""The tuned table and its tuner, without a GPU: the timer and the name of the device are made up."""

import json

import pytest
import torch

pytest.importorskip("triton")

from fastprompt.kernels import launch
from fastprompt.kernels.prefix_attention import config, tuned
from triton.backends.compiler import GPUTarget

from benchmarks.budget import Budget
from benchmarks.gpu import tune
from benchmarks.gpu.chips import CHIPS

TARGET = GPUTarget("cuda", 90, 32)
RULE = tune.entry_of(config.forward_tiles(128, 2, TARGET), "forward")
KEY = "forward 16-bit 128"
BETTER = RULE | {"keys": RULE["keys"] // 2}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The file of the table, which is read anew by every test."""
    monkeypatch.setattr(tuned, "FILE", tmp_path / "tuned.json")
    tuned._entries.cache_clear()
    yield tuned.FILE
    tuned._entries.cache_clear()


def now():
    return tune.entry_of(config.forward_tiles(128, 2, TARGET), "forward")


def ones():
    """The budget of four ones."""
    exact = torch.ones(4, dtype=torch.float64)
    return Budget([exact], [torch.zeros_like(exact)], [torch.float32])


def climb(seconds, wrong=lambda entry: False, unfit=lambda entry: None):
    """``tune.climb`` where time, correctness, fitness are functions of the tiles; also the entries that were timed."""
    timed = []

    def timer(run):
        timed.append(now())
        return seconds(now())

    call = tune.Call(lambda: [torch.ones(4) + wrong(now())], ones())
    return *tune.climb("forward", RULE, [call] * 2, lambda run: unfit(now()), timer, rounds=3), timed


def test_it_climbs_to_the_fastest_and_leaves_the_rule_as_it_was():
    best, speed, timed = climb(lambda entry: entry["keys"] * entry["num_stages"])
    assert best == RULE | {"keys": 16, "num_stages": 1}
    assert speed == pytest.approx(RULE["keys"] * RULE["num_stages"] / 16)
    assert RULE in timed and now() == RULE


@pytest.mark.parametrize("gain, wins", [(1.02, False), (1.04, True)])
def test_the_rule_stays_unless_more_than_three_percent_are_won(gain, wins):
    best, speed, _ = climb(lambda entry: 1.0 if entry == BETTER else gain)
    assert (best, speed) == ((BETTER, pytest.approx(gain)) if wins else (RULE, 1.0))


def test_a_lucky_timing_does_not_win():
    lucky = [1.0] * 3 * 2

    def seconds(entry):
        return lucky.pop() if entry == BETTER and lucky else 2.0

    assert climb(seconds)[:2] == (RULE, 1.0)


def test_fast_and_wrong_or_unfit_candidates_are_never_timed():
    def fast(entry):
        return 1.0 if entry["keys"] != RULE["keys"] else 2.0

    for options in (dict(wrong=lambda entry: entry["keys"] != RULE["keys"]),
                    dict(unfit=lambda entry: "spills" if entry["keys"] != RULE["keys"] else None)):  # fmt: skip
        best, _, timed = climb(fast, **options)
        assert best == RULE and {entry["keys"] for entry in timed} == {RULE["keys"]}


def test_nothing_is_tuned_where_the_rule_itself_is_wrong():
    with pytest.raises(RuntimeError, match="benchmarks.gpu.check"):
        climb(lambda entry: 1.0, wrong=lambda entry: True)


def test_neighbours_differ_in_one_field_and_fit_the_table():
    smallest = {"queries": 16, "keys": 256, "num_warps": 1, "num_stages": 1, "registers": None}
    found = list(tune.neighbours(smallest))
    assert [{name: value for name, value in one.items() if value != smallest[name]} for one in found] == [
        {"queries": 32}, {"keys": 128}, {"num_warps": 2}, {"num_stages": 2},
    ]  # fmt: skip


@pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("role", tuned.FIELDS)
def test_calls_launch_the_kernels_of_their_role_with_the_tiles_of_the_entry(role):
    shape = dict(fold=1, sharing=1) if role == "decode" else {}
    entry = tune.entry_of(getattr(config, f"{role}_tiles")(16, 4, TARGET, **shape), role) | {"keys": 16, "num_warps": 2}
    for call in tune.calls(role, 16, torch.float32, "cpu", rows=64):
        with launch.capture(TARGET) as launches, tune.tiled_by(role, entry):
            call.run()
        assert launches[0].kernel.name == f"_{role}" and launches[0].options.num_warps == 2
        assert dict(zip(launches[0].kernel.constants, launches[0].constants))["BN"] == 16
        assert all(torch.isfinite(x).all() for x in call.budget.exact) and len(call.budget.exact) >= 2


@pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter compiles nothing")
def test_what_does_not_fit_the_chip_is_unfit():
    call, *_ = tune.calls("forward", 16, torch.bfloat16, "cpu", rows=64)
    entry = {"queries": 64, "keys": 32, "num_warps": 4, "num_stages": 2, "registers": None}
    with tune.tiled_by("forward", entry):
        assert tune.unfit(call.run, CHIPS["sm_80"]) is None
        assert "shared memory" in tune.unfit(call.run, tune.replace(CHIPS["sm_80"], shared=64))


def test_a_saved_entry_overrides_the_rule_on_its_device_alone(table):
    tune.save(table, "a card", KEY, BETTER)
    tiles, rule = (config.forward_tiles(128, 2, TARGET, device) for device in ("a card", None))
    assert tune.entry_of(tiles, "forward") == BETTER and tune.entry_of(rule, "forward") == RULE
    assert config.forward_tiles(128, 2, TARGET, "another card") == rule
    for others in ((64, 2), (128, 4)):
        assert config.forward_tiles(*others, TARGET, "a card") == config.forward_tiles(*others, TARGET)
    assert config.backward_tiles(128, 2, TARGET, "a card") == config.backward_tiles(128, 2, TARGET)


def test_the_queries_of_a_decoding_tile_follow_from_the_batch(table):
    tune.save(table, "a card", "decode 16-bit 64", {"keys": 64, "num_warps": 2, "num_stages": 4, "registers": None})
    tiles = config.decode_tiles(64, 2, TARGET, "a card", fold=4, sharing=8)
    assert tiles == config.Tiles(32, 64, launch.Options(2, 4))


def test_saving_keeps_other_entries_and_leaves_no_file_behind(table):
    tune.save(table, "a card", KEY, None)
    assert not list(table.parent.iterdir())  # nothing won: no table
    for device, name in (("a card", KEY), ("a card", "forward 32-bit 64"), ("another card", KEY)):
        tune.save(table, device, name, BETTER)
    tune.save(table, "a card", KEY, None)
    assert tuned.read(table) == {"a card": {"forward 32-bit 64": BETTER}, "another card": {KEY: BETTER}}
    assert [path.name for path in table.parent.iterdir()] == ["tuned.json"]


def test_a_table_is_looked_up_by_the_name_of_the_gpu_that_launches(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    launch._name.cache_clear()
    gpu = torch.device("cuda", 7)
    assert launch.name_of(gpu) == "card 7" and launch.name_of(torch.device("cpu")) is None
    with launch.capture(TARGET):  # for a chip, not for this GPU
        assert launch.name_of(gpu) is None
    launch._name.cache_clear()


def test_without_a_table_the_rule_holds(table):
    assert config.forward_tiles(128, 2, TARGET, "a card") == config.forward_tiles(128, 2, TARGET)


@pytest.mark.parametrize(
    "devices, message",
    [
        ([], "expected an object of devices"),
        ({"a card": 3}, "'a card': expected an object of entries, got 3"),
        ({"a card": {"forward 8-bit 128": BETTER}}, "'forward 8-bit 128': expected a key such as"),
        ({"a card": {KEY: {}}}, f"'{KEY}': expected an object with queries, keys, num_warps"),
        ({"a card": {KEY: BETTER | {"key_keys": 16}}}, f"'{KEY}': expected an object with"),
        ({"a card": {KEY: BETTER | {"keys": 48}}}, f"'{KEY}': keys: expected a power of two from 16 to 256, got 48"),
        (
            {"a card": {KEY: BETTER | {"num_warps": True}}},
            f"'{KEY}': num_warps: expected a power of two from 1 to 16, got True",
        ),
        ({"a card": {KEY: BETTER | {"num_stages": 0}}}, f"'{KEY}': num_stages: expected from 1 to 8, got 0"),
        (
            {"a card": {KEY: BETTER | {"registers": 256}}},
            f"'{KEY}': registers: expected null or from 32 to 255, got 256",
        ),
    ],
)
def test_a_malformed_table_is_named(table, devices, message):
    table.write_text(json.dumps(devices))
    with pytest.raises(ValueError) as error:
        config.forward_tiles(128, 2, TARGET, "a card")
    assert str(table) in str(error.value) and message in str(error.value)


def test_a_table_that_is_not_json_is_named(table):
    table.write_text("{")
    with pytest.raises(ValueError, match="tuned.json: not JSON"):
        config.forward_tiles(128, 2, TARGET, "a card")


def test_the_table_of_a_gpu_is_made_and_used(table, monkeypatch, capsys):
    monkeypatch.setattr(tune, "this_chip", lambda: CHIPS["sm_90"])
    call = tune.Call(lambda: [torch.ones(4)], ones())
    monkeypatch.setattr(tune, "calls", lambda *_: [call])
    monkeypatch.setattr(tune, "unfit", lambda run, chip: None)
    monkeypatch.setattr(tune, "seconds", lambda run: 1.0 if now() == BETTER else 2.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    tune.save(table, "a card", "decode 16-bit 128", {"keys": 64, "num_warps": 2, "num_stages": 4, "registers": None})
    assert tune.main(["--head-dim", "128", "--out", str(table)]) == 0
    assert tuned.read(table) == {"a card": {KEY: BETTER}}  # the backward and decoding had the rule's time throughout
    assert "2.00x" in capsys.readouterr().out
    assert tune.entry_of(config.forward_tiles(128, 2, TARGET, "a card"), "forward") == BETTER


def test_the_tuner_says_at_once_that_it_needs_a_gpu(table, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 1
    assert "needs a GPU" in capsys.readouterr().err and not table.exists()
