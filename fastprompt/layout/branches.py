"""What groups of sequences begin with: found in the tokens of a batch, and taken out of its plan.

Sequences are sorted: those that begin alike then stand side by side, and how many tokens neighbours have in common says
which branches there are. A branch becomes a node of the tree if it saves more rows than it costs. The rows of a plan
with a tree are those of the plan without, but for the repeated ones; so that plan is made first, by whatever backend,
and folded.
"""

from typing import NamedTuple

import numpy as np
import torch

from .cells import IGNORE, STATS, Batch, Filled
from .sequences import move

NODE_COST = 8  # what a node costs, in rows: a tile of attention ends with it, and gradients are summed apart for it
_KEYS = 64  # keys in front of a node whose gradients are summed once more in the time in which a row is run, at least
_LEAST = 2  # tokens of a node: layers with a state would take one for a step of generation, which writes in place


class Branches(NamedTuple):
    """Nodes below the roots, ``[K]`` each, parents before their children; and ``leaf``, ``[B]``.

    Attributes:
        depth: the tokens of a sequence, from its first on, that end with the node.
        parent: the number of the branch that it continues; -1: a root.
        member: a sequence that begins with it.
        leaf: the branch that each sequence continues; -1: a root.
    """

    depth: np.ndarray
    parent: np.ndarray
    member: np.ndarray
    leaf: np.ndarray


