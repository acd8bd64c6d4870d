"""Finds the module that runs a call, of backends that may not be installed or cannot take it."""

from functools import cache

import torch

from .. import native
from ..checks import choose_backend, import_backend


def launcher(op, backend):
    """The module ``fastprompt.ops.<op>.<backend>`` and None, or None and the reason why it cannot be imported."""
    return import_backend(f"{__package__}.{op}", backend)


def available(op, device_type, dtype, *shape):
    """Backend name -> None if it can run such a call, else why not: a reference, C++ and Triton kernels, no CUDA C++.

    ``shape`` is what the Triton kernels of the operator want to know beside device and dtype.
    """
    triton, problem = launcher(op, "triton")
    return {
        "reference": None,
        "cpu": native.unsupported(device_type, dtype),
        "triton": problem or triton.unsupported(device_type, dtype, *shape),
        "cuda": "this operator has no CUDA C++ kernel",
    }


def available_here(op, *shape):
    """:func:`available` for float32 on what this machine has: its GPU if there is one, and for the C++ kernels its CPU."""
    return available(op, "cuda" if torch.cuda.is_available() else "cpu", torch.float32, *shape) | {
        "cpu": native.missing
    }


def choose(op, requested, device_type, dtype):
    """The backend that runs a call; "auto" takes C++ before Triton before the reference."""
    if requested == "auto" and device_type == "cpu":  # without a look at Triton, whose import takes time
        backends = {"reference": None, "cpu": native.unsupported(device_type, dtype)}
    else:
        backends = available(op, device_type, dtype)
    return choose_backend(op, requested, backends, ("cpu", "triton", "reference"))


@cache
def implementation(op, requested, device_type, dtype):
    """The module of the backend that :func:`choose` takes, remembered: the answer is the same for every such call."""
    return launcher(op, choose(op, requested, device_type, dtype))[0]


def is_eager(tensor):
    """Whether the call may go straight to the function that implements a registered operator, which saves microseconds.

    torch.compile has to see the operator itself, and a subclass of Tensor, such as a FakeTensor, torch's dispatcher.
    """
    return not torch.compiler.is_compiling() and type(tensor) in (torch.Tensor, torch.nn.Parameter)
