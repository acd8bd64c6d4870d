"""PEFT 0.21 knows a cache as ``past_key_values`` alone, and transformers 5.24 calls it ``cache``.

What PEFT does there: its ``generate`` does not find the cache, so a prompt is put in front of every new token and a
prefix is dropped; Prefix-Tuning before a classifier raises. Accelerated models do neither. A PEFT that knows the new
name is left alone.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, PeftModelForCausalLM, PeftModelForSeq2SeqLM
from torch import nn
from transformers import DynamicCache

from ..hf.attachment import evaluation_mode
from ..hf.cache_names import CACHE_NAME, cache_in
from .adapter import is_prefix

_FORMER = "past_key_values"


@torch.no_grad()
def generates_wrongly(model: PeftModel) -> bool:
    """Does PEFT's ``generate`` lose the cache that transformers hands on from token to token?

    It is asked for one token's arguments: behind a filled cache there must be no second prompt, and in an empty one's
    place must stand the prefix.
    """
    learned = is_prefix(model.active_peft_config)
    if not isinstance(model, (PeftModelForCausalLM, PeftModelForSeq2SeqLM) if learned else PeftModelForCausalLM):
        return False  # before an encoder-decoder's text, a prompt is put there once
    cache, ids = DynamicCache(), torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    if not learned:
        cache.update(torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2, 1), 0)
    of_base = {"input_ids": ids, "decoder_input_ids": ids, CACHE_NAME: cache}
    with evaluation_mode(model), _prepared_by(model, lambda *args, **kwargs: dict(of_base)):
        given = model.prepare_inputs_for_generation(ids, task_ids=ids[0], is_first_iteration=learned)
    return cache_in(given) is cache if learned else given.get("inputs_embeds") is not None


def prepare_inputs_for_generation(model: PeftModel, state: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """PEFT's own, which finds the cache.

    Args:
        model: the model.
        state: what it remembers; the other arguments are passed on.
    """
    return _prepared(model, state.original(model, "prepare_inputs_for_generation"), args, kwargs)


@contextmanager
def right_generation(model: PeftModel) -> Iterator[None]:
    """While the block runs, ``generate`` of a model that is not accelerated finds the cache."""
    if not model.active_peft_config.is_prompt_learning or not generates_wrongly(model):
        yield
        return
    original, before = model.prepare_inputs_for_generation, vars(model).get("prepare_inputs_for_generation")

    @functools.wraps(original)  # generate looks at its arguments
    def prepare(*args, **kwargs):
        return _prepared(model, original, args, kwargs)

    model.__dict__["prepare_inputs_for_generation"] = prepare
    try:
        yield
    finally:
        _put_back(model, "prepare_inputs_for_generation", before)


def _prepared(model, original, args, kwargs):
    """What ``original``, PEFT's, gives if the base model's cache goes by its former name on the way."""
    of_base = model.base_model_prepare_inputs_for_generation
    with _prepared_by(model, lambda *args, **kwargs: _renamed(of_base(*args, **kwargs), CACHE_NAME, _FORMER)):
        given = original(*args, **kwargs)
    return _renamed(given, _FORMER, CACHE_NAME)


@contextmanager
def former_name(*modules: nn.Module) -> Iterator[None]:
    """While the block runs, forwards that take a ``cache`` take ``past_key_values`` too, and say so."""
    before = [(module, vars(module).get("forward")) for module in modules if _takes_cache_alone(module.forward)]
    for module, _ in before:
        module.__dict__["forward"] = _taking_former_name(module.forward)
    try:
        yield
    finally:
        for module, forward in before:
            _put_back(module, "forward", forward)


@contextmanager
def _prepared_by(model: PeftModel, prepare: Callable[..., dict[str, Any]]) -> Iterator[None]:
    """While the block runs, ``prepare`` gives what PEFT takes for the base model's arguments for the next token."""
    before = model.base_model_prepare_inputs_for_generation
    model.__dict__["base_model_prepare_inputs_for_generation"] = prepare
    try:
        yield
    finally:
        model.__dict__["base_model_prepare_inputs_for_generation"] = before


def _renamed(given, name, other):
    if given.get(name) is not None:
        given[other] = given.pop(name)
    return given


def _put_back(module, name, before):
    if before is None:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = before


def _takes_cache_alone(forward):
    parameters = inspect.signature(forward).parameters
    return "cache" in parameters and _FORMER not in parameters


def _taking_former_name(forward):
    def wrapper(*args, **kwargs):
        return forward(*args, **_renamed(kwargs, _FORMER, "cache"))

    signature = inspect.signature(forward)
    parameters = list(signature.parameters.values())
    end = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    parameters.insert(end, inspect.Parameter(_FORMER, inspect.Parameter.KEYWORD_ONLY, default=None))
    wrapper.__signature__ = signature.replace(parameters=parameters)
    return wrapper
