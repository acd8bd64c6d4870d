"""A worker's attention layers, and how a compiled prompt's keys and values are written into their caches."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index

from .prompts import PromptError, PromptInfo

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


@dataclass(frozen=True)
class _Layer:
    """A layer that keeps a cache of its own.

    Attributes:
        index: in the model.
        group: of layers that share blocks.
        module: vLLM's attention.
        heads: key/value heads of all ranks.
        part: those of this rank.
    """

    index: int
    group: int
    module: Any
    heads: int
    part: slice


class PromptLayers:
    """The layers of a worker that compiled prompts are written into.

    Raises:
        NotImplementedError: a layer's backend does not write its cache apart from attention, or two layers have one
            index.
    """

    def __init__(self, config: "VllmConfig", cache: "KVCacheConfig") -> None:
        modules = config.compilation_config.static_forward_context
        self._dtype = config.model_config.dtype
        self._layers: list[_Layer] = []
        for group, spec in enumerate(cache.kv_cache_groups):
            for name in spec.layer_names:
                module = modules[name]
                if getattr(module, "kv_sharing_target_layer_name", None) is None:  # or it reads another layer's cache
                    self._layers.append(_describe(name, group, module, config))
        if len(self.shapes()) < len(self._layers):
            raise NotImplementedError(
                f"several attention layers have one index: {sorted(layer.index for layer in self._layers)}"
            )

    def shapes(self) -> dict[int, tuple[list[int], list[int]]]:
        """Index of a layer -> heads and width of the keys, and of the values, that a prompt must have there."""
        return {
            layer.index: ([layer.heads, layer.module.head_size], [layer.heads, layer.module.head_size_v])
            for layer in self._layers
        }

    def write(
        self, tensors: list[tuple[torch.Tensor, torch.Tensor]], places: list[tuple[list[int], list[int]]]
    ) -> None:
        """Write a prompt's keys and values.

        Args:
            tensors: of every layer of the model, ``([P, Hkv, Dh], [P, Hkv, Dv])``, of the shapes above.
            places: of each group of layers: rows of the tensors, one behind the other, and the slot of each.
        """
        for layer in self._layers:
            rows, slots = places[layer.group]
            if not rows:
                continue
            module, cache = layer.module, layer.module.kv_cache
            keys, values = (
                x[rows[0] : rows[-1] + 1, layer.part].to(cache.device, self._dtype).contiguous()
                for x in tensors[layer.index]
            )
            where = torch.tensor(slots, dtype=torch.int64, device=cache.device)
            module.impl.do_kv_cache_update(module, keys, values, cache, where)


def check_shapes(info: PromptInfo, shapes: dict[int, tuple[list[int], list[int]]]) -> None:
    """Whether a prompt is one of this model.

    Args:
        info: of the prompt.
        shapes: as of `PromptLayers.shapes`, of all workers.

    Raises:
        PromptError: it has other layers, heads or widths.
    """
    expected = max(shapes, default=-1) + 1
    if len(info.shapes) != expected:
        raise PromptError(f"prompt {info.name!r} is another model's: it has {len(info.shapes)} layers, not {expected}")
    for index, (keys, values) in shapes.items():
        found = info.shapes[index]
        if (found[0][1:], found[1][1:]) != (keys, values):
            raise PromptError(
                f"prompt {info.name!r} is another model's: layer {index} has keys {found[0]} and values {found[1]}; "
                f"expected [P, Hkv, Dh] with [Hkv, Dh] {keys} and {values}"
            )


def _describe(name: str, group: int, module: Any, config: "VllmConfig") -> _Layer:
    if not hasattr(module.impl, "do_kv_cache_update"):
        raise NotImplementedError(
            f"the attention backend of layer {name!r}, {type(module.impl).__name__}, writes its cache only inside of "
            "attention; choose another by --attention-backend"
        )
    ranks, own = config.parallel_config.tensor_parallel_size, module.num_kv_heads
    heads = config.model_config.get_total_num_kv_heads()
    if own != max(1, heads // ranks):  # a layer with other heads than the rest
        heads = own * ranks
    first = get_tensor_model_parallel_rank() * heads // ranks  # where heads are fewer than ranks, several have one
    return _Layer(extract_layer_index(name), group, module, heads, slice(first, first + own))
