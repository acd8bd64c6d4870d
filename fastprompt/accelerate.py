"""accelerate(peft_model): PEFT prompt learning on the packed engine, in place; restore(peft_model) undoes it."""

import types
import warnings

import torch
from peft import PeftModelForCausalLM, PeftType

from .hf.engine import Engine, plan_or_reason

_SUPPORTED = (PeftType.PROMPT_TUNING,)

# What a caller may pass without leaving the packed path. Anything else that is not None takes PEFT's own forward.
_UNDERSTOOD = {"num_items_in_batch", "return_dict", "use_cache", "position_ids", "token_type_ids"}


def accelerate(peft_model, *, keep_logits=False):
    """Make a PEFT prompt-learning model run its prompt once per batch. Same loss, same gradients, same checkpoints.

    Works in place on this one object and returns it. In training with labels the language-model head runs on labelled
    rows only and ``outputs.logits`` is None; in eval mode, or without labels, logits come in PEFT's shape
    ``[B, P + S, V]``, with zeros at padding. A batch or model the packed rows cannot represent exactly takes PEFT's own
    forward, with one warning a reason.

    Args:
        peft_model: a ``PeftModelForCausalLM`` with Prompt Tuning (Lester et al. 2021, arXiv 2104.08691).
        keep_logits: return logits in training too.

    Raises:
        TypeError: not such a model; it is left as it was.
    """
    if not isinstance(peft_model, PeftModelForCausalLM):
        raise TypeError(f"peft_model must be a peft.PeftModelForCausalLM, got {type(peft_model).__name__}")
    kind = peft_model.active_peft_config.peft_type
    if kind not in _SUPPORTED:
        raise TypeError(f"peft_model must use one of {[t.value for t in _SUPPORTED]}, got {kind.value}")
    restore(peft_model)
    engine = Engine(peft_model.base_model, root=peft_model)
    state = _State(engine, keep_logits, peft_model.__dict__.get("forward"))
    peft_model.__dict__["_fastprompt"] = state
    peft_model.forward = types.MethodType(forward, peft_model)
    if engine.refusal is not None:
        state.warn(engine.refusal)
    return peft_model


def restore(peft_model):
    """Undo :func:`accelerate`; a model that is not accelerated is left alone. Returns the model."""
    state = peft_model.__dict__.pop("_fastprompt", None)
    if state is not None:
        peft_model.__dict__.pop("forward", None)
        if state.forward is not None:
            peft_model.forward = state.forward
        state.engine.detach()
    return peft_model


class _State:
    def __init__(self, engine, keep_logits, own_forward):
        self.engine, self.keep_logits = engine, keep_logits
        self.forward = own_forward  # an instance's own forward, if it had one
        self.warned = set()

    def warn(self, reason):
        if reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(f"fastprompt runs PEFT's own padded forward: {reason}", stacklevel=3)


def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, output_attentions=None,
            output_hidden_states=None, return_dict=None, task_ids=None, **kwargs):
    """PEFT's forward with the same arguments, on packed rows where they give the same result."""
    state = self.__dict__["_fastprompt"]
    engine, config = state.engine, self.active_peft_config
    plan = None
    if config.peft_type in _SUPPORTED:
        plan, reason = _plan(engine, config, input_ids, attention_mask, inputs_embeds, labels, output_attentions,
                             output_hidden_states, kwargs)
        if plan is None:
            state.warn(reason)
    if plan is None:
        original = state.forward or types.MethodType(type(self).forward, self)
        return original(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, labels=labels,
                        output_attentions=output_attentions, output_hidden_states=output_hidden_states,
                        return_dict=return_dict, task_ids=task_ids, **kwargs)
    self._adjust_prompt_learning_kwargs(config, kwargs=kwargs)  # PEFT's warnings about arguments it ignores
    embeds = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
    prompt = self.get_prompt(batch_size=1, task_ids=task_ids)[0]  # [P, D]
    rows = engine.rows(plan, prompt, embeds)
    want_logits = labels is None or state.keep_logits or not self.training
    outputs = engine.outputs(plan, rows, want_logits=want_logits, num_items_in_batch=kwargs.get("num_items_in_batch"))
    by_default = getattr(self.base_model.config, "return_dict", True)
    return outputs if (by_default if return_dict is None else return_dict) else outputs.to_tuple()


def _plan(engine, config, input_ids, attention_mask, inputs_embeds, labels, output_attentions, output_hidden_states, kwargs):
    """The row plan of a call, or None and the reason for PEFT's own forward."""
    if (input_ids is None) == (inputs_embeds is None):
        return None, "exactly one of input_ids and inputs_embeds is expected"
    other = dict(kwargs, output_attentions=output_attentions or None, output_hidden_states=output_hidden_states or None)
    if kwargs.get("use_cache") and not torch.is_grad_enabled():
        return None, "use_cache is set"
    unknown = sorted(name for name, value in other.items() if value is not None and name not in _UNDERSTOOD)
    if unknown:
        return None, f"{', '.join(unknown)} given"
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    if tokens.shape[1] == 0:
        return None, "the batch has no tokens"
    return plan_or_reason(engine, tokens.shape[0], tokens.shape[1], config.num_virtual_tokens, attention_mask=attention_mask,
                          labels=labels, device=tokens.device)
