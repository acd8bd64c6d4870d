"""SoftPromptModel: a frozen model with a soft prompt, without PEFT's model wrapper."""

import warnings
from dataclasses import replace

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..layout import IGNORE, CannotPack, plan_packed_input, plan_padded_input
from ..methods import MultitaskPromptTuning, PrefixTuning
from . import checkpoint
from .engine import Engine, plan_or_reason
from .patch import PaddedCalls
from .prefix import cache_of_layers, layers_of_tensor, prefix_length


class SoftPromptModel(nn.Module):
    """A frozen model and a method that produces its prompt. What the rows of a batch have in common is run once.

    The model may be a causal LM, or have another head (sequence or token classification, question answering, none), on a
    decoder or an encoder; such a head sees the hidden states of the text and not those of the prompt: labels and answer
    positions count text tokens, and a classifier reads the first or last token of the text, wherever it is padded.
    Encoder-decoders take their prompt in front of the encoder's text.

    Args:
        base: a Hugging Face model. Its parameters are frozen but for those of a new head (``score``, ``classifier``,
            ``qa_outputs``); its attention is switched over, see :class:`Engine`.
        method: a :class:`PromptTuning`, :class:`PTuning`, :class:`MultitaskPromptTuning` or :class:`PrefixTuning`; its
            parameters are what trains.

    Raises:
        ValueError: the prompt does not fit the model.
    """

    def __init__(self, base, method):
        super().__init__()
        self._is_prefix = isinstance(method, PrefixTuning)
        if not self._is_prefix:
            width = base.get_input_embeddings().weight.shape[1]
            if method.token_dim != width:
                raise ValueError(
                    f"method must produce prompts of width {width} like the model's embeddings, got {method.token_dim}"
                )
        elif base.config.is_encoder_decoder:
            raise ValueError("method must be one at the input for an encoder-decoder, got a PrefixTuning")
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(_is_head(name))
        self.base, self.method, self.config = base, method.to(base.device), base.config
        self._engine = Engine(base)
        self.config = base.config  # the model's own copy now
        self._warned, self._prefix_reason = set(), None
        if self._is_prefix:
            self._prefix_reason = self._why_no_prefix()
        if (reason := self._engine.refusal or self._prefix_reason) is not None:
            self._warn(reason)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        labels=None,
        *,
        inputs_embeds=None,
        prompt_ids=None,
        virtual_tokens=None,
        cu_seqlens=None,
        keep_logits=False,
        num_items_in_batch=None,
        **options,
    ):
        """The model's output for a batch; with targets its loss too.

        Args:
            input_ids: ``[B, S]``, or ``[T]`` (or ``[1, T]``) with ``cu_seqlens``.
            attention_mask: ``[B, S]``; None: everything is text.
            labels: a causal LM's like ``input_ids``, not shifted, -100 to ignore; another head's as the model takes them.
            inputs_embeds: in place of ``input_ids``, one dimension more.
            prompt_ids: ``[B]``, which of the method's N prompts (tasks) belongs to each sequence; None: prompt 0.
            virtual_tokens: like ``input_ids``, j >= 0 where virtual token j stands, -1 elsewhere; the prompt then stands
                there and not in front.
            cu_seqlens: ``[B + 1]``; the batch comes packed. A causal LM only.
            keep_logits: return a causal LM's logits ``[B, P + S, V]`` (``[B, S, V]`` with Prefix-Tuning) in training with
                labels too, where they are None otherwise.
            num_items_in_batch: divide the summed loss by this (gradient accumulation) instead of taking the mean.
            options: what else a model with another head takes (``start_positions``, ``token_type_ids``, ...).

        Raises:
            CannotPack: ``cu_seqlens`` with a model that cannot run packed rows.
            ValueError, TypeError: wrong arguments.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        self._check(prompt_ids, virtual_tokens, cu_seqlens, attention_mask, options)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        is_lm, by_ids = self._engine.is_lm, input_ids is not None and self._engine.may_share()
        prompt, prefix, ids = self._prompts(prompt_ids)
        if num_items_in_batch is not None:
            options["num_items_in_batch"] = num_items_in_batch
        if self.config.is_encoder_decoder:
            return self._encoder_decoder(self._embed(tokens), attention_mask, prompt, ids, labels, options)
        arguments = dict(
            labels=labels if is_lm else None,
            prompt_ids=ids,
            virtual_tokens=virtual_tokens,
            prefix_length=prefix_length(prefix),
            token_ids=input_ids
            if by_ids and (prefix is None or None not in prefix) and "token_type_ids" not in options
            else None,
        )
        plan, reason = self._plan(tokens, attention_mask, cu_seqlens, arguments)
        if plan is None:
            self._warn(reason)
            return self._padded(self._embed(tokens), attention_mask, prompt, prefix, labels, arguments, options)
        if is_lm:  # behind a learned prefix the model looks the tokens up itself
            by_ids = by_ids and self._is_prefix
            rows = plan.token_ids(input_ids) if by_ids else self._engine.rows(plan, prompt, self._embed(tokens))
            want_logits = labels is None or keep_logits or not self.training
            return self._engine.outputs(plan, rows, want_logits=want_logits, prefix=prefix, **options)
        embeds = self._embed(tokens)
        inputs = {"inputs_embeds": self._engine.rows(plan, prompt, embeds)}
        if (types := options.pop("token_type_ids", None)) is not None:
            inputs["token_type_ids"] = torch.where(plan.source >= 0, plan.token_ids(types), 0)
        return self._with_head(plan, inputs, embeds, attention_mask, prefix, labels, options)

    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, *, prompt_ids=None, **options):
        """``base.generate`` behind the prompt; returns ``[B, S + new]`` ids, the input in front, as PEFT does.

        Left-pad a batch of several lengths; positions then count text only.

        Raises:
            CannotPack: Prefix-Tuning with a model whose attention cannot be reached.
        """
        batch = len(input_ids)
        self._check(prompt_ids)
        prompt, prefix, ids = self._prompts(prompt_ids)
        ids = torch.zeros(batch, dtype=torch.int64, device=input_ids.device) if ids is None else ids
        if self._is_prefix:
            if (reason := self._engine.refusal or self._prefix_reason) is not None:
                raise CannotPack(f"generation behind a prefix needs the attention interface, but {reason}")
            calls = PaddedCalls(self.base, prefix, ids)
            try:
                return self.base.generate(input_ids, attention_mask=attention_mask, **options)
            finally:
                calls.remove()
        embeds = self._embed(input_ids)
        prompt = prompt.unflatten(0, (-1, self.method.num_virtual_tokens)).to(embeds.dtype)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = torch.cat([mask.new_ones(batch, prompt.shape[1]), mask], 1)
        result = self.base.generate(inputs_embeds=torch.cat([prompt[ids], embeds], 1), attention_mask=mask, **options)
        if self.config.is_encoder_decoder:
            return result
        if isinstance(result, torch.Tensor):
            return torch.cat([input_ids.repeat_interleave(len(result) // batch, 0), result], 1)
        result.sequences = torch.cat(
            [input_ids.repeat_interleave(len(result.sequences) // batch, 0), result.sequences], 1
        )
        return result

    def save_pretrained(self, directory):
        """Write the prompts, and a head that trained along, in PEFT's adapter format; see :func:`fastprompt.hf.checkpoint.save`."""
        head = {name: p for name, p in self.base.named_parameters() if _is_head(name)}
        checkpoint.save(directory, self.method, self.base.config, self._task_type(), head)

    @classmethod
    def from_pretrained(cls, base, directory):
        """``base`` with the prompts (and head) in ``directory``, written by PEFT or by :meth:`save_pretrained`."""
        method, head = checkpoint.load(directory), checkpoint.load_head(directory)
        unknown = sorted(head.keys() - dict(base.named_parameters()).keys())
        if unknown:
            raise ValueError(
                f"base must have the parameters {unknown} of the head that was saved, but has none of that name"
            )
        with torch.no_grad():
            for name, value in head.items():
                base.get_parameter(name).copy_(value)
        return cls(base, method)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
        """See ``PreTrainedModel``; recomputation works, reentrant or not, with Prefix-Tuning too."""
        self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self):
        """See ``PreTrainedModel``."""
        self.base.gradient_checkpointing_disable()

    def _check(self, prompt_ids, virtual_tokens=None, cu_seqlens=None, attention_mask=None, options=()):
        if prompt_ids is not None and prompt_ids.numel():
            low, high = int(prompt_ids.min()), int(prompt_ids.max())
            if low < 0 or high >= self.method.num_prompts:
                raise ValueError(
                    f"prompt_ids must lie in [0, {self.method.num_prompts}), got values from {low} to {high}"
                )
        if self._is_prefix and virtual_tokens is not None:
            raise ValueError("virtual_tokens must be None with Prefix-Tuning, which puts nothing among the tokens")
        if cu_seqlens is not None and attention_mask is not None:
            raise ValueError("attention_mask must be None with cu_seqlens, which say where sequences end")
        if self._engine.is_lm and not self.config.is_encoder_decoder:
            known = set()
        else:
            known = (
                set(options)
                if self.config.is_encoder_decoder
                else {"token_type_ids", "start_positions", "end_positions"}
            )
            for name, value in (("cu_seqlens", cu_seqlens), ("virtual_tokens", virtual_tokens)):
                if value is not None:
                    raise ValueError(f"{name} must be None for a {type(self.base).__name__}, which is no causal LM")
        if unknown := sorted(set(options) - known):
            raise TypeError(f"forward got unknown arguments {unknown}")

    def _embed(self, tokens):
        """Token ids -> their embeddings; embeddings as they are."""
        return tokens if tokens.is_floating_point() else self.base.get_input_embeddings()(tokens)

    def _plan(self, tokens, attention_mask, cu_seqlens, arguments):
        """``(plan, None)``, or ``(None, the reason)`` for the padded path."""
        length = 0 if self._is_prefix else self.method.num_virtual_tokens
        if cu_seqlens is not None:
            if (reason := self._engine.why_not() or self._prefix_reason) is not None:
                raise CannotPack(f"cu_seqlens needs packed rows, but {reason}")
            flat = {
                name: x.reshape(-1) if name in _LIKE_TOKENS and x is not None else x for name, x in arguments.items()
            }
            return plan_packed_input(cu_seqlens, length, **flat), None
        if self._prefix_reason is not None:
            return None, self._prefix_reason
        return plan_or_reason(
            self._engine,
            *tokens.shape[:2],
            length,
            attention_mask=attention_mask,
            device=tokens.device,
            finds_last=True,
            **arguments,
        )

    def _prompts(self, prompt_ids):
        """The prompts a batch uses: ``[N * P, D]`` or None, a prefix or None, and the batch's ids among them or None."""
        method, used, ids = self.method, None, None
        if prompt_ids is not None:
            used, ids = prompt_ids.to(next(method.parameters()).device).unique(return_inverse=True)
        if self._is_prefix:
            prefix = method()[:, :, :1] if used is None else method()[:, :, used]
            return None, layers_of_tensor(prefix, self.config, method.layers), ids
        if isinstance(method, MultitaskPromptTuning):
            return (
                method(torch.zeros(1, dtype=torch.int64, device=method.shared.device) if used is None else used),
                None,
                ids,
            )
        if used is None:
            return method()[: method.num_virtual_tokens], None, None
        return method().unflatten(0, (method.num_prompts, -1))[used].flatten(0, 1), None, ids

    def _with_head(self, plan, inputs, embeds, attention_mask, prefix, labels, options):
        """The model's own forward with its head on the hidden states of the text."""
        plan = replace(plan, grid=self._text_cells(plan, embeds.shape[1], attention_mask))
        if labels is not None:
            options["labels"] = labels
        with self._engine.packed_backbone(plan, inputs, prefix):
            return self.base(inputs_embeds=embeds, return_dict=True, **options)

    def _text_cells(self, plan, width, attention_mask):
        """``[B, S]`` rows of the text tokens; in the column that a classifier reads, a row's first or last token stands."""
        cells = plan.grid[:, plan.grid.shape[1] - width :]
        if attention_mask is not None:
            cells = cells.masked_fill(attention_mask == 0, -1)
        column = self._engine.pooled_column
        if column is not None:
            cells = cells.gather(1, (cells >= 0).int().argsort(dim=1, stable=True, descending=column == 0))
        return cells

    def _padded(self, embeds, attention_mask, prompt, prefix, labels, arguments, options):
        """The model's own forward on ``[B, P + S]`` rows, for what cannot be packed."""
        batch, width = embeds.shape[:2]
        length = 0 if self._is_prefix else self.method.num_virtual_tokens
        planned = {name: arguments[name] for name in ("prompt_ids", "virtual_tokens")}
        plan = plan_padded_input(batch, width, length, layout="padded", device=embeds.device, **planned)
        rows = self._engine.rows(plan, prompt, embeds).unflatten(0, plan.grid.shape)
        front = plan.grid.shape[1] - width
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must have shape [B, S], got {list(attention_mask.shape)}")
        inputs = {"inputs_embeds": rows, "return_dict": True}
        if attention_mask is not None:
            inputs["attention_mask"] = torch.cat(
                [attention_mask.new_ones(batch, front + prefix_length(prefix)), attention_mask], 1
            )
        if prefix is not None:
            ids = (
                torch.zeros(batch, dtype=torch.int64, device=rows.device)
                if planned["prompt_ids"] is None
                else planned["prompt_ids"]
            )
            inputs["past_key_values"] = cache_of_layers(
                [x and tuple(y.to(rows.dtype) for y in x) for x in prefix], ids, self.config
            )
        if self._engine.is_lm:
            if labels is not None:
                inputs["labels"] = torch.cat([labels.new_full((batch, front), IGNORE), labels], 1)
            output = self.base(use_cache=prefix is not None, **inputs, **options)
            return CausalLMOutputWithPast(loss=output.loss, logits=output.logits)
        plan = replace(plan, grid=self._text_cells(plan, width, attention_mask))
        if (types := options.pop("token_type_ids", None)) is not None:
            inputs["token_type_ids"] = torch.cat([types.new_zeros(batch, front), types], 1)
        if labels is not None:
            options["labels"] = labels
        with self._engine.padded_backbone(plan):
            return self.base(**inputs, **options)

    def _encoder_decoder(self, embeds, attention_mask, prompt, ids, labels, options):
        batch, length = len(embeds), self.method.num_virtual_tokens
        prompt = prompt.unflatten(0, (-1, length)).to(embeds.dtype)
        prompt = prompt.expand(batch, -1, -1) if ids is None else prompt[ids]
        mask = embeds.new_ones(embeds.shape[:2], dtype=torch.int64) if attention_mask is None else attention_mask
        mask = torch.cat([mask.new_ones(batch, length), mask], 1)
        return self.base(
            inputs_embeds=torch.cat([prompt, embeds], 1),
            attention_mask=mask,
            labels=labels,
            return_dict=True,
            **options,
        )

    @torch.no_grad()
    def _why_no_prefix(self):
        """None if the method's prefix can run packed, else why not. Raises ValueError if it fits no way."""
        config = self.config.get_text_config()
        if self.method.layers[-1] >= config.num_hidden_layers:
            raise ValueError(
                f"method must have a prefix for the model's {config.num_hidden_layers} layers, got one for layer {self.method.layers[-1]}"
            )
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        found = self.method.num_kv_heads, self.method.head_dim
        if found != (heads, width) and not hasattr(config, "global_head_dim"):  # which differs from layer to layer
            raise ValueError(
                f"method must have {heads} key heads of width {width} like the model, got {found[0]} of width {found[1]}"
            )
        prefix = self._prompts(None)[1]

        def padded(input_ids, attention_mask):
            nothing = {"prompt_ids": None, "virtual_tokens": None}
            return self._padded(self._embed(input_ids), attention_mask, None, prefix, None, nothing, {})

        return self._engine.why_not_prefix(prefix, padded)

    def _task_type(self):
        if self.config.is_encoder_decoder:
            return "SEQ_2_SEQ_LM"
        if self._engine.is_lm:
            return "CAUSAL_LM"
        name = type(self.base).__name__
        return next((kind for part, kind in _TASK_TYPES.items() if part in name), "FEATURE_EXTRACTION")

    def _warn(self, reason):
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"fastprompt runs the model's own padded forward: {reason}", stacklevel=3)


_HEADS = {"score", "classifier", "qa_outputs"}
_TASK_TYPES = {
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
}
_LIKE_TOKENS = ("labels", "virtual_tokens", "token_ids")


def _is_head(name):
    return name.split(".")[0] in _HEADS
