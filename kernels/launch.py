"""How a Triton kernel is described, compiled and launched.

A :class:`Kernel` compiles each variant once and then launches through the compiled handle. A variant is told apart by
the types of the arguments, the constants, the configuration and one flag, ``aligned``; no integer is ever specialised
on its value, so new batch shapes never compile anything.

:func:`capture` runs the launching code of an operator without a GPU and writes down what would have been launched. The
compile matrix compiles, and the cost model counts, exactly those launches.
"""

import inspect
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

INTERPRETED = triton.knobs.runtime.interpret

_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}
# What a launch is "aligned" by, for loads of 16 bytes: bytes of pointers, and elements (of halves) of strides.
ALIGNMENT, DIVISOR = 16, 8

_captured = ContextVar("captured", default=None)


@dataclass(frozen=True)
class Options:
    """What the compiler is told beside the source: how many warps run a program, how deep loads are pipelined."""

    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Launch:
    """A launch that was captured: everything the compiler needs, and the grid."""

    kernel: "Kernel"
    grid: tuple
    types: tuple
    aligned: bool
    constants: tuple
    options: Options

    def compile(self, target):
        """The compiled kernel for a ``GPUTarget``; needs no GPU."""
        return self.kernel.compile(self.types, self.aligned, self.constants, self.options, target)


class Kernel:
    """A Triton kernel: ``kernel(grid, options, *arguments, **constants)``.

    Conventions for the function it wraps: constexpr parameters come last; integers named ``stride_*`` are int64
    elements, so every address computed with them is int64; other integers are int32, floats fp32; an argument that may be
    None is a constant where it is.
    """

    def __init__(self, function):
        self.function = triton.jit(function)
        parameters = inspect.signature(function).parameters
        self.name, self.arguments = function.__name__, []
        for name, parameter in parameters.items():
            if "constexpr" not in str(parameter.annotation):
                self.arguments.append(name)
        self.constants = list(parameters)[len(self.arguments) :]
        self._handles = {}

    def __call__(self, grid, options, *arguments, **constants):
        if 0 in grid:
            return
        if isinstance(self.function, InterpretedFunction):
            self.function[grid](*arguments, **constants)
            return
        types, aligned = [], True
        for name, value in zip(self.arguments, arguments, strict=True):
            if isinstance(value, torch.Tensor):
                types.append(_TYPES[value.dtype])
                aligned = aligned and value.data_ptr() % ALIGNMENT == 0
            elif value is None:
                types.append("constexpr")
            elif name.startswith("stride_"):
                types.append("i64")
                aligned = aligned and value % DIVISOR == 0
            else:
                types.append("i32" if isinstance(value, int) else "fp32")
        variant = tuple(types), aligned, tuple(constants[name] for name in self.constants), options
        if (launches := _captured.get()) is not None:
            launches.append(Launch(self, (*grid, 1, 1)[:3], *variant))
            return
        device = next(x.device.index for x in arguments if isinstance(x, torch.Tensor))
        if device == torch.cuda.current_device():
            self._launch(grid, device, variant, arguments)
        else:
            with torch.cuda.device(device):
                self._launch(grid, device, variant, arguments)

    def _launch(self, grid, device, variant, arguments):
        handle = self._handles.get((device, variant))
        if handle is None:
            handle = self._handles[device, variant] = self.compile(*variant, driver.active.get_current_target())
            handle[(1, 1, 1)]  # loads the module
        stream = driver.active.get_current_stream(device)
        handle.run(*(*grid, 1, 1)[:3], stream, handle.function, handle.packed_metadata, None, None, None, *arguments, *variant[2])

    def compile(self, types, aligned, constants, options, target):
        names = self.arguments + self.constants
        signature = dict(zip(names, [*types, *["constexpr"] * len(constants)]))
        values = {name: None for name, kind in zip(names, types) if kind == "constexpr"} | dict(zip(self.constants, constants))
        divisors = [ALIGNMENT if kind[0] == "*" else DIVISOR if name.startswith("stride_") else 1 for name, kind in zip(names, types)]
        attributes = {(i,): [["tt.divisibility", n]] for i, n in enumerate(divisors) if n > 1} if aligned else {}
        source = ASTSource(self.function, signature, values, attributes)
        flags = {"num_warps": options.num_warps, "num_stages": options.num_stages, "enable_fp_fusion": True}
        return triton.compile(source, target=target, options=flags)


@contextmanager
def capture(target):
    """Within it kernels are not launched: ``with capture(GPUTarget("cuda", 90, 32)) as launches: ...``.

    Tensors may be on any device, with or without storage ("meta").
    """
    launches = _Captured()
    launches.target = target
    token = _captured.set(launches)
    try:
        yield launches
    finally:
        _captured.reset(token)


class _Captured(list):
    target: GPUTarget


def current_target():
    """The ``GPUTarget`` kernels are compiled for here: what configurations are chosen by."""
    if (launches := _captured.get()) is not None:
        return launches.target
    return GPUTarget("cuda", 80, 32) if INTERPRETED else driver.active.get_current_target()


def unsupported(device_type, dtype):
    """None if kernels can run on such tensors, else the reason why not."""
    if dtype == torch.float64:
        return "the Triton kernels have no float64"
    if INTERPRETED or _captured.get() is not None or device_type == "cuda":
        return None
    return f"Triton kernels run on a GPU, the tensors are on {device_type}"
