"""Row plans: the rows a batch needs, in one of three layouts.

* ``shared``: what sequences have in common in front, once; then everything else of every sequence. That is the P rows
  of every distinct prompt, and the tokens that all sequences of a prompt begin with. A causal model only.
* ``packed``: every sequence with a prompt of its own, no padding. Needed where the prompt sees the text.
* ``padded``: ``[B, P + S]`` as every model takes it.
"""

from dataclasses import dataclass

import torch

from ..checks import INTS, check_tensor
from .sequences import Sequences

IGNORE = -100  # a position whose label is ignored, as in Hugging Face and torch.nn.functional.cross_entropy


class CannotPack(ValueError):
    """A batch that the packed layouts cannot represent exactly; the message says why. The padded layout can."""


@dataclass(frozen=True, eq=False)
class RowPlan:
    """The rows a batch needs and how to read the result. R rows, B sequences, W = P + longest width.

    Attributes:
        layout: "shared", "packed" or "padded".
        source: ``[R]`` int64; ``>= 0``: the flat position of a token in ``input_ids`` (or ``inputs_embeds``),
            ``-1 - j``: row j of the prompts ``[N * P, D]``. What ``prompt_concat`` takes.
        position_ids: ``[R]`` int64, as PEFT numbers them: a token in column c has position P + c, behind a learned
            prefix of Q keys Q + P + c.
        sequences: what attention needs. None for ``padded`` batches with holes in the mask.
        shared: for each prompt the first of the rows that its sequences share, and their number; () if none are shared.
        grid: ``[B, W]`` int64, the row of every cell of the padded result, -1 where there is none.
        label_rows: ``[M]`` int64, the rows that predict a label, in batch order (a row may predict several: the last
            prompt row predicts the first token of every sequence). None without labels.
        labels: ``[M]`` int64, what they predict: already shifted.
    """

    layout: str
    source: torch.Tensor
    position_ids: torch.Tensor
    sequences: Sequences | None
    shared: tuple[tuple[int, int], ...]
    grid: torch.Tensor
    label_rows: torch.Tensor | None
    labels: torch.Tensor | None

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
                      virtual_tokens=None, token_ids=None, prefix_length=0, layout="shared", device=None):
    """Plan a ``[B, S]`` batch.

    Args:
        batch, width: B and S.
        num_virtual_tokens: P.
        attention_mask: ``[B, S]``, nonzero where a token is real; None: everywhere. Left, right and mixed padding.
        labels: ``[B, S]`` int64, not shifted, -100 to ignore.
        prompt_ids: ``[B]`` int64, the prompt of each sequence; None: prompt 0. Ids are dense: N is the largest + 1.
        virtual_tokens: ``[B, S]`` int64, j >= 0 where virtual token j of the sequence's prompt stands (P-Tuning
            templates), -1 elsewhere. The prompt then stands where the template says and not in front.
        token_ids: ``[B, S]`` int64; if given, the ``shared`` layout finds the tokens (and virtual tokens) that all
            sequences of a prompt begin with, and runs them once. Left-padded sequences begin at different positions and
            share nothing.
        prefix_length: Q, the length of the learned keys and values that stand in front of everything.
        layout: "shared", "packed" or "padded".
        device: where the plan lives; by default that of the mask or labels.

    Raises:
        CannotPack: the layout cannot hold this batch exactly (holes in the mask, a label predicted by padding, ...).
        ValueError, TypeError: wrong arguments.
    """
    given = (attention_mask, labels, prompt_ids, virtual_tokens, token_ids)
    device = next((t.device for t in given if t is not None), device)
    if attention_mask is None:
        real = torch.ones(batch, width, dtype=torch.bool, device=device)
    else:
        check_tensor("attention_mask", attention_mask, [batch, width])
        real = attention_mask != 0
    for name, value in (("labels", labels), ("virtual_tokens", virtual_tokens), ("token_ids", token_ids)):
        if value is not None:
            check_tensor(name, value, [batch, width], dtypes=INTS)
    prompts = _Prompts(num_virtual_tokens, prompt_ids, batch, real.device, virtual_tokens is None, prefix_length)
    if layout == "padded":
        return _padded_plan(real, prompts, labels, virtual_tokens)
    lengths = real.sum(1)
    sequence, column = real.nonzero(as_tuple=True)
    first = real.int().argmax(1)
    if bool(((column - first[sequence]) >= lengths[sequence]).any()):
        raise CannotPack("the attention mask has holes")
    tokens = _Tokens(sequence, column, sequence * width + column, lengths, first, width)
    return _plan(tokens, prompts, labels, virtual_tokens, token_ids, layout)


