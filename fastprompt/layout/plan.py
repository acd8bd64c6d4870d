"""Row plans: the rows a batch needs, in one of three layouts.

* ``shared``: what sequences have in common in front, once; then everything else of every sequence. That is the P rows
  of every distinct prompt, the tokens that all sequences of a prompt begin with, and behind them those that groups of
  its sequences begin with (``tree.py``). A causal model only.
* ``packed``: every sequence with a prompt of its own, no padding. Needed where the prompt sees the text.
* ``padded``: ``[B, P + S]`` as every model takes it.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..backends import implementation
from ..checks import INTS, check_tensor
from . import cells
from .branches import NODE_COST, Fold, Tokens, Told, fold, grow, on_host, predicting
from .cells import IGNORE as IGNORE
from .cells import Stats
from .dead_rows import check_pad_rows_to, dead_rows_filled, with_dead_rows
from .row_plan import RowPlan as RowPlan
from .sequences import Ints, Sequences, move
from .tree import Node, Tree, tree_sequences


class CannotPack(ValueError):
    """A batch that the packed layouts cannot represent exactly; the message says why. The padded layout can."""


def plan_padded_input(
    batch: int,
    width: int,
    num_virtual_tokens: int,
    *,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    prompt_ids: torch.Tensor | None = None,
    only_used_prompts: bool = False,
    virtual_tokens: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    common: torch.Tensor | None = None,
    prefix_length: int = 0,
    layout: str = "shared",
    node_cost: int | None = NODE_COST,
    share_padded: bool = True,
    to_last_label: bool = False,
    pad_rows_to: int | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> RowPlan:
    """Plan a ``[B, S]`` batch.

    Args:
        batch, width: B and S.
        num_virtual_tokens: P.
        attention_mask: ``[B, S]``, nonzero where a token is real; None: everywhere. Left, right and mixed padding.
        labels: ``[B, S]`` int64, not shifted, -100 to ignore.
        prompt_ids: ``[B]`` int64, the prompt of each sequence; None: prompt 0. Ids are dense: N is the largest + 1.
        only_used_prompts: ids may be any, and the N prompts are those that a sequence has, ascending; the plan says
            which these are. So nobody has to wait for a device that would know how many there are.
        virtual_tokens: ``[B, S]`` int64, j >= 0 where virtual token j of the sequence's prompt stands (P-Tuning
            templates), -1 elsewhere. The prompt then stands where the template says and not in front.
        token_ids: ``[B, S]`` int64; if given, the ``shared`` layout finds the tokens (and virtual tokens) that
            sequences of a prompt begin with, all of them or groups of them, and runs them once. Sequences that begin in
            different columns share none.
        common: ``[B]`` int64, what token_ids would tell, in their place: how many tokens each sequence has in common
            with the one before it of the same prompt, from the same first column on.
        prefix_length: Q, the length of the learned keys and values that stand in front of everything.
        layout: "shared", "packed" or "padded".
        node_cost: how many rows a node of the tree has to save: text that a group of sequences begins with. None: only
            what all sequences of a prompt begin with is shared.
        share_padded: may groups of left-padded sequences share what stands behind padding and something in front of it?
            A window would count that padding to what is in front wrong.
        to_last_label: leave out what no label depends on: the tokens from the last label of a sequence on, all of a
            sequence without labels. The layout "shared" only; a batch without any labels keeps its tokens.
        device: where the plan lives, and where all that is given is brought; by default that of the first of the mask,
            labels and the others that is given, or else the CPU.
        backend: "auto", "reference" (plain PyTorch), "cpu" (the C++ library) or "triton". "auto" takes "triton" on a
            GPU and "cpu" on a CPU, if they are there.

    Raises:
        CannotPack: the layout cannot hold this batch exactly (holes in the mask, a label predicted by padding, ...).
        ValueError, TypeError: wrong arguments.
        RuntimeError: a backend that was asked for and cannot run.
    """
    given = (attention_mask, labels, prompt_ids, virtual_tokens, token_ids)
    device = _device(device, given, torch.device("cpu"))
    real = None
    if attention_mask is not None:
        check_tensor("attention_mask", attention_mask, [batch, width])
        real = (attention_mask.to(device) != 0).reshape(-1)
    shape = [batch, width]
    cells_of = cells.Batch(
        batch,
        width,
        device,
        starts=None,
        lengths=None,
        real=real,
        labels=_flat("labels", labels, shape, device),
        virtual=_flat("virtual_tokens", virtual_tokens, shape, device),
        token_ids=_flat("token_ids", token_ids, shape, device),
        prompts=_prompts(prompt_ids, batch, device),
        prompt_length=_length("num_virtual_tokens", num_virtual_tokens),
        prefix_length=_length("prefix_length", prefix_length),
    )
    common = _told(common, token_ids, batch, device)
    return _plan(
        cells_of, layout, common, node_cost, share_padded, to_last_label, pad_rows_to, only_used_prompts, backend
    )


def plan_packed_input(
    cu_seqlens: Ints,
    num_virtual_tokens: int,
    *,
    labels: torch.Tensor | None = None,
    prompt_ids: torch.Tensor | None = None,
    only_used_prompts: bool = False,
    virtual_tokens: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    common: torch.Tensor | None = None,
    prefix_length: int = 0,
    layout: str = "shared",
    node_cost: int | None = NODE_COST,
    to_last_label: bool = False,
    pad_rows_to: int | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> RowPlan:
    """Plan a batch that comes packed: T tokens in a row, sequence b from ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``.

    Args:
        cu_seqlens: ``[B + 1]`` int, a tensor, an array or a list.
        labels, virtual_tokens, token_ids: ``[T]``; otherwise as in :func:`plan_padded_input`.
        num_virtual_tokens, prompt_ids, only_used_prompts, common, prefix_length, layout, node_cost, to_last_label,
            pad_rows_to, backend: as there. There is no layout "padded".
        device: as there, but that of cu_seqlens in place of the CPU.

    Raises:
        CannotPack, ValueError, TypeError, RuntimeError: as there.
    """
    if layout == "padded":
        raise ValueError("layout must be 'shared' or 'packed' for packed input, got 'padded'")
    seq = Sequences.packed(cu_seqlens)
    device = _device(device, (labels, prompt_ids, virtual_tokens, token_ids), seq.starts.device)
    seq, batch = seq.to(device), len(seq.starts)
    shape = [seq.rows]
    cells_of = cells.Batch(
        batch,
        int(seq.host.lengths.max(initial=0)),
        device,
        starts=seq.starts,
        lengths=seq.lengths,
        real=None,
        labels=_flat("labels", labels, shape, device),
        virtual=_flat("virtual_tokens", virtual_tokens, shape, device),
        token_ids=_flat("token_ids", token_ids, shape, device),
        prompts=_prompts(prompt_ids, batch, device),
        prompt_length=_length("num_virtual_tokens", num_virtual_tokens),
        prefix_length=_length("prefix_length", prefix_length),
    )
    common = _told(common, token_ids, batch, device)
    return _plan(cells_of, layout, common, node_cost, True, to_last_label, pad_rows_to, only_used_prompts, backend)


def _device(
    asked: torch.device | str | None, given: tuple[torch.Tensor | None, ...], otherwise: torch.device
) -> torch.device:
    if asked is not None:
        return torch.device(asked)
    return next((t.device for t in given if isinstance(t, torch.Tensor)), otherwise)


def _flat(name: str, value: torch.Tensor | None, shape: list[int], device: torch.device) -> torch.Tensor | None:
    if value is None:
        return None
    check_tensor(name, value, shape, dtypes=INTS)
    return value.to(device).reshape(-1).contiguous()


def _prompts(ids: torch.Tensor | None, batch: int, device: torch.device) -> torch.Tensor | None:
    if ids is None:
        return None
    check_tensor("prompt_ids", ids, [batch], dtypes=INTS)
    return ids.to(device, torch.int64).contiguous()


def _told(
    common: torch.Tensor | None, token_ids: torch.Tensor | None, batch: int, device: torch.device
) -> torch.Tensor | None:
    if common is None:
        return None
    if token_ids is not None:
        raise ValueError("common and token_ids must not both be given: either tells what sequences begin with")
    check_tensor("common", common, [batch], dtypes=INTS)
    return common.to(device)


def _length(name: str, value: int) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an int >= 0, got {value!r}")
    return value


def _plan(
    batch: cells.Batch,
    layout: str,
    common: torch.Tensor | None,
    node_cost: int | None,
    share_padded: bool,
    to_last_label: bool,
    pad_rows_to: int | None,
    only_used_prompts: bool,
    backend: str,
) -> RowPlan:
    rows_of: dict[str, Any] = {"shared": _shared_rows, "packed": _packed_rows, "padded": _padded_rows}
    if layout not in rows_of:
        raise ValueError(f"layout must be 'shared', 'packed' or 'padded', got {layout!r}")
    if check_pad_rows_to(pad_rows_to) is not None and layout == "padded":
        raise ValueError("pad_rows_to needs the layout 'shared' or 'packed', got 'padded'")
    if layout != "shared":
        if to_last_label:
            raise ValueError(f"to_last_label needs the layout 'shared', got {layout!r}")
        batch = replace(batch, token_ids=None)
    on_device = implementation("row_plan", backend, batch.device.type)
    known = on_host(batch, on_device.measure(batch), common, node_cost is not None)
    stats = Stats(*known.measured)
    if only_used_prompts and batch.prompts is not None:
        prompts, numbers = np.unique(stats.prompt, return_inverse=True)
        stats = stats._replace(prompt=numbers)
    else:
        prompts = np.arange(1 if batch.prompts is None else stats.prompt.max(initial=-1) + 1)
    if stats.prompt.min(initial=0) < 0:
        raise ValueError(f"prompt_ids must be at least 0, got {stats.prompt.min()}")
    if layout != "padded":
        if stats.holes.any():
            raise CannotPack("the attention mask has holes")
        if batch.virtual is not None and stats.out_of_range.any():
            raise ValueError(
                f"virtual_tokens must be below num_virtual_tokens {batch.prompt_length}, got {int(batch.virtual.max())}"
            )
    labels = int(stats.labels.sum())
    to_last_label = to_last_label and labels > 0
    if to_last_label:
        stats = stats._replace(length=(stats.needed - stats.first).clip(0, stats.length))
    stats = stats._replace(first=np.where(stats.length > 0, stats.first, 0))
    options: tuple = (len(prompts), known.tokens, node_cost, share_padded) if layout == "shared" else ()
    rows, entries, sequences, tree, folded = rows_of[layout](batch, stats, *options)
    if layout != "padded" and stats.behind_padding.any():
        raise CannotPack("a label follows a padding token and would be predicted by it; label padding with -100")
    entries["first_label"] = stats.labels.cumsum() - stats.labels
    entries["end"] = np.full(batch.size, batch.width) if layout == "padded" else stats.first + stats.length
    table = np.zeros((len(cells.ENTRY), len(entries["prompt"])), np.int64)
    for line, name in zip(table, cells.ENTRY):
        line[: len(entries[name])] = entries[name]
    if sequences is not None:
        if pad_rows_to is not None:
            sequences = with_dead_rows(sequences, pad_rows_to)
        sequences = sequences.to(batch.device)
    on_batch = torch.from_numpy(table).to(batch.device)
    filled = on_device.fill(batch, on_batch, rows, labels, everywhere=layout == "padded")
    if folded is not None:
        filled = folded.of(filled)
    if sequences is not None and pad_rows_to is not None:
        filled = dead_rows_filled(filled, sequences.rows)
    rows_of_plan = layout, filled.source, filled.position_ids, sequences, tree, filled.grid
    rows_once, places = None, None
    if known.labels is not None:
        rows_and_places = predicting(batch, known.labels, known.starts, entries, folded)
        rows_once, places = move([torch.from_numpy(x) for x in rows_and_places], batch.device)
    front = tree.front if layout == "shared" and batch.virtual is None else None
    of_prompts = tuple(prompts.tolist()), tuple(stats.prompt.tolist())
    of_labels = filled.label_rows, filled.labels
    return RowPlan(*rows_of_plan, *of_labels, *of_prompts, to_last_label, rows_once, places, front)


# Where the rows of a layout stand: their number, the columns of the table for `cells.fill` by name, the sequences, what
# is shared, and how the plan is folded. All of it on the host.
_Rows = tuple[int, dict[str, np.ndarray], Sequences | None, Tree, Fold | None]


def _shared_rows(
    batch: cells.Batch,
    stats: Stats,
    count: int,
    tokens: Tokens | Told | None,
    node_cost: int | None,
    share_padded: bool,
) -> _Rows:
    """For each prompt its P rows and what its sequences have in common, then groups of them, then all other tokens."""
    front, prompt = batch.front, stats.prompt
    some = stats.length > 0  # sequences without a token have no say
    common = np.full(count, batch.width)
    np.minimum.at(common, prompt[some], stats.agree[some])
    common[np.bincount(prompt[some], minlength=count) < 2] = 0
    longest = np.zeros_like(common)
    np.maximum.at(longest, prompt, stats.length)
    common = np.minimum(common, longest)  # tokens may agree that are left out
    lengths = front + common  # [N]
    starts = lengths.cumsum() - lengths
    start = int(lengths.sum())
    taken = np.minimum(common[prompt], stats.length)  # [B] tokens that are shared rows
    own = stats.length - taken
    ends = start + own.cumsum()
    # One sequence of each prompt writes its rows: the first that has all of what is shared.
    order = np.lexsort((stats.length < common[prompt], prompt))
    grouped = prompt[order]
    leads = grouped != np.append(-1, grouped[:-1])
    unused = np.flatnonzero(np.bincount(prompt, minlength=count) == 0)
    writes = np.ones(batch.size + len(unused), np.int64)
    writes[order] = leads
    own_column = stats.first + taken
    prompts = np.concatenate([prompt, unused])
    entries = dict(
        prompt_row=starts[prompts],
        own_row=ends - own - own_column,
        own_column=own_column,
        prompt=prompts,
        writes=writes,
    )
    nodes = [Node(*root, prompt=i) for i, root in enumerate(zip(starts.tolist(), lengths.tolist()))] if start else []
    leaves, total, folded = prompt if nodes else np.full(batch.size, -1), start + int(own.sum()), None
    branches = None
    if tokens is not None and node_cost is not None:
        in_front = front + batch.prefix_length
        counted = stats.length if share_padded or not in_front else np.where(stats.first > 0, 0, stats.length)
        found = tokens.neighbours(stats.first, counted, prompt)
        branches = grow(*found, prompt, common, in_front, node_cost)
    if branches is not None:
        firsts, counts, own, folded = fold(branches, start, taken, ends - own, own)
        roots, of = len(nodes), branches.member
        parents = np.where(branches.parent < 0, leaves[of], roots + branches.parent)
        below = zip(*(x.tolist() for x in (firsts, counts, parents, prompt[of], stats.first[of])))
        nodes += [Node(*node) for node in below]
        leaves = np.where(branches.leaf < 0, leaves, roots + branches.leaf)
        ends = start + int(counts.sum()) + own.cumsum()
    tree = Tree(tuple(nodes), tuple(leaves.tolist()))
    return total, entries, tree_sequences(tree, ends, prompt, count, batch.prefix_length, stats.gaps), tree, folded


def _packed_rows(batch: cells.Batch, stats: Stats) -> _Rows:
    """Each sequence behind P rows of its own."""
    if stats.gaps is not None and batch.front:
        raise CannotPack("left padding between the prompt and the text has no place in the packed layout")
    ends = (batch.front + stats.length).cumsum()
    sequences = Sequences.packed(np.append(0, ends), stats.prompt if batch.prefix_length else None, gaps=stats.gaps)
    return *_one_by_one(batch, stats, stats.length, stats.first), sequences, Tree(), None


def _padded_rows(batch: cells.Batch, stats: Stats) -> _Rows:
    """Every cell."""
    total, sequences = batch.front + batch.width, None
    if not (stats.holes.any() or batch.front and stats.first.any()):
        sequences = Sequences.padded(stats.first, batch.front + stats.length, total)
    lengths, first = np.full(batch.size, batch.width), np.zeros(batch.size, np.int64)
    return *_one_by_one(batch, stats, lengths, first), sequences, Tree(), None


def _one_by_one(
    batch: cells.Batch, stats: Stats, lengths: np.ndarray, first: np.ndarray
) -> tuple[int, dict[str, np.ndarray]]:
    """The number of rows and the table where each sequence writes P rows and its own."""
    ends = (batch.front + lengths).cumsum()
    starts = ends - lengths - batch.front
    entries = dict(
        prompt_row=starts,
        own_row=starts + batch.front - first,
        own_column=first,
        prompt=stats.prompt,
        writes=np.ones_like(starts),
    )
    return int(ends[-1]) if len(ends) else 0, entries
