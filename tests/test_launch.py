"""The launch of Triton kernels on a GPU, without one: down to the call of the CUDA driver.

Triton's own driver module and launcher, in C and as Triton compiles them, stand on a libcuda that records. What arrives
there is compared with what was asked for: grid, warps, stream, module, and the bytes of every kernel argument in the
order of the kernel's signature. ``make triton-versions`` runs this on the versions of Triton that torch releases ship.
"""

import ctypes
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from fastprompt.kernels import launch
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver

from fastprompt import Sequences
from fastprompt.ops.prefix_attention import triton as attention
from fastprompt.ops.prompt_concat import triton as prompt_concat
from fastprompt.ops.rotary import triton as rotary

pytestmark = [
    pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter launches nothing"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton's driver of NVIDIA GPUs is for Linux"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a real libcuda is loaded; tests/gpu launch on it"),
]


class Recorded(ctypes.Structure):
    """What ``libcuda_recorder.c`` writes down."""

    _fields_ = [
        ("loads", ctypes.c_int),
        ("launches", ctypes.c_int),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_uint64),
        ("function", ctypes.c_uint64),
        ("values", ctypes.c_uint64 * 256),
    ]


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory):
    """The recording library, loaded under the name by which Triton looks for the real one, and its folder."""
    folder = tmp_path_factory.mktemp("libcuda")
    include = Path(nvidia.__file__).parent / "include"
    built = folder / "libcuda.so.1"
    source = Path(__file__).with_name("libcuda_recorder.c")
    command = ["cc", "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(built)]
    subprocess.run(command, check=True)
    (folder / "libcuda.so").symlink_to(built)  # Triton 3.4 links with this name
    library = ctypes.CDLL(str(built), mode=ctypes.RTLD_GLOBAL)
    library.record_launches.restype = ctypes.POINTER(Recorded)
    return library, folder


@pytest.fixture
def gpu(libcuda, tmp_path, monkeypatch):
    """Two devices of compute capability 9.0 without a GPU; a stream is told by its number, 1000 and the device's."""
    library, folder = libcuda
    state = SimpleNamespace(device=0, record=lambda count: library.record_launches(count).contents)

    class OnDevice:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            self.before, state.device = state.device, self.index

        def __exit__(self, *_):
            state.device = self.before

    monkeypatch.setattr(triton.knobs.nvidia, "libcuda_path", str(folder))
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    nvidia.libcuda_dirs.cache_clear()
    nvidia.library_dirs.cache_clear()
    active = nvidia.CudaDriver()
    active.get_current_device = lambda: state.device or 0
    active.get_device_capability = lambda device: (9, 0)
    active.get_current_stream = lambda device: 1000 + (device or 0)
    before = vars(driver).copy()
    driver.set_active(active)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.device)
    monkeypatch.setattr(torch.cuda, "device", OnDevice)
    launch._target.cache_clear()
    for kernel in kernels():
        monkeypatch.setattr(kernel, "_handles", {})
    yield state
    launch._target.cache_clear()
    for kernel in kernels():
        kernel._handles.clear()  # modules are unloaded by the driver that loaded them
    vars(driver).update(before)
    nvidia.libcuda_dirs.cache_clear()
    nvidia.library_dirs.cache_clear()


class OnGpu(torch.Tensor):
    """A tensor in the host's memory that says it is on a GPU."""

    index = 0

    @property
    def device(self):
        return torch.device("cuda", self.index)


class OnGpu1(OnGpu):
    index = 1


class Bias(NamedTuple):
    b: Any
    stride_bias: Any


@launch.Kernel
def scaled_rows(x, bias, out, stride_x, width, factor, extra, BR: tl.constexpr, NEGATE: tl.constexpr):
    column = tl.arange(0, BR)
    inside = column < width
    value = tl.load(x + tl.program_id(0).to(tl.int64) * stride_x + column, mask=inside, other=0.0)
    value += tl.load(bias.b + column.to(tl.int64) * bias.stride_bias, mask=inside, other=0.0)
    if extra is not None:
        value += tl.load(extra)
    if NEGATE:
        value = -value
    tl.store(out + column, value * factor, mask=inside)


OPTIONS = launch.Options(num_warps=2)


def arguments(kind, width=5, extra=True):
    """Those of ``scaled_rows``: tensors, a group, an int64 stride beyond 32 bits, an int32, a float, None or not."""
    x, b, out, more = (torch.zeros(64).as_subclass(kind) for _ in range(4))
    return x, Bias(b, 2**40 + 3), out, -(2**35) - 1, width, 0.37, more if extra else None


def launch_scaled_rows(kind=OnGpu, grid=(3,), negate=True, **sizes):
    given = arguments(kind, **sizes)
    scaled_rows(grid, OPTIONS, *given, BR=64, NEGATE=negate)
    return given


def kernels():
    """All that exist in this process."""
    modules = [module for name, module in sys.modules.items() if name.startswith("fastprompt.kernels.")]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, launch.Kernel)]
    return [*found, scaled_rows]