def plan_packed_input(cu_seqlens, num_virtual_tokens, *, labels=None, prompt_ids=None, virtual_tokens=None,
                      token_ids=None, prefix_length=0, layout="shared"):
    """Plan a batch that comes packed: T tokens in a row, sequence b from ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``.

    Args:
        cu_seqlens: ``[B + 1]`` int, a tensor or a list.
        labels, virtual_tokens, token_ids: ``[T]``; otherwise as in :func:`plan_padded_input`.
        num_virtual_tokens, prompt_ids, prefix_length, layout: as there; "padded" is not a layout of packed input.

    Raises:
        CannotPack, ValueError, TypeError: as there.
    """
    if layout == "padded":
        raise ValueError("layout must be 'shared' or 'packed' for packed input, got 'padded'")
    seq = Sequences.packed(cu_seqlens)
    total, batch = seq.rows, len(seq.starts)
    for name, value in (("labels", labels), ("virtual_tokens", virtual_tokens), ("token_ids", token_ids)):
        if value is not None:
            check_tensor(name, value, [total], dtypes=INTS)
    sequence = torch.repeat_interleave(torch.arange(batch, device=seq.starts.device), seq.lengths)
    flat = torch.arange(total, device=seq.starts.device)
    column = flat - seq.starts[sequence]
    width = max((length for _, length, _, _ in seq.host), default=0)
    tokens = _Tokens(sequence, column, flat, seq.lengths, torch.zeros_like(seq.lengths), width)
    prompts = _Prompts(num_virtual_tokens, prompt_ids, batch, flat.device, virtual_tokens is None, prefix_length)
    return _plan(tokens, prompts, labels, virtual_tokens, token_ids, layout)


@dataclass
class _Tokens:
    """The T real tokens of a batch, sequence by sequence: the sequence and column of each, and its place in the input."""

    sequence: torch.Tensor  # [T]
    column: torch.Tensor  # [T]
    flat: torch.Tensor  # [T]
    lengths: torch.Tensor  # [B]
    first: torch.Tensor  # [B] the column of the first real token
    width: int

    def cells(self, values, fill):
        """``[T]`` values of the tokens -> ``[B, width]``."""
        cells = values.new_full((len(self.lengths), self.width), fill)
        cells[self.sequence, self.column] = values
        return cells


