"""accelerate(peft_model): PEFT prompt learning on the packed engine, in place; restore(peft_model) undoes it."""

import functools
import inspect
import warnings
import weakref

import peft
import torch
import transformers
from peft import PeftModel, PeftType

from ..hf.attachment import is_attached
from ..hf.engine import Engine
from ..hf.masks import UnsupportedAttention
from ..layout import CannotPack
from .call import PACKED_CLASSES, Call
from .renamed_cache import PREFIXES, former_name, generates_wrongly

_STATE = "_fastprompt"


def accelerate(peft_model: PeftModel) -> PeftModel:
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
    ``generate`` is PEFT's own, with a warning where that is wrong. One forward at a time: as PEFT itself, not for
    several threads. A copy, by ``copy.deepcopy`` or by pickle, is accelerated too. ``torch.export`` sees PEFT's own
    forward.

    Args:
        peft_model: a ``PeftModel`` with a prompt-learning adapter.

    Raises:
        TypeError: not such a model; it is left as it was.
    """
    if not isinstance(peft_model, PeftModel):
        raise TypeError(f"peft_model must be a peft.PeftModel, got {type(peft_model).__name__}")
    config = peft_model.active_peft_config
    if not config.is_prompt_learning:
        raise TypeError(f"peft_model must use prompt learning, got {PeftType(config.peft_type).value}")
    restore(peft_model)
    state = _State(peft_model)
    try:
        peft_model.__dict__[_STATE] = state
        engine = state.attach(peft_model)
        state.attached = True
    finally:
        if not state.attached:
            restore(peft_model)
    if engine.refusal is not None:
        state.warn(engine.refusal)
    if generates_wrongly(peft_model):
        state.tell(
            f"PEFT {peft.__version__}'s own generate gives wrong tokens on transformers {transformers.__version__}, "
            "whose renamed cache it does not find; loss, gradients and logits are right, and so are the tokens of "
            "SoftPromptModel.generate and of `fastprompt generate`"
        )
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
        own_forward: the instance's own forward, if it had one.
        outputs: a prompt encoder -> its CachedOutput.
    """

    engine = None
    attached = False

    def __init__(self, model):
        self.own_forward, self.config = model.__dict__.get("forward"), model.__dict__.get("config")
        self.config_is_base_s = self.config is not None and self.config is model.base_model.config
        self.warned, self.outputs = set(), weakref.WeakKeyDictionary()

    def attach(self, model):
        base = model.base_model
        self.engine = Engine(base)
        if self.config_is_base_s:
            model.config = base.config
        model.forward = _Forward(model)
        return self.engine

    def detach(self, model):
        if self.own_forward is not None:
            model.forward = self.own_forward
        else:
            model.__dict__.pop("forward", None)
        if self.engine is not None:
            self.engine.detach()
        if self.config_is_base_s:  # where another user keeps the base attached, that is not the model's own yet
            model.config = self.config if is_attached(model.base_model) else model.base_model.config

    def original(self, model):
        """The forward that the model had before."""
        forward = self.own_forward or functools.partial(type(model).forward, model)
        if model.active_peft_config.peft_type in PREFIXES and hasattr(model, "_prefix_tuning_forward"):
            return _classifying(model, forward)
        return forward

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
            warnings.warn(text, stacklevel=7)

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


class _Forward:
    """The forward of one accelerated model: a bound method that, unlike Python's, a pickle brings back."""

    def __init__(self, model):
        self.__self__, self.__func__ = model, _forward_like(type(model))

    def __call__(self, *args, **kwargs):
        return self.__func__(self.__self__, *args, **kwargs)

    def __reduce__(self):
        return _Forward, (self.__self__,)

    def __getattr__(self, name):
        return getattr(self.__func__, name)  # as of a bound method

    @property
    def __signature__(self):
        return inspect.signature(functools.partial(self.__func__, None))


@torch.compiler.disable
def _translate(model, state, original, args, kwargs):
    """The call, planned, or None if it has to take PEFT's own forward."""
    given = dict(inspect.signature(original).bind(*args, **kwargs).arguments)
    given.update(given.pop("kwargs", {}))
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
def _forward_like(peft_class):
    """``peft_class.forward`` on packed rows where they give the same result."""

    def forward(self, *args, **kwargs):
        state = self.__dict__[_STATE]
        original = state.original(self)
        if torch.compiler.is_exporting():
            return original(*args, **kwargs)
        if not self.active_peft_config.is_prompt_learning or not issubclass(peft_class, PACKED_CLASSES):
            return original(*args, **kwargs)
        call = _translate(self, state, original, args, kwargs)
        if call is None:
            return original(*args, **kwargs)
        try:
            if call.direct:
                return call.language_model()
            with call.packed_backbone():
                return original(*args, **{name: x for name, x in kwargs.items() if name != "adapter_names"})
        except (UnsupportedAttention, CannotPack) as reason:  # what the model's layers are given shows more
            state.engine.uncount(call.plan)
            _fall_back(state, str(reason), call.given)
        return original(*args, **kwargs)

    # Not functools.wraps: who strips wrappers by __wrapped__ (Accelerate does) would strip this one, too.
    for name in ("__name__", "__qualname__", "__doc__", "__module__"):
        setattr(forward, name, getattr(peft_class.forward, name))
    forward.__signature__ = inspect.signature(peft_class.forward)
    return forward
