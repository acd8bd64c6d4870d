"""Batches of decode, whose caches hold nan where no sequence has a key."""

import math
from dataclasses import dataclass

import torch

from fastprompt import Sequences

LAYOUTS = ["contiguous", "pages"]


@dataclass
class Case:
    """A batch of decode, and what its sequences are: ``(keys, values, queries)`` float64, ``[n, Hkv, width]`` each."""

    seq: Sequences
    inputs: list  # q, k, v, prefix_k, prefix_v, sinks
    own: list
    gaps: tuple
    prefixes: tuple  # of each sequence, and the length of each prefix
    used: tuple


def make(layout, dtype=torch.float64, widths=(8, 6), lengths=(9, 1, 0, 6, 13), queries=(3, 1, 0, 6, 2), seed=0):
    """Caches whose unused columns hold nan; in pages of four columns, some of which two sequences read."""
    generator, room = torch.Generator().manual_seed(seed), max(lengths) + 3
    starts = [number % 4 for number in range(len(lengths))]
    gaps, ids, used = tuple(i % 3 for i in starts), tuple(number % 3 - 1 for number in range(len(lengths))), (7, 5)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    options = dict(prefix_ids=ids, prefix_lens=used, gaps=gaps, starts=starts, queries=queries)
    if layout == "contiguous":
        cache = [draw(len(lengths), 2, room, width) for width in widths]
        rows = [[x[b] for b in range(len(lengths))] for x in cache]
    else:
        columns, pages = -(-room // 4), 3 * len(lengths)
        table = torch.randint(0, pages, (len(lengths), columns), generator=generator)
        cache = [draw(pages, 4, 2, width).transpose(1, 2) for width in widths]  # heads side by side, as in vLLM
        rows = [[x[own].transpose(0, 1).flatten(1, 2) for own in table] for x in cache]
        options["pages"] = table
    own = [
        tuple(x[:, start : start + n].transpose(0, 1).double() for x in (k, v))
        for k, v, start, n in zip(*rows, starts, lengths)
    ]
    hide_unused(cache, layout, starts, lengths, options)
    rows = len(lengths) if queries is None else sum(queries)
    q, sinks = draw(rows, 4, widths[0]), draw(4)
    bank = [draw(2, max(used), 2, width) for width in widths]
    return Case(Sequences.decode(lengths, **options), [q, *cache, *bank, sinks], own, gaps, ids, used)


def hide_unused(cache, layout, starts, lengths, options):
    """nan where no sequence has a key, and pages that do not exist where it needs none."""
    read = torch.zeros(cache[0].shape[0], cache[0].shape[2], dtype=torch.bool)
    for number, (start, length) in enumerate(zip(starts, lengths)):
        column = torch.arange(start, start + length)
        if layout == "contiguous":
            read[number, column] = True
            continue
        read[options["pages"][number, column // 4], column % 4] = True
        needed = torch.isin(torch.arange(options["pages"].shape[1]), column // 4)
        options["pages"][number, ~needed] = -7
    for x in cache:
        x.masked_fill_(~read[:, None, :, None], math.nan)
