"""Batch -> rows: which tokens and prompt vectors a model has to run, where they stand, and the way back.

Pure index arithmetic on integer tensors; no parameters, no floating point, no model.

``Sequences`` tells attention which rows form a sequence and which prefix stands in front of each.
``RowPlan`` tells the engine which rows to build from a batch. Three layouts:

* ``shared``: the P rows of every distinct prompt once, then every real token of the batch. A causal model only.
* ``packed``: every sequence with a prompt of its own, no padding. Needed where the prompt sees the text.
* ``padded``: ``[B, P + S]`` as every model takes it.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from .checks import INTS, check_tensor

IGNORE = -100  # a position whose label is ignored, as in Hugging Face and torch.nn.functional.cross_entropy


class CannotPack(ValueError):
    """A batch that the packed layouts cannot represent exactly; the message says why. The padded layout can."""


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
        bounds = cu.tolist()
        if not bounds or bounds[0] != 0 or any(b < a for a, b in zip(bounds, bounds[1:])):
            raise ValueError(f"cu_seqlens must start at 0 and never fall, got {_brief(bounds)}")
        return cls._make("packed", cu[:-1], cu.diff(), bounds[-1], prefix_ids, prefix_lens, gaps)

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
        if len(starts) and not (0 <= int(starts.min()) and 0 <= int(lengths.min()) and int((starts + lengths).max()) <= max_len):
            raise ValueError(f"starts and lengths must stay within the {max_len} columns of a row, "
                             f"got starts {_brief(starts.tolist())}, lengths {_brief(lengths.tolist())}")
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
        end = 0
        for start, length in sorted(zip(starts.tolist(), lengths.tolist())):
            if start < end or length < 0 or start + length > rows:
                raise ValueError(f"runs must not overlap or leave the {rows} rows, got one of {length} rows at {start}")
            end = start + length
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
        return cls(kind, starts, lengths, optional("prefix_ids", prefix_ids, batch),
                   optional("prefix_lens", prefix_lens, "N"), optional("gaps", gaps, batch), rows)

    def tensors(self):
        """``[starts, lengths, prefix_ids, prefix_lens, gaps]`` with empty tensors for None: what crosses an operator."""
        empty = self.starts.new_empty(0)
        return [empty if t is None else t
                for t in (self.starts, self.lengths, self.prefix_ids, self.prefix_lens, self.gaps)]

    @classmethod
    def from_tensors(cls, kind, rows, tensors):
        """The inverse of :meth:`tensors`."""
        starts, lengths, *optional = tensors
        return cls(kind, starts, lengths, *(t if t.numel() else None for t in optional), rows)

    def to(self, device):
        """The same sequences with their tensors on ``device``."""
        return self.from_tensors(self.kind, self.rows, [t.to(device) for t in self.tensors()])

    @cached_property
    def host(self):
        """One ``(start, length, prefix id, gap)`` of Python ints a sequence; read from the device once."""
        batch = len(self.starts)
        prefix_ids = [0] * batch if self.prefix_ids is None else self.prefix_ids.tolist()
        gaps = [0] * batch if self.gaps is None else self.gaps.tolist()
        return list(zip(self.starts.tolist(), self.lengths.tolist(), prefix_ids, gaps))

    @cached_property
    def host_prefix_lens(self):
        """``prefix_lens`` as Python ints, or None."""
        return None if self.prefix_lens is None else self.prefix_lens.tolist()

    def prefix_length(self, prefix_id, longest):
        """The keys of prefix ``prefix_id`` (-1: none) in a bank whose prefixes have room for ``longest``."""
        if prefix_id < 0:
            return 0
        return longest if self.host_prefix_lens is None else self.host_prefix_lens[prefix_id]

    def span(self, longest):
        """The largest position count of any sequence: prefix, gap and own rows. A window of this size hides nothing."""
        return max((self.prefix_length(p, longest) + gap + n for _, n, p, gap in self.host), default=0)


@dataclass(frozen=True, eq=False)
class RowPlan:
    """The rows a batch needs and how to read the result. R rows, B sequences, W = P + longest width.

    Attributes:
        layout: "shared", "packed" or "padded".
        source: ``[R]`` int64; ``>= 0``: the flat position of a token in ``input_ids`` (or ``inputs_embeds``),
            ``-1 - j``: row j of the prompts ``[N * P, D]``. What ``prompt_concat`` takes.
        position_ids: ``[R]`` int64, as PEFT numbers them: a token in column c has position P + c.
        sequences: what attention needs. None for ``padded`` batches with holes in the mask.
        grid: ``[B, W]`` int64, the row of every cell of the padded result, -1 where there is none.
        label_rows: ``[M]`` int64, the rows that predict a label, in batch order (a row may predict several: the last
            prompt row predicts the first token of every sequence). None without labels.
        labels: ``[M]`` int64, what they predict: already shifted.
        prompt_rows: how many leading rows are prompt rows that sequences share (N * P in ``shared``, else 0).
    """

    layout: str
    source: torch.Tensor
    position_ids: torch.Tensor
    sequences: Sequences | None
    grid: torch.Tensor
    label_rows: torch.Tensor | None
    labels: torch.Tensor | None
    prompt_rows: int

    def token_ids(self, input_ids):
        """``source`` with token ids in place of token positions: for gathering from the embedding table directly."""
        flat = input_ids.reshape(-1)
        if flat.numel() == 0:
            return self.source
        return torch.where(self.source >= 0, flat[self.source.clamp(min=0)], self.source)

    def unpack(self, rows, fill=0):
        """``[R, ...]`` -> ``[B, W, ...]``; cells without a row hold ``fill``."""
        cells = rows[self.grid.clamp(min=0)]
        missing = (self.grid < 0).view(self.grid.shape + (1,) * (rows.dim() - 1))
        return cells.masked_fill(missing, fill)


def plan_padded_input(batch, width, num_virtual_tokens, *, attention_mask=None, labels=None, prompt_ids=None,
                      virtual_tokens=None, layout="shared", device=None):
    """Plan a ``[B, S]`` batch.

    Args:
        batch, width: B and S.
        num_virtual_tokens: P.
        attention_mask: ``[B, S]``, nonzero where a token is real; None: everywhere. Left, right and mixed padding.
        labels: ``[B, S]`` int64, not shifted, -100 to ignore.
        prompt_ids: ``[B]`` int64, the prompt of each sequence; None: prompt 0. Ids are dense: N is the largest + 1.
        virtual_tokens: ``[B, S]`` int64, j >= 0 where virtual token j of the sequence's prompt stands (P-Tuning
            templates), -1 elsewhere. The prompt then stands where the template says and not in front.
        layout: "shared", "packed" or "padded".
        device: where the plan lives; by default that of the mask or labels.

    Raises:
        CannotPack: the layout cannot hold this batch exactly (holes in the mask, a label predicted by padding, ...).
        ValueError, TypeError: wrong arguments.
    """
    device = next((t.device for t in (attention_mask, labels, prompt_ids, virtual_tokens) if t is not None), device)
    if attention_mask is None:
        real = torch.ones(batch, width, dtype=torch.bool, device=device)
    else:
        check_tensor("attention_mask", attention_mask, [batch, width])
        real = attention_mask != 0
    if labels is not None:
        check_tensor("labels", labels, [batch, width], dtypes=INTS)
    if virtual_tokens is not None:
        check_tensor("virtual_tokens", virtual_tokens, [batch, width], dtypes=INTS)
    prompts = _Prompts(num_virtual_tokens, prompt_ids, batch, real.device, in_front=virtual_tokens is None)
    if layout == "padded":
        return _padded_plan(real, prompts, labels, virtual_tokens)
    lengths = real.sum(1)
    sequence, column = real.nonzero(as_tuple=True)
    first = real.int().argmax(1)
    if bool(((column - first[sequence]) >= lengths[sequence]).any()):
        raise CannotPack("the attention mask has holes")
    tokens = _Tokens(sequence, column, sequence * width + column, lengths, first, width)
    return _plan(tokens, prompts, labels, virtual_tokens, layout)


def plan_packed_input(cu_seqlens, num_virtual_tokens, *, labels=None, prompt_ids=None, virtual_tokens=None,
                      layout="shared"):
    """Plan a batch that comes packed: T tokens in a row, sequence b from ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``.

    Args:
        cu_seqlens: ``[B + 1]`` int, a tensor or a list.
        labels, virtual_tokens: ``[T]``; otherwise as in :func:`plan_padded_input`.
        num_virtual_tokens, prompt_ids, layout: as there; "padded" is not a layout of packed input.

    Raises:
        CannotPack, ValueError, TypeError: as there.
    """
    if layout == "padded":
        raise ValueError("layout must be 'shared' or 'packed' for packed input, got 'padded'")
    seq = Sequences.packed(cu_seqlens)
    total, batch = seq.rows, len(seq.starts)
    for name, value in (("labels", labels), ("virtual_tokens", virtual_tokens)):
        if value is not None:
            check_tensor(name, value, [total], dtypes=INTS)
    sequence = torch.repeat_interleave(torch.arange(batch, device=seq.starts.device), seq.lengths)
    flat = torch.arange(total, device=seq.starts.device)
    column = flat - seq.starts[sequence]
    tokens = _Tokens(sequence, column, flat, seq.lengths, torch.zeros_like(seq.lengths), max((n for _, n, _, _ in seq.host), default=0))
    prompts = _Prompts(num_virtual_tokens, prompt_ids, batch, flat.device, in_front=virtual_tokens is None)
    return _plan(tokens, prompts, labels, virtual_tokens, layout)


@dataclass
class _Tokens:
    """The T real tokens of a batch: which sequence and column each stands in, and where in the input."""

    sequence: torch.Tensor  # [T]
    column: torch.Tensor  # [T]
    flat: torch.Tensor  # [T]
    lengths: torch.Tensor  # [B]
    first: torch.Tensor  # [B] the column of the first real token
    width: int


class _Prompts:
    """P, the prompt of each sequence, and how many distinct prompts there are."""

    def __init__(self, length, ids, batch, device, in_front):
        if not isinstance(length, int) or length < 0:
            raise ValueError(f"num_virtual_tokens must be an int >= 0, got {length!r}")
        if ids is not None:
            check_tensor("prompt_ids", ids, [batch], dtypes=INTS)
        self.length = length
        self.ids = torch.zeros(batch, dtype=torch.int64, device=device) if ids is None else ids.long().to(device)
        self.count = 1 if ids is None else (int(ids.max()) + 1 if batch else 0)
        self.in_front = length if in_front else 0  # the prompt rows in front of every sequence


def _plan(tokens, prompts, labels, virtual_tokens, layout):
    device, batch, front = tokens.flat.device, len(tokens.lengths), prompts.in_front
    text = tokens.flat
    if virtual_tokens is not None:
        virtual = virtual_tokens.reshape(-1)[tokens.flat].long()
        if bool((virtual >= prompts.length).any()):
            raise ValueError(f"virtual_tokens must be below num_virtual_tokens {prompts.length}, got {int(virtual.max())}")
        text = torch.where(virtual >= 0, -1 - (prompts.ids[tokens.sequence] * prompts.length + virtual), tokens.flat)
    ends = tokens.lengths.cumsum(0)
    gaps = tokens.first if bool((tokens.first * (tokens.lengths > 0)).any()) else None
    if layout == "shared":
        shared = prompts.count * front
        in_front = torch.arange(shared, device=device)
        source = torch.cat([-1 - in_front, text])
        positions = torch.cat([in_front % max(front, 1), front + tokens.column])
        prompt_ends = front * torch.arange(1, prompts.count + 1, device=device)
        no_prefix = torch.full((prompts.count,), -1, device=device)
        cu = torch.cat([ends.new_zeros(1), prompt_ends, shared + ends])
        if gaps is not None:
            gaps = torch.cat([gaps.new_zeros(prompts.count), gaps])
        seq = Sequences.packed(cu, torch.cat([no_prefix, prompts.ids]), gaps=gaps)
        token_rows = shared + torch.arange(len(text), device=device)
        prompt_cells = (prompts.ids * front)[:, None] + torch.arange(front, device=device)  # [B, P]
    elif layout == "packed":
        if gaps is not None and front:
            raise CannotPack("left padding between the prompt and the text has no place in the packed layout")
        starts = ends - tokens.lengths + front * torch.arange(batch, device=device)
        prompt_cells = starts[:, None] + torch.arange(front, device=device)
        token_rows = starts[tokens.sequence] + front + tokens.column - tokens.first[tokens.sequence]
        source = torch.empty(batch * front + len(text), dtype=torch.int64, device=device)
        positions = torch.empty_like(source)
        source[token_rows] = text
        positions[token_rows] = front + tokens.column
        source[prompt_cells] = -1 - (prompts.ids[:, None] * front + torch.arange(front, device=device))
        positions[prompt_cells] = torch.arange(front, device=device).expand(batch, front)
        lengths = tokens.lengths + front
        seq = Sequences.packed(torch.cat([ends.new_zeros(1), lengths.cumsum(0)]))
        shared = 0
    else:
        raise ValueError(f"layout must be 'shared', 'packed' or 'padded', got {layout!r}")
    grid = torch.full((batch, front + tokens.width), -1, dtype=torch.int64, device=device)
    grid[:, :front] = prompt_cells
    grid[tokens.sequence, front + tokens.column] = token_rows
    label_rows = shifted = None
    if labels is not None:
        if labels.dim() == 1:  # packed input: put the labels where the grid has their tokens
            labels = _scatter_labels(labels, tokens, batch)
        label_rows, shifted = _shift_labels(labels, grid, front)
    return RowPlan(layout, source, positions, seq, grid, label_rows, shifted, shared)


def _scatter_labels(labels, tokens, batch):
    cells = labels.new_full((batch, tokens.width), IGNORE)
    cells[tokens.sequence, tokens.column] = labels[tokens.flat]
    return cells


def _shift_labels(labels, grid, front):
    """The rows that predict a label, and the labels: cell (b, c) is predicted by cell (b, c - 1)."""
    wanted = labels != IGNORE
    if front == 0:
        wanted = wanted.clone()
        wanted[:, :1] = False  # nothing stands before the first token, as in Hugging Face
    sequence, column = wanted.nonzero(as_tuple=True)
    rows = grid[sequence, front + column - 1]
    if bool((rows < 0).any()):
        raise CannotPack("a label follows a padding token, whose hidden state would have to predict it")
    return rows, labels[sequence, column].long()


def _padded_plan(real, prompts, labels, virtual_tokens):
    device, (batch, width), front = real.device, real.shape, prompts.in_front
    flat = torch.arange(batch * width, device=device).view(batch, width)
    if virtual_tokens is not None:
        rows = prompts.ids[:, None] * prompts.length + virtual_tokens
        flat = torch.where(virtual_tokens >= 0, -1 - rows, flat)
    in_front = -1 - (prompts.ids[:, None] * front + torch.arange(front, device=device))
    source = torch.cat([in_front, flat], 1)
    total = front + width
    grid = torch.arange(batch * total, device=device).view(batch, total)
    label_rows = shifted = None
    if labels is not None:
        label_rows, shifted = _shift_labels(labels, grid, front)
    lengths, first = real.sum(1), real.int().argmax(1)
    last = width - 1 - real.flip(1).int().argmax(1)
    first = first * (lengths > 0)
    holes = (last - first + 1 != lengths) & (lengths > 0)
    seq = None
    if not bool((holes | (first > 0) if front else holes).any()):
        seq = Sequences.padded(first, front + lengths, total)
    positions = torch.arange(total, device=device).repeat(batch)
    return RowPlan("padded", source.reshape(-1), positions, seq, grid, label_rows, shifted, 0)


def _index(name, value, size):
    """An int64 tensor from a tensor or a list of ints."""
    if not isinstance(value, torch.Tensor):
        value = torch.tensor(value, dtype=torch.int64) if len(value) else torch.empty(0, dtype=torch.int64)
    check_tensor(name, value, [size], dtypes=INTS)
    return value.long()


def _brief(values):
    return values if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"
