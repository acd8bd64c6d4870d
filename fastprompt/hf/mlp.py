"""Gated MLPs that keep less for their backward.

``down(act(gate(x)) * up(x))``, the MLP of Llama and most decoders after it, keeps three tensors a layer where autograd
sees the activation and the product apart: gate, its activation and up. The activation is cheap to make again. With frozen
projections, which keep nothing, that is a fifth of all that a training step keeps.
"""

import types

import torch

from ..ops.gated_activation.api import GatedActivation

_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


@torch.no_grad()
def keep_less(model):
    """Let the model's gated MLPs keep less; :func:`keep_all` undoes it.

    A class is taken on after one of its modules gave the same both ways, bit for bit.
    """
    same = {}
    for module in model.modules():
        if not all(hasattr(module, part) for part in _PARTS) or "forward" in vars(module):
            continue
        kind = type(module)
        if kind not in same:
            same[kind] = _gives_the_same(module)
        if same[kind]:
            module.forward = types.MethodType(_forward, module)


def keep_all(model):
    """Undo :func:`keep_less`."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) is _forward:
            del module.forward


def _forward(self, *args, **kwargs):
    if torch.compiler.is_compiling() or len(args) != 1 or kwargs:  # a compiler makes this choice itself
        return type(self).forward(self, *args, **kwargs)
    return _gated(self, *args)


def _gated(module, x):
    return module.down_proj(GatedActivation.apply(module.gate_proj(x), module.up_proj(x), module.act_fn))


def _gives_the_same(module):
    weight = getattr(module.gate_proj, "weight", None)
    if weight is None or weight.dim() != 2 or not weight.is_floating_point() or weight.device.type == "meta":
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    try:
        return torch.equal(module(x), _gated(module, x))
    except Exception:  # an MLP of another signature, which is left as it is
        return False
