"""How a Triton kernel is described, compiled and launched.

A :class:`Kernel` compiles each variant once and then launches through the compiled handle. A variant is told apart by
the types of the arguments, the constants, the configuration and one flag, ``aligned``; no integer is ever specialised
on its value, so new batch shapes never compile anything.

:func:`capture` runs the launching code of an operator without a GPU and writes down what would have been launched. The
compile matrix compiles, and the cost model counts, exactly those launches.
"""

import inspect
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

INTERPRETED = triton.knobs.runtime.interpret

_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
          torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}  # fmt: skip
# What a launch is "aligned" by, for loads of 16 bytes: bytes of pointers, and elements (of halves) of strides.
ALIGNMENT, DIVISOR = 16, 8

_ANYWHERE = nullcontext()

_captured = ContextVar("captured", default=None)


@dataclass(frozen=True)
class Options:
    """What the compiler is told beside the source: how many warps run a program, how deep loads are pipelined, and how
    many registers a thread may have (NVIDIA; None: the compiler may spill a few where more programs then fit a
    processor)."""

    num_warps: int = 4
    num_stages: int = 2
    registers: int | None = None


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

    def source(self):
        """What Triton compiles, and its options."""
        return self.kernel.source(self.types, self.aligned, self.constants, self.options)


class Kernel:
    """A Triton kernel: ``kernel(grid, options, *arguments, **constants)``.

    Conventions for the function it wraps: constexpr parameters come last; an argument is a tensor, a number, or a named
    tuple of these; integers named ``stride_*`` are int64 elements, so every address computed with them is int64; other
    integers are int32, floats fp32; an argument that may be None is a constant where it is.
    """

    def __init__(self, function):
        self.function = triton.jit(function)
        parameters = inspect.signature(function).parameters
        self.name, arguments = function.__name__, []
        for name, parameter in parameters.items():
            if "constexpr" not in str(parameter.annotation):
                arguments.append(name)
        self.arguments = tuple(arguments)
        self.constants = tuple(parameters)[len(arguments) :]
        self._handles, self._places = {}, {}

    def __call__(self, grid, options, *arguments, **constants):
        if 0 in grid:
            return
        if isinstance(self.function, InterpretedFunction):
            self.function[grid](*arguments, **constants)
            return
        flat = []
        for x in arguments:
            if isinstance(x, tuple):
                flat += x
            else:
                flat.append(x)
        classes = tuple(map(type, arguments)), tuple(map(type, flat))
        tensors, stride_places = self._places.get(classes) or self._find_places(*classes)
        dtypes, pointers, strides = [], 0, 0
        for i in tensors:
            dtypes.append(flat[i].dtype)
            pointers |= flat[i].data_ptr()
        for i in stride_places:
            strides |= flat[i]
        aligned = pointers % ALIGNMENT == 0 and strides % DIVISOR == 0
        types = *classes, tuple(dtypes)
        variant = types, aligned, tuple([constants[name] for name in self.constants]), options
        if (launches := _captured.get()) is not None:
            launches.append(Launch(self, (*grid, 1, 1)[:3], self._types(*types), *variant[1:]))
            return
        device = flat[tensors[0]].device
        with _on(device):
            _, run, function, metadata = self._handles.get((device, variant)) or self._load(device, variant)
            stream = driver.active.get_current_stream(device.index)
            run(*(*grid, 1, 1)[:3], stream, function, metadata, None, None, None, *arguments, *variant[2])

    def _load(self, device, variant):
        """The compiled kernel, which unloads when it is forgotten, and what a launch needs of it."""
        types, *others = variant
        compiled = self.compile(self._types(*types), *others, _target(device))
        compiled[(1, 1, 1)]  # loads the module
        self._handles[device, variant] = compiled, compiled.run, compiled.function, compiled.packed_metadata
        return self._handles[device, variant]

    def _find_places(self, groups, classes):
        """Which of the values are tensors and which strides: to ask each anew would cost more than all the rest."""
        tensors = [i for i, kind in enumerate(classes) if issubclass(kind, torch.Tensor)]
        strides = [i for i, (_, name) in enumerate(_names(self.arguments, groups)) if name.startswith("stride_")]
        self._places[groups, classes] = tensors, strides
        return tensors, strides

    def _types(self, groups, classes, dtypes):
        """Triton's names for the types of the arguments; ``dtypes`` are those of the tensors among them."""
        names, dtypes, types = _names(self.arguments, groups), iter(dtypes), []
        for (_, name), kind in zip(names, classes, strict=True):
            if issubclass(kind, torch.Tensor):
                types.append(_TYPES[next(dtypes)])
            elif issubclass(kind, int):
                types.append("i64" if name.startswith("stride_") else "i32")
            else:
                types.append("constexpr" if kind is type(None) else "fp32")
        types = iter(types)
        return tuple(
            kind(*(next(types) for _ in kind._fields)) if issubclass(kind, tuple) else next(types) for kind in groups
        )

    def compile(self, types, aligned, constants, options, target):
        source, flags = self.source(types, aligned, constants, options)
        return triton.compile(source, target=target, options=flags)

    def source(self, types, aligned, constants, options):
        """What Triton compiles, and its options."""
        names = self.arguments + self.constants
        signature, values, attributes = dict(zip(names, types)), {}, {}
        for i, value in enumerate(constants, len(types)):
            if isinstance(value, tuple):
                signature[names[i]] = type(value)(*["constexpr"] * len(value))
                values |= {(i, j): field for j, field in enumerate(value)}
            else:
                signature[names[i]], values[(i,)] = "constexpr", value
        flat = [x for one in types for x in (one if isinstance(one, tuple) else (one,))]
        for (path, name), kind in zip(_names(self.arguments, tuple(map(type, types))), flat, strict=True):
            if kind == "constexpr":
                values[path] = None
            elif aligned and (kind[0] == "*" or name.startswith("stride_")):
                attributes[path] = [["tt.divisibility", ALIGNMENT if kind[0] == "*" else DIVISOR]]
        source = ASTSource(self.function, signature, values, attributes)
        flags = {"num_warps": options.num_warps, "num_stages": options.num_stages, "enable_fp_fusion": True}
        if options.registers:
            flags["maxnreg"] = options.registers
        return source, flags


def _names(arguments, groups):
    """Where each value stands, as Triton says it, and its name; ``groups``: the classes of the arguments."""
    found = []
    for i, (name, kind) in enumerate(zip(arguments, groups, strict=True)):
        if issubclass(kind, tuple):
            found += [((i, j), field) for j, field in enumerate(kind._fields)]
        else:
            found.append(((i,), name))
    return found


def by_field(values):
    """A dictionary of arguments or constants with the fields of named tuples in place of these."""
    found = {}
    for name, value in values.items():
        found |= value._asdict() if isinstance(value, tuple) else {name: value}
    return found


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


def target_of(device):
    """The ``GPUTarget`` kernels are compiled for on a device: what configurations are chosen by."""
    if (launches := _captured.get()) is not None:
        return launches.target
    return GPUTarget("cuda", 80, 32) if INTERPRETED else _target(device)


def name_of(device):
    """The name a device's tuned tables go by; None where nothing is launched on a GPU."""
    return None if INTERPRETED or device.type != "cuda" or _captured.get() is not None else _name(device)


@cache
def _name(device):
    return torch.cuda.get_device_name(device)


@cache
def _target(device):
    with _on(device):
        return driver.active.get_current_target()


def _on(device):
    """Within it the device is the current one."""
    return _ANYWHERE if device.index == torch.cuda.current_device() else torch.cuda.device(device)
