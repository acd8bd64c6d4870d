"""Hooks and forwards that others give to a model's modules, at any time: what they change was asked of it, or is asked.

A hook that only watches may come and go. One that changes what passes may do so by where a row stands in the batch, and
may be switched on at any time; so all of them are watched while packed rows run, and the model is asked again behind
the first that was not seen to change anything when it was asked.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .masks import UnsupportedAttention
from .structure import is_compiled

# Whose hooks and forwards move weights, watch or record, and leave what modules compute as it is.
_LIBRARIES = ("torch", "accelerate", "deepspeed", "transformers", "peft")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")

Hook = Callable[..., Any]


class NotAsked(UnsupportedAttention):
    """A hook changed what passes, of which the model was not asked; whoever calls it asks again, and calls again."""


class Interventions:
    """What others gave to the modules of one model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._forwards: list[Any] | None = None  # when it was asked
        self._changing: list[Hook] = []  # were seen to change something then
        self._caught: Hook | None = None  # has changed something since

    @property
    def asked(self) -> tuple[Any, ...]:
        """What the model was asked of: equal again only if that is."""
        return (*(self._forwards or ()), *self._changing)

    def are_others(self) -> bool:
        """Are there others by now than the model was asked of, as far as they are known to change anything?"""
        if self._forwards is None or self._caught is not None:
            return True
        if not _same(self._forwards, self._replaced()):
            return True
        hooks = {id(hook) for *_, hook in self._hooks()} if self._changing else set()
        return any(id(hook) not in hooks for hook in self._changing)

    @contextmanager
    def being_asked(self) -> Iterator[None]:
        """While the block runs the model is asked, and hooks are seen that change something."""
        changing: list[Hook] = []
        with self._seen_by(lambda hook: changing.append(hook)):
            yield
        self._forwards, self._changing, self._caught = self._replaced(), list(dict.fromkeys(changing)), None

    def watched(self) -> AbstractContextManager[None]:
        """A block that ends with NotAsked if a hook changes something in it that the model was not asked of."""
        if torch.compiler.is_compiling():  # its graphs hold the hooks, and have guards of their own
            return nullcontext()

        def catch(hook):
            if not any(hook is known for known in self._changing):
                self._caught = hook
                raise NotAsked("a hook changes what passes through the model, which was not asked of it")

        return self._seen_by(catch)

    def _hooks(self):
        """Where the hooks of others stand, but for those of compiled layers, whose graphs hold them."""
        hooked = [
            (module, vars(module)[name]) for module in self._model.modules() for name in _HOOKS if vars(module)[name]
        ]
        if not hooked:
            return
        inside = {part for module in self._model.modules() if is_compiled(module) for part in module.modules()}
        for module, hooks in hooked:
            for key, hook in hooks.items():
                if module not in inside and _is_foreign(hook, _LIBRARIES):
                    yield hooks, key, hook

    def _replaced(self):
        """The modules whose forward is somebody's, and these forwards."""
        found: list[Any] = []
        for module in self._model.modules():
            forward = vars(module).get("forward")
            moves = module is not self._model and "_hf_hook" in vars(module)  # Accelerate's, of tensors
            if forward is not None and not moves and _is_foreign(forward, () if module is self._model else _LIBRARIES):
                found += [module, forward]
        return found

    @contextmanager
    def _seen_by(self, changed):
        """While the block runs, ``changed(hook)`` is called whenever a hook has changed something."""
        with ExitStack() as block:
            for hooks, key, hook in list(self._hooks()):
                instead = hooks[key] = _seen(hook, changed)
                block.callback(_put_back, hooks, key, hook, instead)
            yield


def _put_back(hooks, key, hook, instead):
    if hooks.get(key) is instead:  # it may have taken itself away
        hooks[key] = hook


def _seen(hook, changed):
    """A hook that says so when ``hook`` returns something, or writes into what it is given."""

    def run(*given):
        before = _state(given)
        result = hook(*given)
        if result is not None or not _same(before, _state(given)):
            changed(hook)
        return result

    return run


def _state(given):
    """The tensors among a hook's arguments, and how often each was written to."""
    tensors = [x for x in tree_leaves(given) if isinstance(x, torch.Tensor)]
    return [*tensors, *(None if x.is_inference() else x._version for x in tensors)]


def _same(mine, theirs):
    return len(mine) == len(theirs) and all(x is y or (isinstance(x, int) and x == y) for x, y in zip(mine, theirs))


def _is_foreign(function, libraries):
    """Does a function, or one that it wraps, stand in other code than some libraries' and ours?"""
    while function is not None:
        inner = function.func if isinstance(function, partial) else function
        inner = getattr(inner, "__func__", inner)
        names = getattr(inner, "__globals__", None)
        code = type(inner).__module__ if names is None else names.get("__name__", "")
        if code.partition(".")[0] not in (*libraries, "fastprompt"):
            return True
        function = getattr(function, "__wrapped__", None)
    return False
