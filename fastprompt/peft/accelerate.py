"""accelerate(peft_model): PEFT prompt learning on the packed engine, in place; restore(peft_model) undoes it."""

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, PeftType
from transformers import PreTrainedModel

from ..hf.attachment import REPLICATE, is_attached, refuse_replicas
from ..hf.checkpointing import without_checkpoints
from ..hf.engine import Engine
from . import resuming
from .adapter import is_prefix
from .forward import disable_adapter, forward
from .renamed_cache import former_name, generates_wrongly, prepare_inputs_for_generation
from .smoothing import smooth_by_text

_STATE = "_fastprompt"


def accelerate(peft_model: PeftModel, *, heads: str = "text") -> PeftModel:
    """Make a PEFT prompt-learning model run what its rows have in common once per batch. Same loss, gradients,
    checkpoints.

    Works in place on this one object and returns it, for every kind of prompt learning: Prompt Tuning, P-Tuning,
    Multitask Prompt Tuning, Prefix-Tuning, CARTRIDGE and CPT, before causal LMs, classifiers, question answering and
    feature extraction, decoders and encoders, and before encoder-decoders. Padding is not run. On decoders the prompt,
    and the tokens that all rows of a prompt begin with, run once. Adapters that are added or loaded later are covered.
    Prefix-Tuning works with gradient checkpointing switched on afterwards, or before by :func:`get_peft_model`; a batch
    that is not packed runs without checkpoints then.

    ``save_pretrained`` writes the encoder of P-Tuning and of projected prefixes beside PEFT's files, and
    ``load_adapter`` brings it back, which PEFT cannot: trainings resume, by hand (``is_trainable=True``) and by
    Trainer. Trainer's label smoothing is right.

    With labels, in training, the head of a causal LM runs on labelled rows only; ``outputs.logits`` are computed when
    somebody reads them, and ``outputs.past_key_values`` is None. Otherwise logits come in PEFT's shape, and a cache
    where PEFT returns one. What a model puts out at padding is that of zero hidden states. A batch or model that packed
    rows cannot represent exactly takes PEFT's own forward, with one warning a reason. In a step of an encoder-decoder,
    what stands behind a row's last label is padding, which no label sees.
    Dropout in the base model is drawn for packed rows: loss and gradient have PEFT's expectation, not its numbers.
    ``generate`` is PEFT's own, put right where PEFT does not find the cache (transformers 5.24). One forward at a time:
    as PEFT itself, not for several threads. A copy, by ``copy.deepcopy`` or by pickle, is accelerated too.
    ``torch.export`` sees PEFT's own forward.

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


def get_peft_model(
    model: PreTrainedModel,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    *,
    heads: str = "text",
    **options: Any,
) -> PeftModel:
    """``peft.get_peft_model`` and :func:`accelerate` in one, for models whose gradient checkpointing is on already.

    PEFT refuses Prefix-Tuning on them, for its own forward cannot do it (``prepare_model_for_kbit_training`` switches
    it on); packed rows can. Other arguments are those of ``peft.get_peft_model``.
    """
    with without_checkpoints(model):
        peft_model = peft.get_peft_model(model, peft_config, adapter_name, **options)
    return accelerate(peft_model, heads=heads)


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
        replaced = set(_REPLACED) - (set() if generates_wrongly(model) else {"prepare_inputs_for_generation"})
        model.__dict__.update({name: _Method(model, name) for name in replaced})
        model.__dict__[REPLICATE] = refuse_replicas
        return self.engine

    def detach(self, model):
        for name in (*_REPLACED, REPLICATE):
            model.__dict__.pop(name, None)
        model.__dict__.update(self.own)
        if self.engine is not None:
            self.engine.detach()
        if self.config_is_base_s:  # where another user keeps the base attached, that is not the model's own yet
            model.config = self.config if is_attached(model.base_model) else model.base_model.config

    def original(self, model, name="forward"):
        """The method that the model had before."""
        method = self.own.get(name) or functools.partial(getattr(type(model), name), model)
        classifies = is_prefix(model.active_peft_config) and hasattr(model, "_prefix_tuning_forward")
        return _classifying(model, method) if name == "forward" and classifies else method

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


def _classifying(model, forward):
    """``forward`` of a classifier behind a prefix, which looks for what the base model or its backbone call a cache."""

    @functools.wraps(forward, assigned=())
    def wrapper(*args, **kwargs):
        with former_name(model.base_model, model.base_model.get_submodule(model.transformer_backbone_name)):
            return forward(*args, **kwargs)

    return wrapper


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


@functools.cache
def _method_like(peft_class, name):
    """``peft_class.name`` as an accelerated model has it, under the same name and signature."""
    run, original = _REPLACED[name], getattr(peft_class, name)

    def method(self, *args, **kwargs):
        return run(self, self.__dict__[_STATE], *args, **kwargs)

    # Not functools.wraps: who strips wrappers by __wrapped__ (Accelerate does) would strip this one, too.
    for attribute in ("__name__", "__qualname__", "__doc__", "__module__"):
        setattr(method, attribute, getattr(original, attribute))
    method.__signature__ = inspect.signature(original)
    return method


# The methods of a PeftModel that an accelerated one replaces.
_REPLACED: dict[str, Callable[..., Any]] = {
    "forward": forward,
    "prepare_inputs_for_generation": prepare_inputs_for_generation,
    "disable_adapter": disable_adapter,
    "save_pretrained": resuming.save_pretrained,
    "load_adapter": resuming.load_adapter,
    "add_adapter": resuming.add_adapter,
}
