"""What the probes of a freshly attached model share: a quiet model for a while, and how far results may differ."""

from contextlib import contextmanager

import torch

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def tolerance(dtype):
    """How far two ways to the same result may lie apart in ``dtype``, relative to the largest value."""
    return _TOLERANCE.get(dtype, 1e-4)


def relative_error(result, expected):
    """The largest difference, relative to the largest expected value."""
    return float((result - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@contextmanager
def quiet(model):
    """Evaluation mode without autocast for a while; every module gets its own flag back."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for module, flag in flags.items():
            module.training = flag
