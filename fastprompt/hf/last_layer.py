"""The last layer of a decoder, on the rows whose hidden states are wanted.

Nothing passes from row to row behind the last attention, whose keys and values alone are needed of all rows. So the
last layer runs, by its own code, on the rows that are wanted; only its attention is given all rows, made by what stands
between the layer's input and its attention (a norm, or nothing), and projects the queries and the output of the wanted
rows. The layer's output has zeros in the rows that nobody wants.

That the rest of a layer treats each row alone is what running packed rows rests on already. How the states reach the
attention is looked at in every call: they are the layer's input, or what one of its parts made of it.

A layer that ``layer.compile()`` has compiled runs uncompiled on these rows: its graph, of all rows, would cost more
than it saves.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from .checkpointing import without_checkpoints
from .masks import UnsupportedAttention
from .outer_layer import OuterLayer, forward_of

# What projects queries alone, and the output, where attention modules have it.
_QUERIES = "q_proj"
_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")


class LastLayer(OuterLayer):
    """The last layer of a backbone."""

    number: ClassVar[int] = -1

    @contextmanager
    def on_rows(self, keep: torch.Tensor) -> Iterator[None]:
        """While the block runs, the layer gives the rows ``keep`` ``[M]``, each once, and zeros in place of others.

        Raises:
            UnsupportedAttention: in the layer's call; it has another structure.
        """
        # What it keeps is less than one layer run again does; a checkpoint around it would run its own forward again.
        with forward_of(self.layer, partial(_run_layer, self, keep)), without_checkpoints(self.layer):
            yield


def _run_layer(last, keep, states, *args, **kwargs):
    layer, attention = last.layer, last.attention
    attention_forward = attention.forward
    keep = keep.to(states.device)
    rows = states.index_select(1, keep)  # [1, M, D]
    made_by: list[tuple[torch.Tensor, nn.Module]] = []  # what parts of the layer made of its input, at these rows

    def remember(part, inputs, output):
        if len(inputs) == 1 and inputs[0] is rows:
            made_by.append((output, part))

    def attend(*args, **kwargs):
        given, args, kwargs = _first(args, kwargs)
        if given is rows:
            everywhere = states
        else:
            part = next((part for output, part in made_by if output is given), None)
            if part is None:
                raise UnsupportedAttention(f"{type(layer).__name__} hands other states to attention than a norm's")
            everywhere = part(states)
        with ExitStack() as hooks:
            for hook in _hooks(attention, keep, everywhere.shape[1]):
                hooks.callback(hook.remove)
            output = attention_forward(everywhere, *args, **kwargs)
        return _with_first(output, lambda x: x if x.shape[1] == len(keep) else x.index_select(1, keep))

    with ExitStack() as block:
        for part in layer.children():
            if part is not attention:
                block.callback(part.register_forward_hook(remember).remove)
        block.enter_context(forward_of(attention, attend))
        output = type(layer).forward(layer, rows, *args, **kwargs)
    return _with_first(output, lambda x: _spread(x, keep, states, rows))


def _hooks(attention, keep, count):
    """Hooks by which the projections of queries and of the output run on the rows ``keep`` of ``count`` only."""
    queries = getattr(attention, _QUERIES, None)
    if isinstance(queries, nn.Module):
        yield queries.register_forward_pre_hook(lambda part, args: (args[0].index_select(1, keep), *args[1:]))
        yield queries.register_forward_hook(
            lambda part, args, x: x.new_zeros(1, count, x.shape[2]).index_copy(1, keep, x)
        )
    outputs = next((x for name in _OUTPUTS if isinstance(x := getattr(attention, name, None), nn.Module)), None)
    if outputs is not None:
        yield outputs.register_forward_pre_hook(lambda part, args: (args[0].index_select(1, keep), *args[1:]))


def _first(args, kwargs):
    """The hidden states among a module's arguments, and the others."""
    if args:
        return args[0], args[1:], kwargs
    kwargs = dict(kwargs)
    return kwargs.pop("hidden_states"), (), kwargs


def _with_first(output, function):
    """An output, or the first of several, after ``function``."""
    return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)


def _spread(x, keep, states, rows):
    """``[1, M, D]`` at the rows ``keep`` of ``[1, R, D]``."""
    if x.shape != rows.shape:
        raise UnsupportedAttention(f"a layer makes {list(x.shape)} of {list(rows.shape)} states")
    return x.new_zeros(states.shape).index_copy(1, keep, x)
