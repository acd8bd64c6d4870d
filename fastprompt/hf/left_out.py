"""Rows that are left out of a step because no label depends on them, and the logits of all rows for who reads them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .attachment import attach, detach
from .head import unchanged
from .request import Embed, Request


def needs_labels_alone(engine: Any, request: Request, draws: bool) -> bool:
    """May rows be left out on which the loss does not depend? ``draws``: does the model draw random numbers?

    Not once somebody has read the logits of such a step, which costs a second forward pass; nor where that would not be
    the same pass: where random numbers are drawn, where positions, a row's place or the keys that it sees depend on the
    rows that there are, where a hook counts calls.
    """
    found, backbone = engine.abilities, engine.runner.backbone
    if request.wants_logits or request.loss is not None or not found.causal or engine.logits_are_read:
        return False
    if found.rope_limit is not None or found.row_limit is not None or found.position_offset:
        return False
    if found.key_limit is not None:
        width = request.num_virtual_tokens + request.prefix_length + request.tokens.shape[1]
        if width > found.key_limit:
            return False
    return not (backbone._forward_hooks or backbone._forward_pre_hooks or draws)


@torch.compiler.disable
def whole_logits(engine: Any, request: Request, embed: Embed) -> tuple[list[torch.Tensor], Callable[..., torch.Tensor]]:
    """The logits of all tokens of a request some of whose rows are left out: what they are computed of, and how."""
    given = [] if request.prompts is None else [request.prompts()]
    given += [] if request.has_ids else [request.tokens]
    sources = given + ([] if request.shared is None else request.shared.tensors())
    check = unchanged(engine.base, sources)

    def compute(*sources: torch.Tensor) -> torch.Tensor:
        check()
        engine.logits_are_read = True
        rest = iter(sources)
        prompts = None if request.prompts is None else next(rest)
        again = replace(
            request,
            prompts=None if prompts is None else lambda: prompts,
            tokens=request.tokens if request.has_ids else next(rest),
            shared=None if request.shared is None else request.shared.with_tensors(rest),
        )
        reader = object()
        attach(engine.base, reader, packs=True)
        try:
            plan = engine.laid_out(again, to_last_label=False)
            return plan.unpack(engine.runner.logits(plan, engine.rows(again, plan, embed), again.shared))
        finally:
            detach(engine.base, reader)

    return sources, compute
