"""Row plans: the rows a batch needs, in one of three layouts.

* ``shared``: what sequences have in common in front, once; then everything else of every sequence. That is the P rows
  of every distinct prompt, and the tokens that all sequences of a prompt begin with. A causal model only.
* ``packed``: every sequence with a prompt of its own, no padding. Needed where the prompt sees the text.
* ``padded``: ``[B, P + S]`` as every model takes it.
"""

from collections import namedtuple
from dataclasses import dataclass, replace

import torch

from ..checks import INTS, check_tensor, choose_backend, import_backend
from . import cells
from .cells import IGNORE as IGNORE
from .sequences import Sequences, move


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
        return cells.masked_fill_(missing, fill)  # of the copy that indexing made


def plan_padded_input(
    batch,
    width,
    num_virtual_tokens,
    *,
    attention_mask=None,
    labels=None,
    prompt_ids=None,
    virtual_tokens=None,
    token_ids=None,
    prefix_length=0,
    layout="shared",
    device=None,
    backend="auto",
):
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
        backend: "auto", "reference" (plain PyTorch) or "triton". "auto" takes "triton" on a GPU, if Triton is there.

    Raises:
        CannotPack: the layout cannot hold this batch exactly (holes in the mask, a label predicted by padding, ...).
        ValueError, TypeError: wrong arguments.
        RuntimeError: a backend that was asked for and cannot run.
    """
    given = (attention_mask, labels, prompt_ids, virtual_tokens, token_ids)
    device = next((t.device for t in given if t is not None), torch.device(device or "cpu"))
    real = None
    if attention_mask is not None:
        check_tensor("attention_mask", attention_mask, [batch, width])
        real = (attention_mask != 0).reshape(-1)
    tokens = _like_tokens([batch, width], labels, virtual_tokens, token_ids)
    prompts = _prompts(num_virtual_tokens, prompt_ids, batch, device, prefix_length)
    return _plan(cells.Batch(batch, width, device, None, None, real, *tokens, *prompts), layout, backend)


def plan_packed_input(
    cu_seqlens,
    num_virtual_tokens,
    *,
    labels=None,
    prompt_ids=None,
    virtual_tokens=None,
    token_ids=None,
    prefix_length=0,
    layout="shared",
    backend="auto",
):
    """Plan a batch that comes packed: T tokens in a row, sequence b from ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``.

    Args:
        cu_seqlens: ``[B + 1]`` int, a tensor or a list.
        labels, virtual_tokens, token_ids: ``[T]``; otherwise as in :func:`plan_padded_input`.
        num_virtual_tokens, prompt_ids, prefix_length, layout, backend: as there; "padded" is not a layout of packed
            input.

    Raises:
        CannotPack, ValueError, TypeError, RuntimeError: as there.
    """
    if layout == "padded":
        raise ValueError("layout must be 'shared' or 'packed' for packed input, got 'padded'")
    seq = Sequences.packed(cu_seqlens)
    given = (labels, prompt_ids, virtual_tokens, token_ids)
    seq = seq.to(next((t.device for t in given if t is not None), seq.starts.device))
    batch, device = len(seq.starts), seq.starts.device
    tokens = _like_tokens([seq.rows], labels, virtual_tokens, token_ids)
    prompts = _prompts(num_virtual_tokens, prompt_ids, batch, device, prefix_length)
    width = max((length for _, length, _, _ in seq.host), default=0)
    return _plan(cells.Batch(batch, width, device, seq.starts, seq.lengths, None, *tokens, *prompts), layout, backend)


def _like_tokens(shape, labels, virtual_tokens, token_ids):
    """Each checked and flat."""
    values = dict(labels=labels, virtual_tokens=virtual_tokens, token_ids=token_ids)
    for name, value in values.items():
        if value is not None:
            check_tensor(name, value, shape, dtypes=INTS)
    return [None if value is None else value.reshape(-1) for value in values.values()]


def _prompts(length, ids, batch, device, prefix_length):
    """The prompts of the sequences, P and Q, checked."""
    for name, value in (("num_virtual_tokens", length), ("prefix_length", prefix_length)):
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} must be an int >= 0, got {value!r}")
    if ids is not None:
        check_tensor("prompt_ids", ids, [batch], dtypes=INTS)
        ids = ids.to(device, torch.int64)
    return ids, length, prefix_length


def _implementation(requested, device):
    """The module whose ``measure`` and ``fill`` look at the cells."""
    backends, triton = {"reference": None}, None
    if requested == "triton" or device.type != "cpu":  # otherwise without a look at Triton, whose import takes time
        triton, problem = import_backend(__package__, "triton")
        backends["triton"] = problem or triton.unsupported(device.type)
    chosen = choose_backend("the row plan", requested, backends, ["triton", "reference"])
    return triton if chosen == "triton" else cells


def _plan(batch, layout, backend):
    rows_of = {"shared": _shared_rows, "packed": _packed_rows, "padded": _padded_rows}
    if layout not in rows_of:
        raise ValueError(f"layout must be 'shared', 'packed' or 'padded', got {layout!r}")
    if layout != "shared":
        batch = replace(batch, token_ids=None)
    on_device = _implementation(backend, batch.device)
    stats = _Stats(*on_device.measure(batch).cpu())
    if layout != "padded":
        if stats.holes.any():
            raise CannotPack("the attention mask has holes")
        if stats.strangers.any():
            raise ValueError(
                f"virtual_tokens must be below num_virtual_tokens {batch.prompt_length}, got {int(batch.virtual.max())}"
            )
    stats.first[stats.length == 0] = 0
    rows, entries, sequences, shared = rows_of[layout](batch, stats)
    if layout != "padded" and stats.orphans.any():
        raise CannotPack("a label follows a padding token, whose hidden state would have to predict it")
    labels = int(stats.labels.sum())
    entries["first_label"] = stats.labels.cumsum(0) - stats.labels
    table = torch.zeros(len(cells.ENTRY), len(entries["prompt"]), dtype=torch.int64)
    for line, name in zip(table, cells.ENTRY):
        line[: len(entries[name])] = entries[name]
    if sequences is not None:
        sequences = sequences.to(batch.device)
    filled = on_device.fill(batch, *move([table], batch.device), rows, labels, everywhere=layout == "padded")
    return RowPlan(
        layout, filled.source, filled.position_ids, sequences, shared, filled.grid, filled.label_rows, filled.labels
    )


class _Stats(namedtuple("_Stats", cells.STATS)):
    """On the host, ``[B]`` int64 each."""

    @property
    def gaps(self):
        """``first``, or None if every sequence begins in column 0."""
        return self.first if self.first.any() else None


# Where the rows of a layout stand: their number, the columns of the table for `cells.fill` by name, the sequences, and
# what is shared.


def _shared_rows(batch, stats):
    """For each prompt its P rows and what its sequences have in common, then all other tokens."""
    front, prefix, prompt = batch.front, batch.prefix_length, stats.prompt
    count = 1 if batch.prompts is None else max(prompt.tolist(), default=-1) + 1
    some = stats.length > 0  # sequences without a token have no say
    common = torch.full((count,), batch.width).scatter_reduce_(0, prompt[some], stats.agree[some], "amin")
    common[prompt[some].bincount(minlength=count) < 2] = 0
    lengths = front + common  # [N]
    starts = lengths.cumsum(0) - lengths
    start = int(lengths.sum())
    taken = common[prompt].minimum(stats.length)  # [B] tokens that are shared rows
    own = stats.length - taken
    ends = start + own.cumsum(0)
    leaders = {}  # of each prompt the sequence that writes its rows: the first with a token, if one has any
    for _, number, owner in sorted(zip((stats.length == 0).tolist(), range(batch.size), prompt.tolist())):
        leaders.setdefault(owner, number)
    unused = [n for n in range(count) if n not in leaders]
    writes = torch.zeros(batch.size + len(unused), dtype=torch.int64)
    writes[list(leaders.values())] = 1
    writes[batch.size :] = 1
    prompt = torch.cat([prompt, torch.tensor(unused, dtype=torch.int64)])
    own_column = stats.first + taken
    entries = dict(
        prompt_row=starts[prompt], own_row=ends - own - own_column, own_column=own_column, prompt=prompt, writes=writes
    )
    if not start:
        sequences = Sequences.packed(torch.cat([ends.new_zeros(1), ends]), stats.prompt, gaps=stats.gaps)
        return int(own.sum()), entries, sequences, ()
    cu = torch.cat([starts, starts.new_tensor([start]), ends])
    gaps = None if stats.gaps is None else torch.cat([torch.zeros_like(starts), stats.gaps])
    if prefix:  # the bank holds every prompt twice: the learned prefix, and it with the shared rows behind it
        prefix_ids = torch.cat([torch.arange(count), count + stats.prompt])
        prefix_lens = torch.cat([torch.full_like(lengths, prefix), prefix + lengths])
    else:
        prefix_ids = torch.cat([torch.full_like(starts, -1), stats.prompt])
        prefix_lens = lengths if len(lengths.unique()) > 1 else None
    shared = tuple(zip(starts.tolist(), lengths.tolist()))
    return start + int(own.sum()), entries, Sequences.packed(cu, prefix_ids, prefix_lens, gaps), shared


def _packed_rows(batch, stats):
    """Each sequence behind P rows of its own."""
    if stats.gaps is not None and batch.front:
        raise CannotPack("left padding between the prompt and the text has no place in the packed layout")
    ends = (batch.front + stats.length).cumsum(0)
    sequences = Sequences.packed(
        torch.cat([ends.new_zeros(1), ends]), stats.prompt if batch.prefix_length else None, gaps=stats.gaps
    )
    return *_one_by_one(batch, stats, stats.length, stats.first), sequences, ()


def _padded_rows(batch, stats):
    """Every cell."""
    total, sequences = batch.front + batch.width, None
    if not (stats.holes.any() or batch.front and stats.first.any()):
        sequences = Sequences.padded(stats.first, batch.front + stats.length, total)
    return (
        *_one_by_one(batch, stats, torch.full_like(stats.length, batch.width), torch.zeros_like(stats.first)),
        sequences,
        (),
    )


def _one_by_one(batch, stats, lengths, first):
    """The number of rows and the table where each sequence writes P rows and its own."""
    ends = (batch.front + lengths).cumsum(0)
    starts = ends - lengths - batch.front
    entries = dict(prompt_row=starts, own_row=starts + batch.front - first, own_column=first, prompt=stats.prompt,
                   writes=torch.ones_like(starts))  # fmt: skip
    return int(ends[-1]) if len(ends) else 0, entries
