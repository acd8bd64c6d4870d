"""What a mask function of transformers says about which query sees which key.

transformers composes masks of functions ``(batch, head, query, key) -> seen``. Those it makes itself are recognised by
their code, and read without looking at a single pair; any other function is evaluated on all pairs of the batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import masking_utils as masking

from .structure import computes_the_same

_CELLS = 1 << 20  # pairs that are looked at at once: 1 MiB of booleans


@dataclass(frozen=True, eq=False)
class Pattern:
    """A query at position q sees the key at k if ``k - q <= ahead`` and ``q - k <= behind``, within its segment.

    Attributes:
        ahead, behind: None for no bound. A causal mask has ``ahead=0``.
        segments: ``[B, S]``, the number of the segment a token is in, never falling in a row. None: a row is one.
        chunk: queries and keys see each other within chunks of so many positions only. None: there are no chunks.
    """

    ahead: int | None = None
    behind: int | None = None
    segments: torch.Tensor | None = None
    chunk: int | None = None

    @property
    def causal(self) -> bool:
        return self.ahead == 0

    @property
    def is_expressible(self) -> bool:
        """Can ``causal`` and ``window`` of prefix_attention say this?"""
        return self.chunk is None and (self.causal or self.ahead == self.behind)

    def of_positions_below(self, limit: int) -> "Pattern":
        """The same pattern for positions from 0 to ``limit - 1``: chunks that hold them all say nothing."""
        return self if self.chunk is None or limit > self.chunk else replace(self, chunk=None)

    @property
    def window(self) -> int | None:
        """prefix_attention's: keys nearer than this are seen."""
        return None if self.behind is None else self.behind + 1

    def sees(self, batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """As a mask function of transformers, the segments left out."""
        seen = (query >= 0) & (key >= 0)  # all of them
        if self.ahead is not None:
            seen = seen & (key - query <= self.ahead)
        if self.behind is not None:
            seen = seen & (query - key <= self.behind)
        return seen

    def __and__(self, other: "Pattern") -> "Pattern | None":
        """What both let see; None if both have segments, or chunks."""
        if self.segments is not None and other.segments is not None:
            return None
        if self.chunk is not None and other.chunk is not None:
            return None
        segmented = other if self.segments is None else self
        return replace(
            segmented,
            ahead=_least(self.ahead, other.ahead),
            behind=_least(self.behind, other.behind),
            chunk=_least(self.chunk, other.chunk),
        )


def read_pattern(mask_function: Callable) -> Pattern | None:
    """The pattern of a mask function that transformers made, read off its code; None for any other function.

    Exact: what cannot be said without looking at pairs (blocks, functions of a model's own) is None.
    """
    if mask_function is masking.causal_mask_function:
        return Pattern(ahead=0)
    if mask_function is masking.bidirectional_mask_function or _is_constant(mask_function):
        return Pattern()
    for factory, read in _READERS.items():
        if _is_made_by(factory, mask_function):
            return read(**_closure(mask_function))
    return None


def name_unread(mask_function: Callable) -> str:
    """What :func:`read_pattern` cannot read in a mask function, for a message."""
    closure = _closure(mask_function)
    if _is_made_by("and_masks", mask_function) or _is_made_by("or_masks", mask_function):
        unread = [name_unread(part) for part in closure["mask_functions"] if not _is_read(part)]
        return " and ".join(dict.fromkeys(unread)) or "a combination of masks"
    if _is_made_by("remap_positions_for_packed_sequence", mask_function):
        return name_unread(closure["mask_function"])
    for factory, name in _NAMES.items():
        if _is_made_by(factory, mask_function):
            return name
    return f"the mask function {getattr(mask_function, '__qualname__', type(mask_function).__qualname__)}"


def _is_read(mask_function):
    pattern = read_pattern(mask_function)
    return pattern is not None and pattern.chunk is None


def find_pattern(mask_function: Callable, real: torch.Tensor, *, use_vmap: bool = False) -> Pattern | None:
    """The pattern without segments that equals a mask function on all pairs of real tokens, or None if there is none.

    Looks at every pair, a block of queries at a time. A bound that hides none of these pairs is given as None.

    Args:
        mask_function: any.
        real: ``[B, S]`` booleans, in each row one run of True or none.
        use_vmap: as transformers hands it to a mask interface: the function cannot be broadcast.
    """
    batch, width = real.shape
    first, last = _bounds(real)
    longest = int((last - first).max()) if batch else 0
    if longest == 0:
        return Pattern(ahead=0)
    keys = torch.arange(width, device=real.device)
    ahead = behind = seen_pairs = 0
    step = max(1, _CELLS // (batch * width))
    for start in range(0, width, step):
        queries = keys[start : start + step]
        mask: Any = masking.sdpa_mask(
            batch_size=batch,
            q_length=len(queries),
            kv_length=width,
            q_offset=start,
            mask_function=mask_function,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=real.device,
        )
        seen = mask[:, 0] & real[:, queries, None] & real[:, None, :]
        seen_pairs += int(seen.sum())
        distance = (keys - queries[:, None]).masked_fill(~seen.any(0), 0)
        ahead, behind = max(ahead, int(distance.max())), max(behind, -int(distance.min()))
        # Every pair that is seen lies in the band of these two bounds. If as many are seen as the band has, it is the
        # band; and one that has too many already will not have fewer.
        if seen_pairs < _pairs_in_band(first, last, start + step, ahead, behind):
            return None
    hides_nothing = max(1, longest - 1)
    bounds = [None if bound >= hides_nothing else bound for bound in (ahead, behind)]
    return Pattern(bounds[0], bounds[1])


def _bounds(real):
    """``[B]`` each: the first token of each row's run, and what follows the last one."""
    first = real.int().argmax(1)
    return first, first + real.sum(1)


def _pairs_in_band(first, last, end, ahead, behind):
    """How many pairs of tokens of a run have ``-behind <= key - query <= ahead``, for queries before column ``end``."""
    distance = torch.arange(-behind, ahead + 1, device=first.device)
    begins = first[:, None] - distance.clamp(max=0)
    ends = (last[:, None] - distance.clamp(min=0)).clamp(max=end)
    return int((ends - begins).clamp(min=0).sum())


_WAITS = ContextVar("fastprompt_waits", default=True)


@contextmanager
def without_waiting() -> Iterator[None]:
    """While the block runs, what masks have to be for packed rows is taken to hold, and checked by the device."""
    token = _WAITS.set(False)
    try:
        yield
    finally:
        _WAITS.reset(token)


def holds(condition: torch.Tensor) -> bool:
    """Is it so? As in ``check_range``, an accelerator that is not waited for stops the program if it is not."""
    if _WAITS.get():
        return bool(condition)
    torch._assert_async(condition, "a model took packed rows apart by position ids, or by a mask, of its own")
    return True


def _least(*bounds):
    return min((bound for bound in bounds if bound is not None), default=None)


# What the functions that transformers' factories return say; the arguments are the variables in their closure.


def _closure(function):
    """The variables that a function closes over; {} for another callable."""
    cells = getattr(function, "__closure__", None) or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells)} if cells else {}


