"""Batches so long that a model computes otherwise than packed rows would."""

from ..layout import RowPlan
from .abilities import Abilities
from .request import Request


def why_too_long(found: Abilities, request: Request, plan: RowPlan) -> str | None:
    """The reason why a planned batch has to take the padded path, by how long it is; None: there is none."""
    if found.key_limit is not None and _most_keys(plan, request.prefix_length) > found.key_limit:
        return f"an indexer chooses {found.key_limit} keys, and a row of the batch sees more"
    if request.cu_seqlens is not None:
        return None
    if found.rope_limit is not None:
        width = plan.grid.shape[1] + request.prefix_length
        if width >= found.rope_limit and bool((plan.grid[:, -1] < 0).all()):
            return "its rotary frequencies depend on the width of the batch, and the last column is padding"
    if found.row_limit is not None and len(plan.source) >= found.row_limit:
        return f"attention depends on a row's place from row {found.row_limit} on, and the batch has more rows"
    return None


def _most_keys(plan, prefix_length):
    """How many keys the last row of a sequence sees, of that which sees the most."""
    seq = plan.sequences
    return int((seq.prefix_lengths(prefix_length) + seq.host.lengths).max(initial=0))
