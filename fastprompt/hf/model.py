"""SoftPromptModel: a frozen causal LM with a soft prompt, without PEFT's model wrapper."""

import warnings

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..layout import CannotPack, plan_packed_input, plan_padded_input
from . import checkpoint
from .engine import Engine, plan_or_reason


class SoftPromptModel(nn.Module):
    """A frozen causal LM and a method that produces its prompt, which is run once per batch.

    Args:
        base: a Hugging Face causal LM. Its parameters are frozen; its attention is switched over, see :class:`Engine`.
        method: for example :class:`fastprompt.PromptTuning`; its parameters are what trains.

    Raises:
        ValueError: the prompt is not as wide as the model's embeddings.
    """

    def __init__(self, base, method):
        super().__init__()
        width = base.get_input_embeddings().weight.shape[1]
        if method.prompt.shape[-1] != width:
            raise ValueError(f"method must produce prompts of width {width} like the model's embeddings, got {method.prompt.shape[-1]}")
        base.requires_grad_(False)
        self.base, self.method, self.config = base, method.to(base.device), base.config
        self._engine = Engine(base)
        self.config = base.config  # the model's own copy now
        self._warned = set()
        if self._engine.refusal is not None:
            self._warn(self._engine.refusal)

    def forward(self, input_ids=None, attention_mask=None, labels=None, *, inputs_embeds=None, prompt_ids=None,
                virtual_tokens=None, cu_seqlens=None, keep_logits=False, num_items_in_batch=None):
        """Loss and logits of a batch, as a ``CausalLMOutputWithPast``.

        Args:
            input_ids: ``[B, S]``, or ``[T]`` (or ``[1, T]``) with ``cu_seqlens``.
            attention_mask: ``[B, S]``; None: everything is text.
            labels: like ``input_ids``, not shifted, -100 to ignore.
            inputs_embeds: in place of ``input_ids``, one dimension more.
            prompt_ids: ``[B]``, which of the method's N prompts stands in front of each sequence; None: prompt 0.
            virtual_tokens: like ``input_ids``, j >= 0 where virtual token j stands, -1 elsewhere; the prompt then stands
                there and not in front.
            cu_seqlens: ``[B + 1]``; the batch comes packed.
            keep_logits: return logits ``[B, P + S, V]`` in training with labels too, where they are None otherwise.
            num_items_in_batch: divide the summed loss by this (gradient accumulation) instead of taking the mean.

        Raises:
            CannotPack: ``cu_seqlens`` with a model that cannot run packed rows.
            ValueError, TypeError: wrong arguments.
        """
        tokens = self._one_of(input_ids, inputs_embeds)
        if prompt_ids is not None and prompt_ids.numel():
            low, high = int(prompt_ids.min()), int(prompt_ids.max())
            if low < 0 or high >= self.method.num_prompts:
                raise ValueError(f"prompt_ids must lie in [0, {self.method.num_prompts}), got values from {low} to {high}")
        prompt, bank_ids = self._distinct_prompts(prompt_ids)
        options = dict(labels=labels, prompt_ids=bank_ids, virtual_tokens=virtual_tokens)
        embeds = self.base.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        want_logits = labels is None or keep_logits or not self.training
        length = self.method.num_virtual_tokens
        if cu_seqlens is not None:
            if (reason := self._engine.why_not()) is not None:
                raise CannotPack(f"cu_seqlens needs packed rows, but {reason}")
            flat = {name: x.reshape(-1) if name in ("labels", "virtual_tokens") and x is not None else x for name, x in options.items()}
            plan = plan_packed_input(cu_seqlens, length, **flat)
        else:
            plan, reason = plan_or_reason(self._engine, *tokens.shape[:2], length, attention_mask=attention_mask,
                                          device=tokens.device, **options)
            if plan is None:
                self._warn(reason)
                return self._padded(embeds, prompt, attention_mask, length, num_items_in_batch, **options)
        rows = self._engine.rows(plan, prompt, embeds)
        return self._engine.outputs(plan, rows, want_logits=want_logits, num_items_in_batch=num_items_in_batch)

    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, *, prompt_ids=None, **options):
        """``base.generate`` behind the prompt; returns ``[B, S + new]`` ids, the input in front, as PEFT does.

        Left-pad a batch of several lengths; positions then count text only.
        """
        embeds = self.base.get_input_embeddings()(input_ids)
        batch, width = input_ids.shape
        prompt, ids = self._distinct_prompts(prompt_ids)
        prompt = prompt.unflatten(0, (-1, self.method.num_virtual_tokens)).to(embeds.dtype)
        ids = torch.zeros(batch, dtype=torch.int64, device=prompt.device) if ids is None else ids
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = torch.cat([mask.new_ones(batch, prompt.shape[1]), mask], 1)
        result = self.base.generate(inputs_embeds=torch.cat([prompt[ids], embeds], 1), attention_mask=mask, **options)
        if isinstance(result, torch.Tensor):
            return torch.cat([input_ids.repeat_interleave(len(result) // batch, 0), result], 1)
        result.sequences = torch.cat([input_ids.repeat_interleave(len(result.sequences) // batch, 0), result.sequences], 1)
        return result

    def save_pretrained(self, directory):
        """Write the prompts in PEFT's adapter format; see :func:`fastprompt.hf.checkpoint.save`."""
        checkpoint.save(directory, self.method, self.base.config)

    @classmethod
    def from_pretrained(cls, base, directory):
        """``base`` with the prompts in ``directory``, written by PEFT or by :meth:`save_pretrained`."""
        return cls(base, checkpoint.load(directory))

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
        """See ``PreTrainedModel``; recomputation works, reentrant or not."""
        self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self):
        """See ``PreTrainedModel``."""
        self.base.gradient_checkpointing_disable()

    def _distinct_prompts(self, prompt_ids):
        """The prompts a batch uses, ``[N * P, D]``, and the batch's ids among them."""
        if prompt_ids is None:
            return self.method()[: self.method.num_virtual_tokens], None
        used, ids = prompt_ids.to(self.method.prompt.device).unique(return_inverse=True)
        return self.method().unflatten(0, (self.method.num_prompts, -1))[used].flatten(0, 1), ids

    def _padded(self, embeds, prompt, attention_mask, length, num_items_in_batch, *, labels, prompt_ids, virtual_tokens, **_):
        """The model's own forward on ``[B, P + S]`` rows, for what cannot be packed."""
        batch, width = embeds.shape[:2]
        plan = plan_padded_input(batch, width, length, prompt_ids=prompt_ids, virtual_tokens=virtual_tokens, layout="padded", device=embeds.device)
        rows = self._engine.rows(plan, prompt, embeds).unflatten(0, plan.grid.shape)
        front = plan.grid.shape[1] - width
        extra = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ValueError(f"attention_mask must have shape [B, S], got {list(attention_mask.shape)}")
            attention_mask = torch.cat([attention_mask.new_ones(batch, front), attention_mask], 1)
        if labels is not None:
            extra["labels"] = torch.cat([labels.new_full((batch, front), -100), labels], 1)
        output = self.base(inputs_embeds=rows, attention_mask=attention_mask, use_cache=False, return_dict=True, **extra)
        return CausalLMOutputWithPast(loss=output.loss, logits=output.logits)

    def _one_of(self, input_ids, inputs_embeds):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        return input_ids if inputs_embeds is None else inputs_embeds

    def _warn(self, reason):
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"fastprompt runs the model's own padded forward: {reason}", stacklevel=3)
