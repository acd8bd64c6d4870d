"""Sequences of prefix_attention behind chains: prefixes whose keys are rows of k and learned ones."""

import torch

from fastprompt import Sequences

LEARNED, ROOM = 2, 4  # learned prefixes, and their keys
_UNUSED = 10**6  # what stands behind a chain is read by nobody


def chained(root, child, grandchild, others, learned=True, gaps=True):
    """Sequences: three nodes, each behind the one before, then ``others`` behind all sorts of chains, and behind none.

    Args:
        root, child, grandchild, others: the lengths.
        learned: do learned keys stand in front of the root, and in between elsewhere?
    """
    starts = [0, root, root + child]
    nodes = [list(range(start, start + length)) for start, length in zip(starts, (root, child, grandchild))]
    front = [-1 - i for i in range(ROOM)] if learned else []
    chains = [[], front]
    for node in nodes:
        chains.append(chains[-1] + node)
    odd = [nodes[1][-1], nodes[0][0], *([-1 - ROOM, -2 - ROOM, -1] if learned else []), nodes[0][0]]
    chains += [odd, nodes[1][1:]]
    width = max(map(len, chains))
    lengths = [root, child, grandchild, *others]
    ids = [1, 2, 3] + [(5, 4, 6, -1, 3, 0, 4)[i % 7] for i in range(len(others))]
    return Sequences.packed(
        [sum(lengths[:i]) for i in range(len(lengths) + 1)],
        ids,
        [len(chain) for chain in chains],
        [i % 3 for i in range(len(lengths))] if gaps else None,
        [chain + [_UNUSED] * (width - len(chain)) for chain in chains],
    )


def drawn(seq, heads, kv_heads, widths, dtype=torch.float64, sinks=False, learned=True):
    """q, k, v, prefix_k, prefix_v, sinks."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    bank = [draw(LEARNED, ROOM, kv_heads, width) if learned else None for width in widths]
    q, k, v = draw(seq.rows, heads, widths[0]), *(draw(seq.rows, kv_heads, width) for width in widths)
    return [q, k, v, *bank, draw(heads) if sinks else None]
