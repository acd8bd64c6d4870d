"""share_prefixes(model): text that groups of rows begin with is run once, in models without a soft prompt."""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from ..hf.cache_names import cache_in
from ..hf.interventions import NotAsked
from ..hf.masks import UnsupportedAttention, active
from ..hf.request import Request, tokens_of
from ..layout import IGNORE, CannotPack
from .call import as_asked, says_something
from .forward import by_name, is_exporting
from .samples import OF_SAMPLES, cu_seqlens_of
from .state import State, restore

# What a caller may pass without leaving the path on which the head runs on labelled rows alone.
_UNDERSTOOD = {
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "labels",
    "num_items_in_batch",
    "return_dict",
    "use_cache",
    "fused_lm_head",
}
# What has a value for each token, and would have to be packed, too.
_OF_TOKENS = {"token_type_ids", "position_ids", "cache_position"}
_WHAT_LAYERS_RETURN = {"output_attentions", "output_hidden_states", "output_router_logits"}
# What tells adapters of PEFT which rows, and which of their tokens, they are for.
_OF_ADAPTERS = {"adapter_names", "alora_offsets", "task_ids"}


def share_prefixes(model: nn.Module, *, pad_rows_to: int | None = None) -> nn.Module:
    """Run text that rows of a batch begin with once: what all of them, and what groups of them begin with. Same loss,
    gradients and logits.

    For causal LMs without a soft prompt, in training (LoRA and other adapters of PEFT, or the whole model) and scoring:
    the completions of a GRPO prompt, chosen and rejected of a DPO pair, choices of a question. Padding is not run, and
    with labels, in training, the head runs on labelled rows only; ``outputs.logits`` are computed when somebody reads
    them, and no cache is returned then. Works in place on this one object; trainers, checkpoints and ``generate`` go on
    as before. A batch or model that packed rows cannot represent exactly takes the model's own forward, with one
    warning a reason. Rows with left padding share only with rows that begin in the same column.

    Dropout, LoRA's too, is drawn for the rows that run: rows that share text share its masks. Each row's loss and
    gradient have the expectation that they have in a padded batch; see DESIGN.md.

    Args:
        model: a Hugging Face causal LM, or a ``PeftModel`` around one whose adapters are no soft prompts.
        pad_rows_to: see :func:`fastprompt.accelerate`.

    Returns:
        ``model``. :func:`fastprompt.restore` undoes it; :func:`fastprompt.stats` counts calls and rows.

    Raises:
        TypeError: not such a model; it is left as it was.
    """
    base = model
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise TypeError("model must have no soft prompt: fastprompt.accelerate shares text behind one")
        base = model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"model must be a Hugging Face model, or a PeftModel of one, got {type(base).__name__}")
    if base.get_output_embeddings() is None or not base.can_generate():
        raise TypeError(f"model must be a causal LM, got {type(base).__name__}")
    restore(model)
    state = State(base, {"forward": _forward}, whose="the model's", pad_rows_to=pad_rows_to)
    state.attach(model)
    if state.engine.refusal is not None:
        state.warn(state.engine.refusal)
    return model


def _forward(model, state, *args, **kwargs):
    """The model's forward, on packed rows where they give the same."""
    original = state.original(model)
    if is_exporting() or active() is not None:  # packed rows are on their way, or none are wanted
        return original(*args, **kwargs)
    given = by_name(original, args, kwargs)
    call = _translated(model, state, given)
    if call is not None:
        try:
            return call.run(original)
        except NotAsked:
            state.engine.uncount(call.plan)
            return _forward(model, state, **given)
        except (UnsupportedAttention, CannotPack) as reason:  # what the model's layers are given shows more
            state.engine.uncount(call.plan)
            state.fell_back(str(reason))
    return original(*args, **kwargs)


@torch.compiler.disable
def _translated(model, state, given):
    """The call, planned; None if it has to take the model's own forward."""
    if cache_in(given) is not None:  # generation
        return None
    try:
        return _Call(model, state, given)
    except CannotPack as reason:
        state.fell_back(str(reason))
        return None


