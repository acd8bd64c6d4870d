"""What the tests of Triton kernels share: where they run, guarded buffers.

Every test in this folder runs within :func:`guards` (an autouse fixture), so that a kernel cannot read or write outside
its buffers, write into its inputs or leave an output unwritten without a test failing.
"""

import bisect
import math
from contextlib import contextmanager

import numpy as np
import torch
import triton.language as tl
from fastprompt.kernels.launch import INTERPRETED
from triton.runtime import interpreter
from triton.runtime.interpreter import interpreter_builder

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

_BAND = 1 << 16  # bytes before and after every buffer; a multiple of every alignment that matters
_records = []  # (name, buffer, what it must still be, the tensor in it if that may be written, where it starts)
_spans = []  # of the buffers of all records, sorted: (address of the first byte, of the one behind the last, name)


def guarded(tensor, offset=0):
    """A copy of ``tensor`` on DEVICE with the same strides, in a buffer that is poisoned before, after and between.

    Args:
        tensor: any strides, expanded dimensions included.
        offset: elements by which the start is off a 16-byte boundary.

    The copy must not be written: :func:`check_guards` tells.
    """
    buffer, copy = _bury(tensor, DEVICE, offset)
    _memory(copy).copy_(_memory(tensor.detach()))
    _record("an input", buffer, None, 0)
    return copy.requires_grad_(tensor.requires_grad)


def check_guards():
    """Fail if a byte outside the outputs made since :func:`guards` was entered, or of a guarded input, has changed."""
    for what, buffer, expected, output, start in _records:
        if output is not None:  # its own bytes may have changed
            memory = _memory(output)
            own = expected.view(output.dtype).as_strided(memory.shape, memory.stride(), start)
            own.copy_(memory)
        if not torch.equal(buffer, expected):
            changed = (buffer != expected).nonzero()
            first, last, size = changed[0].item() - _BAND, changed[-1].item() - _BAND, len(buffer) - 2 * _BAND
            raise AssertionError(f"{what} of {size} bytes: bytes {first} to {last} were written")


@contextmanager
def guards():
    """Within it ``torch.empty`` and its like give poisoned tensors in guarded buffers.

    Poison is NaN for floats and a large value for integers. On leaving, :func:`check_guards` runs. The interpreter also
    refuses to read the bands: what is read there may be thrown away, and then no result would show it. It rounds
    fp32 to the nearest bf16, as every GPU does; by itself it truncates. And it prepares the language once a launch and
    not at every call of a function, which takes a third of its time.
    """
    places = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]
    before = len(_records)
    originals = [(owner, name, getattr(owner, name), name in vars(owner)) for owner, name in places]
    for owner, name, original, _ in originals:
        setattr(owner, name, _poisoned(original))
    if INTERPRETED:
        load, convert = interpreter_builder.create_masked_load, interpreter._convert_float
        prepare = interpreter._patch_lang
        interpreter._patch_lang = _once_a_launch(prepare)
        interpreter._convert_float = _rounding(convert)
        interpreter_builder.create_masked_load = _checked(load)
    try:
        yield
        check_guards()
    finally:
        if INTERPRETED:
            interpreter_builder.create_masked_load, interpreter._convert_float = load, convert
            interpreter._patch_lang = prepare
        del _records[before:]
        _spans[:] = sorted(_span(what, buffer) for what, buffer, *_ in _records)
        for owner, name, original, own in originals:
            setattr(owner, name, original) if own else delattr(owner, name)


@contextmanager
def shuffled(seed):
    """Within it the interpreter runs the programs of every launch in a random order; on a GPU the order is its own."""
    if not INTERPRETED:
        yield
        return
    generator, orders = torch.Generator().manual_seed(seed), {}
    set_dim, set_index = interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx

    def draw(*grid):
        orders["now"] = torch.randperm(math.prod(grid), generator=generator).view(grid)
        set_dim(*grid)

    def place(*index):
        set_index(*(int(i) for i in torch.unravel_index(orders["now"][index], orders["now"].shape)))

    interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx = draw, place
    try:
        yield
    finally:
        del interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx


def _record(what, buffer, output, start):
    _records.append((what, buffer, buffer.clone(), output, start))
    bisect.insort(_spans, _span(what, buffer))


def _span(what, buffer):
    return buffer.data_ptr(), buffer.data_ptr() + len(buffer), what


def _poisoned(empty):
    def poisoned(*arguments, **options):
        made = empty(*arguments, **options)
        if type(made) is not torch.Tensor or made.device.type == "meta" or made.numel() == 0:
            return made
        buffer, tensor = _bury(made, made.device)
        _record("an output", buffer, tensor.detach(), _BAND // made.element_size())
        return tensor.requires_grad_(made.requires_grad)

    return poisoned


def _checked(load):
    def checked(place, mask, *rest):
        _check_reads(place, mask)
        return load(place, mask, *rest)

    return checked


def _check_reads(place, mask):
    addresses = place.data[mask.data.astype(bool)]
    if not addresses.size:
        return
    lowest, highest = int(addresses.min()), int(addresses.max())
    # The buffers that the span of the addresses touches: mostly one, between whose bands all of them are.
    number = max(bisect.bisect_right(_spans, (lowest, math.inf)) - 1, 0)
    for first, last, what in _spans[number:]:
        if first > highest:
            return
        if first + _BAND <= lowest and highest < last - _BAND:
            return
        inside = addresses[(addresses >= first) & (addresses < last)] - first
        if ((inside < _BAND) | (inside >= last - first - _BAND)).any():
            raise AssertionError(f"{what} of {last - first - 2 * _BAND} bytes: read at byte {int(inside[0]) - _BAND}")


def _once_a_launch(prepare):
    languages = {}  # of the globals of a function

    def prepared(function):
        names = function.__globals__
        if id(names) not in languages:
            languages[id(names)] = [x for x in (tl, tl.core) if any(x is value for value in names.values())]
        if any(tl.core.is_builtin(language.load) for language in languages[id(names)]):
            return prepare(function)

    return prepared


def _rounding(convert):
    def rounded(values, source, target, mode):
        if (source, target, mode) == (tl.float32, tl.bfloat16, None):
            return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16).numpy()
        return convert(values, source, target, mode)

    return rounded


def _bury(tensor, device, offset=0):
    """A poisoned buffer (bytes), and in its middle a tensor like ``tensor``, not filled."""
    extent = tensor.numel() and 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
    size = (extent + offset) * tensor.element_size()
    poison = 0xFF if tensor.is_floating_point() or tensor.is_complex() else 0x7F  # a NaN of its own, or a large integer
    buffer = torch.full((2 * _BAND + -(-size // 16) * 16,), poison, dtype=torch.uint8, device=device)
    start = _BAND + offset * tensor.element_size()
    storage = buffer.untyped_storage()[start : start + extent * tensor.element_size()]  # offset 0, as torch's own
    return buffer, torch.tensor([], dtype=tensor.dtype, device=device).set_(storage, 0, tensor.shape, tensor.stride())


def _memory(tensor):
    """The elements of ``tensor``, each place in memory once."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
