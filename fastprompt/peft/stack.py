"""Many adapters of one kind in front of one model: their parameters stacked, and their losses in one packed batch."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import nn

from ..hf.masks import UnsupportedAttention
from ..hf.request import Request
from ..hf.shared_state import SharedState
from ..layout import IGNORE, CannotPack
from ..ops import prompt_lstm
from .adapter import is_prefix, rows_in_front
from .call import shared_of_prefix
from .state import state_of

# Name in the encoder -> values. Of one adapter, or [N, ...] of all.
Values = dict[str, torch.Tensor]


class AdapterStack:
    """N adapters that differ in their values only, on one accelerated model.

    The model's own adapter is where one of them is put to be evaluated or saved (:meth:`load`).

    Args:
        model: an accelerated ``PeftModel`` for a causal LM, with Prompt Tuning, Prefix-Tuning or P-Tuning.
        starts: for each of the N the values that it starts with, as :func:`values_of` gives them.

    Attributes:
        values: ``{name: [N, ...]}``.

    Raises:
        TypeError: a model that is not accelerated, or another method.
        CannotPack: the model cannot run packed rows, or computes a loss of its own.
    """

    def __init__(self, model: PeftModel, starts: Sequence[Values]) -> None:
        state = state_of(model)
        kinds = (PeftType.PROMPT_TUNING, PeftType.PREFIX_TUNING, PeftType.P_TUNING)
        self.config: Any = model.active_peft_config
        if state is None:
            raise TypeError(f"model must be accelerated, got {type(model).__name__}")
        if self.config.peft_type not in kinds:
            expected = ", ".join(kind.value for kind in kinds)
            raise TypeError(f"model must have an adapter of {expected}, got {PeftType(self.config.peft_type).value}")
        self.model, self.engine = model, state.engine
        if self.engine.refusal is not None:
            raise CannotPack(self.engine.refusal)
        if is_prefix(self.config):
            with torch.no_grad():
                shared_of_prefix(model, state, model.get_prompt(batch_size=1))
        self.values: Values = {name: torch.stack([start[name] for start in starts]) for name in starts[0]}

    @property
    def encoder(self) -> Any:
        """The model's own prompt encoder."""
        return self.model.prompt_encoder[self.model.active_adapter]

    @torch.no_grad()
    def load(self, values: Values, index: int) -> None:
        """Give the model's own adapter the values of one of a stack."""
        for name, parameter in self.encoder.named_parameters():
            parameter.copy_(values[name][index])

    def leaves(self, ids: torch.Tensor) -> Values:
        """The values of some adapters, ``[n, ...]``, as tensors that gradients are taken of."""
        return {name: x[ids].requires_grad_() for name, x in self.values.items()}

    def losses(self, leaves: Values, batch: dict[str, torch.Tensor], owners: torch.Tensor) -> torch.Tensor:
        """The mean loss of each adapter over its own labels, ``[n]`` fp32; the gradient of one touches no other.

        Args:
            leaves: the values of n adapters.
            batch: ``input_ids``, ``attention_mask`` and ``labels`` ``[B, S]``, the rows of an adapter one after the
                other.
            owners: ``[B]`` int64 in [0, n), ascending: which adapter each row has. Each has a label at least.

        Raises:
            CannotPack: the batch cannot be packed, or the model computes a loss of its own.
        """
        device = self.engine.base.device
        tokens, labels, mask = (batch[name].to(device) for name in ("input_ids", "labels", "attention_mask"))
        owners = owners.to(device)
        if self.engine.own_forward_has_the_loss(labels, None):
            raise CannotPack(f"{type(self.engine.base).__name__} computes a loss of its own")
        prefix = is_prefix(self.config)
        encoded = self._encoded(leaves)  # [n, P, W]
        request = Request(
            tokens=tokens,
            num_virtual_tokens=rows_in_front(self.config),
            prompts=None if prefix else lambda: encoded.flatten(0, 1),
            prompt_ids=owners,
            shared=self._shared(encoded) if prefix else None,
            attention_mask=mask,
            labels=labels,
            each_label=True,
            training=True,
        )
        plan = self.engine.plan(request)
        try:
            output: Any = self.engine.run(request, plan, self.model.word_embeddings)
        except UnsupportedAttention as reason:
            raise CannotPack(str(reason)) from None
        # Labels come in the order of the batch. Behind learned keys and values nothing predicts a row's first token.
        counts = (labels[:, 1 if prefix else 0 :] != IGNORE).sum(1)
        owner = owners.repeat_interleave(counts, output_size=len(output.loss))
        mine = owner == torch.arange(len(encoded), device=device)[:, None]  # [n, M]
        # A product, and no scatter: it adds up in the same order every time.
        return (mine / mine.sum(1, keepdim=True)) @ output.loss.float()

    def _encoded(self, leaves: Values) -> torch.Tensor:
        """What the encoders give, ``[n, P, W]``: the LSTM of one at a time, everything else of all at once."""
        rows, encoder = leaves["embedding.weight"], self.encoder
        if hasattr(encoder, "lstm_head"):
            names = [f"lstm_head.{name}" for name, _ in encoder.lstm_head.named_parameters()]
            weights = zip(*(leaves[name].unbind() for name in names))
            rows = torch.stack([self._lstm(x, list(own)) for x, own in zip(rows.unbind(), weights)])
        for name in ("mlp_head", "transform"):
            for index, layer in enumerate(getattr(encoder, name, ())):
                if isinstance(layer, nn.Linear):
                    weight, bias = leaves[f"{name}.{index}.weight"], leaves[f"{name}.{index}.bias"]
                    rows = torch.baddbmm(bias[:, None], rows, weight.transpose(1, 2))
                else:
                    rows = layer(rows)
        return rows

    def _lstm(self, rows, weights):
        lstm = self.encoder.lstm_head
        return prompt_lstm(
            rows,
            weights,
            num_layers=lstm.num_layers,
            bidirectional=lstm.bidirectional,
            dropout=lstm.dropout,
            training=lstm.training,
        )

    def _shared(self, encoded):
        """The keys and values of n adapters, laid out by PEFT."""
        encoder = self.encoder
        encoder.__dict__["forward"] = lambda indices: encoded
        try:
            cache: Any = self.model.get_prompt(batch_size=len(encoded))
        finally:
            del encoder.forward
        return SharedState.of_cache(cache, self.engine.base.config)


def values_of(model: PeftModel) -> Values:
    """A copy of the parameters of a model's own adapter, by their names in its encoder."""
    encoder = model.prompt_encoder[model.active_adapter]
    return {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}