class _Call:
    """One call of a model that shares prefixes, planned.

    Raises:
        CannotPack: it has to take the model's own forward.
    """

    def __init__(self, model, state, given):
        self.state, self.engine, self.given = state, state.engine, given
        tokens = tokens_of(given)
        if tokens is None or (given.get("input_ids") is None) == (given.get("inputs_embeds") is None):
            raise CannotPack("exactly one of input_ids and inputs_embeds is expected")
        if tokens.shape[1] == 0:
            raise CannotPack("the batch has no tokens")
        self.fused, labels = bool(given.get("fused_lm_head")), given.get("labels")
        if not self.fused:
            with state.without_methods(model):
                self.engine.ask_again()
        cu_seqlens = cu_seqlens_of(given)
        said = {name for name, value in given.items() if says_something(value)}
        said -= OF_SAMPLES if cu_seqlens is not None else set()
        if told := sorted(said & (_OF_TOKENS | _OF_ADAPTERS | _WHAT_LAYERS_RETURN)):
            raise CannotPack(f"{', '.join(told)} given")
        if (reason := _why_adapters_see_rows(model)) is not None:
            raise CannotPack(reason)
        if (reason := _why_not_samples(given, cu_seqlens)) is not None:
            raise CannotPack(reason)
        mask = given.get("attention_mask")
        self.direct = not said - _UNDERSTOOD and (self.fused or not self._has_own_loss(model))
        self.request = Request(
            tokens=tokens,
            num_virtual_tokens=0,
            attention_mask=mask if cu_seqlens is None else None,
            cu_seqlens=cu_seqlens,
            flat=cu_seqlens is not None,
            labels=labels,
            num_items_in_batch=given.get("num_items_in_batch"),
            training=model.training,
            use_cache=given.get("use_cache") if cu_seqlens is None else False,
            own_forward=not self.direct,
            head_labels=labels,
        )
        self.plan = self.engine.plan(self.request)

    def _has_own_loss(self, model):
        """Must the loss be left to the model's own forward?"""
        labels, items = self.given.get("labels"), self.given.get("num_items_in_batch")
        if model is not self.state.base:
            return self.engine.own_forward_has_the_loss(labels, items)
        if labels is None:
            return False
        replaced = bool(self.state.own) and not hasattr(model, "_hf_hook")  # Accelerate's moves tensors
        return replaced or self.engine.abilities.why_not_loss_of_logits(items) is not None

    def run(self, original):
        """The output of the model."""
        request, plan, given = self.request, self.plan, self.given
        if not self.direct:
            rows = self.engine.rows(request, plan, self._embed)
            inputs = {"inputs_embeds" if rows.is_floating_point() else "input_ids": rows}
            with self.engine.packed_backbone(request, plan, inputs):
                return original(**given)
        if self.fused:
            options = {name: given[name] for name in ("fused_lm_head", "num_items_in_batch") if name in given}
            return self.engine.run_fused_head(request, plan, self._embed, **options)
        return as_asked(self.engine.run(request, plan, self._embed), given, self.state.base.config)

    def _embed(self, tokens):
        return tokens if tokens.is_floating_point() else self.state.base.get_input_embeddings()(tokens)


def _why_not_samples(given, cu_seqlens):
    """Why samples that came packed into one row are not what the model takes them for; None: they are, or there are
    none."""
    if cu_seqlens is None:
        return None
    mask, positions, labels = (given.get(name) for name in ("attention_mask", "position_ids", "labels"))
    if mask is not None and not bool(mask.all()):
        return "a packed batch with an attention mask"
    if positions is not None and int(positions.min()):
        return "the positions of packed samples do not begin with 0"
    starts = cu_seqlens[1:-1]
    if labels is not None and bool((labels.reshape(-1)[starts.to(labels.device)] != IGNORE).any()):
        return "the first token of a packed sample has a label, which the last one of another sample predicts"
    return None


def _why_adapters_see_rows(model):
    """Why an adapter may treat the rows of a batch in different ways, or adds to the loss; None: none does."""
    if not isinstance(model, PeftModel):  # it may stand inside of one, which tells layers by hooks
        told = next((x for x in model.modules() if x is not model and x._forward_pre_hooks_with_kwargs), None)
        return None if told is None else f"a hook changes what {type(told).__name__} is given"
    tuner: Any = model.base_model
    if type(tuner).forward is not BaseTuner.forward:
        return f"{type(tuner).__name__} has a forward of its own"
    if any(getattr(config, "alora_invocation_tokens", None) for config in model.peft_config.values()):
        return "an activated LoRA is for the tokens from its invocation on"
    return None
