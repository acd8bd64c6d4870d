"""Sequences of prefix_attention behind chains: prefixes whose keys are rows of k and learned ones."""

import torch
from test_prefix_attention import dense, tensors

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
    prefixes = LEARNED if learned else 0
    return tensors(seq.rows, heads, kv_heads, widths[0], prefixes, ROOM, dtype, sinks=sinks, value_dim=widths[1])


def concatenated(q, k, v, prefix_k, prefix_v, seq, **flags):
    """Dense attention behind copies of what the chains name."""
    used = torch.arange(seq.chains.shape[1]) < seq.prefix_lens[:, None]
    index = torch.where(used, seq.chains, 0)
    index = torch.where(index < 0, len(k) - 1 - index, index)
    banks = [
        (own if learned is None else torch.cat([own, learned.flatten(0, 1)]))[index]
        for own, learned in ((k, prefix_k), (v, prefix_v))
    ]
    table = zip(*(x.tolist() for x in (seq.starts, seq.lengths, seq.prefix_ids)), seq.host.gaps.tolist())
    described = [(start, n, i, 0 if i < 0 else int(seq.prefix_lens[i]), gap) for start, n, i, gap in table]
    return dense(q, k, v, *banks, described, **flags)