def parameters(kernel, arguments):
    """The bytes that the driver must find at each parameter: of every argument that is neither a constant nor None."""
    named = []
    for name, value in zip(kernel.arguments, arguments, strict=True):
        named += value._asdict().items() if isinstance(value, tuple) else [(name, value)]
    found = []
    for name, value in named:
        if isinstance(value, torch.Tensor):
            found.append((name, struct.pack("<q", value.data_ptr())))
        elif isinstance(value, float):
            found.append((name, struct.pack("<f", value)))
        elif value is not None:
            found.append((name, struct.pack("<q" if name.startswith("stride_") else "<i", value)))
    return found


def check(record, kernel, arguments):
    for place, (name, given) in enumerate(parameters(kernel, arguments)):
        arrived = struct.pack("<Q", record.values[place])[: len(given)]
        assert arrived == given, f"parameter {place}, {name}: {arrived.hex()} instead of {given.hex()}"


def test_every_argument_arrives_in_its_place(gpu):
    record = gpu.record(8)
    given = launch_scaled_rows(grid=(3, 2))
    assert (record.launches, record.loads) == (1, 1)
    assert list(record.grid) == [3, 2, 1] and list(record.block) == [64, 1, 1]
    assert record.stream == 1000 and record.function == record.loads
    check(record, scaled_rows, given)


def test_none_takes_no_place(gpu):
    record = gpu.record(7)
    check(record, scaled_rows, launch_scaled_rows(extra=False))


def test_a_variant_is_loaded_once_for_each_device(gpu):
    record = gpu.record(8)
    for width in (1, 16, 63):  # no integer is specialised on its value
        check(record, scaled_rows, launch_scaled_rows(width=width))
    assert (record.loads, record.launches, record.stream) == (1, 3, 1000)
    check(record, scaled_rows, launch_scaled_rows(OnGpu1))
    assert (record.loads, record.function, record.stream) == (2, 2, 1001)
    launch_scaled_rows()
    assert (record.loads, record.function, record.stream) == (2, 1, 1000) and gpu.device == 0
    launch_scaled_rows(negate=False)
    assert (record.loads, record.function) == (3, 3)


def test_an_empty_grid_launches_nothing(gpu):
    record = gpu.record(8)
    launch_scaled_rows(grid=(3, 0))
    assert (record.loads, record.launches) == (0, 0)


@pytest.mark.parametrize("direction", ["forward", "backward", "decode"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_of_attention(gpu, direction, dtype):
    calls = launched_by(gpu, attention_call(direction, dtype))
    assert len(calls) >= {"forward": 1, "backward": 2, "decode": 1}[direction]


def test_launches_of_prompt_concat(gpu):
    source = torch.arange(-2, 7).repeat(40)
    table, prompt, grad = torch.zeros(7, 24), torch.zeros(2, 24), torch.zeros(len(source), 24)
    assert launched_by(gpu, lambda: prompt_concat.forward(source, table, prompt, 2.0)) == ["gather"]
    calls = launched_by(gpu, lambda: prompt_concat.backward(grad, source, 2.0, 7, 2, True, True))
    assert calls == ["sum_chunks", "sum_readers", "sum_readers"]


def test_launches_of_rotary(gpu):
    x, table = torch.zeros(2, 3, 4, 40)[..., :24], torch.zeros(1, 3, 24)  # a part of each head
    assert launched_by(gpu, lambda: rotary.forward(x, table, table + 1)) == ["turn"]
    assert launched_by(gpu, lambda: rotary.backward(x, table, table + 1)) == ["turn"]


def attention_call(direction, dtype):
    new = partial(torch.zeros, dtype=dtype)
    bank, q, k, v = new(2, 5, 2, 32), new(12, 4, 32), new(12, 2, 32), new(12, 2, 32)
    options = dict(causal=True, window=9, softcap=30.0, sinks=torch.zeros(4), scale=0.125)
    if direction == "decode":
        seq, cache = Sequences.decode([3, 7], [0, 1]), new(2, 2, 8, 32)
        return lambda: attention.forward(q[:2], cache, cache, bank, bank, seq, **options)
    seq = Sequences.packed([0, 5, 12], [0, 1])
    if direction == "forward":
        return lambda: attention.forward(q, k, v, bank, bank, seq, **options)
    return lambda: attention.backward(q, q, k, v, bank, bank, q, torch.zeros(4, 12), seq, **options)


def launched_by(gpu, call):
    """The names of the kernels that an operator launches; each launch is checked against the driver's record.

    The operator's tensors are the host's, whose device has no index.
    """
    gpu.device, calls = None, []
    launched = launch.Kernel.__call__

    def checked(kernel, grid, options, *arguments, **constants):
        record = gpu.record(len(parameters(kernel, arguments)))
        launched(kernel, grid, options, *arguments, **constants)
        assert record.launches == 1, "every launch of these calls has work to do"
        assert list(record.grid) == [*grid, 1, 1][:3]
        assert list(record.block) == [32 * options.num_warps, 1, 1]
        check(record, kernel, arguments)
        calls.append(kernel.name)

    with mock.patch.object(launch.Kernel, "__call__", checked):
        call()
    return calls
