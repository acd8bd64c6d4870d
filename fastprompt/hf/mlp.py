"""Gated MLPs that keep less for their backward.

``down(act(gate(x)) * up(x))``, the MLP of Llama and most decoders after it, keeps three tensors a layer where autograd
sees the activation and the product apart: gate, its activation and up. The activation is cheap to make again. With frozen
projections, which keep nothing, that is a fifth of all that a training step keeps.
"""

import types

import torch

_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


class GatedActivation(torch.autograd.Function):
    """``activation(gate) * up`` for an elementwise activation; keeps ``gate`` and ``up`` only."""

    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        activated = activation(gate)
        # In place where the activation made a tensor: what comes and goes between kept tensors leaves holes in the heap.
        return activated * up if activated.data_ptr() == gate.data_ptr() else activated.mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = ctx.activation(leaf)
        dgate = torch.autograd.grad(activated, leaf, grad * up)[0] if ctx.needs_input_grad[0] else None
        dup = activated.detach()
        # In place, since a step's memory peaks here; not into what was saved, which an identity would hand back.
        dup = grad * dup if dup.data_ptr() == gate.data_ptr() else dup.mul_(grad)
        return dgate, dup if ctx.needs_input_grad[1] else None, None


@torch.no_grad()
def patch_gated_mlps(model):
    """Let the model's gated MLPs keep less; :func:`unpatch_gated_mlps` undoes it.

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


def unpatch_gated_mlps(model):
    """Undo :func:`patch_gated_mlps`."""
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
