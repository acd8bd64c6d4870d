"""accelerate(peft_model): PEFT prompt learning on the packed engine, in place; restore(peft_model) undoes it."""

import functools
import inspect
import warnings
import weakref
from contextlib import nullcontext

import torch
from peft import PeftModel, PeftModelForCausalLM, PeftModelForSequenceClassification, PeftType

from ..hf.attachment import is_attached
from ..hf.engine import Engine
from ..hf.masks import UnsupportedAttention
from ..layout import CannotPack
from . import resuming
from .call import PACKED_CLASSES, Call, is_prefix
from .heads import last_token_read, outputs_of_text, targets_of_text
from .smoothing import smooth_by_text, to_be_shifted

_STATE = "_fastprompt"


def accelerate(peft_model: PeftModel, *, heads: str = "text") -> PeftModel:
    """Make a PEFT prompt-learning model run what its rows have in common once per batch. Same loss, gradients,
    checkpoints.

    Works in place on this one object and returns it, for every kind of prompt learning: Prompt Tuning, P-Tuning,
    Multitask Prompt Tuning, Prefix-Tuning, CARTRIDGE and CPT, before causal LMs, classifiers, question answering and
    feature extraction, decoders and encoders. Padding is not run. On decoders the prompt, and the tokens that all rows
    of a prompt begin with, run once. Adapters that are added or loaded later are covered; Prefix-Tuning works with
    gradient checkpointing switched on afterwards.

    With labels, in training, the head of a causal LM runs on labelled rows only; ``outputs.logits`` are computed when
    somebody reads them, and ``outputs.past_key_values`` is None. Otherwise logits come in PEFT's shape, and a cache
    where PEFT returns one. What a model puts out at padding is that of zero hidden states. A batch or model that packed
    rows cannot represent exactly (encoder-decoders among them) takes PEFT's own forward, with one warning a reason.
    Dropout in the base model is drawn for packed rows: loss and gradient have PEFT's expectation, not its numbers.
    ``generate`` is PEFT's own. One forward at a time: as PEFT itself, not for several threads. A copy, by
    ``copy.deepcopy`` or by pickle, is accelerated too. ``torch.export`` sees PEFT's own forward.

    Args:
        peft_model: a ``PeftModel`` with a prompt-learning adapter.
        heads: "text": where PEFT's classes for classification and question answering mistake virtual tokens or padding
            for text, they do not. A classifier on a decoder reads a row's last real token, whatever the side of the
            padding; labels ``[B, S]`` of tokens, and positions of answers, are those of the text, and logits that come
            with them, too. One warning says so. "peft": everything as in PEFT.

    Raises:
        TypeError: not such a model; it is left as it was.
        ValueError: another ``heads``.
    """
    if heads not in ("text", "peft"):
        raise ValueError(f'heads must be "text" or "peft", got {heads!r}')
    if not isinstance(peft_model, PeftModel):
        raise TypeError(f"peft_model must be a peft.PeftModel, got {type(peft_model).__name__}")
    config = peft_model.active_peft_config
    if not config.is_prompt_learning:
        raise TypeError(f"peft_model must use prompt learning, got {PeftType(config.peft_type).value}")
    restore(peft_model)
    state = _State(peft_model, heads)
    try:
        peft_model.__dict__[_STATE] = state
        engine = state.attach(peft_model)
        state.attached = True
    finally:
        if not state.attached:
            restore(peft_model)
    smooth_by_text()
    if engine.refusal is not None:
        state.warn(engine.refusal)
    return peft_model


def restore(peft_model: PeftModel) -> PeftModel:
    """Undo :func:`accelerate`; a model that is not accelerated is left alone. Returns the model."""
    state = peft_model.__dict__.get(_STATE)
    if state is not None:
        state.detach(peft_model)
        peft_model.__dict__.pop(_STATE, None)
    return peft_model


def engine_of(module: torch.nn.Module) -> Engine | None:
    """The engine of an accelerated model; None if it is not."""
    state = module.__dict__.get(_STATE)
    return None if state is None else state.engine


class _State:
    """What an accelerated model remembers.

    Attributes:
        engine: the engine of its base model.
        heads: see accelerate.
        own: the methods that were the instance's own already.
        outputs: a prompt encoder -> its CachedOutput.
    """

    engine = None
    attached = False

    def __init__(self, model, heads):
        self.heads = heads
        self.own = {name: model.__dict__[name] for name in _REPLACED if name in model.__dict__}
        self.config = model.__dict__.get("config")
        self.config_is_base_s = self.config is not None and self.config is model.base_model.config
        self.warned, self.outputs = set(), weakref.WeakKeyDictionary()

    def attach(self, model):
        base = model.base_model
        self.engine = Engine(base)
        if self.config_is_base_s:
            model.config = base.config
        for name in _REPLACED:
            model.__dict__[name] = _Method(model, name)
        return self.engine

    def detach(self, model):
        for name in _REPLACED:
            model.__dict__.pop(name, None)
        model.__dict__.update(self.own)
        if self.engine is not None:
            self.engine.detach()
        if self.config_is_base_s:  # where another user keeps the base attached, that is not the model's own yet
            model.config = self.config if is_attached(model.base_model) else model.base_model.config

    def original(self, model, name="forward"):
        """The method that the model had before."""
        return self.own.get(name) or functools.partial(getattr(type(model), name), model)

    def fell_back(self, reason):
        """Count a call that takes PEFT's own forward, and say why."""
        self.engine.stats.count_padded(reason)
        self.warn(reason)

    def warn(self, reason):
        self.tell(f"fastprompt runs PEFT's own padded forward: {reason}")

    def tell(self, text):
        """A warning, the first time."""
        if text not in self.warned:
            self.warned.add(text)
            warnings.warn(text, stacklevel=9)

    def __getstate__(self):
        return {**vars(self), "outputs": None}

    def __setstate__(self, state):
        vars(self).update(state, outputs=weakref.WeakKeyDictionary())


