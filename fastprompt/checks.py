"""Argument checks shared by all operators: every message names the argument, what came and what is expected."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTS = (torch.int64, torch.int32)


def check_tensor(
    name: str,
    value: object,
    shape: Sequence[int | str],
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    like: tuple[str, torch.Tensor] | None = None,
) -> None:
    """Check one tensor argument.

    Args:
        name: the argument's name, for the message.
        value: what the caller passed.
        shape: expected sizes, one per dimension: an int is required exactly, a str is any size and only named.
        dtypes: the accepted dtypes, or None for any.
        like: ``(name, tensor)`` whose device, and dtype where ``dtypes`` is None, must be the same.

    Raises:
        TypeError: not a tensor, or a dtype that is not accepted.
        ValueError: another shape or device.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape {_show(shape)}, got {type(value).__name__}")
    if not _fits(value.shape, shape):
        raise ValueError(f"{name} must have shape {_show(shape)}, got {list(value.shape)}")
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{name} must have one of the dtypes {[str(d) for d in dtypes]}, got {value.dtype}")
    if like is not None:
        other_name, other = like
        if value.device != other.device:
            raise ValueError(f"{name} must be on {other.device} like {other_name}, got {value.device}")
        if dtypes is None and value.dtype != other.dtype:
            raise TypeError(f"{name} must have dtype {other.dtype} like {other_name}, got {value.dtype}")


def check_range(name: str, ids: torch.Tensor, low: int, high: int) -> None:
    """Check that every value of the integer tensor ``ids`` lies in ``[low, high)``.

    On the CPU a violation raises ValueError. On an accelerator reading the values would stall the queue, so there the
    check runs on the device and stops the program asynchronously.
    """
    if ids.numel() == 0:
        return
    if ids.device.type != "cpu":
        torch._assert_async(((ids >= low) & (ids < high)).all(), f"{name} must lie in [{low}, {high})")
        return
    smallest, largest = (int(x) for x in torch.aminmax(ids))
    if smallest < low or largest >= high:
        raise ValueError(f"{name} must lie in [{low}, {high}), got values from {smallest} to {largest}")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: fp32 for the low precisions, otherwise the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def without_autocast(device_type: str) -> AbstractContextManager:
    """A context for code whose matrix products autocast must not reach."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _fits(sizes: Sequence[int], shape: Sequence[int | str]) -> bool:
    if len(sizes) != len(shape):
        return False
    for size, expected in zip(sizes, shape):  # a loop: several times faster than all() of a generator
        if size != expected and not isinstance(expected, str):
            return False
    return True


def _show(shape: Sequence[int | str]) -> str:
    return "[" + ", ".join(str(n) for n in shape) + "]"
