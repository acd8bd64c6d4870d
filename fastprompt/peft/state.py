"""What a model that runs on the packed engine remembers, the methods that it has meanwhile, and how both go."""

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..hf.attachment import REPLICATE, is_attached, refuse_replicas
from ..hf.engine import Engine
from .adapter import is_prefix
from .renamed_cache import former_name

_STATE = "_fastprompt"


def restore(model: Any) -> Any:
    """Undo :func:`accelerate` or :func:`share_prefixes`; any other model is left alone. Returns the model."""
    state = model.__dict__.get(_STATE)
    if state is not None:
        state.detach(model)
        model.__dict__.pop(_STATE, None)
    return model


def state_of(module: nn.Module) -> "State | None":
    """What a model remembers that runs on the packed engine; None if it does not."""
    return module.__dict__.get(_STATE)


def engine_of(module: nn.Module) -> Engine | None:
    """The engine of a model that has one; else None."""
    state = state_of(module)
    return None if state is None else state.engine


class State:
    """What a model remembers.

    Args:
        base: the Hugging Face model that runs packed rows: inside of a PEFT model, or that model itself.
        methods: what takes the place of methods, by name: functions of the model, its state, and the arguments.
        heads: see accelerate.
        whose: the padded forward is, in words.
        unneeded: which of the methods a model, whose base is attached, does not need replaced.
        pad_rows_to: see Engine.

    Attributes:
        engine: the engine of ``base``.
        own: the methods that were the instance's own already.
        outputs: a prompt encoder -> its CachedOutput.
        compiled: its prompts, compiled for generate.
    """

    engine: Any = None
    compiled: Any = None

    def __init__(
        self,
        base: PreTrainedModel,
        methods: Mapping[str, Callable[..., Any]],
        heads: str = "text",
        whose: str = "PEFT's",
        unneeded: Callable[[Any], Collection[str]] = lambda model: (),
        pad_rows_to: int | None = None,
    ) -> None:
        self.base, self.methods, self.heads, self.whose = base, methods, heads, whose
        self._unneeded, self.pad_rows_to = unneeded, pad_rows_to
        self.warned: set[str] = set()
        self.outputs: Any = weakref.WeakKeyDictionary()

    def attach(self, model: Any) -> None:
        """Make ``model`` one with this state; an exception leaves it as it was."""
        self.own = {name: model.__dict__[name] for name in self.methods if name in model.__dict__}
        self.config = model.__dict__.get("config")
        self.config_is_base_s = model is not self.base and self.config is not None and self.config is self.base.config
        attached = False
        try:
            model.__dict__[_STATE] = self
            self.engine = Engine(self.base, self.pad_rows_to)
            if self.config_is_base_s:
                model.config = self.base.config
            replaced = set(self.methods).difference(self._unneeded(model))
            model.__dict__.update({name: _Method(model, name) for name in replaced})
            model.__dict__[REPLICATE] = refuse_replicas
            attached = True
        finally:
            if not attached:
                restore(model)

    def detach(self, model: Any) -> None:
        """The undoing of :meth:`attach`."""
        for name in (*self.methods, REPLICATE):
            model.__dict__.pop(name, None)
        model.__dict__.update(self.own)
        if self.engine is not None:
            self.engine.detach()
        if self.config_is_base_s:  # where another user keeps the base attached, that is not the model's own yet
            model.config = self.config if is_attached(self.base) else self.base.config

    @contextmanager
    def without_methods(self, model: Any) -> Iterator[None]:
        """While the block runs, the model has the methods that it had before."""
        ours = {name: model.__dict__.pop(name) for name in self.methods if name in model.__dict__}
        try:
            model.__dict__.update(self.own)
            yield
        finally:
            model.__dict__.update(ours)

    def original(self, model: Any, name: str = "forward") -> Callable[..., Any]:
        """The method that the model had before."""
        method = self.own.get(name) or functools.partial(getattr(type(model), name), model)
        classifies = hasattr(model, "_prefix_tuning_forward") and is_prefix(model.active_peft_config)
        return _classifying(model, method) if name == "forward" and classifies else method

    def fell_back(self, reason: str) -> None:
        """Count a call that takes the model's own forward, and say why."""
        self.engine.stats.count_padded(reason)
        self.warn(reason)

    def warn(self, reason: str) -> None:
        """Say why the model's own forward runs."""
        self.tell(f"fastprompt runs {self.whose} own padded forward: {reason}")

    def tell(self, text: str) -> None:
        """A warning, the first time."""
        if text not in self.warned:
            self.warned.add(text)
            warnings.warn(text, stacklevel=9)

    def __getstate__(self):
        return {**vars(self), "outputs": None, "_unneeded": None}

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
    """A method of one model with a state: bound, and unlike Python's a pickle brings it back."""

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
def _method_like(model_class, name):
    """``model_class.name`` as a model with a state has it, under the same name and signature."""
    original = getattr(model_class, name)

    def method(self, *args, **kwargs):
        state = self.__dict__[_STATE]
        return state.methods[name](self, state, *args, **kwargs)

    # Not functools.wraps: who strips wrappers by __wrapped__ (Accelerate does) would strip this one, too.
    for attribute in ("__name__", "__qualname__", "__doc__", "__module__"):
        setattr(method, attribute, getattr(original, attribute))
    method.__signature__ = inspect.signature(original)
    return method