def _read_and(mask_functions):
    pattern, positions = Pattern(), None
    for function in map(_what_sees, mask_functions):
        if _is_made_by("remap_positions_for_packed_sequence", function):
            function, positions = _closure(function)["mask_function"], _closure(function)["position_ids"]
        inner = read_pattern(function)
        pattern = None if inner is None else pattern & inner
        if pattern is None:
            return None
    if positions is not None and not _count_within(pattern.segments, positions):
        return None
    return pattern


def _count_within(segments, positions):
    """Do the positions go up by 1 from token to token of a segment, so that a distance is one of indices too?"""
    counts = positions.diff(dim=1) == 1
    return holds((counts if segments is None else counts | (segments.diff(dim=1) != 0)).all())


def _read_or(mask_functions):
    seeing = [function for function in mask_functions if not _sees_nothing(function)]
    return read_pattern(seeing[0]) if len(seeing) == 1 else None


def _what_sees(function):
    """The one part of a union that sees anything; any other function as it is."""
    parts = _closure(function)["mask_functions"] if _is_made_by("or_masks", function) else ()
    seeing = [part for part in parts if not _sees_nothing(part)]
    return seeing[0] if len(seeing) == 1 else function


def _sees_nothing(function):
    """Is this the overlay of bidirectional blocks for a batch without a block?"""
    if not _is_made_by("blockwise_overlay", function):
        return False
    return not bool((_closure(function)["block_sequence_ids"] >= 0).any())


def _read_window(sliding_window):
    return Pattern(behind=sliding_window - 1)


def _read_bidirectional_window(sliding_window):
    return Pattern(ahead=sliding_window, behind=sliding_window)


def _read_chunks(chunk_size, left_padding):
    return None if bool((left_padding != 0).any()) else Pattern(chunk=chunk_size)


def _read_segments(packed_sequence_mask):
    rises = packed_sequence_mask.diff(dim=1) >= 0
    return Pattern(segments=packed_sequence_mask) if holds(rises.all()) else None


def _every_pair():
    return lambda *args: torch.tensor(True, dtype=torch.bool)


def _is_constant(function):
    """Is it what Falcon adds to its mask, before transformers 5.15, so that there is one for ALiBi?"""
    return computes_the_same(function, _every_pair()) and function.__globals__.get("torch") is torch


_anything = torch.zeros(1, 1, dtype=torch.int64)
# Of the functions that each factory returns, by its name. Versions of transformers before 5.23 have not all of them.
_CODE = {
    name: getattr(masking, name)(*arguments).__code__
    for name, arguments in {
        "and_masks": (),
        "or_masks": (),
        "sliding_window_overlay": (1,),
        "sliding_window_bidirectional_overlay": (1,),
        "packed_sequence_mask_function": (_anything,),
        "blockwise_overlay": (_anything,),
        "chunked_overlay": (1, _anything),
        "remap_positions_for_packed_sequence": (masking.causal_mask_function, _anything),
    }.items()
    if hasattr(masking, name)
}
_NAMES = {
    "chunked_overlay": "attention in chunks",
    "blockwise_overlay": "attention both ways within blocks",
    "packed_sequence_mask_function": "a mask of sequences in no order",
}
_READERS: dict[str, Callable[..., Pattern | None]] = {
    "and_masks": _read_and,
    "or_masks": _read_or,
    "sliding_window_overlay": _read_window,
    "sliding_window_bidirectional_overlay": _read_bidirectional_window,
    "packed_sequence_mask_function": _read_segments,
    "chunked_overlay": _read_chunks,
}


def _is_made_by(factory, function):
    return getattr(function, "__code__", None) is _CODE.get(factory, _CODE)
