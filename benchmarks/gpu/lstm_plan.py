"""The rule of csrc/cuda/prompt_lstm.h that picks a kernel, compiled by the C++ compiler and called through ctypes."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

CUDA = Path(__file__).parents[2] / "csrc/cuda"
COMMAND = os.environ.get("CXX", "c++").split()
COMPILER = shutil.which(COMMAND[0]) if os.name == "posix" else None
CLUSTER, GRID = 0, 1  # of Plan.exchange


def _structure(name, **fields):
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


INT, POINTER = ctypes.c_int, ctypes.c_void_p
Problem = _structure("Problem", hidden=INT, directions=INT, element=INT, backward=ctypes.c_bool)
Chip = _structure("Chip", processors=INT, shared=INT, cluster=INT)
Plan = _structure("Plan", exchange=INT, blocks=INT, tiles=INT, warps=INT, held=INT, kept=INT, shared=INT)
Args = _structure(
    "Args",
    matrix=POINTER * 2,
    input=POINTER,
    steps=POINTER,
    output=POINTER,
    words=POINTER,
    count=INT,
    hidden=INT,
    directions=INT,
    plan=Plan,
)


def build(library, *sources, flags=()):
    """Compile files of csrc/cuda/host, where CUDA is an emulation, to the shared library ``library``, and load it."""
    command = [*COMMAND, "-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", *flags, f"-I{CUDA / 'host'}"]
    subprocess.run([*command, *(CUDA / "host" / name for name in sources), "-o", library], check=True)
    return ctypes.CDLL(str(library))


def choose(library, chip, problem):
    plan = Plan()
    library.choose_plan(ctypes.byref(problem), ctypes.byref(chip), ctypes.byref(plan))
    return plan


def make(library, problem, cluster, blocks, room, registers=True):
    """A plan of the caller's own; room: bytes of shared memory that a block may have."""
    plan = Plan()
    library.make_plan(ctypes.byref(problem), cluster, blocks, room, registers, ctypes.byref(plan))
    return plan


def chunks(problem):
    """Of a row of the matrix."""
    return -(-(4 if problem.backward else 1) * problem.hidden * problem.element // 16)
