"""Learned keys and values in front of every layer: where they come from, and how their gradients come back."""

import torch
from torch.nn.functional import pad
from transformers import DynamicCache

# For each layer its learned keys and values, ``[N, P, Hkv, Dh]`` each, or None.
Prefix = tuple[tuple[torch.Tensor, torch.Tensor] | None, ...]


def prefix_length(prefix: Prefix | None) -> int:
    """P of the layers' learned keys and values; 0 without any."""
    return next((layer[0].shape[1] for layer in prefix or () if layer is not None), 0)


def layers_of_tensor(prefix, config=None, layers=None):
    """Learned keys and values in one tensor -> for each layer ``(keys, values)``, ``[N, P, Hkv, Dh]`` views, or None.

    Args:
        prefix: ``[L, 2, P, Hkv, Dh]`` or ``[L, 2, N, P, Hkv, Dh]``.
        config: the model's config, which says whose keys and values a layer without its own reads (Gemma 3n and 4).
        layers: the indices of the L layers in the model; None: 0 to L - 1.
    """
    if prefix.dim() == 5:
        prefix = prefix.unsqueeze(2)
    # Unbound rather than indexed: backward then stacks the layers' gradients instead of adding each up with zeros.
    found = dict(zip(range(len(prefix)) if layers is None else layers, (layer.unbind() for layer in prefix.unbind())))
    return _with_shared([found.get(i) for i in range(max(found, default=-1) + 1)], config)


def layers_of_cache(cache, config):
    """A cache of batch size 1 that was filled before the first token -> for each layer ``(keys, values)`` or None.

    Args:
        cache: a transformers ``Cache``.
        config: the model's config, as for :func:`layers_of_tensor`.
    """
    filled = [(x.keys, x.values) if getattr(x, "is_initialized", False) else None for x in cache.layers]
    length = max((cache.get_seq_length(i) for i, layer in enumerate(filled) if layer is not None), default=0)
    return _with_shared([layer and tuple(_rows(x, length) for x in layer) for layer in filled], config)


def cache_of_layers(layers, prompt_ids, config):
    """The inverse for a batch: a cache that starts with prefix ``prompt_ids[b]`` in row b. What the padded path takes."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    cache = DynamicCache(config=text)
    own = text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", 0) or 0)
    for index, layer in enumerate(layers[:own]):
        if layer is not None:
            cache.update(*(x[prompt_ids].transpose(1, 2) for x in layer), index)
    return cache


def _with_shared(layers, config):
    """Layers without keys and values of their own get those of the layer that theirs come from."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    shared = getattr(text, "num_kv_shared_layers", 0) or 0
    if shared:
        total = text.num_hidden_layers
        own = total - shared
        layers = layers[:own] + [None] * (total - len(layers[:own]))
        for layer in range(own, total):
            same = [i for i in range(own) if text.layer_types[i] == text.layer_types[layer]]
            layers[layer] = layers[same[-1]] if same else None
    return tuple(layers)


def _rows(x, length):
    """``[1, Hkv, n, Dh]`` of a cache -> ``[1, length, Hkv, Dh]``.

    A layer with a sliding window keeps only the last n positions; what it dropped no window reaches, so zeros do there.
    """
    rows = x.transpose(1, 2)
    return rows if x.shape[2] == length else pad(rows, (0, 0, 0, 0, length - x.shape[2], 0))  # pad copies in any case


@torch.no_grad()
def prefix_of_text(model, token_ids):
    """The keys and values of a real text in the frozen model: ``[L, 2, P, Hkv, Dh]``, what Prefix-Tuning starts best from.

    Args:
        model: a Hugging Face causal LM.
        token_ids: the P tokens of the text, a list of ints or ``[P]``.

    Raises:
        ValueError: no tokens, or layers whose keys differ in shape.
    """
    ids = torch.as_tensor(token_ids, device=model.device).reshape(1, -1)
    if not ids.numel():
        raise ValueError("token_ids must hold at least one token, got none")
    cache = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
    layers = [(x.keys, x.values) for x in cache.layers]
    shapes = {tuple(x.shape) for layer in layers for x in layer}
    if len(shapes) > 1:
        raise ValueError(f"model must have keys and values of one shape in all layers, got {sorted(shapes)}")
    return torch.stack([torch.stack([x[0].transpose(0, 1) for x in layer]) for layer in layers])


class _Bridge(torch.autograd.Function):
    """Passes ``rows`` through, and in backward hands the gradients that gathered in ``leaves`` on to ``sources``."""

    @staticmethod
    def forward(ctx, rows, leaves, *sources):
        ctx.leaves = leaves
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad):
        gathered = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None  # a second backward through a retained graph gathers again
        return grad, None, *gathered


def through_reentrant_checkpoints(rows, prefix):
    """Rows and a prefix that give the right gradients inside of reentrant checkpoints too.

    A reentrant checkpoint runs a backward of its own that stops at the checkpoint's inputs, and the prefix is not one of
    them: it would be walked through once a layer, which the graph behind it (an embedding, an MLP) does not survive. So the
    layers read leaves, which may gather gradients from any number of backwards, and a node in front of the first layer,
    where backward arrives last, passes the sums on.
    """
    sources = [x for layer in prefix if layer is not None for x in layer]
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in sources]
    rows = _Bridge.apply(rows, leaves, *sources)
    found = iter(leaves)
    return rows, tuple(layer and (next(found), next(found)) for layer in prefix)


def checkpoints_reentrantly(model):
    """Does the model, as it stands, recompute layers through reentrant checkpoints?"""
    for module in model.modules():
        if module.training and getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant", True):
                return True
    return False
