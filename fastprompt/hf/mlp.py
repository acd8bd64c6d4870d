"""Gated MLPs that save fewer tensors for their backward.

``down(act(gate(x)) * up(x))``, the MLP of Llama and most decoders after it, saves three tensors a layer where autograd
sees the activation and the product apart: gate, its activation and up. The activation is cheap to compute again. With
frozen projections, which save nothing, that is a fifth of all that a training step saves.

An MLP is patched for what it is, not for what it once gave: the code of its class's forward is that of this expression,
and its activation is elementwise and without state. Both are looked at again at every call.
"""

import functools
import types

import torch
from torch import nn
from torch.nn import functional as F
from transformers import activations

from ..ops.gated_activation.api import GatedActivation
from .masks import packed_rows_run
from .module_patch import ModulePatch
from .structure import is_transformed


def _gated_mlps(model):
    """Not those whose class computes anything else (dropout, clamps, sparsity) or whose activation may (in place,
    parameters, hooks, not elementwise, of an unknown class)."""
    return [module for module in model.modules() if _parts(module) is not None]


def _forward(self, *args, **kwargs):
    # A compiler chooses itself what it saves.
    parts = None if torch.compiler.is_compiling() or len(args) != 1 or kwargs else _parts(self)
    if parts is None or is_transformed():
        return type(self).forward(self, *args, **kwargs)
    gate_proj, up_proj, down_proj, activation = parts
    gate, up = gate_proj(*args), up_proj(*args)
    if gate.dtype != up.dtype or gate.shape != up.shape:
        return down_proj(activation(gate) * up)
    if packed_rows_run():  # kernels round otherwise than the model's own operations
        activation = _known(activation)
    return down_proj(GatedActivation.apply(gate, up, activation))


GATED_MLPS = ModulePatch(_gated_mlps, _forward)


def _parts(module):
    """The gate, up and down projections and the activation of a plain gated MLP; None for any other module."""
    forward = type(module).forward
    names = _names(forward) if isinstance(forward, types.FunctionType) else None
    if names is None:
        return None
    *projections, activation = (getattr(module, name, None) for name in names)
    return (*projections, activation) if None not in projections and _is_pure(activation) else None


@functools.cache
def _names(forward):
    """The attributes of gate, up, down and activation, if ``forward`` is that of a plain gated MLP, else None."""
    for spelling in _SPELLINGS:
        if _computes(forward.__code__) == _computes(spelling.__code__):
            name_of = dict(zip(spelling.__code__.co_names, forward.__code__.co_names))
            return tuple(name_of[part] for part in ("gate_proj", "up_proj", "down_proj", "act_fn"))
    return None


def _computes(code):
    """What functions have in common that differ in the names of variables and attributes only, or in annotations."""
    arguments = code.co_argcount, code.co_kwonlyargcount, code.co_flags & _GATHERS_ARGUMENTS
    return code.co_code, len(code.co_names), arguments


# The spellings of one expression that are compiled to different code, as functions that are compared and never called.


def _returned(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _named(self, x):
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def _product_named(self, x):
    product = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(product)


def _gate_named(self, x):
    gate = self.act_fn(self.gate_proj(x))
    return self.down_proj(gate * self.up_proj(x))


def _gate_and_up_named(self, x):
    gate = self.act_fn(self.gate_proj(x))
    up = self.up_proj(x)
    return self.down_proj(gate * up)


def _projections_named(self, x):
    gate = self.gate_proj(x)
    up = self.up_proj(x)
    return self.down_proj(self.act_fn(gate) * up)


def _up_first(self, x):
    return self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x)))


_SPELLINGS = (_returned, _named, _product_named, _gate_named, _gate_and_up_named, _projections_named, _up_first)
_GATHERS_ARGUMENTS = 0x04 | 0x08  # *args, **kwargs


def _is_pure(activation):
    """Is this known to be an elementwise function of its input alone, which it leaves as it is, in any mode?"""
    if isinstance(activation, functools.partial):
        return activation.func is F.gelu and not activation.args and activation.keywords.keys() <= {"approximate"}
    if type(activation) not in _PURE_MODULES:
        return any(activation is function for function in _PURE_FUNCTIONS)
    own = vars(activation)
    if "forward" in own or own.get("inplace") or any(own[hooks] for hooks in _HOOKS):
        return False
    return "act" not in own or _is_pure(own["act"])  # some call a function they hold


def _known(activation):
    """The name by which the operator knows a pure activation, else the activation: a name has kernels."""
    if activation is F.silu or isinstance(activation, nn.SiLU | activations.SiLUActivation):
        return "silu"
    function = getattr(activation, "act", activation)  # some modules call a function they hold
    if function is F.gelu:
        return "gelu"
    if isinstance(function, functools.partial | nn.GELU):
        options = vars(function) if isinstance(function, nn.GELU) else function.keywords
        return {"none": "gelu", "tanh": "gelu_tanh"}[options.get("approximate", "none")]
    return activation


# By exact type, as a subclass may add anything. Not those that autocast takes to another dtype (torch.pow).
_PURE_MODULES = {
    *(nn.SiLU, nn.GELU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardswish, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Identity),
    *(activations.SiLUActivation, activations.GELUActivation, activations.FastGELUActivation),
    *(activations.QuickGELUActivation, activations.ReLUSquaredActivation, activations.MishActivation),
    activations.LinearActivation,
    activations.GELUTanh,
}
_PURE_FUNCTIONS = (F.silu, F.gelu, F.relu, F.mish, F.sigmoid, F.tanh, torch.relu, torch.sigmoid, torch.tanh)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
