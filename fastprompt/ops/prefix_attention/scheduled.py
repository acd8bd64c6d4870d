"""The schedule of prefix_attention as data, for compiled code.

A compiled layer may read nothing of a batch but tensors: every number that it reads is a constant of its graph, and
another number another graph; and what it reads of a tensor's values waits for the device. So the registered operators
take one tensor, made outside of the graph from what the host knows of the sequences. Its size, and the grid of a
launch, depend on the shapes of a call alone. It is one of two:

- int32, on the device: the tables of the Triton kernels, filled up to the most that the shapes allow.
- int64, on the CPU: the sequences themselves, those of queries and, in cross-attention, those of keys behind them.
  Backends without a grid of launches need no more: it is read where it is, and the tables that are worked out from it
  are remembered, so that layers share them.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from ...backends import implementation, module_of
from ...layout import Sequences

_KEPT = 8  # sequences: of a few masks of a batch, and of the batch before, whose backward may be to come


class Shape(NamedTuple):
    """What the schedule of a call depends on, beside its sequences and prefixes."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    alibi: bool = False
    bias: bool = False

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        alibi_slopes: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
    ) -> "Shape":
        """That of a call with q ``[Rq, H, Dh]``, k ``[Rk, Hkv, Dh]`` and v ``[Rk, Hkv, Dv]``."""
        return cls(q.shape[1], k.shape[1], q.shape[2], v.shape[2], alibi_slopes is not None, position_bias is not None)


def make_schedule(
    seq: Sequences,
    shape: Shape,
    *,
    causal: bool,
    window: int | None,
    prefixes: int,
    room: int,
    dtype: torch.dtype,
    device: torch.device,
    key_seq: Sequences | None = None,
) -> torch.Tensor:
    """The schedule of a call, for :func:`fastprompt.ops.prefix_attention.api.scheduled_attention`.

    Args:
        seq: not for decode.
        shape: of the call.
        causal, window, key_seq: as in prefix_attention.
        prefixes, room: N and P of its prefixes ``[N, P, Hkv, Dh]``; 0 without.
        dtype, device: those of q.

    Returns:
        A tensor whose shape depends on how many rows, prefixes and keys of a prefix there are, and not on the
        sequences, unless more of these are empty than there are rows.
    """
    of_device = "prefix_attention", "auto", device.type, dtype
    backend: Any = implementation(*of_device, head_dim=shape.head_dim, value_dim=shape.value_dim)
    if hasattr(backend, "pack"):
        options = dict(causal=causal, window=window, prefixes=prefixes, room=room, key_seq=key_seq)
        packed = backend.pack(seq, shape, **options, element_size=dtype.itemsize, device=device)
        if seq.kind == "packed":  # or it has as many rows and chains as other batches, too
            torch._dynamo.maybe_mark_dynamic(packed, list(range(packed.dim())))
        return packed
    flat = flat_of(seq, key_seq)
    of_prefixes = sum(x.numel() for x in (seq.prefix_lens, seq.chains) if x is not None)
    most = 64 + 8 * (seq.rows + (0 if key_seq is None else key_seq.rows)) + of_prefixes
    return pad(flat, (0, max(most - len(flat), 0)))


def flat_of(seq: Sequences, key_seq: Sequences | None) -> torch.Tensor:
    """The sequences of a call as a schedule."""
    return seq.flat if key_seq is None else torch.cat([seq.flat, key_seq.flat])


def read_schedule(schedule: torch.Tensor, device: torch.device) -> tuple[Any, Sequences | None]:
    """What a call on ``device`` has for ``seq`` and ``key_seq``: tables stand in place of the first."""
    if schedule.dtype == torch.int32:
        tables: Any = module_of("prefix_attention", "triton")
        return tables.unpack(schedule.to(device)), None  # layers may be spread over devices
    size = Sequences.flat_size(schedule)
    of_keys = schedule[size:]
    seq, key_seq = (x.numpy().tobytes() for x in (schedule[:size], of_keys[: Sequences.flat_size(of_keys)]))
    return _sequences(seq, device), _sequences(key_seq, device) if key_seq else None


@lru_cache(maxsize=_KEPT)
def _sequences(flat, device):
    """Sequences by what they say: the same for all layers of a batch."""
    return Sequences.from_flat(torch.frombuffer(bytearray(flat), dtype=torch.int64), device)