class _Method:
    """A method of one accelerated model: bound, and unlike Python's a pickle brings it back."""

    def __init__(self, model, name):
        self.__self__, self.__func__ = model, _method_like(type(model), name)

    def __call__(self, *args, **kwargs):
        return self.__func__(self.__self__, *args, **kwargs)

    def __reduce__(self):
        return _Method, (self.__self__, self.__func__.__name__)

    def __getattr__(self, name):
        return getattr(self.__func__, name)  # as of a bound method

    @property
    def __signature__(self):
        return inspect.signature(functools.partial(self.__func__, None))


@torch.compiler.disable
def _translate(model, state, given):
    """The call, planned, or None if it has to take PEFT's own forward."""
    try:
        return Call(model, state, given)
    except CannotPack as reason:
        _fall_back(state, str(reason), given)
        return None


def _fall_back(state, reason, given):
    """Let the call take PEFT's own forward, unless that would be the wrong answer."""
    if given.get("adapter_names") is not None:
        raise ValueError(f"adapter_names needs packed rows, but {reason}")
    state.fell_back(reason)


@functools.cache
def _method_like(peft_class, name):
    """``peft_class.name`` as an accelerated model has it, under the same name and signature."""
    make = _REPLACED[name]
    original = getattr(peft_class, name)

    def method(self, *args, **kwargs):
        return make(self, *args, **kwargs)

    # Not functools.wraps: who strips wrappers by __wrapped__ (Accelerate does) would strip this one, too.
    for attribute in ("__name__", "__qualname__", "__doc__", "__module__"):
        setattr(method, attribute, getattr(original, attribute))
    method.__signature__ = inspect.signature(original)
    return method


def _forward(self, *args, **kwargs):
    output = _run(self, args, kwargs)
    if (
        isinstance(self, PeftModelForCausalLM)
        and is_prefix(self.active_peft_config)
        and not torch.compiler.is_compiling()
    ):
        output = to_be_shifted(output)
    return output


def _run(self, args, kwargs):
    state = self.__dict__[_STATE]
    original = state.original(self)
    if torch.compiler.is_exporting():
        return original(*args, **kwargs)
    config = self.active_peft_config
    if not config.is_prompt_learning or not isinstance(self, PACKED_CLASSES):
        return original(*args, **kwargs)
    front = 0 if is_prefix(config) else config.num_virtual_tokens
    given, of_text, reading = _understood(self, state, original, front, args, kwargs)
    output = _packed_or_padded(self, state, original, given, reading)
    return outputs_of_text(output, front) if of_text else output


@torch.compiler.disable
def _understood(model, state, original, front, args, kwargs):
    """The arguments of a call by name, are its outputs wanted of the text only, and what makes the block to run it in."""
    given = dict(inspect.signature(original).bind(*args, **kwargs).arguments)
    given.update(given.pop("kwargs", {}))
    if state.heads != "text":
        return given, False, nullcontext
    given, of_text = targets_of_text(model, front, given, state.tell)
    reading = nullcontext
    if isinstance(model, PeftModelForSequenceClassification) and not state.engine.abilities.right_padding:
        by_id = is_prefix(model.active_peft_config)
        reading = functools.partial(last_token_read, model.base_model, given, by_id=by_id, tell=state.tell)
    return given, of_text, reading


def _packed_or_padded(self, state, original, given, reading):
    call = _translate(self, state, given)
    if call is not None:
        try:
            if call.direct:
                return call.language_model()
            with call.packed_backbone(), reading():
                return original(**{name: x for name, x in given.items() if name != "adapter_names"})
        except (UnsupportedAttention, CannotPack) as reason:  # what the model's layers are given shows more
            state.engine.uncount(call.plan)
            _fall_back(state, str(reason), given)
    with reading():
        return original(**given)


def _save_pretrained(self, *args, **kwargs):
    return resuming.save_pretrained(self, self.__dict__[_STATE].original(self, "save_pretrained"), *args, **kwargs)


def _load_adapter(self, *args, **kwargs):
    return resuming.load_adapter(self, self.__dict__[_STATE].original(self, "load_adapter"), *args, **kwargs)


# The methods of a PeftModel that an accelerated one replaces.
_REPLACED = {"forward": _forward, "save_pretrained": _save_pretrained, "load_adapter": _load_adapter}
