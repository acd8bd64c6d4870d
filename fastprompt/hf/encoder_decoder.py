"""Encoder-decoders on packed rows: sources behind their prompts, targets, and each target's view of its own source."""

import copy
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, ModelOutput, Seq2SeqLMOutput

from ..layout import IGNORE, PairPlan, RowPlan, plan_padded_input, plan_pairs
from ..ops import linear_cross_entropy
from .abilities import Abilities
from .cache import PairRecorder
from .cache_names import cache_argument
from .head import ROWS, logits_of_states
from .later import later
from .request import Embed, Request, Target
from .runner import Runner, gathered
from .structure import is_plain_linear


@dataclass
class PairRunner:
    """Runs the rows of a PairPlan through an attached encoder-decoder with a language model's head.

    Attributes:
        base: the model.
        encoder, decoder: what runs the rows of either part.
    """

    base: PreTrainedModel
    encoder: Runner
    decoder: Runner
    mixers = ()  # none that it runs

    @classmethod
    def of(cls, base: PreTrainedModel) -> "PairRunner":
        """The runner of a model."""
        parts = (Runner(base, part, is_lm=False, layout="packed") for part in (base.get_encoder(), base.get_decoder()))
        return cls(base, *parts)

    @property
    def backbone(self) -> nn.Module:
        """The part whose states the head reads."""
        return self.decoder.backbone

    @property
    def compiled(self) -> list[nn.Module]:
        """See Runner."""
        return self.decoder.compiled

    @compiled.setter
    def compiled(self, parts: list[nn.Module]) -> None:
        self.encoder.compiled = self.decoder.compiled = parts

    @torch.compiler.disable
    def run(
        self,
        request: Request,
        target: Target,
        plan: PairPlan,
        embed: Embed,
        found: Abilities,
        with_cache: bool = False,
    ) -> Seq2SeqLMOutput:
        """The model's output: ``loss`` if there are labels, ``logits [B, P + T, V]``, ``encoder_last_hidden_state``.

        In a step of training the head runs on labelled rows only, and what else there is, is computed when it is read.

        Args:
            request, target, plan: what was asked, and its plan.
            embed: token ids or embeddings -> embeddings.
            found: what may be done with the model.
            with_cache: is a cache wanted, too?
        """
        tokens = target.tokens
        if tokens is None:
            tokens = shifted(self.base, _given(request.labels))
        rows = _rows(self.encoder, plan.source, request.prompts, request.tokens, embed)
        encoded = self.encoder.states(plan.source, rows).last_hidden_state
        config: Any = self.decoder.backbone.config
        recorder = PairRecorder(config) if with_cache else None
        options: dict[str, Any] = {}
        if recorder is not None:
            options = cache_argument(self.decoder.backbone.forward, recorder.handed()) | {"use_cache": True}
        states = self.decoder.states(
            plan.target,
            _rows(self.decoder, plan.target, target.prompts, tokens, embed),
            request.shared,
            sources=plan.keys,
            encoder_hidden_states=encoded,
            **options,
        )
        if request.wants_logits:
            hidden, labels = states.last_hidden_state[0], row_labels(plan.target)
            output = self.head(states, hidden, encoded, labels, request.num_items_in_batch)
            loss, logits = output.loss, plan.target.unpack(output.logits[0])
            padded = plan.source.unpack(encoded[0])
        else:
            loss, logits, padded = self._step(request, plan, states, encoded, found)
        cache: dict[str, Any] = {}
        if recorder is not None:
            cache[found.cache_name] = recorder.cache(plan, request.shared)
        return Seq2SeqLMOutput(loss=loss, logits=logits, encoder_last_hidden_state=padded, **cache)

    def head(
        self,
        states: ModelOutput,
        hidden: torch.Tensor,
        encoded: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_items: torch.Tensor | int | None = None,
    ) -> Any:
        """The model's output, ``logits [1, M, V]`` and ``loss``, by its own forward without encoder and decoder.

        Args:
            states: the decoder's output.
            hidden: ``[M, D]``, those of its hidden states that are wanted.
            encoded: ``[1, R, D]``, the encoder's hidden states.
            labels: ``[M]``, what they predict, or None.
            num_items: ``num_items_in_batch``, or None.
        """
        states = copy.copy(states)
        states.last_hidden_state = hidden[None]
        options: dict[str, Any] = {}
        if labels is not None:
            options["labels"] = labels.to(hidden.device)[None]
            if num_items is not None:
                options["num_items_in_batch"] = num_items
        with self.decoder.replaced(lambda *args, **kwargs: states):
            return self.base(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
                decoder_inputs_embeds=hidden[None],
                use_cache=False,
                return_dict=True,
                **options,
            )

    @torch.compiler.disable
    def _step(self, request, pairs, states, encoded, found):
        """The loss of labelled rows, and logits and the encoder's padded states for who reads them."""
        plan, source = pairs.target, pairs.source
        hidden, items = gathered(states.last_hidden_state[0], plan.label_rows), request.num_items_in_batch
        if self._chunked_loss(hidden, items, found):
            weight, bias, scale = plain_head(self.base)
            labels = plan.labels.to(hidden.device)
            loss = linear_cross_entropy(hidden * scale, weight, bias, labels) / len(labels)
            vocabulary, dtype = len(weight), hidden.dtype
        else:
            output = self.head(states, hidden, encoded, plan.labels, items)
            loss, vocabulary, dtype = output.loss, output.logits.shape[-1], output.logits.dtype

        def logits_of(hidden):
            return self.head(states, hidden, encoded.detach()).logits[0]

        logits = logits_of_states(self.base, plan, states.last_hidden_state, logits_of, vocabulary, dtype)
        shape = torch.Size((*source.grid.shape, encoded.shape[-1]))
        padded = later([encoded], lambda rows: source.unpack(rows[0]), shape, encoded.dtype, encoded.device)
        return loss, logits, padded

    def _chunked_loss(self, hidden, items, found):
        head = self.base.get_output_embeddings()
        return (
            len(hidden) > ROWS
            and found.plain_head
            and (items is None or found.ignores_items)
            and is_plain_linear(head)  # still
            and head.weight.dtype == hidden.dtype == torch.float32
            and not torch.is_autocast_enabled(hidden.device.type)
        )


