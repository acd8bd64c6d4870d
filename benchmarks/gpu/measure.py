"""Each provider of an operator checked against the float64 reference and timed on one device."""

import time

import torch

from ..budget import FEW, Budget
from .record import Row


def normal(device, dtype):
    """A generator, and a function that draws tensors by it, the same ones after every call of this."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return generator, draw


def results_of(run, inputs, grad):
    """The output and the gradients of all inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = run(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def exactly(reference, inputs, grad):
    """What :class:`Budget` evaluates: :func:`results_of` of the reference in float64."""
    inputs, grad = [x.detach().double() for x in inputs], grad.double()
    return lambda stored: results_of(reference, inputs, grad)


def seconds(call, device, rounds=7, calls=10):
    """Seconds of one call, a value a round. Calls follow one another without a wait, as in training."""

    def wait():
        if device != "cpu":
            torch.cuda.synchronize()

    call()
    found = []
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        found.append((time.perf_counter() - start) / calls)
    return found


def milliseconds(call, device, **timing):
    """:func:`seconds` in milliseconds."""
    return [1e3 * s for s in seconds(call, device, **timing)]


def peak_mib(call, device):
    """MiB that a call allocates beyond what was there before; None on a CPU."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def compare(section, case, functions, exactly, inputs, grad, device, results=torch.float32, **timing):
    """Check each provider against ``exactly`` and ``results`` (see :class:`Budget`), and time it, forward and forward
    with backward."""
    rows, budget = [], Budget.of(exactly, grad.dtype, results=results, draws=FEW)
    for name, run in functions.items():
        try:
            rows += _checked_and_timed(section, case, name, run, budget, inputs, grad, device, timing)
        except (RuntimeError, NotImplementedError, ImportError) as problem:
            if name == "fastprompt":
                raise
            # A rival that cannot run here is no failure of ours.
            rows.append(Row(section, case, name, note=f"does not run: {str(problem).splitlines()[0][:120]}"))
    return rows


def _checked_and_timed(section, case, name, run, budget, inputs, grad, device, timing):
    error = budget.ratio(results_of(run, inputs, grad))
    inputs = [x.detach().requires_grad_() for x in inputs]

    def both():
        torch.autograd.grad(run(*inputs), inputs, grad)

    def forward():
        with torch.no_grad():
            run(*inputs)

    return [
        Row(
            section,
            f"{case}, {kind}",
            name,
            error,
            milliseconds(call, device, **timing),
            peak_mib(call, device),
        )
        for kind, call in {"forward": forward, "forward + backward": both}.items()
    ]