class _Prompts:
    """P, the prompt of each sequence, how many distinct prompts there are, and Q."""

    def __init__(self, length, ids, batch, device, in_front, prefix_length):
        for name, value in (("num_virtual_tokens", length), ("prefix_length", prefix_length)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an int >= 0, got {value!r}")
        if ids is not None:
            check_tensor("prompt_ids", ids, [batch], dtypes=INTS)
        self.length = length
        self.ids = torch.zeros(batch, dtype=torch.int64, device=device) if ids is None else ids.long().to(device)
        self.count = 1 if ids is None else (int(ids.max()) + 1 if batch else 0)
        self.in_front = length if in_front else 0  # the prompt rows in front of every sequence
        self.prefix_length = prefix_length


def _plan(tokens, prompts, labels, virtual_tokens, token_ids, layout):
    text = tokens.flat  # [T] the source of every token's row
    if virtual_tokens is not None:
        virtual = virtual_tokens.reshape(-1)[tokens.flat].long()
        if bool((virtual >= prompts.length).any()):
            raise ValueError(f"virtual_tokens must be below num_virtual_tokens {prompts.length}, got {int(virtual.max())}")
        text = torch.where(virtual >= 0, -1 - (prompts.ids[tokens.sequence] * prompts.length + virtual), tokens.flat)
    gaps = tokens.first if bool((tokens.first * (tokens.lengths > 0)).any()) else None
    if layout == "shared":
        common = [0] * prompts.count
        if token_ids is not None:
            code = token_ids.reshape(-1)[tokens.flat].long()
            common = _common_lengths(tokens, prompts, torch.where(text < 0, text, code))
        rows = _shared_rows(tokens, prompts, text, gaps, common)
    elif layout == "packed":
        if gaps is not None and prompts.in_front:
            raise CannotPack("left padding between the prompt and the text has no place in the packed layout")
        rows = _packed_rows(tokens, prompts, text, gaps)
    else:
        raise ValueError(f"layout must be 'shared', 'packed' or 'padded', got {layout!r}")
    source, positions, sequences, shared, prompt_cells, token_rows = rows
    front = prompts.in_front
    grid = torch.full((len(tokens.lengths), front + tokens.width), -1, dtype=torch.int64, device=source.device)
    grid[:, :front] = prompt_cells
    grid[tokens.sequence, front + tokens.column] = token_rows
    label_rows = shifted = None
    if labels is not None:
        if labels.dim() == 1:  # packed input: put the labels where the grid has their tokens
            labels = tokens.cells(labels[tokens.flat], IGNORE)
        label_rows, shifted = _shift_labels(labels, grid, front)
    return RowPlan(layout, source, positions, sequences, shared, grid, label_rows, shifted)


def _common_lengths(tokens, prompts, code):
    """How many tokens all sequences of each prompt begin with: N ints. ``code [T]`` is equal where tokens are."""
    device, used = code.device, (tokens.lengths > 0).nonzero()[:, 0]  # sequences without a token have no say
    if len(used) < 2:
        return [0] * prompts.count
    cells, ids = tokens.cells(code, -1)[used], prompts.ids[used]
    members = torch.zeros(prompts.count, dtype=torch.int64, device=device).index_add_(0, ids, torch.ones_like(ids))
    some = torch.zeros(prompts.count, dtype=torch.int64, device=device)
    some[ids] = torch.arange(len(used), device=device)  # one of each prompt's sequences, whichever
    there = torch.arange(tokens.width, device=device) < tokens.lengths[used, None]
    equal = (cells == cells[some[ids]]) & there & (tokens.first[used, None] == 0)
    agree = equal.long().cumprod(1).sum(1)  # [B] how far each agrees with it
    common = agree.new_full((prompts.count,), tokens.width).scatter_reduce_(0, ids, agree, "amin")
    return common.masked_fill(members < 2, 0).tolist()


def _shared_rows(tokens, prompts, text, gaps, common):
    """Rows of the ``shared`` layout: for each prompt its P rows and ``common[n]`` tokens, then all other tokens."""
    device, front, prefix = text.device, prompts.in_front, prompts.prefix_length
    ends = tokens.lengths.cumsum(0)
    in_front = torch.arange(front, device=device)
    first_of = torch.full((prompts.count,), 0, device=device)
    used = (tokens.lengths > 0).nonzero()[:, 0]
    first_of[prompts.ids[used]] = (ends - tokens.lengths)[used]  # a token that a sequence of the prompt begins with
    begins = first_of.tolist() if any(common) else [0] * prompts.count
    source, positions, shared, start = [], [], [], 0
    for prompt, (begin, length) in enumerate(zip(begins, common)):
        source += [-1 - prompt * front - in_front, text[begin : begin + length]]
        positions.append(prefix + torch.arange(front + length, device=device))
        shared.append((start, front + length))
        start += front + length
    taken = torch.tensor(common, dtype=torch.int64, device=device)[prompts.ids]  # [B] tokens that are shared rows
    own = tokens.column - tokens.first[tokens.sequence] >= taken[tokens.sequence]
    row_of = torch.tensor([row for row, _ in shared], dtype=torch.int64, device=device)[prompts.ids]  # [B]
    token_rows = torch.where(own, start + own.cumsum(0) - 1, row_of[tokens.sequence] + front + tokens.column)
    source = torch.cat([*source, text[own]])
    positions = torch.cat([*positions, (prefix + front + tokens.column)[own]])
    own_ends = (tokens.lengths - taken.minimum(tokens.lengths)).cumsum(0)
    cu, prefix_ids, prefix_lens = [own_ends.new_zeros(1), start + own_ends], prompts.ids, None
    if start:
        lengths = [length for _, length in shared]
        cu.insert(1, torch.tensor(lengths, dtype=torch.int64, device=device).cumsum(0))
        if gaps is not None:
            gaps = torch.cat([gaps.new_zeros(prompts.count), gaps])
        if prefix:  # the bank holds every prompt twice: the learned prefix, and it with the shared rows behind it
            prefix_ids = torch.cat([torch.arange(prompts.count, device=device), prompts.count + prompts.ids])
            prefix_lens = [prefix] * prompts.count + [prefix + length for length in lengths]
        else:
            prefix_ids = torch.cat([torch.full((prompts.count,), -1, device=device), prompts.ids])
            prefix_lens = lengths if len(set(lengths)) > 1 else None
        if prefix_lens is not None:
            prefix_lens = torch.tensor(prefix_lens, device=device)
    sequences = Sequences.packed(torch.cat(cu), prefix_ids, prefix_lens, gaps)
    prompt_cells = row_of[:, None] + in_front  # [B, P]
    return source, positions, sequences, tuple(shared) if start else (), prompt_cells, token_rows


def _packed_rows(tokens, prompts, text, gaps):
    """Rows of the ``packed`` layout: each sequence behind P rows of its own."""
    device, batch, front = text.device, len(tokens.lengths), prompts.in_front
    in_front = torch.arange(front, device=device)
    starts = tokens.lengths.cumsum(0) - tokens.lengths + front * torch.arange(batch, device=device)
    prompt_cells = starts[:, None] + in_front  # [B, P]
    token_rows = starts[tokens.sequence] + front + tokens.column - tokens.first[tokens.sequence]
    source = torch.empty(batch * front + len(text), dtype=torch.int64, device=device)
    positions = torch.empty_like(source)
    source[token_rows] = text
    positions[token_rows] = front + tokens.column
    source[prompt_cells] = -1 - (prompts.ids[:, None] * front + in_front)
    positions[prompt_cells] = in_front.expand(batch, front)
    cu = torch.cat([starts.new_zeros(1), (tokens.lengths + front).cumsum(0)])
    sequences = Sequences.packed(cu, prompts.ids if prompts.prefix_length else None, gaps=gaps)
    return source, prompts.prefix_length + positions, sequences, (), prompt_cells, token_rows


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
    positions = (prompts.prefix_length + torch.arange(total, device=device)).repeat(batch)
    return RowPlan("padded", source.reshape(-1), positions, seq, (), grid, label_rows, shifted)
