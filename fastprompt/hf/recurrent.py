"""Layers with a recurrent or convolution state on packed rows.

A mixer of this kind (Mamba 2, gated delta rule, short convolution) reads the state of earlier tokens from the cache
that it is handed, and leaves its own there. So it runs the shared rows of every prompt with an empty state, those of
groups each from the state that is left in front of them, and then the sequences, padded on the right where it does not
see, each from the state that its prompt or group left: autograd adds up the gradient of a state over all that start
from it. The results go back to where the rows came from; the layers around it see packed rows.
"""

import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..layout import Bucket, RecurrentSchedule, recurrent_schedule
from ..ops import prompt_concat
from .attention import WITHOUT_EFFECT
from .masks import PackedRows, UnsupportedAttention, active
from .module_patch import ModulePatch
from .states import ForkedStates, States, gathered_states
from .structure import keeps_state, outermost

_CACHES = ("cache_params", "past_key_values", "cache")
_MASKS = ("attention_mask", "conv_mask")
# Their kernels cut sequences into chunks of lengths of their own.
_LIBRARIES = any(find_spec(name) is not None for name in ("fla", "mamba_ssm"))


def mixers(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` whose forward keeps a recurrent or convolution state."""
    return outermost(model, keeps_state)


def _forward(self, *args, **kwargs):
    batch = active()
    if not isinstance(batch, PackedRows):
        return type(self).forward(self, *args, **kwargs)
    return _run_packed(self, batch, args, kwargs)


MIXERS = ModulePatch(mixers, _forward)


@torch.compiler.disable
def _run_packed(module, batch, args, kwargs):
    """The output ``[1, R, ...]`` of a mixer for the packed rows ``[1, R, D]`` of ``batch``."""
    if batch.differentiable and not torch.is_grad_enabled():
        raise UnsupportedAttention(f"a checkpoint that is not the model's own recomputes {type(module).__name__}")
    batch.ran.add(module)
    mixer = Mixer(module, args, kwargs)
    schedule = schedule_of(batch)
    if not len(schedule.places):
        raise UnsupportedAttention("the batch has no rows")
    outputs, shared = mixer.run_shared(schedule)
    outputs += [mixer.run(bucket, gathered_states(shared, bucket))[0] for bucket in schedule.own]
    if batch.recorded is not None:
        batch.recorded.mixers.append((mixer, shared))
    return _joined(outputs, schedule.places.to(mixer.rows.device))


def schedule_of(batch: PackedRows) -> RecurrentSchedule:
    """The buckets of a packed batch: made by the first layer that asks."""
    return batch.sequences.cached("recurrent", lambda: recurrent_schedule(batch.plan))


class Mixer:
    """A mixer and the packed rows that it was called with.

    Args:
        module: the mixer; its forward takes rows ``[1, R, D]`` first, a cache, and maybe a mask.
        args, kwargs: what it was called with.

    Raises:
        UnsupportedAttention: it was given something else that may change what it computes.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._module = module
        kind: Any = type(module)
        self._takes = _parameters(kind)
        given = dict(zip(self._takes, args)) | kwargs
        self._first = next(iter(self._takes))
        self.rows: torch.Tensor = given.pop(self._first)[0]
        known = {*_CACHES, *_MASKS, *WITHOUT_EFFECT}
        unknown = sorted(name for name, x in given.items() if name not in known and x is not None)
        if unknown:
            raise UnsupportedAttention(f"{type(module).__name__} is given {unknown}, which has no form for packed rows")

    def run_shared(self, schedule: RecurrentSchedule) -> tuple[list[Any], States]:
        """What the buckets of shared rows give, and the states ``[N, ...]`` that they leave."""
        outputs: list[Any] = []
        shared: States = {}
        for level in schedule.shared:
            ran = [self.run(bucket, gathered_states(shared, bucket)) for bucket in level]
            outputs += [output for output, _ in ran]
            left = [after for _, after in ran]
            before = [shared] if shared else []
            shared = {key: torch.cat([x[key] for x in (*before, *left)]) for key in left[0]}
        return outputs, shared

    def run(self, bucket: Bucket, before: States) -> tuple[Any, States]:
        """The output ``[n, W, ...]`` of a bucket whose sequences start from ``before``, and the states they leave."""
        index, device = bucket.rows, self.rows.device
        padding = self.rows.new_zeros(1, self.rows.shape[1])
        rows = prompt_concat(index.flatten().to(device), self.rows, padding).unflatten(0, index.shape)
        states = ForkedStates(before)
        given = {self._first: rows, self._name_of("cache", _CACHES): states}
        if bucket.mask is not None:
            given[self._name_of("mask", _MASKS)] = bucket.mask.to(device)
        for name, parameter in self._takes.items():
            if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                given.setdefault(name, None)
        with chunks_of(self._module, index.shape[1]) as chunks:
            output = type(self._module).forward(self._module, **given, **chunks)
        return output, states.now

    def why_not_continued(self, schedule: RecurrentSchedule, shared: States) -> str | None:
        """None if the sequences depend on the states that their prompts left, else what does not reach them."""
        for bucket in schedule.own:
            before = gathered_states(shared, bucket)
            output, _ = self.run(bucket, before)
            for key in before:
                changed, _ = self.run(bucket, {**before, key: before[key] + 1})
                if _same(output, changed):
                    return f"{type(self._module).__name__} does not start from the {key.kind} state that it is given"
        return None

    def _name_of(self, what, names):
        found = next((name for name in names if name in self._takes), None)
        if found is None:
            raise UnsupportedAttention(f"{type(self._module).__name__} takes no {what}")
        return found


def _same(output, other):
    if isinstance(output, torch.Tensor):
        return torch.equal(output, other)
    return all(map(_same, output, other))


@cache
def _parameters(kind):
    """The parameters of the forward of a class, by name, without the module itself."""
    return dict(list(inspect.signature(kind.forward).parameters.items())[1:])


def _joined(outputs, places):
    """The packed rows ``[1, R, ...]`` of what buckets gave: tensors ``[n, W, ...]`` or tuples of them."""
    if not isinstance(outputs[0], torch.Tensor):
        return tuple(_joined(parts, places) for parts in zip(*outputs))
    cells = torch.cat([x.flatten(0, 1).flatten(1) for x in outputs])
    return prompt_concat(places, cells, cells[:0]).unflatten(1, outputs[0].shape[2:])[None]


@contextmanager
def chunks_of(module: nn.Module, width: int) -> Iterator[dict[str, int]]:
    """While the block runs, a mixer cuts ``width`` columns into chunks that leave none empty, as far as it lets us.

    The chunked form of a recurrence runs whole chunks, of 64 or 256 columns, however short a sequence is; what it gives
    does not depend on their length. The block has the keyword arguments that its forward is to be given for that.
    """
    longest, is_argument = _longest_chunk(module)
    if longest is None:
        yield {}
        return
    length = -(-width // -(-width // longest))
    if is_argument:
        yield {"chunk_size": length}
        return
    try:
        module.chunk_size = length
        yield {}
    finally:
        module.chunk_size = longest


def _longest_chunk(module):
    """The length of a mixer's chunks, None if it cannot be told another; is it an argument, and not an attribute?"""
    if _LIBRARIES:
        return None, False
    if isinstance(vars(module).get("chunk_size"), int):
        return module.chunk_size, False
    return _default_chunk(type(module)), True


@cache
def _default_chunk(kind):
    """The default ``chunk_size`` of a function that the forward of a class calls and hands its own arguments on to."""
    forward = inspect.unwrap(kind.forward)
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values()):
        return None
    for name in forward.__code__.co_names:
        function = forward.__globals__.get(name)
        known = inspect.signature(function).parameters if isinstance(function, types.FunctionType) else {}
        parameter = known.get("chunk_size")
        if parameter is not None and isinstance(parameter.default, int):
            return parameter.default
    return None
