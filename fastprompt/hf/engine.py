"""The engine: runs a planned batch through a Hugging Face causal LM, the prompt once, the head on labelled rows only."""

import inspect
from functools import cached_property

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..layout import CannotPack, plan_padded_input
from ..ops import prompt_concat
from .attention import PackedRows, running, switch_back, switch_over
from .loss import ROWS, SummedCrossEntropy
from .probe import quiet, relative_error, tolerance

class Engine:
    """A causal LM that can run packed rows beside its ordinary forward.

    Building one switches the model's attention over (:func:`switch_over`; its ordinary forward is not changed) and
    probes it: two short sequences run packed and through the model's own padded forward.

    Attributes:
        base: the model.
        refusal: None if the packed rows give the model's own logits, else the reason why not.
    """

    def __init__(self, base, root=None):
        self.base, self.root = base, base if root is None else root
        self.refusal, self.compact_positions, self.left_padding, self.plain_head = None, False, True, False
        try:
            switch_over(self.root)
            self._probe()
        except Exception as error:  # a model can fail in any way on rows it was not written for; the reason is kept
            self.refusal = f"{type(error).__name__}: {error}"
        if self.refusal is not None:
            switch_back(self.root)

    def detach(self):
        """Give the model its own attention back."""
        switch_back(self.root)

    def why_not(self, attention_mask=None):
        """The reason why this call has to take the padded path, or None. Costs a look at a few flags."""
        if self.refusal is not None:
            return self.refusal
        if dropout := self._active_dropout():
            return f"dropout is active in the base model ({dropout}); set it to 0 in its config or call .eval() on the base model"
        if attention_mask is not None and attention_mask.dim() != 2:
            return f"the attention mask has {attention_mask.dim()} dimensions"
        if attention_mask is not None and not self.left_padding and bool((attention_mask[:, :1] == 0).any()):
            return "the model numbers left-padded positions in a way of its own"
        for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
            if getattr(self.base.config, name, False):
                return f"config.{name} is set"
        return None

    def rows(self, plan, prompt, embeds):
        """``[R, D]`` input rows of a plan.

        Args:
            plan: a RowPlan.
            prompt: ``[N * P, D]``.
            embeds: ``[B, S, D]`` or ``[T, D]`` embedded tokens of the batch the plan was made of.
        """
        return prompt_concat(plan.source, embeds.reshape(-1, embeds.shape[-1]), prompt.to(embeds.dtype))

    def hidden(self, plan, rows):
        """``[R, D]`` rows -> ``[R, D]`` last hidden states of the decoder."""
        return self._call(self.base.get_decoder(), plan, rows).last_hidden_state[0]

    def logits(self, plan, rows, keep=None):
        """Logits ``[R, V]`` of all rows, or ``[M, V]`` of the rows ``keep``."""
        extra = {} if keep is None else {"logits_to_keep": keep}
        return self._call(self.base, plan, rows, **extra).logits[0]

    def loss(self, plan, rows, num_items_in_batch=None):
        """The model's own loss over the plan's labelled rows, the head run on those rows only."""
        if self._chunked_loss(plan, rows):
            hidden, head = self.hidden(plan, rows).index_select(0, plan.label_rows), self.base.get_output_embeddings()
            total = SummedCrossEntropy.apply(hidden, head.weight, head.bias, plan.labels)
            return total / (len(plan.labels) if num_items_in_batch is None else num_items_in_batch)
        logits = self.logits(plan, rows, plan.label_rows)
        return self.loss_of_logits(logits, plan.labels, num_items_in_batch)

    def loss_of_logits(self, logits, labels, num_items_in_batch=None):
        """The model's own loss of ``[M, V]`` logits against ``[M]`` shifted labels."""
        extra = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        return self.base.loss_function(
            logits=logits[None], labels=labels[None], vocab_size=logits.shape[-1], shift_labels=labels[None], **extra
        )

    def outputs(self, plan, rows, *, want_logits, num_items_in_batch=None):
        """A model output with ``loss`` (if the plan has labels) and ``logits [B, W, V]`` (if wanted)."""
        if not want_logits:
            return CausalLMOutputWithPast(loss=self.loss(plan, rows, num_items_in_batch))
        logits = self.logits(plan, rows)
        loss = None
        if plan.labels is not None:
            loss = self.loss_of_logits(logits[plan.label_rows], plan.labels, num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=plan.unpack(logits))

    def _call(self, model, plan, rows, **extra):
        prompts = None
        if plan.layout == "shared":
            length = int(plan.sequences.host[0][1])
            prompts = (plan.prompt_rows // length, length) if length else None
        positions = plan.position_ids
        if self.compact_positions and plan.sequences.gaps is not None:
            gaps = torch.repeat_interleave(plan.sequences.gaps, plan.sequences.lengths)
            positions = positions - gaps
        with running(PackedRows(plan.sequences, prompts)):
            return model(inputs_embeds=rows[None], position_ids=positions[None], use_cache=False, return_dict=True, **extra)

    def _chunked_loss(self, plan, rows):
        head = self.base.get_output_embeddings()
        return (
            len(plan.labels) > ROWS
            and self.plain_head
            and _is_plain_linear(head)  # still
            and rows.dtype == head.weight.dtype == torch.float32  # else the model's own loss decides about casts
            and not torch.is_autocast_enabled(rows.device.type)
            and not torch.compiler.is_compiling()
        )

    def _active_dropout(self):
        for module, name in self._random:
            if module.training and getattr(module, name) > 0:
                return f"{type(module).__name__}.{name} = {getattr(module, name)}"
        return None

    @cached_property
    def _random(self):
        """Every ``(module, attribute)`` that holds a dropout probability or a router's noise."""
        return [
            (module, name)
            for module in self.base.modules()
            for name, value in vars(module).items()
            if type(value) in (int, float) and ("drop" in name or "jitter" in name or (name == "p" and isinstance(module, nn.Dropout)))
        ]

    @torch.no_grad()
    def _probe(self):
        if "position_ids" not in inspect.signature(self.base.get_decoder().forward).parameters:
            self.refusal = f"{type(self.base).__name__} takes no position_ids"
            return
        with quiet(self.base):
            table = self.base.get_input_embeddings()
            vocabulary = min(table.weight.shape[0], self.base.config.get_text_config().vocab_size)
            ids = (torch.arange(10, device=table.weight.device).view(2, 5) * 7 + 3) % vocabulary
            prompt = table(ids.flip(0)[:1, :3])[0]  # [3, D]
            embeds = table(ids)
            right = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], device=ids.device)
            if (reason := self._compare(embeds, prompt, right)) is not None:
                self.refusal = reason
                return
            left = right.flip(1)
            if self._compare(embeds, prompt, left) is not None:
                self.compact_positions = True
                self.left_padding = self._compare(embeds, prompt, left) is None
            self.plain_head = self._head_is_plain(embeds)

    def _compare(self, embeds, prompt, mask):
        """None if packed and padded logits of the real tokens agree, else what differs."""
        batch, width = mask.shape
        plan = plan_padded_input(batch, width, len(prompt), attention_mask=mask)
        packed = plan.unpack(self.logits(plan, self.rows(plan, prompt, embeds)))
        full = torch.cat([mask.new_ones(batch, len(prompt)), mask], 1)
        inputs = torch.cat([prompt.expand(batch, -1, -1), embeds], 1)
        padded = self.base(inputs_embeds=inputs, attention_mask=full, use_cache=False, return_dict=True).logits
        real = full.bool()
        error = relative_error(packed[real], padded[real])
        if not error <= tolerance(embeds.dtype):
            return f"packed rows give other logits than the padded forward (relative error {error:.1e})"
        return None

    def _head_is_plain(self, embeds):
        """Is the model's forward after its decoder nothing but a linear head and the ordinary causal LM loss?

        The decoder's output is replaced by large values, so that a soft cap or a scale behind the head shows.
        """
        head = self.base.get_output_embeddings()
        if not _is_plain_linear(head) or self.base.loss_function is not ForCausalLMLoss:
            return False
        large = torch.randn(embeds.shape, device=embeds.device, generator=torch.Generator(embeds.device).manual_seed(0))
        large = (large * 1e3).to(embeds.dtype)

        def replace(module, inputs, output):
            output.last_hidden_state = large
            return output

        hook = self.base.get_decoder().register_forward_hook(replace)
        try:
            logits = self.base(inputs_embeds=embeds, use_cache=False, return_dict=True).logits
        finally:
            hook.remove()
        expected = head(large)
        return bool(torch.allclose(logits, expected.to(logits.dtype), rtol=1e-5, atol=1e-5 * float(expected.abs().max())))


def _is_plain_linear(module):
    """A frozen ``nn.Linear`` that may be replaced by its weight: no subclass, no hook of torch's or accelerate's."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is nn.Linear and not hooked and not module.weight.requires_grad


def plan_or_reason(engine, *arguments, attention_mask=None, **options):
    """``(plan, None)`` for a batch that can run packed, else ``(None, the reason)``."""
    if (reason := engine.why_not(attention_mask)) is not None:
        return None, reason
    try:
        return plan_padded_input(*arguments, attention_mask=attention_mask, **options), None
    except CannotPack as error:
        return None, str(error)
