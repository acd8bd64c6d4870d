"""Which rows of a batch form a sequence, and what stands in front of each: what attention needs to know."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from ..checks import INTS, check_tensor

Ints = torch.Tensor | np.ndarray | Sequence[int]

_KINDS = "packed", "padded", "decode"
# The tensors of Sequences, in the order in which ``flat`` has them. Of two dimensions are pages and chains.
_TENSORS = "starts", "lengths", "prefix_ids", "prefix_lens", "gaps", "queries", "key_starts", "pages", "chains"
_HEADER = 2 + 2 * len(_TENSORS)  # numbers in front of them: the kind, counted from 1, the rows, and sizes


class HostSequences(NamedTuple):
    """What a :class:`Sequences` says, as int64 arrays on the host, with prefix 0 and gap 0 where it says nothing.

    Attributes:
        starts, lengths, prefix_ids, gaps: ``[B]``.
        prefix_lens: ``[N]``, or None: all of every prefix is used.
        queries: ``[B]`` the query rows of each sequence: its length but in decode, 0 where a cache is empty.
        key_starts: ``[B]`` the column of the cache in which its keys begin; 0 but in decode.
        pages: ``[B, M]``, or None: the cache is contiguous.
        chains: ``[N, W]``, or None: prefixes are those of a bank.
    """

    starts: np.ndarray
    lengths: np.ndarray
    prefix_ids: np.ndarray
    gaps: np.ndarray
    prefix_lens: np.ndarray | None
    queries: np.ndarray
    key_starts: np.ndarray
    pages: np.ndarray | None
    chains: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences of a batch of rows, made once a batch and shared by all layers. Immutable.

    Build it with :meth:`packed`, :meth:`padded`, :meth:`runs` or :meth:`decode`.

    Attributes:
        kind: "packed" (the sequences fill the rows), "padded" (rows may lie outside) or "decode".
        starts: ``[B]`` int64, the first row of each sequence (decode: of its queries).
        lengths: ``[B]`` int64, its rows (decode: the keys in its cache, the queries' own included).
        prefix_ids: ``[B]`` int64, the prefix in front of it; -1 for none. None: prefix 0 for all.
        prefix_lens: ``[N]`` int64, the used length of each prefix. None: all of it.
        gaps: ``[B]`` int64, positions left out between the prefix and the sequence (left padding keeps its place in
            the model's position count, so a sliding window counts it too). None: 0.
        rows: how many query rows the batch has.
        chains: ``[N, W]`` int64, the keys that each prefix is made of, where they stand in several places: row r of k
            and v is r, learned key i, of all prefixes of the bank one after the other, is -1 - i. Behind the
            ``prefix_lens[n]`` used ones anything may stand. None: prefixes are those of the bank.
        queries, key_starts, pages: of decode, see there; ``[B]``, ``[B]`` and ``[B, M]`` int64 or None.
        flat: all of this in one int64 vector on the CPU, read from the device by one copy when the object is made: what
            crosses an operator, in whose graph neither its length nor what it says is a constant.
    """

    kind: str
    starts: torch.Tensor
    lengths: torch.Tensor
    prefix_ids: torch.Tensor | None
    prefix_lens: torch.Tensor | None
    gaps: torch.Tensor | None
    rows: int
    queries: torch.Tensor | None = None
    key_starts: torch.Tensor | None = None
    pages: torch.Tensor | None = None
    chains: torch.Tensor | None = None
    flat: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parts = [getattr(self, name) for name in _TENSORS]
        header = [1 + _KINDS.index(self.kind), self.rows]
        for part in parts:
            header += (-1, 1) if part is None else (*part.shape, 1)[:2]
        values = torch.cat([part.reshape(-1) for part in parts if part is not None]).cpu()
        object.__setattr__(self, "flat", torch.cat([torch.tensor(header), values]))

    @classmethod
    def packed(
        cls,
        cu_seqlens: Ints,
        prefix_ids: Ints | None = None,
        prefix_lens: Ints | None = None,
        gaps: Ints | None = None,
        chains: Ints | None = None,
    ) -> "Sequences":
        """Sequences one after the other: rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]`` are sequence b.

        Args:
            cu_seqlens: ``[B + 1]`` cumulative lengths, a tensor, an array or a list, starting at 0, never falling.
            prefix_ids, prefix_lens, gaps, chains: see the attributes; tensors, arrays or lists.

        Raises:
            ValueError, TypeError: wrong shapes, dtypes or values.
        """
        cu = _index("cu_seqlens", cu_seqlens, "B + 1")
        bounds = cu.cpu().numpy()
        if not len(bounds) or bounds[0] != 0 or (np.diff(bounds) < 0).any():
            raise ValueError(f"cu_seqlens must start at 0 and never fall, got {_brief(bounds.tolist())}")
        return cls._make("packed", cu[:-1], cu.diff(), int(bounds[-1]), prefix_ids, prefix_lens, gaps, chains)

    @classmethod
    def padded(
        cls,
        starts: Ints,
        lengths: Ints,
        max_len: int,
        prefix_ids: Ints | None = None,
        prefix_lens: Ints | None = None,
        gaps: Ints | None = None,
        chains: Ints | None = None,
    ) -> "Sequences":
        """A ``[B, max_len]`` batch used in place: sequence b is the ``lengths[b]`` columns from ``starts[b]`` on.

        Rows outside every sequence get zeros from attention.

        Raises:
            ValueError, TypeError: wrong shapes or dtypes, or a sequence that leaves its row.
        """
        columns, counts = _starts_and_lengths(starts, lengths)
        if len(columns) and not (
            0 <= int(columns.min()) and 0 <= int(counts.min()) and int((columns + counts).max()) <= max_len
        ):
            raise ValueError(
                f"starts and lengths must stay within the {max_len} columns of a row, "
                f"got starts {_brief(columns.tolist())}, lengths {_brief(counts.tolist())}"
            )
        first = torch.arange(len(columns), device=columns.device) * max_len + columns
        return cls._make("padded", first, counts, len(columns) * max_len, prefix_ids, prefix_lens, gaps, chains)

    @classmethod
    def runs(
        cls,
        starts: Ints,
        lengths: Ints,
        rows: int,
        prefix_ids: Ints | None = None,
        prefix_lens: Ints | None = None,
        gaps: Ints | None = None,
        chains: Ints | None = None,
    ) -> "Sequences":
        """Any runs of rows that do not overlap, in a batch of ``rows`` rows: a padded batch whose rows are packed.

        Raises:
            ValueError, TypeError: wrong shapes or dtypes, runs that overlap or leave the batch.
        """
        first_rows, counts = _starts_and_lengths(starts, lengths)
        runs = torch.stack([first_rows, counts]).cpu().numpy()
        start, length = runs[:, np.lexsort(runs[::-1])]  # by start
        end = start + length
        wrong = (start < np.append(0, end[:-1])) | (length < 0) | (end > rows)
        if wrong.any():
            first = wrong.argmax()
            raise ValueError(
                f"runs must not overlap or leave the {rows} rows, got one of {length[first]} rows at {start[first]}"
            )
        return cls._make("padded", first_rows, counts, rows, prefix_ids, prefix_lens, gaps, chains)

    @classmethod
    def decode(
        cls,
        lengths: Ints,
        prefix_ids: Ints | None = None,
        prefix_lens: Ints | None = None,
        gaps: Ints | None = None,
        *,
        starts: Ints | None = None,
        queries: Ints | int | None = None,
        pages: Ints | None = None,
    ) -> "Sequences":
        """The newest tokens of each sequence as queries, against the sequence's own keys in a cache, theirs included.

        The keys of sequence b stand in ``lengths[b]`` columns of its cache, and its queries are those of the last of
        them: one row of q for a step of decoding, several for a chunk of a prefill or guessed tokens, which see one
        another as ``causal`` says. Positions begin behind the prefix, wherever the keys stand in the cache.

        Args:
            lengths: ``[B]`` how many keys each sequence has.
            prefix_ids, prefix_lens, gaps: see the attributes.
            starts: ``[B]`` the columns in which the keys begin; a cache that is padded on the left has them behind the
                padding. None: 0.
            queries: how many queries each sequence has, one number for all or ``[B]``, at most its length; their rows
                of q follow one another, sequence by sequence. None: one each, which gets zeros from an empty cache.
            pages: ``[B, M]`` for a cache in pages, ``[pages, Hkv, page size, Dh]``: column c of sequence b is column
                ``c % page_size`` of page ``pages[b, c // page_size]``. Sequences may share pages. What stands where a
                sequence has no keys is never read. None: row b of the cache belongs to sequence b.

        Raises:
            ValueError, TypeError: wrong shapes, dtypes or numbers of queries; the operator, which knows the sizes of
                the cache, refuses keys or pages that leave it.
        """
        counts = _index("lengths", lengths, "B")
        batch, device = len(counts), counts.device
        if isinstance(queries, int):
            queries = counts.new_full((batch,), queries)
        first, rows, asked = torch.arange(batch, device=device), batch, None
        if queries is not None:
            asked = _index("queries", queries, batch).to(device)
            if bool(((asked < 0) | (asked > counts)).any()):
                raise ValueError(
                    f"queries must lie between 0 and the lengths {_brief(counts.tolist())}, "
                    f"whose last keys are theirs, got {_brief(asked.tolist())}"
                )
            first, rows = asked.cumsum(0) - asked, int(asked.sum())
        columns = None if starts is None else _index("starts", starts, batch).to(device)
        table = None if pages is None else _index("pages", pages, batch, "M").to(device)
        if table is not None and batch and not table.shape[1]:
            raise ValueError(f"pages must have at least one column, got {list(table.shape)}")
        made = cls._make("decode", first, counts, rows, prefix_ids, prefix_lens, gaps)
        return replace(made, queries=asked, key_starts=columns, pages=table)

    @classmethod
    def _make(
        cls,
        kind: str,
        starts: torch.Tensor,
        lengths: torch.Tensor,
        rows: int,
        prefix_ids: Ints | None,
        prefix_lens: Ints | None,
        gaps: Ints | None,
        chains: Ints | None = None,
    ) -> "Sequences":
        def optional(name: str, value: Ints | None, *size: int | str) -> torch.Tensor | None:
            return None if value is None else _index(name, value, *size).to(starts.device)

        batch = len(starts)
        return cls(
            kind,
            starts,
            lengths,
            optional("prefix_ids", prefix_ids, batch),
            optional("prefix_lens", prefix_lens, "N"),
            optional("gaps", gaps, batch),
            rows,
            chains=optional("chains", chains, "N", "W"),
        )

    @staticmethod
    def flat_size(values: torch.Tensor) -> int:
        """How many of the numbers are a ``flat``, with which they begin; 0 if they are none."""
        if not len(values) or not values[0]:
            return 0
        return _HEADER + sum(n * m for n, m in _header(values)[2] if n >= 0)

    @classmethod
    def from_flat(cls, flat: torch.Tensor, device: torch.device | str = "cpu") -> "Sequences":
        """The sequences that it is the ``flat`` of, with their tensors on ``device``, by one copy."""
        kind, rows, sizes = _header(flat)
        made = object.__new__(cls)  # the constructor would read from the device what is known
        made.__dict__.update(zip(_TENSORS, _parts(flat[_HEADER:].to(device), sizes)), kind=kind, rows=rows, flat=flat)
        return made

    def to(self, device: torch.device | str) -> "Sequences":
        """The same sequences with their tensors on ``device``; what was read on the host need not be read again."""
        device = torch.device(device)
        if device == self.starts.device:
            return self
        moved = self.from_flat(self.flat, device)
        moved.__dict__.update(host=self.host)
        return moved

    @cached_property
    def host(self) -> HostSequences:
        """The same on the host."""
        arrays: Any = (None if x is None else x.numpy() for x in _parts(self.flat[_HEADER:], _header(self.flat)[2]))
        starts, lengths, prefix_ids, prefix_lens, gaps, queries, key_starts, pages, chains = arrays
        nothing = np.zeros(len(self.starts), np.int64)
        if queries is None:
            queries = np.minimum(lengths, 1) if self.kind == "decode" else lengths
        return HostSequences(
            starts,
            lengths,
            nothing if prefix_ids is None else prefix_ids,
            nothing if gaps is None else gaps,
            prefix_lens,
            queries,
            nothing if key_starts is None else key_starts,
            pages,
            chains,
        )

    def cached(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """``make()``, which an operator works out from these sequences: once, whichever layer asks first.

        ``key`` starts with the name of who asks, and holds all that the result depends on beside the sequences.
        """
        made = self.__dict__.setdefault("_made", {})
        if key not in made:
            made[key] = make()
        return made[key]

    def room(self, learned: int) -> int:
        """How many keys prefixes have room for: W of chains, else ``learned``, P of the bank; 0 without a bank."""
        return learned if self.chains is None else self.chains.shape[1]

    def prefix_lengths(self, room: int) -> np.ndarray:
        """``[B]`` the keys of the prefix in front of each sequence, on the host.

        Args:
            room: P, how many keys the prefixes of the bank have room for; 0 without a bank. Chains have their own.
        """
        host, room = self.host, self.room(room)
        if room == 0:
            return np.zeros_like(host.lengths)
        if host.prefix_lens is None:
            return np.where(host.prefix_ids < 0, 0, room)
        return np.append(host.prefix_lens, 0)[host.prefix_ids]  # -1 finds the last

    def span(self, room: int) -> int:
        """The largest position count of any sequence: prefix, gap and own rows. A window of this size hides nothing."""
        host = self.host
        return int((self.prefix_lengths(room) + host.gaps + host.lengths).max(initial=0))


def _header(flat: torch.Tensor) -> tuple[str, int, list[list[int]]]:
    """Kind, rows, and of each tensor the two sizes; the first is -1 if it is None."""
    kind, rows, *sizes = flat[:_HEADER].tolist()
    return _KINDS[kind - 1], rows, [sizes[i : i + 2] for i in range(0, len(sizes), 2)]


def _parts(values: torch.Tensor, sizes: list[list[int]]) -> list[torch.Tensor | None]:
    """The tensors of sequences, None for those that are None, as views of what stands behind a header."""
    parts: list[torch.Tensor | None] = []
    end = 0
    for name, (n, m) in zip(_TENSORS, sizes):
        begin, end = end, end + max(n, 0) * m
        shape = (n, m) if name in ("pages", "chains") else (n,)
        parts.append(None if n < 0 else values[begin:end].view(shape))
    return parts


def move(tensors: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tensors of one dtype on ``device``, by one copy."""
    if all(t.device == device for t in tensors):
        return tensors
    whole = torch.cat([t.reshape(-1) for t in tensors]).to(device)
    return [part.view(t.shape) for part, t in zip(whole.split([t.numel() for t in tensors]), tensors)]


def _starts_and_lengths(starts: Ints, lengths: Ints) -> tuple[torch.Tensor, torch.Tensor]:
    first, counts = _index("starts", starts, "B"), _index("lengths", lengths, "B")
    if first.shape != counts.shape:
        raise ValueError(f"starts and lengths must have one entry a sequence, got {len(first)} and {len(counts)}")
    return first, counts.to(first.device)


def _index(name: str, value: Ints, *shape: int | str) -> torch.Tensor:
    """An int64 tensor from a tensor, an array or a list of ints."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    elif not isinstance(value, torch.Tensor):
        value = torch.tensor(value, dtype=torch.int64) if len(value) else torch.empty([0] * len(shape)).long()
    check_tensor(name, value, list(shape), dtypes=INTS)
    return value.long()


def _brief(values: list[int]) -> list[int] | str:
    return values if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"
