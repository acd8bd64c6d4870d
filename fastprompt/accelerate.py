"""accelerate(peft_model): PEFT prompt learning on the packed engine, in place; restore(peft_model) undoes it."""

import functools
import inspect
import types
import warnings
import weakref
from contextlib import contextmanager

import torch
from peft import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    PeftType,
)
from transformers import Cache

from .hf.encoder import fast_encoder
from .hf.engine import Engine, plan_or_reason
from .hf.prefix import layers_of_cache
from .layout import IGNORE

_PROMPTS = (PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.MULTITASK_PROMPT_TUNING)
_PREFIXES = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)
_PACKED = (
    PeftModelForCausalLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    PeftModelForQuestionAnswering,
    PeftModelForFeatureExtraction,
)

# What a caller may pass without leaving the packed path. Anything else that is not None takes PEFT's own forward.
_UNDERSTOOD = {
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "labels",
    "task_ids",
    "num_items_in_batch",
    "return_dict",
    "use_cache",
    "token_type_ids",
    "start_positions",
    "end_positions",
    "input_type_mask",
}
_OUTPUTS = {"output_attentions", "output_hidden_states"}


def accelerate(peft_model, *, keep_logits=False):
    """Make a PEFT prompt-learning model run what its rows have in common once per batch. Same loss, gradients, checkpoints.

    Works in place on this one object and returns it, for every kind of prompt learning: Prompt Tuning, P-Tuning,
    Multitask Prompt Tuning, Prefix-Tuning, CARTRIDGE and CPT, before causal LMs, classifiers, question answering and
    feature extraction, decoders and encoders. Padding is not run. On decoders the prompt, and the tokens that all rows of
    a prompt begin with, run once. Adapters that are added or loaded later are covered; Prefix-Tuning works with gradient
    checkpointing switched on afterwards.

    With labels, in training, the head of a causal LM runs on labelled rows only and ``outputs.logits`` is None;
    otherwise logits come in PEFT's shape. What a model puts out at padding is that of zero hidden states. A batch or
    model that packed rows cannot represent exactly (encoder-decoders among them) takes PEFT's own forward, with one
    warning a reason. ``generate`` is PEFT's own. One forward at a time: as PEFT itself, not for several threads. A copy
    (``copy.deepcopy``) is accelerated too; a pickled model comes back as plain PEFT.

    Args:
        peft_model: a ``PeftModel`` with a prompt-learning adapter.
        keep_logits: return logits in training too.

    Raises:
        TypeError: not such a model; it is left as it was.
    """
    if not isinstance(peft_model, PeftModel):
        raise TypeError(f"peft_model must be a peft.PeftModel, got {type(peft_model).__name__}")
    config = peft_model.active_peft_config
    if not config.is_prompt_learning:
        raise TypeError(f"peft_model must use prompt learning, got {PeftType(config.peft_type).value}")
    restore(peft_model)
    engine = Engine(peft_model.base_model, root=peft_model)
    state = _State(engine, keep_logits, peft_model.__dict__.get("forward"))
    peft_model.__dict__["_fastprompt"] = state
    peft_model.forward = types.MethodType(_forward_like(type(peft_model)), peft_model)
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
        self.outputs = weakref.WeakKeyDictionary()  # a prompt encoder -> its CachedOutput
        self.prefixes = {}  # adapter name and shapes of a prefix -> None if it can run packed, else why not

    def original(self, model):
        """The forward that the model had before."""
        return self.forward or types.MethodType(type(model).forward, model)

    def warn(self, reason):
        if reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(f"fastprompt runs PEFT's own padded forward: {reason}", stacklevel=4)


@functools.cache
def _forward_like(peft_class):
    """``peft_class.forward`` on packed rows where they give the same result."""

    @functools.wraps(peft_class.forward)
    def forward(self, *args, **kwargs):
        state = self.__dict__["_fastprompt"]
        original = state.original(self)
        if not self.active_peft_config.is_prompt_learning or not issubclass(peft_class, _PACKED):
            return original(*args, **kwargs)
        given = dict(inspect.signature(original).bind(*args, **kwargs).arguments)
        given.update(given.pop("kwargs", {}))
        try:
            call = _Call(self, state, given)
        except _OwnForward as reason:
            state.warn(str(reason))
            return original(*args, **kwargs)
        if call.direct:
            return call.language_model()
        with call.packed_backbone():
            return original(*args, **kwargs)

    return forward