class Tokens(NamedTuple):
    """The tokens of a batch on the host, flat: ``ids``; ``virtual`` or None; ``starts [B]``, where sequences begin."""

    ids: np.ndarray
    virtual: np.ndarray | None
    starts: np.ndarray

    def neighbours(self, first: np.ndarray, lengths: np.ndarray, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sequences in an order in which those that begin alike stand side by side, and what neighbours have in common.

        Args:
            first, lengths, prompts: ``[B]`` the column of each sequence's first token, its tokens, and its prompt.

        Returns:
            ``[B]`` the order, and ``[B]`` how many tokens each has in common with the one before it; 0 where their
            prompts or first columns differ.
        """
        column = np.arange(int(lengths.max(initial=0)))
        codes = np.empty((len(lengths), 2 + len(column)), np.int64)
        codes[:, 0], codes[:, 1] = prompts, first
        place = np.minimum((self.starts + first)[:, None] + column, len(self.ids) - 1)
        codes[:, 2:] = self.ids[place]
        if self.virtual is not None:
            virtual = self.virtual[place]
            codes[:, 2:][virtual >= 0] = -1 - virtual[virtual >= 0]
        codes[:, 2:][column >= lengths[:, None]] = np.iinfo(np.int64).min
        # Bytes in any order of significance: equal beginnings stand together, and nothing else is asked for.
        order = codes.view(f"V{codes.itemsize * codes.shape[1]}")[:, 0].argsort(kind="stable")
        codes, lengths = codes[order], lengths[order]
        differ = codes[1:] != codes[:-1]
        alike = np.where(differ.any(1), differ.argmax(1), codes.shape[1]) - 2
        return order, np.append(0, np.clip(alike, 0, np.minimum(lengths[1:], lengths[:-1])))


class Told(NamedTuple):
    """What a caller says: ``common [B]``, and ``lengths [B]`` of the sequences that it says it of."""

    common: np.ndarray
    lengths: np.ndarray

    def neighbours(self, first: np.ndarray, lengths: np.ndarray, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`Tokens.neighbours`.

        Raises:
            ValueError: two sequences cannot have so much in common.
        """
        order = prompts.argsort(kind="stable")
        before = np.append(order[:1], order[:-1])
        common = np.where(prompts[order] == prompts[before], self.common[order], 0)[: len(order)]
        common[:1] = 0
        room = np.minimum(self.lengths[order], self.lengths[before]) * (first[order] == first[before])
        if (wrong := (common < 0) | (common > room)).any():
            row = wrong.argmax()
            raise ValueError(
                f"common must be at most what a sequence and the one before it have room for, got {common[row]} for "
                f"sequence {order[row]}, which has room for {room[row]}"
            )
        return order, np.minimum(common, np.minimum(lengths[order], lengths[before]))


class OnHost(NamedTuple):
    """What the host needs of a batch.

    Attributes:
        measured: ``[STATS, B]``.
        tokens: what groups of sequences are looked for in; None: in nothing.
        labels: ``[T]`` or None.
        starts: ``[B]`` where sequences begin in the flat tensors.
    """

    measured: np.ndarray
    tokens: Tokens | Told | None
    labels: np.ndarray | None
    starts: np.ndarray


def on_host(batch: Batch, stats: torch.Tensor, common: torch.Tensor | None, wanted: bool) -> OnHost:
    """What the host needs of a batch, groups of sequences included if they are ``wanted``: by one copy."""
    wanted = wanted and batch.size > 1
    given = dict(stats=stats, labels=batch.labels, starts=batch.starts, common=common if wanted else None)
    if wanted and common is None and batch.token_ids is not None:
        given |= dict(ids=batch.token_ids, virtual=batch.virtual)
    moved = move([x.long() for x in given.values() if x is not None], torch.device("cpu"))
    found = dict(zip((name for name, x in given.items() if x is not None), (x.numpy() for x in moved)))
    measured = found["stats"]
    tokens: Tokens | Told | None = None
    starts = found.get("starts", np.arange(batch.size) * batch.width)
    if "common" in found:
        tokens = Told(found["common"], measured[STATS.index("length")])
    elif "ids" in found:
        tokens = Tokens(found["ids"], found.get("virtual"), starts)
    return OnHost(measured, tokens, found.get("labels"), starts)


class _Branch:
    """Sequences that begin alike, in parts: numbers of sequences, or branches that have more in common."""

    __slots__ = ("depth", "first", "parts")

    def __init__(self, depth: int, first: int, parts: list) -> None:
        self.depth, self.first, self.parts = depth, first, parts


def grow(
    order: np.ndarray, common: np.ndarray, prompts: np.ndarray, depths: np.ndarray, front: int, cost: int
) -> Branches | None:
    """The branches that save more rows than they cost, or None if none does.

    Args:
        order, common: of :meth:`Tokens.neighbours`; the sequences of a prompt stand together.
        prompts: ``[B]``.
        depths: ``[N]`` the tokens that all sequences of a prompt begin with, and that its root holds.
        front: what stands in front of the tokens, in rows.
        cost: of a node, in rows.
    """

    def pays(branch: _Branch, above: int) -> bool:
        """Its tokens are run once, in place of once for each part."""
        length = branch.depth - above
        saved = (len(branch.parts) - 1) * length
        return length >= _LEAST and saved >= cost + (front + branch.depth) // _KEYS

    def close(opened: list[_Branch], shared: int) -> None:
        """Leave the branches in which the next sequence, of which ``shared`` tokens are known, is not."""
        while len(opened) > 1 and opened[-1].depth > shared:
            branch = opened.pop()
            if opened[-1].depth < shared:
                opened.append(_Branch(shared, branch.first, []))
            opened[-1].parts += [branch] if pays(branch, opened[-1].depth) else branch.parts

    if not (common > depths[prompts[order]] + 1).any():
        return None
    roots: list[_Branch] = []
    opened: list[_Branch] = []
    last = -1
    of_order = prompts[order]
    for sequence, shared, prompt, depth in zip(
        order.tolist(), common.tolist(), of_order.tolist(), depths[of_order].tolist()
    ):
        if prompt != last:
            close(opened, -1)
            opened, last = [_Branch(depth, sequence, [])], prompt
            roots.append(opened[0])
        else:
            close(opened, shared)
        if opened[-1].depth < shared:
            before = opened[-1].parts.pop()  # the sequence before
            opened.append(_Branch(shared, before, [before]))
        opened[-1].parts.append(sequence)
    close(opened, -1)
    return _numbered(roots, len(order))


def _numbered(roots: list[_Branch], batch: int) -> Branches | None:
    depth, parent, member, leaf = [], [], [], np.full(batch, -1)
    waiting = [(root, -1) for root in reversed(roots)]
    while waiting:
        branch, number = waiting.pop()
        for part in branch.parts:
            if isinstance(part, _Branch):
                depth.append(part.depth)
                parent.append(number)
                member.append(part.first)
                waiting.append((part, len(depth) - 1))
            else:
                leaf[part] = number
    if not depth:
        return None
    return Branches(np.array(depth), np.array(parent), np.array(member), leaf)


class Fold(NamedTuple):
    """What makes the plan of a tree of the one without: on the host.

    Attributes:
        kept: ``[R]`` the rows that stay, in their new order.
        places: ``[R0 + 1]`` the new row of each former one; -1 for number -1.
    """

    kept: np.ndarray
    places: np.ndarray

    def of(self, filled: Filled) -> Filled:
        """The folded plan."""
        rows = filled.label_rows
        kept, places = move([torch.from_numpy(self.kept), torch.from_numpy(self.places)], filled.grid.device)
        return Filled(
            filled.source[kept],
            filled.position_ids[kept],
            places[filled.grid],
            None if rows is None else places[rows],
            filled.labels,
        )


def predicting(
    batch: Batch, labels: np.ndarray, starts: np.ndarray, entries: dict[str, np.ndarray], folded: Fold | None
) -> tuple[np.ndarray, np.ndarray]:
    """The rows that predict a label, each once, and ``[M]`` which of them predicts each label, in batch order.

    The host works them out, or it would have to wait for the device, which alone would know how many there are.

    Args:
        labels: ``[T]``.
        starts: ``[B]`` where sequences begin in them.
        entries: of the plan; see ``cells.ENTRY``.
    """
    place = np.flatnonzero(labels != IGNORE)
    sequence = np.searchsorted(starts, place, "right") - 1
    column = place - starts[sequence] - 1  # in front of the label
    if not batch.front:
        sequence, column = sequence[column >= 0], column[column >= 0]
    own = column >= entries["own_column"][sequence]
    row = np.where(own, entries["own_row"][sequence], entries["prompt_row"][sequence] + batch.front) + column
    return np.unique(row if folded is None else folded.places[row], return_inverse=True)


def fold(
    branches: Branches, start: int, begin: np.ndarray, starts: np.ndarray, own: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Fold]:
    """The rows of a tree, and how to come to them.

    Args:
        branches: the nodes below the roots.
        start: how many rows the roots have.
        begin: ``[B]`` the tokens of each sequence that its root holds.
        starts, own: ``[B]`` the first row of each sequence's own tokens in the plan without a tree, and their number.

    Returns:
        ``[K]`` the first row and the number of rows of each branch, ``[B]`` the rows that sequences keep, and the fold.
    """
    depth, parent, member, leaf = branches
    above = np.where(parent < 0, begin[member], depth[parent])
    lengths = depth - above
    firsts = start + lengths.cumsum() - lengths
    taken = np.where(leaf < 0, 0, depth[leaf] - begin)
    left = own - taken
    nodes = _runs(starts[member] + above - begin[member], lengths)
    kept = np.concatenate([np.arange(start), nodes, _runs(starts + taken, left)])
    places = np.full(start + int(own.sum()) + 1, -1)
    places[kept] = np.arange(len(kept))
    node, some = leaf, np.flatnonzero(leaf >= 0)
    while len(some):  # every sequence climbs to its root, all of them a step at a time
        here = node[some]
        places[_runs(starts[some] + above[here] - begin[some], lengths[here])] = _runs(firsts[here], lengths[here])
        node = np.where(node >= 0, parent[node], -1)
        some = np.flatnonzero(node >= 0)
    return firsts, lengths, left, Fold(kept, places)


def _runs(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers from ``starts[i]`` on, ``lengths[i]`` of them, one run behind the other."""
    ends = lengths.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - ends + lengths, lengths) + np.arange(total)
