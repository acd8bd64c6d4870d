"""PEFT's PromptEncoder, P-Tuning's, on prompt_lstm, with its output kept while nothing trains; and CPT's without
waiting for a device."""

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import CPTEmbedding, PromptEncoder
from torch import nn

from ..methods.cached import CachedOutput
from ..ops import prompt_lstm
from .cpt import projected

_KINDS = (nn.Embedding, nn.LSTM, nn.Sequential, nn.Linear, nn.ReLU)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def fast_encoder(encoder: nn.Module, outputs: MutableMapping[nn.Module, CachedOutput]) -> Iterator[None]:
    """Calls of ``encoder``, a prompt encoder of PEFT's, run faster inside of this block.

    A plain nn.LSTM without hooks runs on :func:`prompt_lstm`; all other modules are called as always. Where all of them
    are plain and nothing trains, what the encoder gave is kept in ``outputs``. CPT's finds its projection by
    :func:`projected`.
    """
    faster: dict[type, tuple[str, Callable[..., Any]]] = {
        PromptEncoder: ("forward", lambda indices: _forward(encoder, indices, outputs)),
        CPTEmbedding: ("get_projection", lambda: projected(encoder)),
    }
    name, method = faster.get(type(encoder), ("", None))
    if method is None or name in vars(encoder) or torch.compiler.is_compiling():
        yield
        return
    encoder.__dict__[name] = method
    try:
        yield
    finally:
        del encoder.__dict__[name]


def _forward(encoder, indices, outputs):
    lstm = getattr(encoder, "lstm_head", None)
    if len(indices) > 1 or (lstm is not None and not (_is_plain(lstm) and lstm.proj_size == 0)):
        return PromptEncoder.forward(encoder, indices)

    def encode():
        rows = encoder.embedding(indices[0])
        if lstm is not None:
            rows = prompt_lstm(
                rows,
                list(lstm.parameters()),
                num_layers=lstm.num_layers,
                bidirectional=lstm.bidirectional,
                dropout=lstm.dropout,
                training=lstm.training,
            )
        return encoder.mlp_head(rows)[None]

    trains = torch.is_grad_enabled() or any(module.training for module in encoder.modules())
    plain = all(_is_plain(module) for module in encoder.modules() if module is not encoder)
    cached = outputs.setdefault(encoder, CachedOutput())
    return cached(encoder.parameters(), trains or not plain, encode)


def _is_plain(module):
    """Is the module what its class says: nothing derived, replaced or hooked?"""
    return (
        type(module) in _KINDS and "forward" not in vars(module) and not any(getattr(module, hooks) for hooks in _HOOKS)
    )