class _OwnForward(Exception):
    """A call has to take PEFT's own forward; the message says why."""


class _Call:
    """One forward call on packed rows, planned; raises :class:`_OwnForward` if it cannot be.

    Two ways to run it: :meth:`language_model` does what PEFT's forward would do, with the head on labelled rows only;
    in :meth:`packed_backbone` PEFT's own forward runs, and only the layers in it see packed rows.
    """

    def __init__(self, model, state, given):
        self.model, self.state, self.engine, self.given = model, state, state.engine, given
        self.config = model.active_peft_config
        self.length = self.config.num_virtual_tokens
        self.is_prefix = self.config.peft_type in _PREFIXES
        self.direct = isinstance(model, PeftModelForCausalLM) and self.config.peft_type in _PROMPTS + _PREFIXES
        self._check()
        self.task_ids, self.prompt_ids = given.get("task_ids"), None
        if self.config.peft_type == PeftType.MULTITASK_PROMPT_TUNING and self.task_ids is not None:
            ids = self.task_ids.reshape(-1)
            ids = ids.expand(len(self.tokens)) if len(ids) == 1 else ids  # as PEFT broadcasts one task
            self.task_ids, self.prompt_ids = ids.unique(return_inverse=True)
        self.cache = self.prefix = None
        if self.is_prefix:
            self._find_prefix()
        self.plan = self._plan()

    def _check(self):
        given = self.given
        if self.engine.refusal is not None:
            raise _OwnForward(self.engine.refusal)
        if (given.get("input_ids") is None) == (given.get("inputs_embeds") is None):
            raise _OwnForward("exactly one of input_ids and inputs_embeds is expected")
        ignored = set() if self.is_prefix else {"position_ids"}  # PEFT ignores them there
        unknown = sorted(
            name for name, value in given.items() if value is not None and name not in _UNDERSTOOD | ignored
        )
        unknown = [name for name in unknown if not (name in _OUTPUTS and given[name] is False)]
        if unknown:
            raise _OwnForward(f"{', '.join(unknown)} given")
        if given.get("use_cache") and not torch.is_grad_enabled():
            raise _OwnForward("use_cache is set")
        self.tokens = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        if self.tokens.shape[1] == 0:
            raise _OwnForward("the batch has no tokens")
        if self.is_prefix and self.engine.position_offset and given.get("input_ids") is None:
            raise _OwnForward("without token ids, the model does not count the prefix in its positions")  # RoBERTa

    def _find_prefix(self):
        self.cache = self.model.get_prompt(batch_size=1)
        if not isinstance(self.cache, Cache):
            raise _OwnForward(f"its prefix is a {type(self.cache).__name__}")
        self.prefix = layers_of_cache(self.cache, self.engine.base.config)
        key = (self.model.active_adapter, *(layer and layer[0].shape for layer in self.prefix))
        if key not in self.state.prefixes:
            with torch.no_grad(), torch.autocast(self.tokens.device.type, enabled=False):  # as the probe runs
                prefix = layers_of_cache(self.model.get_prompt(batch_size=1), self.engine.base.config)
            self.state.prefixes[key] = self.engine.why_not_prefix(prefix, self.state.original(self.model))
        if self.state.prefixes[key] is not None:
            raise _OwnForward(self.state.prefixes[key])

    def _plan(self):
        given = self.given
        everywhere = self.prefix is None or None not in self.prefix  # do all layers have one?
        alike = given.get("token_type_ids") is None or self.direct  # may rows of the same ids still differ?
        share = given.get("input_ids") is not None and everywhere and alike and self.engine.may_share()
        plan, reason = plan_or_reason(
            self.engine,
            *self.tokens.shape[:2],
            0 if self.is_prefix else self.length,
            attention_mask=given.get("attention_mask"),
            labels=given.get("labels") if isinstance(self.model, PeftModelForCausalLM) else None,
            prompt_ids=self.prompt_ids,
            token_ids=self.tokens if share else None,
            prefix_length=self.length if self.is_prefix else 0,
            device=self.tokens.device,
            finds_last=self.is_prefix and given.get("input_ids") is not None,
        )
        if plan is None:
            raise _OwnForward(reason)
        if not self.direct:
            self._check_padding((plan.grid < 0), given.get("labels"))
            if self.is_prefix and given.get("input_ids") is not None:
                self._check_ids(given["input_ids"], plan.grid >= 0)
        return plan

    def _check_ids(self, ids, real):
        """Does the model take token ids at their word in a way that the rows ``real [B, S]`` do not follow?"""
        padding = getattr(self.engine.base.config, "pad_token_id", None)
        if self.engine.position_offset and bool((real & (ids == padding)).any()):
            raise _OwnForward("the model counts positions by token ids, and a real token has that of padding")
        if not self.engine.right_padding:  # a classifier reads the last token that is not padding by its id
            column = torch.arange(ids.shape[1], device=ids.device)
            last = column[-1:] if padding is None else ((ids != padding) * column).argmax(1)
            if not bool(real.gather(1, last.expand(len(ids))[:, None]).all()):
                raise _OwnForward("by its token ids, the model reads what the attention mask says is padding")

    def _check_padding(self, padding, labels):
        """Does the head read states at ``padding [B, W]``, where none were run?"""
        if isinstance(self.model, PeftModelForQuestionAnswering) and bool(padding.any()):
            raise _OwnForward("an answer's probabilities are over all columns, padding among them")
        if labels is not None and labels.shape == padding.shape and bool((labels[padding] != IGNORE).any()):
            raise _OwnForward(f"padding has labels other than {IGNORE}")

    def language_model(self):
        """The output of a causal LM."""
        given, model, state = self.given, self.model, self.state
        # PEFT's warnings about arguments it ignores.
        model._adjust_prompt_learning_kwargs(
            self.config, kwargs={k: given.get(k) for k in ("position_ids", "token_type_ids")}
        )
        if not self.is_prefix:
            count = 1 if self.prompt_ids is None else len(self.task_ids)
            with self._encoder():
                prompt = model.get_prompt(batch_size=count, task_ids=self.task_ids).flatten(0, 1)  # [N * P, D]
            rows = self.engine.rows(self.plan, prompt, self._embeds())
        elif given.get("input_ids") is not None and self.engine.may_share():
            rows = self.plan.token_ids(given["input_ids"])  # the model looks them up, and whatever else it has for ids
        else:
            rows = self.engine.rows(self.plan, None, self._embeds())
        want_logits = given.get("labels") is None or state.keep_logits or not model.training
        outputs = self.engine.outputs(
            self.plan,
            rows,
            want_logits=want_logits,
            prefix=self.prefix,
            num_items_in_batch=given.get("num_items_in_batch"),
        )
        by_default = getattr(model.base_model.config, "return_dict", True)
        as_dict = given.get("return_dict")
        return outputs if (by_default if as_dict is None else as_dict) else outputs.to_tuple()

    def _encoder(self):
        return fast_encoder(self.model.prompt_encoder[self.model.active_adapter], self.state.outputs)

    def _embeds(self):
        return self.model.word_embeddings(self.tokens) if self.given.get("inputs_embeds") is None else self.tokens

    @contextmanager
    def packed_backbone(self):
        """PEFT's own forward inside of this block runs its layers on packed rows."""
        if self.is_prefix:
            # PEFT would repeat the prefix for every row of the batch; nothing reads it here.
            self.model.__dict__["get_prompt"] = lambda *args, **kwargs: self.cache
        try:
            with self.engine.packed_backbone(self.plan, self._packed, self.prefix), self._encoder():
                yield
        finally:
            if self.is_prefix:
                del self.model.__dict__["get_prompt"]

    def _packed(self, given):
        """The packed rows of what PEFT hands to the backbone: ``[B, P + S, ...]``, prompt and text."""
        source = self.plan.source
        batch, width = self.tokens.shape[:2]
        front = 0 if self.is_prefix else self.length
        cells = source + front * (1 + source // width)  # token (b, c) stands in column P + c there
        if front:
            row_of = torch.zeros(
                1 if self.prompt_ids is None else len(self.task_ids), dtype=torch.int64, device=source.device
            )
            if self.prompt_ids is not None:  # a row of the batch in front of which each prompt stands
                row_of[self.prompt_ids] = torch.arange(batch, device=source.device)
            prompt, virtual = (-1 - source).clamp(min=0) // front, (-1 - source).clamp(min=0) % front
            cells = torch.where(source >= 0, cells, row_of[prompt] * (front + width) + virtual)
        names = [name for name in ("input_ids", "inputs_embeds", "token_type_ids") if given.get(name) is not None]
        return {name: given[name].flatten(0, 1)[cells] for name in names}
