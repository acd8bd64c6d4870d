"""SoftPromptModel: a frozen model with a soft prompt, without PEFT's model wrapper."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput

from ..layout import IGNORE, CannotPack, plan_padded_input
from ..methods import MultitaskPromptTuning, PrefixTuning
from .arguments import Method, check_call, check_chosen, check_method, checked_prompt_ids
from .attachment import refuse_replicas
from .cache_names import CACHE_NAMES, cache_argument
from .compiled_prompts import CompiledPrompts, prompt_of_method
from .encoder_decoder import padded_pairs
from .engine import Engine
from .interventions import NotAsked
from .masks import UnsupportedAttention
from .padded_generation import generate_behind_prefix, generate_from_embeddings
from .per_layer import per_layer_inputs, searching_part
from .request import Request, beside, target_of
from .shared_state import SharedState
from .structure import is_encoder_decoder
from .trained_state import is_head, keep_what_trains

# What the forward of an encoder-decoder may be given besides, on packed rows.
_OF_TARGETS = {"decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask", "use_cache"}


class SoftPromptModel(nn.Module):
    """A frozen model and a method that produces its prompt. What the rows of a batch have in common is run once.

    The model may be a causal LM, or have another head (sequence or token classification, question answering, none), on
    a decoder or an encoder; such a head sees the hidden states of the text and not those of the prompt: labels and
    answer positions count text tokens, and a classifier reads the first or last token of the text, wherever it is
    padded. Encoder-decoders take their prompt in front of the encoder's text.

    ``state_dict()`` holds what trains and nothing that is frozen, so checkpoints of transformers' Trainer and of
    Accelerate are as small as the prompts.

    Args:
        base: a Hugging Face model. Its parameters are frozen but for those of a new head (``score``, ``classifier``,
            ``qa_outputs``); it is attached, see :class:`Engine`.
        method: a :class:`PromptTuning`, :class:`PTuning`, :class:`MultitaskPromptTuning` or :class:`PrefixTuning`; its
            parameters are what trains.
        pad_rows_to: see :func:`fastprompt.accelerate`.

    Raises:
        ValueError: the prompt does not fit the model.
    """

    base: Any
    _replicate_for_data_parallel = refuse_replicas

    def __init__(self, base: PreTrainedModel, method: Method, *, pad_rows_to: int | None = None) -> None:
        super().__init__()
        self._is_prefix = isinstance(method, PrefixTuning)
        check_method(base, method)
        self.base, self.method, self.config = base, method.to(base.device), base.config
        keep_what_trains(self)
        self._required = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
        self._engine: Any = None
        self._warned: set[str] = set()
        self._compiled = CompiledPrompts()
        ready = False
        try:
            for name, parameter in base.named_parameters():
                parameter.requires_grad_(is_head(name))
            self._engine = Engine(base, pad_rows_to)
            self.config = base.config  # the model's own copy now
            reason = self._engine.refusal or self._why_no_prefix()
            ready = True
        finally:
            if not ready:
                self.release()
        if reason is not None:
            self._warn(reason)

    def release(self) -> PreTrainedModel:
        """Give the model back as it was: its attention, MLPs, config and which of its parameters require gradients.

        Returns:
            The model. What is left runs it the padded way.
        """
        if self._engine is not None:
            self._engine.detach()
        for parameter, required in self._required:
            parameter.requires_grad_(required)
        self.config = self.base.config
        return self.base

    def train(self, mode: bool = True) -> "SoftPromptModel":
        """As in every module, but a base that was put in evaluation mode while this trains stays there.

        So ``model.base.eval()``, by which a frozen model's dropout is switched off, outlasts an evaluation.
        """
        if self.training:
            self._base_evaluates = not self.base.training
        super().train(mode)
        if mode and self._base_evaluates:
            self.base.eval()
        return self

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        prompt_ids: torch.Tensor | Sequence[int] | None = None,
        virtual_tokens: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | list[int] | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **options: Any,
    ) -> ModelOutput:
        """The model's output for a batch; with targets its loss too.

        Args:
            input_ids: ``[B, S]``, or ``[T]`` (or ``[1, T]``) with ``cu_seqlens``.
            attention_mask: ``[B, S]``; None: everything is text.
            labels: a causal LM's like ``input_ids``, not shifted, -100 to ignore; another head's as the model takes
                them.
            inputs_embeds: in place of ``input_ids``, one dimension more.
            prompt_ids: ``[B]``, which of the method's N prompts (tasks) belongs to each sequence; None: prompt 0.
            virtual_tokens: like ``input_ids``, j >= 0 where virtual token j stands, -1 elsewhere; the prompt then
                stands there and not in front.
            cu_seqlens: ``[B + 1]``; the batch comes packed. A causal LM only.
            num_items_in_batch: divide the summed loss by this (gradient accumulation) instead of taking the mean.
            options: what else a model with another head takes (``start_positions``, ``token_type_ids``, ...).

        Raises:
            CannotPack: ``cu_seqlens`` with a model that cannot run packed rows.
            ValueError, TypeError: wrong arguments.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        tokens = cast(torch.Tensor, input_ids if inputs_embeds is None else inputs_embeds)
        self._engine.ask_again()
        is_lm = self._engine.is_lm
        check_call(self.base, self.method, is_lm, tokens, attention_mask, virtual_tokens, cu_seqlens, options)
        of_rows = dict(attention_mask=attention_mask, labels=labels, virtual_tokens=virtual_tokens)
        options = beside(tokens, dict(options, **of_rows, prompt_ids=checked_prompt_ids(prompt_ids)))
        attention_mask, labels, virtual_tokens, ids = (options.pop(name) for name in (*of_rows, "prompt_ids"))
        if num_items_in_batch is not None and not is_lm:
            options["num_items_in_batch"] = num_items_in_batch
        request = Request(
            tokens=tokens,
            num_virtual_tokens=0 if self._is_prefix else self.method.num_virtual_tokens,
            prompt_ids=ids,
            shared=self._prompts((0,))[1] if self._is_prefix else None,
            attention_mask=attention_mask,
            target=target_of(self.base, options),
            labels=labels if is_lm else None,
            virtual_tokens=virtual_tokens,
            cu_seqlens=cu_seqlens,
            num_items_in_batch=num_items_in_batch,
            training=self.training,
            use_cache=options.get("use_cache", False),
            finds_last=True,
            rows_differ="token_type_ids" in options,
        )
        try:
            if (reason := self._why_no_prefix()) is not None:
                raise CannotPack(reason)
            if request.target is not None and (unknown := sorted(set(options) - _OF_TARGETS)):
                raise CannotPack(f"{', '.join(unknown)} given")
            plan = self._engine.plan(request)
        except CannotPack as reason:
            if cu_seqlens is not None:
                raise CannotPack(f"cu_seqlens needs packed rows, but {reason}") from None
            self._fell_back(str(reason))
            return self._padded(request, labels, options)
        try:
            chosen = self._behind_prompts(request, plan)
            if is_lm:
                return self._engine.run(chosen, plan, self._embed)
            return self._with_head(chosen, plan, labels, dict(options))
        except NotAsked:
            self._engine.uncount(plan)
            options.update(virtual_tokens=virtual_tokens, cu_seqlens=cu_seqlens, num_items_in_batch=num_items_in_batch)
            return self.forward(
                input_ids, attention_mask, labels, inputs_embeds=inputs_embeds, prompt_ids=ids, **options
            )
        except UnsupportedAttention as reason:  # a mask that nothing but this batch's values shows
            if cu_seqlens is not None:
                raise
            self._engine.uncount(plan)
            self._fell_back(str(reason))
            return self._padded(request, labels, options)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        prompt_ids: torch.Tensor | Sequence[int] | None = None,
        **options: Any,
    ) -> Any:
        """``base.generate`` behind the prompt; returns ``[B, S + new]`` ids, the input in front, as PEFT does.

        The prompts are run once, and again only when a parameter has changed; each row gives what it gives alone,
        wherever it is padded.

        Raises:
            CannotPack: Prefix-Tuning with a model that cannot run rows behind learned keys and values.
            ValueError, TypeError, NotImplementedError: an option that cannot be done behind a prompt.
        """
        ids = checked_prompt_ids(prompt_ids)
        keys = [0] * len(input_ids) if ids is None else ids.tolist()
        check_chosen(sorted(keys), self.method.num_prompts)
        attention_mask = None if attention_mask is None else attention_mask.to(input_ids.device)
        try:
            if is_encoder_decoder(self.base):
                raise NotImplementedError("an encoder-decoder's prompt stands in front of its encoder's text")
            mixed = self._compiled.mixed(self.base)
            if not self._is_prefix and not mixed.takes_prompts:
                raise NotImplementedError(f"a {type(self.base).__name__} looks more up by token id than embeddings")
        except NotImplementedError:
            return self._generate_padded(input_ids, attention_mask, keys, options)
        if any(options.get(name) is not None for name in CACHE_NAMES):
            return mixed.generate(None, input_ids, attention_mask, **options)
        rows = self._compiled.states(
            self.base,
            keys,
            lambda key: self.method,
            lambda key: prompt_of_method(self.base, self.method, key),
            keep=not self.training,
        )
        try:
            with self._compiled.watched(self.base):
                return mixed.generate(rows, input_ids, attention_mask, prompts=keys, **options)
        except NotAsked:
            return self.generate(input_ids, attention_mask, prompt_ids=ids, **options)

    def _generate_padded(self, input_ids, attention_mask, keys, options):
        """For models whose cache cannot start with a compiled prompt."""
        used = sorted(set(keys))
        prompt, shared = self._prompts(used)
        ids = torch.tensor([used.index(key) for key in keys], dtype=torch.int64, device=input_ids.device)
        if self._is_prefix:
            if (reason := self._engine.refusal or self._why_no_prefix()) is not None:
                raise CannotPack(f"generation behind a prefix needs the attention interface, but {reason}")
            given = dict(input_ids=input_ids, attention_mask=attention_mask, **options)
            return generate_behind_prefix(self.base, shared, ids, **given)
        embeds = self._embed(input_ids)
        prompt = prompt.unflatten(0, (-1, self.method.num_virtual_tokens)).to(embeds.dtype)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return generate_from_embeddings(self.base, prompt[ids], embeds, input_ids, mask, **options)

    def trained_head(self) -> dict[str, nn.Parameter]:
        """``{name in the model: parameter}`` of a head that trains along; {} if there is none."""
        return {name: parameter for name, parameter in self.base.named_parameters() if is_head(name)}

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """See ``PreTrainedModel``; recomputation works, reentrant or not, with Prefix-Tuning too."""
        self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """See ``PreTrainedModel``."""
        self.base.gradient_checkpointing_disable()

    def _embed(self, tokens):
        """Token ids -> their embeddings; embeddings as they are."""
        return tokens if tokens.is_floating_point() else self.base.get_input_embeddings()(tokens)

    @torch.compiler.disable  # a graph for each set of prompts would be one too many
    def _behind_prompts(self, request, plan):
        """A request with the prompts that its plan says its rows have; it was planned with the first prefix."""
        check_chosen(plan.prompts, self.method.num_prompts)
        if self._is_prefix and plan.prompts == (0,):
            return request
        prompt, shared = self._prompts(plan.prompts)
        return replace(request, prompts=None if prompt is None else lambda: prompt, shared=shared)

    def _prompts(self, used):
        """The prompts ``[N * P, D]`` of these ids, which ascend, or their shared state; the other is None."""
        method, index = self.method, torch.tensor(used, dtype=torch.int64, device=next(self.method.parameters()).device)
        if isinstance(method, MultitaskPromptTuning):
            return method(index), None
        if used and used[-1] - used[0] == len(used) - 1:  # read where they lie
            index = slice(used[0], used[-1] + 1)
        if self._is_prefix:
            return None, SharedState.of_tensor(method()[:, :, index], self.config, method.layers)
        return method().unflatten(0, (method.num_prompts, -1))[index].flatten(0, 1), None

    def _with_head(self, request, plan, labels, options):
        """The model's own forward with its head on the hidden states of the text."""
        embeds = self._embed(request.tokens)
        prompt = None if request.prompts is None else request.prompts()
        inputs = {"inputs_embeds": self._engine.runner.rows(plan, prompt, embeds)}
        types = options.pop("token_type_ids", None)
        if types is not None:
            inputs["token_type_ids"] = torch.where(plan.source >= 0, plan.token_ids(types), 0)
        plan = replace(plan, grid=self._text_cells(plan, embeds.shape[1], request.attention_mask))
        if labels is not None:
            options["labels"] = labels
        with self._engine.packed_backbone(request, plan, inputs):
            return self.base(inputs_embeds=embeds, return_dict=True, **options)

    def _text_cells(self, plan, width, attention_mask):
        """``[B, S]`` rows of the text; in the column that a classifier reads stands a row's first or last token."""
        cells = plan.grid[:, plan.grid.shape[1] - width :]
        if attention_mask is not None:
            cells = cells.masked_fill(attention_mask == 0, -1)
        column = self._engine.abilities.pooled_column
        if column is not None:
            cells = cells.gather(1, (cells >= 0).int().argsort(dim=1, stable=True, descending=column == 0))
        return cells

    def _padded(self, request, labels, options):
        """The model's own forward on ``[B, P + S]`` rows, for what cannot be packed."""
        tokens, mask = request.tokens, request.attention_mask
        batch, width = tokens.shape[:2]
        plan = plan_padded_input(
            batch,
            width,
            request.num_virtual_tokens,
            prompt_ids=request.prompt_ids,
            only_used_prompts=True,
            virtual_tokens=request.virtual_tokens,
            layout="padded",
            device=tokens.device,
        )
        request = self._behind_prompts(request, plan)
        ids = torch.tensor(plan.prompt_ids, dtype=torch.int64, device=tokens.device)
        if request.target is not None:
            return padded_pairs(self.base, request, ids, self._embed(tokens), labels, options)
        shared = request.shared
        front = plan.grid.shape[1] - width
        inputs = {"return_dict": True}
        if mask is not None:
            inputs["attention_mask"] = torch.cat([mask.new_ones(batch, front + request.prefix_length), mask], 1)
        if shared is not None:
            inputs.update(cache_argument(self.base.forward, shared.to_cache(ids, self.config, self.base.dtype)))
            if self._engine.numbers_columns:  # not all models do so behind a cache (Bamba)
                first = request.prefix_length
                inputs["position_ids"] = torch.arange(first, first + width, device=tokens.device)[None]
        if shared is not None and request.has_ids:
            inputs["input_ids"] = tokens  # some models look more up by them than embeddings
        else:
            prompt = None if request.prompts is None else request.prompts()
            rows = self._engine.runner.rows(plan, prompt, self._embed(tokens))
            inputs["inputs_embeds"] = rows.unflatten(0, plan.grid.shape)
            if request.has_ids:
                ids = plan.token_ids(tokens).unflatten(0, plan.grid.shape)
                inputs.update(per_layer_inputs(searching_part(self.base), ids))
        if self._engine.is_lm:
            if labels is not None:
                inputs["labels"] = torch.cat([labels.new_full((batch, front), IGNORE), labels], 1)
                if request.num_items_in_batch is not None:
                    inputs["num_items_in_batch"] = request.num_items_in_batch
            output = self.base(use_cache=shared is not None, **inputs, **options)
            return CausalLMOutputWithPast(loss=output.loss, logits=output.logits)
        plan = replace(plan, grid=self._text_cells(plan, width, mask))
        if (types := options.pop("token_type_ids", None)) is not None:
            inputs["token_type_ids"] = torch.cat([types.new_zeros(batch, front), types], 1)
        if labels is not None:
            options["labels"] = labels
        with self._engine.runner.padded_backbone(plan):
            return self.base(**inputs, **options)

    @torch.compiler.disable
    def _why_no_prefix(self):
        """None if the method has no prefix, or one that can run packed, else why not."""
        if not self._is_prefix:
            return None

        def padded(input_ids, attention_mask):
            shared = self._prompts((0,))[1]
            return self._padded(Request(input_ids, 0, shared=shared, attention_mask=attention_mask), None, {})

        return self._engine.why_not_prefix(lambda: self._prompts((0,))[1], "prefix", padded)

    def _fell_back(self, reason):
        self._engine.stats.count_padded(reason)
        self._warn(reason)

    def _warn(self, reason):
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"fastprompt runs the model's own padded forward: {reason}", stacklevel=4)
