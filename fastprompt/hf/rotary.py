"""Rotary position embeddings in one pass over queries and keys.

Llama's attention, and that of most decoders after it, calls a function of its module that turns queries and keys in
nine operations, each a pass over all rows, and more in its backward. Where that function computes what Llama's does,
number for number, the forward of the attention's class runs with another one in its place; nothing is changed that
modules share. It rounds otherwise, so that packed rows alone run through it.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from ..backends import implementation
from ..ops.rotary import reference
from ..ops.rotary.api import Rotary
from .masks import packed_rows_run
from .module_patch import ModulePatch
from .structure import computes_the_same, undecorated


def _attentions(model):
    return [module for module in model.modules() if _turns_as_llama(type(module).forward)]


def _forward(self, *args, **kwargs):
    forward = type(self).forward
    # A compiler fuses itself what it sees.
    if not torch.compiler.is_compiling() and packed_rows_run() and _turns_as_llama(forward):
        forward = _in_one_pass(forward)
    return forward(self, *args, **kwargs)


# On devices with a kernel. It is the forward of an attention's class but for rotary embeddings.
ROTARY = ModulePatch(_attentions, _forward)


def _turns_as_llama(forward):
    """Does ``forward`` call a function by the name of Llama's that computes what Llama's does?"""
    if not isinstance(forward, types.FunctionType):
        return False
    forward = undecorated(forward)
    function = forward.__globals__.get(_NAME) if _NAME in forward.__code__.co_names else None
    if not computes_the_same(function, _llama) or function.__defaults__ != _llama.__defaults__:
        return False
    turn = function.__globals__.get("rotate_half")
    return computes_the_same(turn, rotate_half) and turn.__globals__.get("torch") is torch


class _Globals(dict):
    """What the code of a module finds by name, some names in it replaced."""

    def __init__(self, found: dict[str, Any], replaced: dict[str, Any]) -> None:
        super().__init__(replaced)
        self.found = found

    def __missing__(self, name):
        return self.found[name]


@functools.cache
def _in_one_pass(forward):
    """``forward``, decorated as it is, with :func:`_rotate` in place of the function that it calls."""
    if undecorated(forward) is not forward:
        inner, cells = forward.__wrapped__, forward.__closure__
        ours = types.CellType(_in_one_pass(inner))
        cells = tuple(ours if cell.cell_contents is inner else cell for cell in cells)
        return _copy(forward, forward.__globals__, cells)
    plain = forward.__globals__[_NAME]
    names = _Globals(forward.__globals__, {_NAME: functools.partial(_rotate, plain)})
    return _copy(forward, names, forward.__closure__)


def _copy(function, names, cells):
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _rotate(plain: Callable[..., Any], q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    """``plain``, by the operator where it takes these: heads ``[B, H, S, Dh]``, tables ``[B or 1, S, Dh]``."""
    if unsqueeze_dim != 1 or not all(_fits(x, cos, sin) for x in (q, k)):
        return plain(q, k, cos, sin, unsqueeze_dim)
    return tuple(Rotary.apply(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in (q, k))


def _fits(x, cos, sin):
    if any(type(t) is not torch.Tensor or t.dtype != x.dtype or t.device != x.device for t in (x, cos, sin)):
        return False
    if x.dim() != 4 or cos.requires_grad or sin.requires_grad or cos.shape != sin.shape or x.shape[-1] % 2:
        return False
    batch, _, rows, width = x.shape
    if cos.shape not in ((1, rows, width), (batch, rows, width)):
        return False
    return implementation("rotary", "auto", x.device.type, x.dtype) is not reference


_NAME = "apply_rotary_pos_emb"


# Compared and never called, with a docstring as theirs have one: it moves the constants behind it.


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """``(-b, a)`` of the halves ``(a, b)`` of each head."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def _llama(q, k, cos, sin, unsqueeze_dim=1):
    """Queries and keys, turned by the tables of their positions."""
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed
