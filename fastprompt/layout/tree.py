"""The rows that sequences share, as a tree: each node continues another one, or begins."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from .sequences import Sequences


class Node(NamedTuple):
    """A run of rows that several sequences, or other nodes, continue.

    Attributes:
        start, length: its first row, and how many there are; a root may have none.
        parent: the number of the node that it continues; -1: none.
        prompt: the prompt of the sequences behind it.
        gap: the padding in front of it, or of what it continues.
    """

    start: int
    length: int
    parent: int = -1
    prompt: int = 0
    gap: int = 0


@dataclass(frozen=True)
class Tree:
    """The rows that sequences share. The J nodes are the first sequences of a plan, parents before their children.

    Attributes:
        nodes: first of all the roots, one for each prompt, if there is a prompt all of whose sequences share rows.
        leaves: ``[B]`` the node that each sequence of the batch continues; -1: none.
    """

    nodes: tuple[Node, ...] = ()
    leaves: tuple[int, ...] = ()

    @cached_property
    def parents(self) -> np.ndarray:
        """``[J + B]`` the node that each sequence of the plan continues; -1: none."""
        return np.array([node.parent for node in self.nodes] + list(self.leaves), np.int64)

    @cached_property
    def lengths(self) -> np.ndarray:
        """``[J]`` the rows of each node."""
        return np.array([node.length for node in self.nodes], np.int64)

    @cached_property
    def depths(self) -> np.ndarray:
        """``[J]`` the rows of each node and of all that it continues."""
        depths = self.lengths.copy()
        for number, node in enumerate(self.nodes):
            if node.parent >= 0:
                depths[number] += depths[node.parent]
        return depths

    @property
    def front(self) -> int:
        """The rows of the roots, which stand in front of all others."""
        return sum(node.length for node in self.nodes if node.parent < 0)

    @property
    def roots(self) -> np.ndarray:
        """``[B]`` the first of the nodes in front of each sequence of the batch; -1: none."""
        first = np.arange(len(self.nodes))
        for number, node in enumerate(self.nodes):
            if node.parent >= 0:
                first[number] = first[node.parent]
        return np.append(first, -1)[self.parents[len(self.nodes) :]]

    @property
    def gaps(self) -> np.ndarray:
        """``[J + B]`` the padding in front of what each sequence of the plan continues."""
        return np.array([node.gap for node in self.nodes] + [0], np.int64)[self.parents]

    def pads_between(self, prefix_length: int) -> bool:
        """Does padding stand between rows that are shared, or between them and learned keys in front of everything?"""
        gaps = self.gaps
        return any(
            node.gap > gaps[number] and prefix_length + self.depths[number] > node.length
            for number, node in enumerate(self.nodes)
        )

    def chains(self, prompts: int, prefix_length: int) -> np.ndarray:
        """``[E, W]`` what stands in front of sequences, as ``Sequences.chains`` has it.

        First ``prompts`` learned prefixes, if they have a length, then for each node the learned prefix of its prompt
        and all rows down to its own.
        """
        first = prompts if prefix_length else 0
        source = np.full((first + len(self.nodes), prefix_length + int(self.depths.max(initial=0))), -1)
        source[:first, :prefix_length] -= np.arange(first * prefix_length).reshape(first, prefix_length)
        for number, node in enumerate(self.nodes):
            end = prefix_length + int(self.depths[number])
            begin = end - node.length
            if begin:
                source[first + number, :begin] = source[node.prompt if node.parent < 0 else first + node.parent, :begin]
            source[first + number, begin:end] = np.arange(node.start, node.start + node.length)
        return source


def tree_sequences(
    tree: Tree, ends: np.ndarray, prompts: np.ndarray, count: int, prefix_length: int, gaps: np.ndarray | None
) -> Sequences:
    """The sequences of a plan: the nodes, and those of the batch behind them.

    Args:
        tree: the nodes; there may be none.
        ends: ``[B]`` the row behind each sequence of the batch.
        prompts: ``[B]``, of ``count``.
        prefix_length: Q, of learned keys and values in front of everything.
        gaps: ``[B]`` the padding in front of each sequence, or None.
    """
    nodes = tree.nodes
    if not nodes:
        return Sequences.packed(np.append(0, ends), prompts, gaps=gaps)
    start = nodes[-1].start + nodes[-1].length
    cu_seqlens = np.concatenate([[node.start for node in nodes], [start], ends])
    ids, lengths, chains = tree.parents, tree.depths, tree.chains(count, prefix_length)
    if prefix_length:  # in front stand the learned prefixes alone, or with rows behind them
        prompts = np.append([node.prompt for node in nodes], prompts)
        ids = np.where(ids < 0, prompts, count + ids)
        lengths = np.concatenate([np.full(count, prefix_length), prefix_length + lengths])
    if gaps is not None:
        gaps = np.append([node.gap for node in nodes], gaps) - tree.gaps
    return Sequences.packed(cu_seqlens, ids, None if (lengths == lengths[0]).all() else lengths, gaps, chains)
