"""Rows outside of every sequence that bring a plan to a number of rows which other batches have, too."""

from dataclasses import replace

import torch
from torch.nn.functional import pad

from .cells import Filled
from .sequences import Sequences

_WIDTHS = 32  # of chains


def check_pad_rows_to(value: int | None) -> int | None:
    """``value``, if it is a number of rows.

    Raises:
        ValueError, TypeError: it is none.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"pad_rows_to must be an int or None, got {type(value).__name__}")
    if value is not None and value < 1:
        raise ValueError(f"pad_rows_to must be at least 1, got {value}")
    return value


def with_dead_rows(sequences: Sequences, multiple: int) -> Sequences:
    """Sequences of as many rows as the next multiple, beside a power of two of prefixes, two at least.

    What of a prefix is used does not depend on its room any more, which may be rounded up, too.

    Args:
        sequences: of a plan, packed.
        multiple: of which the number of rows shall be one.
    """
    rows = -(-sequences.rows // multiple) * multiple
    used, chains = sequences.prefix_lens, sequences.chains
    if chains is not None:
        if used is None:  # all that stands in front of any sequence is equally long
            used = chains.new_full((len(chains),), chains.shape[1])
        more = max(2, 1 << (len(chains) - 1).bit_length()) - len(chains)
        used = pad(used, (0, more))
        chains = pad(chains, (0, -chains.shape[1] % _WIDTHS, 0, more), value=-1)
    return replace(sequences, kind="padded", rows=rows, prefix_lens=used, chains=chains)


def dead_rows_filled(filled: Filled, rows: int) -> Filled:
    """A plan of so many rows. The dead ones repeat the first, which is fit to be run, at position 0; nobody reads
    them."""
    dead = rows - len(filled.source)
    source = torch.cat([filled.source, filled.source[:1].expand(dead)])
    position_ids = torch.cat([filled.position_ids, filled.position_ids.new_zeros(dead)])
    return replace(filled, source=source, position_ids=position_ids)
