"""Sizes of the methods in their tests, the same in PEFT's encoders, and their gradients."""

import torch

P, D, L, HEADS, DH = 5, 12, 3, 2, 4
COMMON = dict(task_type="CAUSAL_LM", num_virtual_tokens=P, num_transformer_submodules=1, num_layers=L)


def backward(module, out):
    """Gradients of every parameter, by name, for one fixed gradient of ``out``."""
    module.zero_grad()
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(3)))
    return {name: parameter.grad for name, parameter in module.named_parameters()}
