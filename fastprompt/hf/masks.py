"""How a planned batch is described to a model: what stands where its layers expect an attention mask.

Inside of a :func:`running` block a model that asks transformers for a mask is given a :class:`PackedMask`; it travels
through the layers, gradient checkpointing included, to the attention function, which finds everything it needs in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..backends import is_eager
from ..layout import RowPlan, Sequences
from ..ops.prefix_attention.scheduled import Shape, make_schedule
from .mask_patterns import find_pattern, holds, name_unread, read_pattern, without_waiting
from .shared_state import SharedState
from .states import Recorded


class UnsupportedAttention(NotImplementedError):
    """A model asks attention for something prefix_attention does not compute; the message says what."""


@dataclass(frozen=True, eq=False)
class PackedMask:
    """What stands where a model expects its attention mask, for attention that runs on prefix_attention.

    Attributes:
        seq: the sequences among the rows of the batch.
        window: see prefix_attention.
        causal: see prefix_attention.
        shared: the learned keys and values in front of the sequences.
        dense: the same mask for the implementation before; None for planned rows, which it cannot run.
        shapes: of the calls of attention, which are written down here for the schedules of batches to come; or None.
        schedules: for compiled layers, by the dtype and shape of a call and whether anything stands in front.
        keys: the rows that are keys, where they are others than those of the queries: those of the sequences' sources.
        of_tokens: the same without gaps, for compiled layers that count tokens alone; None where it is not needed.
    """

    seq: Sequences
    window: int | None = None
    causal: bool = True
    shared: SharedState = SharedState()
    dense: "DenseMask | None" = None
    shapes: set[Shape] | None = None
    schedules: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)
    keys: Sequences | None = None
    of_tokens: "PackedMask | None" = None
    ndim = 0  # Falcon adds ALiBi to masks of four dimensions

    def to(self, *args: Any, **kwargs: Any) -> "PackedMask":
        """accelerate moves whatever has ``to`` between devices; the sequences follow when attention reads them."""
        return self

    def __getitem__(self, index: Any) -> "PackedMask":
        """All of it: Gemma 4 takes the last rows of its mask for layers without keys of their own, or all of them, and
        DeepSeek V3.2 the one head that a mask has.

        Raises:
            UnsupportedAttention: some of it is wanted.
        """
        whole = (slice(None), slice(0, None))
        if any(part not in whole and (place, part) != (1, 0) for place, part in enumerate(index)):
            raise UnsupportedAttention(f"it takes {index} of its mask")
        return self


@dataclass(frozen=True, eq=False)
class DenseMask:
    """What stands where a model expects its attention mask, for attention that runs on the implementation before.

    Attributes:
        before: its name.
        arguments: what the model asked its mask function for.
        shared: see :class:`PackedMask`.
    """

    before: str
    arguments: dict[str, Any]
    shared: SharedState = SharedState()

    def to(self, *args: Any, **kwargs: Any) -> "DenseMask":
        """As :meth:`PackedMask.to`."""
        return self

    @cached_property
    def of_each_row(self) -> SharedState:
        """``shared`` with an entry for each row of the batch."""
        return self.shared.of_each_row(self.arguments["batch_size"])

    @cached_property
    def behind_nothing(self) -> torch.Tensor | None:
        """The mask over own keys, for a layer without learned ones."""
        return ALL_MASK_ATTENTION_FUNCTIONS[self.before](**self.arguments)

    @cached_property
    def behind_prefix(self) -> torch.Tensor | None:
        """The mask over learned and own keys."""
        length, arguments = self.shared.length, dict(self.arguments)
        arguments["kv_length"] += length
        arguments["q_offset"] = arguments.get("q_offset", 0) + length
        arguments["allow_is_causal_skip"] = arguments["allow_is_bidirectional_skip"] = False
        real = arguments.get("attention_mask")
        if real is not None:
            arguments["attention_mask"] = torch.cat([real.new_ones(real.shape[0], length), real], 1)
        return ALL_MASK_ATTENTION_FUNCTIONS[self.before](**arguments)


@dataclass(frozen=True, eq=False)
class RefusedMask:
    """What stands in place of a mask that packed rows have no form for, until attention is to run under it.

    Decoders of the BART kind ask for a mask of their encoder's states even where there are none.

    Attributes:
        reason: why not.
    """

    reason: str

    def to(self, *args: Any, **kwargs: Any) -> "RefusedMask":
        """As :meth:`PackedMask.to`."""
        return self


class PackedRows:
    """Rows that :mod:`fastprompt.layout` planned, as the one packed sequence of a batch of size 1.

    Args:
        plan: a RowPlan.
        causal: is the plan one for causal attention only? (It is if rows are shared.)
        shared: the learned keys and values in front of the sequences; None: there are none.
        recorded: where layers with a state leave what a cache holds; None: nowhere.
        sources: what the rows of each sequence see in cross-attention, the rows of an encoder; None: there are none.
        shapes: of the model's calls of attention, as far as they are known; more are added.
        compiled: the dtype of compiled layers, for which all that attention is told has to be tensors; None: there are
            no such layers.

    Attributes:
        plan: the RowPlan.
        asked: did the model ask for a mask at all?
        has_window: did it ask for that of a sliding window?
        differentiable: are gradients recorded, so that no layer may run without unless it is run again?
        run_again_by_others: may layers be run again outside of a block that says of what batch they are?
        ran: the layers with a state that ran these rows as sequences.
    """

    def __init__(
        self,
        plan: RowPlan,
        causal: bool = True,
        shared: SharedState | None = None,
        recorded: Recorded | None = None,
        sources: Sequences | None = None,
        shapes: set[Shape] | None = None,
        compiled: torch.dtype | None = None,
    ) -> None:
        self.plan, self.asked, self.has_window = plan, False, False
        self.shapes, self.compiled = shapes, compiled
        self.sequences: Any = plan.sequences
        self.sources = sources
        self.causal, self.recorded = causal, recorded
        self.differentiable = torch.is_grad_enabled()
        self.run_again_by_others = False
        self.ran: set[Any] = set()
        self.shared = shared or SharedState()

    def mask(self, before: str, **arguments: Any) -> PackedMask | RefusedMask:
        """The mask of the plan's sequences; a refused one if the model asks for one that is not causal and they are.

        Raises:
            UnsupportedAttention: the model asks for more: a mask that is neither causal, bidirectional nor a sliding
                window, one with padding or sequences of its own, or one of other rows.
        """
        self.asked = True
        waits = is_eager(self.plan.source) and self.plan.source.device.type == "cpu"
        with nullcontext() if waits else without_waiting():
            return self._mask(**arguments)

    def _mask(self, *, batch_size, q_length, kv_length, mask_function, attention_mask=None, **_):
        pattern, rows = read_pattern(mask_function), self.sequences.rows
        # A decoder's self-attention is causal, and its cross-attention is not.
        sources = None if pattern is None or pattern.causal else self.sources
        keys = rows if sources is None else sources.rows
        if (batch_size, q_length, kv_length) != (1, rows, keys):
            raise UnsupportedAttention(
                f"it asks for a mask of {batch_size} x {q_length} queries and {kv_length} keys for {rows} packed rows"
                + ("" if keys == rows else f" and {keys} of their sources")
            )
        if pattern is not None and pattern.chunk is not None:
            pattern = pattern.of_positions_below(int(self.plan.position_ids.max()) + 1)
        if pattern is None or not pattern.is_expressible:
            raise UnsupportedAttention(f"{name_unread(mask_function)} has no form for packed rows")
        if self.causal and not pattern.causal:
            return RefusedMask("its attention is not causal")
        if attention_mask is not None and not bool(attention_mask.all()):
            raise UnsupportedAttention("it masks some of the packed rows")
        if pattern.segments is not None and self._splits_a_sequence(pattern.segments):
            raise UnsupportedAttention("it splits a sequence by position ids, or by a mask, of its own")
        if sources is not None:
            if pattern.window is not None or pattern.segments is not None:
                raise UnsupportedAttention(f"{name_unread(mask_function)} has no form for cross-attention")
            return self._packed(self.sequences, None, False, SharedState(), keys=sources)
        self.has_window = self.has_window or pattern.window is not None
        if pattern.window is not None and self.plan.shared.pads_between(self.shared.length):
            raise UnsupportedAttention("its window reaches over padding that stands between rows that are shared")
        given = pattern.window, pattern.causal, self.shared
        of_tokens = None
        if self.compiled is not None and self.sequences.gaps is not None and any(x.alibi for x in self.shapes or ()):
            of_tokens = self._packed(replace(self.sequences, gaps=None), *given)
        return self._packed(self.sequences, *given, of_tokens=of_tokens)

    def _packed(self, sequences, window, causal, shared, **given):
        """A mask with, for compiled layers, the schedules of all shapes of attention that are known."""
        schedules: dict[tuple[Any, ...], torch.Tensor] = {}
        if self.compiled is not None:
            options: dict[str, Any] = dict(causal=causal, window=window, key_seq=given.get("keys"))
            options |= dict(dtype=self.compiled, device=self.plan.source.device)
            for has_bank, (prefixes, room) in shared.banks().items():
                for shape in self.shapes or ():
                    key = (self.compiled, *shape, has_bank)
                    schedules[key] = make_schedule(sequences, shape, prefixes=prefixes, room=room, **options)
        return PackedMask(sequences, window, causal, shared, shapes=self.shapes, schedules=schedules, **given)

    def _splits_a_sequence(self, segments):
        splits = segments[0].diff(prepend=segments[0, :1], append=segments[0, -1:]) != 0
        splits[self.sequences.starts.to(splits.device)] = False  # behind the last row, if nothing is left of one
        return not holds(~splits[: int(self.sequences.host.lengths.sum())].any())  # behind them dead rows


class PaddedBatch:
    """A batch as users pass it: padded, packed by its position ids, or decoding, behind a shared state or none.

    Attributes:
        asked: did the model ask for a mask at all?
    """

    def __init__(self, shared: SharedState | None = None) -> None:
        self.shared = shared or SharedState()
        self.asked = False

    def mask(self, before: str, **arguments: Any) -> PackedMask | DenseMask | torch.Tensor | None:
        """A :class:`PackedMask` where one says the same on all pairs of real tokens, else the mask there was before.

        Raises:
            UnsupportedAttention: a mask that a learned prefix has no place under.
        """
        self.asked = True
        pattern = read_pattern(arguments["mask_function"])
        if self.shared.learned and (pattern is None or pattern.chunk is not None):
            raise UnsupportedAttention(f"{name_unread(arguments['mask_function'])} leaves no place for a prefix")
        packed = self._packed(before, pattern, **arguments)
        if packed is not None:
            return packed
        if pattern is None or not self.shared.learned:
            return ALL_MASK_ATTENTION_FUNCTIONS[before](**arguments)
        if pattern.segments is not None:
            raise UnsupportedAttention("sequences that are both packed and padded leave no place for a prefix")
        # Of indices alone, which moves behind the prefix; a function over the tokens of the batch would not.
        return DenseMask(before, arguments | dict(mask_function=pattern.sees, use_vmap=False), self.shared)

    def _packed(
        self, before, pattern, *, batch_size, q_length, kv_length, mask_function, attention_mask=None, **arguments
    ):
        if q_length != kv_length or not _starts_at_zero(arguments):
            return None
        if pattern is not None and pattern.chunk is not None:
            pattern = None  # all pairs say whether a chunk holds each row
        real = _real(attention_mask, batch_size, q_length, arguments.get("device", "cpu"))
        runs = _runs(real, None if pattern is None else pattern.segments)
        if runs is None:
            return None
        starts, lengths, gaps = runs
        if pattern is None:
            pattern = find_pattern(mask_function, real, use_vmap=arguments.get("use_vmap", False))
        if pattern is None or not pattern.is_expressible:
            return None
        ids = self.shared.repeated(batch_size)
        ids = None if ids is None else ids[starts // q_length]
        seq = Sequences.runs(starts, lengths, batch_size * q_length, ids, gaps=gaps)
        arguments |= dict(batch_size=batch_size, q_length=q_length, kv_length=kv_length)
        arguments |= dict(mask_function=mask_function, attention_mask=attention_mask)
        dense = DenseMask(before, arguments, self.shared)
        return PackedMask(seq, pattern.window, pattern.causal, self.shared, dense)


class AsBefore:
    """A batch that runs as it would if its model were not attached, nor patched with a prefix."""

    shared = SharedState()

    def mask(self, before: str, **arguments: Any) -> Any:
        """The mask of the implementation before."""
        return ALL_MASK_ATTENTION_FUNCTIONS[before](**arguments)


def _starts_at_zero(arguments):
    offsets = arguments.get("q_offset", 0), arguments.get("kv_offset", 0)
    return not any(isinstance(offset, torch.Tensor) or offset for offset in offsets)


def _real(attention_mask, batch, width, device):
    """``[B, S]`` booleans: the tokens that are no padding. Behind a short mask all is, as in transformers."""
    if attention_mask is None:
        return torch.ones(batch, width, dtype=torch.bool, device=device)
    real = attention_mask[:, :width].bool()
    return torch.nn.functional.pad(real, (0, width - real.shape[1]))


def _runs(real, segments):
    """The runs of real tokens of a segment: starts, lengths and gaps; None if padding leaves more than one in a row."""
    padded = not bool(real.all())
    first = torch.ones_like(real[:, :1])
    joined = real[:, :-1] & real[:, 1:]
    if segments is not None:
        joined &= segments.diff(dim=1) == 0
    opens = real & torch.cat([first, ~joined], 1)
    closes = real & torch.cat([~joined, first], 1)
    if padded and bool((opens.sum(1) > 1).any()):
        return None
    starts, ends = opens.reshape(-1).nonzero()[:, 0], closes.reshape(-1).nonzero()[:, 0]
    gaps = starts % max(real.shape[1], 1) if padded else None
    return starts, ends - starts + 1, gaps


Batch = TypeVar("Batch", bound=PackedRows | PaddedBatch | AsBefore)
_ACTIVE: ContextVar[PackedRows | PaddedBatch | AsBefore | None] = ContextVar("fastprompt_active", default=None)


@contextmanager
def running(batch: Batch) -> Iterator[Batch]:
    """While the block runs, models that are attached run ``batch`` on prefix_attention."""
    token = _ACTIVE.set(batch)
    try:
        yield batch
    finally:
        _ACTIVE.reset(token)


def active() -> PackedRows | PaddedBatch | AsBefore | None:
    """The batch of the innermost :func:`running` block, or None outside of any."""
    return _ACTIVE.get()


def packed_rows_run() -> bool:
    """Do packed rows run, which nobody runs a second time without saying so?

    What rounds otherwise than the model's own operations is for them alone: whatever else a model is called with gives
    the bits it gave.
    """
    batch = active()
    if not isinstance(batch, PackedRows) or batch.run_again_by_others:
        return False
    return torch.is_grad_enabled() or not batch.differentiable


def outranks_patch() -> bool:
    """Does the batch that is being run stay what it is in a model that is patched?"""
    return isinstance(_ACTIVE.get(), PackedRows | AsBefore)


@torch.compiler.disable
def make_mask(before: str, **arguments: Any) -> Any:
    """What a model that ran on ``before`` is given for the mask it asks for, with transformers' arguments."""
    batch = _ACTIVE.get()
    if batch is None:
        return ALL_MASK_ATTENTION_FUNCTIONS[before](**arguments)
    return batch.mask(before, **arguments)