def _rows(runner, plan, prompts, tokens, embed):
    """What a part is given: token ids, or embeddings where some are given or a prompt stands in front."""
    if prompts is None and not tokens.is_floating_point():
        return plan.token_ids(tokens)
    return runner.rows(plan, None if prompts is None else prompts(), embed(tokens))


def _given(columns):
    """Labels or tokens of the decoder."""
    if columns is None:
        raise ValueError("an encoder-decoder needs labels or decoder_input_ids, got neither")
    return columns


def planned_pairs(request: Request, target: Target) -> PairPlan:
    """The rows of a request to an encoder-decoder.

    Raises:
        CannotPack, ValueError, TypeError: see ``plan_padded_input`` and ``plan_pairs``.
    """
    batch, width = request.tokens.shape[:2]
    columns = _given(request.labels if target.tokens is None else target.tokens)
    source = plan_padded_input(
        batch,
        width,
        request.num_virtual_tokens,
        attention_mask=request.attention_mask,
        prompt_ids=request.prompt_ids,
        only_used_prompts=True,
        layout="packed",
        device=request.tokens.device,
    )
    return plan_pairs(
        source,
        columns.shape[1],
        target.num_virtual_tokens,
        attention_mask=target.attention_mask,
        labels=request.labels,
        prompt_ids=request.prompt_ids,
        only_used_prompts=True,
        prefix_length=request.prefix_length,
        up_to_last_label=not request.wants_logits,
    )


def padded_pairs(
    base: PreTrainedModel,
    request: Request,
    ids: torch.Tensor,
    embeds: torch.Tensor,
    labels: torch.Tensor | None,
    options: dict[str, Any],
) -> Any:
    """The output of the model's own forward on padded rows.

    Args:
        base: the model.
        request: what was asked, with prompts ``[N * P, D]``.
        ids: ``[B]``, the prompt of each row.
        embeds: ``[B, S, D]``, the sources.
        labels, options: what its forward takes besides.
    """
    length, prompts = request.num_virtual_tokens, request.prompts
    if prompts is not None:
        embeds = torch.cat([prompts().unflatten(0, (-1, length)).to(embeds.dtype)[ids], embeds], 1)
    mask = request.attention_mask
    if mask is None:
        mask = embeds.new_ones(embeds.shape[:2], dtype=torch.int64)
    else:
        mask = torch.cat([mask.new_ones(len(mask), length), mask], 1)
    if request.num_items_in_batch is not None:
        options = {**options, "num_items_in_batch": request.num_items_in_batch}
    forward: Any = base
    return forward(inputs_embeds=embeds, attention_mask=mask, labels=labels, return_dict=True, **options)


def plain_head(base: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """Weight and bias of the head, and what T5 multiplies its input by. The probe shows whether that is all of it."""
    head: Any = base.get_output_embeddings()
    scale = base.config.d_model**-0.5 if getattr(base.config, "scale_decoder_outputs", False) else 1.0
    biases = [x for x in (head.bias, getattr(base, "final_logits_bias", None)) if x is not None]
    bias = sum(x.reshape(-1) for x in biases) if biases else None
    return head.weight, bias, scale


def row_labels(plan: RowPlan) -> torch.Tensor | None:
    """``[R]``: what each row predicts, -100 for nothing; None without labels."""
    if plan.label_rows is None or plan.labels is None:
        return None
    labels = plan.labels.new_full((len(plan.source),), IGNORE)
    return labels.scatter(0, plan.label_rows, plan.labels)


def shifted(base: PreTrainedModel, labels: torch.Tensor) -> torch.Tensor:
    """``[B, T]``: the decoder's tokens that a model makes of labels, as it makes them.

    Raises:
        NotImplementedError: it has no function for that.
    """
    prepare = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        return prepare(labels)
    shift = getattr(sys.modules[type(base).__module__], "shift_tokens_right", None)
    if shift is None:
        raise NotImplementedError(f"{type(base).__name__} says nowhere what its decoder is given for labels")
    return shift(labels, base.config.pad_token_id, base.config.decoder_start_token_id)
