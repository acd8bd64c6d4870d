"""The engine: runs a planned batch through a Hugging Face model, what sequences share once, heads where they are needed."""

import inspect
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..layout import CannotPack, plan_padded_input
from ..ops import linear_cross_entropy, prompt_concat
from .attention import PackedRows, is_switched_over, prefix_length, running, switch_back, switch_over
from .mlp import keep_all, keep_less
from .prefix import checkpoints_reentrantly, through_reentrant_checkpoints
from .probe import Probe, primary, quiet, relative_error, tolerance

ROWS = 256  # labelled rows up to which the loss is left to the model: logits so few are small, and its roundings its own


class Engine:
    """A model that can run packed rows beside its ordinary forward.

    Building one switches the model's attention over (:func:`switch_over`; its ordinary forward is not changed) and
    probes it: two short sequences run packed and through the model's own padded forward.

    Attributes:
        base: the model: a causal LM, or any other head on a decoder or an encoder.
        backbone: the part of it that runs packed rows; what comes behind it sees padded hidden states.
        layout: "shared" for a causal model, whose prompt no text changes, else "packed".
        refusal: None if the packed rows give the model's own output, else the reason why not.
    """

    def __init__(self, base, root=None):
        self.base, self.root = base, base if root is None else root
        self.refusal, self.layout, self.position_offset, self.plain_head = None, "shared", 0, False
        self.compact_positions, self.left_padding, self.right_padding = False, True, True
        try:
            self.is_lm = base.get_output_embeddings() is not None and base.can_generate()
            self.backbone = base.get_decoder() if self.is_lm else base.base_model
            switch_over(self.root)
            with quiet(self.base):
                keep_less(self.base)
            self._probe()
        except Exception as error:  # a model can fail in any way on rows it was not written for; the reason is kept
            self.refusal = self._reason(error)
        if self.refusal is not None:
            self.detach()

    def _reason(self, error):
        if "MaskPlan" in str(error):  # what stands in place of the mask met code that wants a tensor
            return f"{type(self.base).__name__} computes attention in code of its own"
        return f"{type(error).__name__}: {error}"

    @property
    def causal(self):
        return self.layout == "shared"

    def detach(self):
        """Give the model its own attention and MLPs back."""
        switch_back(self.root)
        keep_all(self.base)

    def why_not(self, attention_mask=None, finds_last=False):
        """The reason why this call has to take the padded path, or None. Costs a look at a few flags.

        ``finds_last``: the model is told the token ids, and by them it finds the last one of a right-padded row.
        """
        if self.refusal is not None:
            return self.refusal
        if dropout := self._active_dropout():
            return f"dropout is active in the base model ({dropout}); set it to 0 in its config or call .eval() on the base model"
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                return f"the attention mask has {attention_mask.dim()} dimensions"
            if not self.left_padding and bool((attention_mask[:, :1] == 0).any()):
                return "the model does not see left-padded rows as packed rows would"
            if not self.right_padding and not finds_last and bool((attention_mask[:, -1:] == 0).any()):
                return "the model reads what stands in the last column, which is padding here; pad on the left"
        for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
            if getattr(self.base.config, name, False):
                return f"config.{name} is set"
        return None

    def may_share(self):
        """Are two tokens of the same id the same row? Not if a hook of the embedding module may change one of them."""
        hooks = self.base.get_input_embeddings()._forward_hooks.values()
        return all(getattr(hook, "__name__", "").startswith("make_inputs_require_grad") for hook in hooks)

    def rows(self, plan, prompt, embeds):
        """``[R, D]`` input rows of a plan.

        Args:
            plan: a RowPlan.
            prompt: ``[N * P, D]``, or None if the plan has no virtual tokens.
            embeds: ``[B, S, D]`` or ``[T, D]`` embedded tokens of the batch the plan was made of.
        """
        flat = embeds.reshape(-1, embeds.shape[-1])
        return prompt_concat(plan.source, flat, flat[:0] if prompt is None else prompt.to(embeds.dtype))

    def hidden(self, plan, rows, prefix=None):
        """``[R, D]`` rows -> ``[R, D]`` last hidden states of the backbone."""
        return self._call(self.backbone, plan, rows, prefix).last_hidden_state[0]

    def logits(self, plan, rows, keep=None, prefix=None):
        """Logits ``[R, V]`` of all rows, or ``[M, V]`` of the rows ``keep``. A causal LM only."""
        extra = {} if keep is None else {"logits_to_keep": keep}
        return self._call(self.base, plan, rows, prefix, **extra).logits[0]

    def loss(self, plan, rows, num_items_in_batch=None, prefix=None):
        """The model's own loss over the plan's labelled rows, the head run on those rows only."""
        if self._chunked_loss(plan, rows):
            hidden, head = self.hidden(plan, rows, prefix), self.base.get_output_embeddings()
            hidden = hidden.index_select(0, plan.label_rows.to(hidden.device))
            total = linear_cross_entropy(hidden, head.weight, head.bias, plan.labels.to(hidden.device))
            return total / (len(plan.labels) if num_items_in_batch is None else num_items_in_batch)
        head = self.base.get_output_embeddings().weight.device  # the last device of a model that is spread over several
        keep = plan.label_rows if head.type == "meta" else plan.label_rows.to(head)
        logits = self.logits(plan, rows, keep, prefix)
        return self.loss_of_logits(logits, plan.labels, num_items_in_batch)

    def loss_of_logits(self, logits, labels, num_items_in_batch=None):
        """The model's own loss of ``[M, V]`` logits against ``[M]`` shifted labels."""
        extra = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        return self.base.loss_function(
            logits=logits[None], labels=labels[None], vocab_size=logits.shape[-1], shift_labels=labels[None], **extra
        )

    def outputs(self, plan, rows, *, want_logits, num_items_in_batch=None, prefix=None):
        """A model output with ``loss`` (if the plan has labels) and ``logits [B, W, V]`` (if wanted)."""
        if not want_logits:
            return CausalLMOutputWithPast(loss=self.loss(plan, rows, num_items_in_batch, prefix))
        logits = self.logits(plan, rows, prefix=prefix)
        loss = None
        if plan.labels is not None:
            loss = self.loss_of_logits(logits[plan.label_rows], plan.labels, num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=plan.unpack(logits))

    @contextmanager
    def packed_backbone(self, plan, inputs, prefix=None):
        """While the block runs, a call of the backbone runs the plan's rows, and gives back padded ``[B, W, D]`` states.

        So a model's own forward, with whatever comes behind its backbone, can run on packed rows.

        Args:
            plan: a RowPlan.
            inputs: ``{argument: rows}``, ``[R, D]`` ``inputs_embeds`` or ``[R]`` ``input_ids`` and others; or a function
                that makes it from the arguments the backbone is called with.
            prefix: see MaskPlan.
        """
        signature = inspect.signature(self.backbone.forward)
        blocks = []

        def enter(module, args, kwargs):
            given = dict(signature.bind(*args, **kwargs).arguments)
            given.update(given.pop("kwargs", {}))
            rows = inputs(given) if callable(inputs) else inputs
            for name in ("input_ids", "inputs_embeds", "attention_mask", "past_key_values"):
                given.pop(name, None)
            rows, block = self._inputs(plan, rows, prefix)
            given.update(rows)
            block.__enter__()
            blocks.append(block)
            return (), given

        def leave(module, args, kwargs, output):
            if blocks:
                blocks.pop().__exit__(None, None, None)
            return None if output is None else _unpacked(plan, module, output)

        hooks = [
            self.backbone.register_forward_pre_hook(enter, with_kwargs=True),
            self.backbone.register_forward_hook(leave, with_kwargs=True, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            while blocks:  # torch calls no hook after a KeyboardInterrupt
                blocks.pop().__exit__(None, None, None)

    @contextmanager
    def padded_backbone(self, plan):
        """While the block runs, a call of the backbone, on ``[B, W]`` rows, gives the states that the plan's grid picks."""
        hook = self.backbone.register_forward_hook(lambda module, args, output: _unpacked(plan, module, output))
        try:
            yield
        finally:
            hook.remove()

    def _call(self, model, plan, rows, prefix=None, **extra):
        inputs = {"inputs_embeds": rows} if rows.is_floating_point() else {"input_ids": rows}
        inputs, block = self._inputs(plan, inputs, prefix)
        with block:
            return model(**inputs, **extra)

    def _inputs(self, plan, rows, prefix):
        """The keyword arguments of the backbone for ``{argument: [R, ...]}``, and the block it has to run in."""
        if not is_switched_over(
            self.backbone.config
        ):  # by another user of the same base model, or by set_attn_implementation
            switch_over(self.root)
        if prefix is not None and any(x.requires_grad for x in _tensors(prefix)) and checkpoints_reentrantly(self.base):
            if "inputs_embeds" not in rows:
                rows = {**rows, "inputs_embeds": self.base.get_input_embeddings()(rows["input_ids"])}
                del rows["input_ids"]
            rows["inputs_embeds"], prefix = through_reentrant_checkpoints(rows["inputs_embeds"], prefix)
        positions = plan.position_ids
        if self.compact_positions and plan.sequences.gaps is not None:
            positions = positions - torch.repeat_interleave(plan.sequences.gaps, plan.sequences.lengths)
        inputs = {name: x[None] for name, x in rows.items()}
        inputs["position_ids"] = (positions + self.position_offset)[None]
        inputs["return_dict"] = True
        if "use_cache" in self._parameters or "kwargs" in self._parameters:
            inputs["use_cache"] = False
        return inputs, running(PackedRows(plan, self.causal, prefix))

    @cached_property
    def _parameters(self):
        return set(inspect.signature(self.backbone.forward).parameters)

    def _chunked_loss(self, plan, rows):
        head = self.base.get_output_embeddings()
        return (
            len(plan.labels) > ROWS
            and self.plain_head
            and _is_plain_linear(head)  # still
            and self.base.loss_function is ForCausalLMLoss
            and head.weight.dtype == torch.float32  # else the model's own loss decides about casts
            and (rows.dtype == torch.float32 or not rows.is_floating_point())
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
        """Every ``(module, attribute)`` in front of the padded states that holds a dropout probability or a router's noise."""
        return [
            (module, name)
            for module in (self.base if self.is_lm else self.backbone).modules()
            for name, value in vars(module).items()
            if type(value) in (int, float)
            and ("drop" in name or "jitter" in name or (name == "p" and isinstance(module, nn.Dropout)))
        ]

    @torch.no_grad()
    def _probe(self):
        if getattr(self.base.config, "is_encoder_decoder", False):
            self.refusal = "an encoder-decoder's cross-attention has no packed layout"
            return
        if "position_ids" not in self._parameters:
            self.refusal = f"{type(self.backbone).__name__} takes no position_ids"
            return
        with quiet(self.base):
            probe = Probe(self.base)
            self.refusal = self._find_layout(probe)
            if self.refusal is not None:
                return
            self._find_left_padding(probe)
            self.plain_head = self.is_lm and self._head_is_plain(probe.embeds)

    def _find_layout(self, probe):
        """Choose the layout and the first position; None, or the reason why none gives the model's own output."""
        padding = getattr(self.base.config, "pad_token_id", None)
        offsets = [0] if self.is_lm or padding is None else [0, padding + 1]  # RoBERTa counts from there
        reason = None
        for mask in (probe.right, probe.full):
            self.right_padding = mask is probe.right
            for self.layout in ("shared",) if self.is_lm else ("shared", "packed"):
                for self.position_offset in offsets:
                    try:
                        found = self._differs(probe, mask)
                    except Exception as error:  # as above; another layout may do
                        found = self._reason(error)
                    if found is None:
                        return None
                    reason = reason or found
            if self.is_lm:
                break
        return reason

    def _find_left_padding(self, probe):
        try:
            for self.compact_positions in (False, True):
                self.left_padding = self._differs(probe, probe.left) is None
                if self.left_padding:
                    return
        except CannotPack:
            self.left_padding = False

    def _differs(self, probe, mask):
        """None if the packed and the padded output agree where tokens are real, else what differs."""
        batch, width = mask.shape
        plan = plan_padded_input(batch, width, len(probe.prompt), attention_mask=mask, layout=self.layout)
        rows = self.rows(plan, probe.prompt, probe.embeds)
        if self.is_lm:
            packed = plan.unpack(self.logits(plan, rows))
        else:
            with self.packed_backbone(plan, {"inputs_embeds": rows}):
                packed = probe.padded(mask)
        return _difference(packed, probe.padded(mask), probe.real(mask), probe.embeds.dtype)

    @torch.no_grad()
    def why_not_prefix(self, prefix, forward):
        """None if learned keys and values give the same packed as in ``forward``, the padded way, else what differs.

        Args:
            prefix: see MaskPlan.
            forward: takes ``input_ids`` and ``attention_mask`` and returns the model's output behind the prefix.
        """
        if self.refusal is not None:
            return self.refusal
        with quiet(self.root):
            probe = Probe(self.base)
            mask, ids = probe.right, probe.ids
            if (padding := getattr(self.base.config, "pad_token_id", None)) is not None:
                ids = ids.masked_fill(mask == 0, padding)  # by it some heads find a row's last token
            plan = plan_padded_input(
                *mask.shape, 0, attention_mask=mask, prefix_length=prefix_length(prefix), layout=self.layout
            )
            rows = plan.token_ids(ids)
            try:
                padded = primary(forward(input_ids=ids, attention_mask=mask))
                if self.is_lm:
                    packed = plan.unpack(self.logits(plan, rows, prefix=prefix))
                else:
                    with self.packed_backbone(plan, {"input_ids": rows}, prefix):
                        packed = primary(self.base(input_ids=ids, attention_mask=mask, return_dict=True))
                return _difference(packed, padded, mask.bool(), probe.embeds.dtype)
            except Exception as error:  # as in __init__
                return self._reason(error)

    @cached_property
    def pooled_column(self):
        """The column of hidden states that a classifier reads, whatever stands there: 0, -1, or None if it reads them all."""
        with torch.no_grad(), quiet(self.base):
            probe = Probe(self.base)
            plain, *changed = (self._with_change(probe, column) for column in (None, 0, -1))
        read = []
        for column, output in zip((0, -1), changed):
            differs = output != plain
            if plain.shape[:2] == probe.real(probe.full).shape:  # one output a token: its own does not count
                differs[:, column] = False
            if differs.any():
                read.append(column)
        return read[0] if len(read) == 1 else None

    def _with_change(self, probe, column):
        """The output on the probe's rows with the hidden states of a column changed."""

        def change(module, args, output):
            if column is not None:
                output.last_hidden_state = output.last_hidden_state.clone()
                output.last_hidden_state[:, column] += 1
            return output if column is None or output.get("pooler_output") is None else _pooled(module, output)

        hook = self.backbone.register_forward_hook(change)
        try:
            return probe.padded(probe.full)
        finally:
            hook.remove()

    def _head_is_plain(self, embeds):
        """Is the model's forward after its decoder nothing but a linear head and the ordinary causal LM loss?

        The decoder's output is replaced by large values, so that a soft cap or a scale behind the head shows.
        """
        head = self.base.get_output_embeddings()
        if not _is_plain_linear(head) or self.base.loss_function is not ForCausalLMLoss:
            return False
        large = torch.randn(embeds.shape, device=embeds.device, generator=torch.Generator(embeds.device).manual_seed(0))
        large = (large * 1e3).to(embeds.dtype)

        def replace_output(module, inputs, output):
            output.last_hidden_state = large
            return output

        hook = self.backbone.register_forward_hook(replace_output)
        try:
            logits = self.base(inputs_embeds=embeds, use_cache=False, return_dict=True).logits
        finally:
            hook.remove()
        expected = head(large)
        return bool(
            torch.allclose(logits, expected.to(logits.dtype), rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        )


def _unpacked(plan, backbone, output):
    """A backbone's output with padded in place of packed states, and what it pools from them pooled again."""
    output.last_hidden_state = plan.unpack(output.last_hidden_state.flatten(0, 1))
    return output if output.get("pooler_output") is None else _pooled(backbone, output)


def _pooled(backbone, output):
    output.pooler_output = backbone.pooler(output.last_hidden_state)
    return output


def _difference(packed, padded, real, dtype):
    """None if two outputs agree, where tokens are real if they have one value a token, else what differs."""
    if packed.shape != padded.shape:
        return f"packed rows give an output of shape {list(packed.shape)}, the padded forward {list(padded.shape)}"
    if padded.shape[:2] == real.shape:
        packed, padded = packed[real], padded[real]
    error = relative_error(packed, padded)
    if not error <= tolerance(dtype):
        return f"packed rows give another output than the padded forward (relative error {error:.1e})"
    return None


def _tensors(prefix):
    return [x for layer in prefix if layer is not None for x in layer]


def _is_plain_linear(module):
    """A frozen ``nn.Linear`` that may be replaced by its weight: no subclass, no hook of torch's or accelerate's."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is nn.Linear and not hooked and not any(p.requires_grad for p in module.parameters())


def plan_or_reason(engine, *arguments, attention_mask=None, finds_last=False, **options):
    """``(plan, None)`` for a batch that can run packed, else ``(None, the reason)``."""
    if (reason := engine.why_not(attention_mask, finds_last)) is not None:
        return None, reason
    try:
        return plan_padded_input(*arguments, attention_mask=attention_mask, layout=engine.layout, **options), None
    except CannotPack as error:
        return None, str(error)
