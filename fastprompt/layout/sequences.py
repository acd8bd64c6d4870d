"""Which rows of a batch form a sequence, and what stands in front of each: what attention needs to know."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from ..checks import INTS, check_tensor


class HostSequences(NamedTuple):
    """What a :class:`Sequences` says, as int64 arrays on the host, with prefix 0 and gap 0 where it says nothing.

    Attributes:
        starts, lengths, prefix_ids, gaps: ``[B]``.
        prefix_lens: ``[N]``, or None: all of every prefix is used.
    """

    starts: np.ndarray
    lengths: np.ndarray
    prefix_ids: np.ndarray
    gaps: np.ndarray
    prefix_lens: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences of a batch of rows, made once a batch and shared by all layers. Immutable.

    Build it with :meth:`packed`, :meth:`padded`, :meth:`runs` or :meth:`decode`.

    Attributes:
        kind: "packed" (the sequences fill the rows), "padded" (rows may lie outside) or "decode".
        starts: ``[B]`` int64, the first row of each sequence.
        lengths: ``[B]`` int64, its rows (decode: the keys in its cache, the query's own included).
        prefix_ids: ``[B]`` int64, the prefix in front of it; -1 for none. None: prefix 0 for all.
        prefix_lens: ``[N]`` int64, the used length of each prefix. None: all of it.
        gaps: ``[B]`` int64, positions left out between the prefix and the sequence (left padding keeps its place in
            the model's position count, so a sliding window counts it too). None: 0.
        rows: how many query rows the batch has.
    """

    kind: str
    starts: torch.Tensor
    lengths: torch.Tensor
    prefix_ids: torch.Tensor | None
    prefix_lens: torch.Tensor | None
    gaps: torch.Tensor | None
    rows: int

    @classmethod
    def packed(cls, cu_seqlens, prefix_ids=None, prefix_lens=None, gaps=None):
        """Sequences one after the other: rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]`` are sequence b.

        Args:
            cu_seqlens: ``[B + 1]`` cumulative lengths, a tensor or a list, starting at 0, never falling.
            prefix_ids, prefix_lens, gaps: see the attributes; tensors or lists.

        Raises:
            ValueError, TypeError: wrong shapes, dtypes or values.
        """
        cu = _index("cu_seqlens", cu_seqlens, "B + 1")
        bounds = cu.cpu().numpy()
        if not len(bounds) or bounds[0] != 0 or (np.diff(bounds) < 0).any():
            raise ValueError(f"cu_seqlens must start at 0 and never fall, got {_brief(bounds.tolist())}")
        return cls._make("packed", cu[:-1], cu.diff(), int(bounds[-1]), prefix_ids, prefix_lens, gaps)

    @classmethod
    def padded(cls, starts, lengths, max_len, prefix_ids=None, prefix_lens=None, gaps=None):
        """A ``[B, max_len]`` batch used in place: sequence b is the ``lengths[b]`` columns from ``starts[b]`` on.

        Rows outside every sequence get zeros from attention.

        Raises:
            ValueError, TypeError: wrong shapes or dtypes, or a sequence that leaves its row.
        """
        starts, lengths = _index("starts", starts, "B"), _index("lengths", lengths, "B")
        if starts.shape != lengths.shape:
            raise ValueError(f"starts and lengths must have one entry a sequence, got {len(starts)} and {len(lengths)}")
        if len(starts) and not (
            0 <= int(starts.min()) and 0 <= int(lengths.min()) and int((starts + lengths).max()) <= max_len
        ):
            raise ValueError(
                f"starts and lengths must stay within the {max_len} columns of a row, "
                f"got starts {_brief(starts.tolist())}, lengths {_brief(lengths.tolist())}"
            )
        first = torch.arange(len(starts), device=starts.device) * max_len + starts
        return cls._make("padded", first, lengths, len(starts) * max_len, prefix_ids, prefix_lens, gaps)

    @classmethod
    def runs(cls, starts, lengths, rows, prefix_ids=None, prefix_lens=None, gaps=None):
        """Any runs of rows that do not overlap, in a batch of ``rows`` rows: a padded batch whose rows are packed.

        Raises:
            ValueError, TypeError: wrong shapes or dtypes, runs that overlap or leave the batch.
        """
        starts, lengths = _index("starts", starts, "B"), _index("lengths", lengths, "B")
        if starts.shape != lengths.shape:
            raise ValueError(f"starts and lengths must have one entry a sequence, got {len(starts)} and {len(lengths)}")
        runs = torch.stack([starts, lengths.to(starts.device)]).cpu().numpy()
        start, length = runs[:, np.lexsort(runs[::-1])]  # by start
        end = start + length
        wrong = (start < np.append(0, end[:-1])) | (length < 0) | (end > rows)
        if wrong.any():
            first = wrong.argmax()
            raise ValueError(
                f"runs must not overlap or leave the {rows} rows, got one of {length[first]} rows at {start[first]}"
            )
        return cls._make("padded", starts, lengths, rows, prefix_ids, prefix_lens, gaps)

    @classmethod
    def decode(cls, lengths, prefix_ids=None, prefix_lens=None, gaps=None):
        """One query a sequence, against the first ``lengths[b]`` keys of its own cache (its own key included)."""
        lengths = _index("lengths", lengths, "B")
        starts = torch.arange(len(lengths), device=lengths.device)
        return cls._make("decode", starts, lengths, len(lengths), prefix_ids, prefix_lens, gaps)

    @classmethod
    def _make(cls, kind, starts, lengths, rows, prefix_ids, prefix_lens, gaps):
        def optional(name, value, size):
            return None if value is None else _index(name, value, size).to(starts.device)

        batch = len(starts)
        return cls(
            kind,
            starts,
            lengths,
            optional("prefix_ids", prefix_ids, batch),
            optional("prefix_lens", prefix_lens, "N"),
            optional("gaps", gaps, batch),
            rows,
        )

    def tensors(self):
        """``[starts, lengths, prefix_ids, prefix_lens, gaps]``, empty tensors for None: what crosses an operator."""
        empty = self.starts.new_empty(0)
        return [
            empty if t is None else t for t in (self.starts, self.lengths, self.prefix_ids, self.prefix_lens, self.gaps)
        ]

    @classmethod
    def from_tensors(cls, kind, rows, tensors):
        """The inverse of :meth:`tensors`."""
        starts, lengths, *optional = tensors
        return cls(kind, starts, lengths, *(t if t.numel() else None for t in optional), rows)

    def to(self, device):
        """The same sequences with their tensors on ``device``; what was read on the host need not be read again."""
        device = torch.device(device)
        if device == self.starts.device:
            return self
        moved = self.from_tensors(self.kind, self.rows, move(self.tensors(), device))
        if self.starts.device.type == "cpu":
            moved.__dict__.update(host=self.host)
        return moved

    @cached_property
    def host(self) -> HostSequences:
        """The same on the host; read from the device once, by one copy."""
        starts, lengths, prefix_ids, prefix_lens, gaps = (t.numpy() for t in move(self.tensors(), torch.device("cpu")))
        nothing = np.zeros(len(starts), np.int64)
        return HostSequences(
            starts,
            lengths,
            nothing if self.prefix_ids is None else prefix_ids,
            nothing if self.gaps is None else gaps,
            None if self.prefix_lens is None else prefix_lens,
        )

    def cached(self, key, make):
        """``make()``, which an operator works out from these sequences: once, whichever layer asks first.

        ``key`` starts with the name of who asks, and holds all that the result depends on beside the sequences.
        """
        made = self.__dict__.setdefault("_made", {})
        if key not in made:
            made[key] = make()
        return made[key]

    def prefix_lengths(self, room) -> np.ndarray:
        """``[B]`` the keys of the prefix in front of each sequence, on the host.

        Args:
            room: P, how many keys the prefixes of the bank have room for; 0 without a bank.
        """
        host = self.host
        if room == 0:
            return np.zeros_like(host.lengths)
        if host.prefix_lens is None:
            return np.where(host.prefix_ids < 0, 0, room)
        return np.append(host.prefix_lens, 0)[host.prefix_ids]  # -1 finds the last

    def span(self, room) -> int:
        """The largest position count of any sequence: prefix, gap and own rows. A window of this size hides nothing."""
        host = self.host
        return int((self.prefix_lengths(room) + host.gaps + host.lengths).max(initial=0))


def move(tensors, device):
    """Tensors of one dtype on ``device``, by one copy."""
    if all(t.device == device for t in tensors):
        return tensors
    whole = torch.cat([t.reshape(-1) for t in tensors]).to(device)
    return [part.view(t.shape) for part, t in zip(whole.split([t.numel() for t in tensors]), tensors)]


def _index(name, value, size):
    """An int64 tensor from a tensor, an array or a list of ints."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    elif not isinstance(value, torch.Tensor):
        value = torch.tensor(value, dtype=torch.int64) if len(value) else torch.empty(0, dtype=torch.int64)
    check_tensor(name, value, [size], dtypes=INTS)
    return value.long()


def _brief(values):
    return values if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"
