"""Attention modules that do not ask transformers' attention interface, taken to prefix_attention.

GPT-J, Falcon and a few others compute attention in a method of their own. Where that method is known, the module is
given another one: under a mask of ours it hands the module's queries, keys and values to prefix_attention, and under
any other it is the method itself.

A method is known by its name in transformers and by the names that its code uses. The method of a subclass, of code
that comes with a model, or one that another transformers writes in another way is not: such a module is left alone,
and its model is refused, as it takes our mask for a tensor.
"""

import inspect
import types
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn

from .attention import IMPLEMENTATIONS, attend, is_ours
from .known_attention import known_method
from .masks import PackedMask
from .structure import has_own_forward


class ConfigAsBefore:
    """The config of a module that asks it for the attention implementation, and is told that of before.

    Attributes:
        switched: the config itself.
    """

    def __init__(self, switched: Any) -> None:
        self.switched = switched

    def __getattr__(self, name: str) -> Any:
        if name == "switched":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.switched, name)

    @property
    def _attn_implementation(self):
        name = self.switched._attn_implementation
        return IMPLEMENTATIONS.get(name, name)


def own_attention(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` with a method that is known."""
    return [module for module in model.modules() if any(_known(module, name) is not None for name in _METHODS)]


def patch_own_attention(model: nn.Module) -> None:
    """Let the model's attention modules of a known kind run on prefix_attention; :func:`unpatch_own_attention` undoes
    it.

    Modules with methods of their own are left alone.
    """
    module: Any
    for module in own_attention(model):
        for name, method in _METHODS.items():
            replaced = has_own_forward(module) if name == "forward" else name in vars(module)
            if _known(module, name) is None or replaced:
                continue
            setattr(module, name, types.MethodType(method, module))
            config = vars(module).get("config")
            if config is not None and not isinstance(config, ConfigAsBefore):
                module.config = ConfigAsBefore(config)


def unpatch_own_attention(model: nn.Module) -> None:
    """Undo :func:`patch_own_attention`."""
    module: Any
    for module in model.modules():
        for name, method in _METHODS.items():
            if getattr(vars(module).get(name), "__func__", None) is method:
                delattr(module, name)
        config = vars(module).get("config")
        if isinstance(config, ConfigAsBefore):
            module.config = config.switched


def is_patched(module: nn.Module) -> bool:
    """Does one of :func:`own_attention` run on prefix_attention? Somebody else may have given it another method."""
    return any(getattr(vars(module).get(name), "__func__", None) is method for name, method in _METHODS.items())


def _known(module, name):
    """What is known of the method ``name`` of a module's class, or None."""
    return known_method(getattr(type(module), name, None))


# What stands in the modules.


def _attn(self, query, key, value, attention_mask=None):
    """Queries, keys and values ``[B, H, S, Dh]`` -> ``[B, H, S, Dh]``, and the weights or None."""

    def original(module, query, key, value, mask, **arguments):
        out, weights = type(self)._attn(self, query, key, value, mask)
        return out.transpose(1, 2), weights

    dtype = value.dtype
    arguments = {}
    if is_ours(self, attention_mask):
        arguments = _known(self, "_attn").ours(self)
        attention_mask = _within(attention_mask, arguments.pop("window", None))
        # Rotary embeddings may leave queries and keys in a wider dtype than values.
        widest = torch.promote_types(torch.promote_types(query.dtype, key.dtype), dtype)
        query, key, value = query.to(widest), key.to(widest), value.to(widest)
    out, weights = attend(original, True, self, query, key, value, attention_mask, **arguments)
    return out.transpose(1, 2).to(dtype), weights


def _forward(self, *args, **kwargs):
    """As the forward of its class."""
    given = _arguments(type(self), args, kwargs)
    if is_ours(self, given.get("attention_mask")):
        return _known(self, "forward").ours(self, **given)
    return type(self).forward(self, *args, **kwargs)


# What pickle looks up in the module when it loads it: the method of its class, so that it comes back unpatched.
_forward.__name__ = "forward"
_METHODS = {"_attn": _attn, "forward": _forward}


def _arguments(kind, args, kwargs):
    """The arguments of a forward by name."""
    return dict(zip(_parameters(kind), args)) | kwargs


@cache
def _parameters(kind):
    return list(inspect.signature(kind.forward).parameters)[1:]


def _within(mask, window):
    """The mask with a sliding window."""
    if window is None or not isinstance(mask, PackedMask):  # in the others, the module hides what is outside of it
        return mask
    return replace(mask, window=window if mask.window is None else min(window, mask.window))
