"""Root-mean-square norms that pass over their rows once.

Llama's norm, and that of most decoders after it, is seven operations, each a pass over all rows, and twice as many in
its backward. A norm is patched for what it is: the code of its class's forward is Llama's, number for number. It rounds
otherwise, so that packed rows alone run through it: what else a model is called with gives the bits it gave.
"""

import functools

import torch
from torch import nn

from ..backends import implementation
from ..ops.rms_norm import reference
from ..ops.rms_norm.api import RMSNorm
from .masks import packed_rows_run
from .module_patch import ModulePatch
from .structure import computes_the_same


def _norms(model):
    return [module for module in model.modules() if _is_llama_s(type(module).forward)]


def _forward(self, *args, **kwargs):
    # A compiler fuses itself what it sees.
    plain = not torch.compiler.is_compiling() and len(args) == 1 and not kwargs
    if not plain or not packed_rows_run() or not _has_kernel(self, args[0]):
        return type(self).forward(self, *args, **kwargs)
    return RMSNorm.apply(args[0], self.weight, float(self.variance_epsilon))


# On devices with a kernel.
NORMS = ModulePatch(_norms, _forward)


def _has_kernel(module, states):
    weight = module.weight
    if type(states) is not torch.Tensor or type(weight) is not nn.Parameter or not states.dim():
        return False
    alike = weight.dtype == states.dtype and weight.device == states.device and weight.shape == states.shape[-1:]
    device = states.device.type
    if not alike or torch.is_autocast_enabled(device):
        return False
    return implementation("rms_norm", "auto", device, states.dtype) is not reference


@functools.cache
def _is_llama_s(forward):
    """Does ``forward`` compute what :func:`_llama` does, and does it mean torch by ``torch``?"""
    return computes_the_same(forward, _llama) and forward.__globals__.get("torch") is torch


# Compared and never called.
def _llama(self, hidden_states):
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)
