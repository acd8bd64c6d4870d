"""Request: what a front understood of one call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ..layout import RowPlan
from .shared_state import SharedState
from .structure import is_encoder_decoder


class Loss(Protocol):
    """A loss of the logits of some rows."""

    def rows(self, plan: RowPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """The plan's rows whose logits it reads, each once, and ``[M]`` int64, which of them each of its labels is
        predicted by."""

    def __call__(self, plan: RowPlan, logits: torch.Tensor) -> torch.Tensor:
        """A scalar, of ``[M, V]`` logits."""


Embed = Callable[[torch.Tensor], torch.Tensor]  # token ids or embeddings -> embeddings


@dataclass(frozen=True, eq=False)
class Target:
    """What the decoder of an encoder-decoder is given.

    Attributes:
        tokens: ``[B, T]`` token ids or ``[B, T, D]`` embeddings; None: those that the model makes of the labels.
        attention_mask: ``[B, T]`` or None.
        num_virtual_tokens: P, in front of the decoder's tokens; 0 for most adapters.
        prompts: gives what stands there, ``[N * P, D]``, as in :class:`Request`; or None.
    """

    tokens: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    num_virtual_tokens: int = 0
    prompts: Callable[[], torch.Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Request:
    """One call of a model behind a soft prompt. The fronts make it; the engine alone decides how it is run.

    All tensors are on the device of the tokens; see :func:`beside`.

    Attributes:
        tokens: ``[B, S]`` token ids or ``[B, S, D]`` embeddings; with ``cu_seqlens`` a sequence of T in place of B x S.
        num_virtual_tokens: P at the input; 0 behind learned keys and values.
        prompts: gives the distinct prompts of the batch, ``[N * P, D]``, those of ``RowPlan.prompts``; called once, if
            the batch is run. None: no prompt at the input.
        prompt_ids: ``[B]`` int64, the prompt of each row, at the input or in ``shared``; the N are the distinct ones,
            ascending. None: the first for all.
        shared: learned keys and values in front of the batch, or None.
        attention_mask: ``[B, S]`` or None.
        target: what an encoder-decoder's decoder is given; ``tokens`` are the encoder's then. None for other models.
        labels: of a causal LM, like token ids and not shifted; of an encoder-decoder ``[B, T]``, those of the columns
            of its decoder; or None.
        virtual_tokens: where the prompt's tokens stand among the text; None: in front. See ``plan_padded_input``.
        cu_seqlens: ``[B + 1]``, if the batch comes packed.
        flat: are the results of a packed batch wanted as it came, ``[1, P + T]``, and not ``[B, W]``? The first P are
            those of the first prompt.
        loss: a loss of the front's own in place of the model's, with the rows it is taken from; see Loss.
        num_items_in_batch: what to divide the summed loss by; None: the number of labels.
        each_label: is the cross-entropy of each label wanted, ``[M]`` in the order of the plan's labels, and not one
            number? In training only.
        training: is it a step of training? Then the loss of a causal LM with labels is wanted, and its logits are
            computed only if somebody reads them.
        use_cache: are keys and values wanted with the logits? None: as the model's config says.
        own_forward: does the front run the model's own forward around the packed backbone, on the batch as it came?
        head_labels: the labels of such a forward.
        reads_all_columns: does its result depend on the states of all columns, padding among them?
        finds_last, finds_last_by_id: does its head find a row's last token whatever stands behind it, or by its id?
        rows_differ: may tokens of the same id be different rows, by what is given beside them?
    """

    tokens: torch.Tensor
    num_virtual_tokens: int
    prompts: Callable[[], torch.Tensor] | None = None
    prompt_ids: torch.Tensor | None = None
    shared: SharedState | None = None
    attention_mask: torch.Tensor | None = None
    target: Target | None = None
    labels: torch.Tensor | None = None
    virtual_tokens: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | list[int] | None = None
    flat: bool = False
    loss: Loss | None = None
    num_items_in_batch: torch.Tensor | int | None = None
    each_label: bool = False
    training: bool = False
    use_cache: bool | None = False
    own_forward: bool = False
    head_labels: torch.Tensor | None = None
    reads_all_columns: bool = False
    finds_last: bool = False
    finds_last_by_id: bool = False
    rows_differ: bool = False

    @property
    def has_ids(self) -> bool:
        """Are the tokens ids, and not embeddings?"""
        return not self.tokens.is_floating_point()

    @property
    def wants_logits(self) -> bool:
        """Is more wanted of a causal LM than its loss?"""
        return self.labels is None or self.own_forward or not self.training

    @property
    def prefix_length(self) -> int:
        """The length of the learned keys and values in front."""
        return 0 if self.shared is None else self.shared.length


def tokens_of(given: Mapping[str, Any]) -> torch.Tensor | None:
    """The embeddings or token ids among the arguments of a model's forward; None if there are neither."""
    return given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]


def beside(tokens: torch.Tensor | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model's forward with all tensors where the tokens are, if there are any: labels, masks, ids of
    tasks and what else comes row by row may have been left on the host, or on another device."""
    if tokens is None:
        return dict(given)
    return {name: x.to(tokens.device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}


def target_of(base: nn.Module, options: dict[str, Any]) -> Target | None:
    """What the decoder of an encoder-decoder is given, by the arguments of its forward; None for other models."""
    if not is_encoder_decoder(base):
        return None
    embeds, mask = options.get("decoder_inputs_embeds"), options.get("decoder_attention_mask")
    return Target(options.get("decoder_input_ids") if embeds is None else embeds, mask)
