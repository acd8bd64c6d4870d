"""How a planned batch is described to a model: what stands where its layers expect an attention mask.

Inside of a :func:`running` block a model that asks transformers for a mask is given a :class:`PackedMask`; it travels
through the layers, gradient checkpointing included, to the attention function, which finds everything it needs in it.
"""

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..layout import Sequences
from .shared_state import SharedState


class UnsupportedAttention(NotImplementedError):
    """A model asks attention for something prefix_attention does not compute; the message says what."""


@dataclass(frozen=True, eq=False)
class PackedMask:
    """What stands where a model expects its attention mask.

    Attributes:
        seq: the sequences among the rows of the batch.
        window: see prefix_attention.
        causal: see prefix_attention.
        shared: what stands in front of the sequences.
        dense: a mask of the implementation before over prefix and own keys, for a batch that ``seq`` cannot describe.
        recorded: where attention leaves each layer's keys and values ``[Hkv, R, Dh]``, by its index; None: nowhere.
    """

    seq: Sequences | None
    window: int | None = None
    causal: bool = True
    shared: SharedState = SharedState()
    dense: torch.Tensor | None = None
    recorded: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None

    def to(self, *args, **kwargs):
        """accelerate moves whatever has ``to`` between devices; the sequences follow when attention reads them."""
        return self


class PackedRows:
    """Rows that :mod:`fastprompt.layout` planned, as the one packed sequence of a batch of size 1.

    Args:
        plan: a RowPlan.
        causal: see prefix_attention.
        shared: the learned keys and values in front of the sequences; None: there are none.
        recorded: see PackedMask.
    """

    def __init__(self, plan, causal=True, shared=None, recorded=None):
        self.plan, self.causal, self.recorded = plan, causal, recorded
        self.shared = (shared or SharedState()).for_rows(plan.shared)

    def mask(self, before, *, local_size=None, **_):
        window = local_size if self.causal or local_size is None else local_size + 1  # bidirectional: inclusive
        return PackedMask(self.plan.sequences, window, self.causal, self.shared, recorded=self.recorded)


class PaddedBatch:
    """A batch as users pass it: padded, packed by its position ids, or decoding, behind a shared state or none."""

    def __init__(self, shared=None):
        self.shared = shared or SharedState()
        self.asked = False  # did the model ask for a mask at all?

    def mask(
        self, before, *, batch_size, q_length, kv_length, mask_function, attention_mask=None, local_size=None, **other
    ):
        self.asked = True
        device = other.get("device", "cpu")
        sees = partial(mask_function, torch.arange(batch_size, device=device)[:, None], 0)
        if q_length == kv_length:
            starts, lengths, gaps, whole = _runs(sees, batch_size, q_length, attention_mask, device)
            if whole:
                last = torch.arange(q_length - 1, device=device)
                ahead = q_length > 1 and bool(_as_mask(sees(last, last + 1), batch_size, q_length - 1, device).any())
                window = local_size + 1 if local_size is not None and ahead else local_size  # bidirectional: inclusive
                ids = self.shared.repeated(batch_size)
                ids = None if ids is None else ids[starts // q_length]
                seq = Sequences.runs(starts, lengths, batch_size * q_length, ids, gaps=gaps)
                return PackedMask(seq, window, causal=not ahead, shared=self.shared)
        return self._dense(
            before,
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            **other,
        )

    def _dense(self, before, **arguments):
        original = ALL_MASK_ATTENTION_FUNCTIONS[before]
        if not self.shared.learned:
            return original(**arguments)
        length = self.shared.length
        arguments["kv_length"] += length
        arguments["q_offset"] = arguments.get("q_offset", 0) + length
        arguments["allow_is_causal_skip"] = arguments["allow_is_bidirectional_skip"] = False
        if (real := arguments.get("attention_mask")) is not None:
            arguments["attention_mask"] = torch.cat([real.new_ones(real.shape[0], length), real], 1)
        shared = self.shared.of_each_row(arguments["batch_size"])
        return PackedMask(None, shared=shared, dense=original(**arguments))


def _runs(sees, batch, width, attention_mask, device):
    """The runs of real tokens: starts, lengths, gaps, and whether they describe the batch (no holes in the mask)."""
    first = torch.ones(batch, 1, dtype=torch.bool, device=device)
    position = torch.arange(1, width, device=device)
    joined = _as_mask(sees(position, position - 1), batch, width - 1, device)  # does a token see the one before it?
    real = (
        torch.ones(batch, width, dtype=torch.bool, device=device) if attention_mask is None else attention_mask.bool()
    )
    opens = real & torch.cat([first, ~joined | ~real[:, :-1]], 1)
    closes = real & torch.cat([~joined | ~real[:, 1:], first], 1)
    starts, ends = opens.reshape(-1).nonzero()[:, 0], closes.reshape(-1).nonzero()[:, 0]
    whole = attention_mask is None or bool((opens.sum(1) <= 1).all())
    gaps = None if attention_mask is None else starts % max(width, 1)
    return starts, ends - starts + 1, gaps, whole


def _as_mask(seen, batch, width, device):
    """A mask function's answer as ``[B, width]``: some answer True or False for all, some without the batch axis."""
    return torch.as_tensor(seen, device=device).expand(batch, width)


_ACTIVE: ContextVar[PackedRows | PaddedBatch | None] = ContextVar("fastprompt_active", default=None)


@contextmanager
def running(batch):
    """While the block runs, models that were switched over run ``batch`` on prefix_attention."""
    token = _ACTIVE.set(batch)
    try:
        yield batch
    finally:
        _ACTIVE.reset(token)


def active():
    """The batch of the innermost :func:`running` block, or None outside of any."""
    return _ACTIVE.get()


def packed_rows_run():
    """Is a :class:`PackedRows` being run right now?"""
    return isinstance(_ACTIVE.get(), PackedRows)


def make_mask(before, **arguments):
    """What a model that ran on ``before`` is given for the mask it asks for, with transformers' arguments."""
    batch = _ACTIVE.get()
    if batch is None:
        return ALL_MASK_ATTENTION_FUNCTIONS[before](**arguments)
    return batch.mask(before, **arguments)
