"""A fingerprint of a frozen model: its config, and a hash over its weights."""

import hashlib
import json

import torch
from transformers import PreTrainedModel

# What a config says about where it came from, how it is run, or how it generates; none of it changes keys or values.
_PASSING = {
    "_name_or_path",
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "output_router_logits",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
_SAMPLE = 4096  # numbers of a weight that are hashed


def fingerprint(model: PreTrainedModel) -> str:
    """``<config>-<weights>``, 16 hexadecimal digits each: equal for equal models, different after any training.

    The first is a hash of what the config says about the architecture, without values that are the library's defaults.
    The second is one over the name, dtype and shape of every parameter and of every buffer that is saved, and over
    their numbers: all of them up to 4096, and of larger ones 4096, spread evenly. A change of a few numbers of a large
    weight can pass unseen; fine-tuning, rounding to another dtype and merging an adapter do not.

    Raises:
        ValueError: weights that are not in memory (offloaded).
    """
    weights = hashlib.sha256()
    for name, tensor in _saved(model):
        for part, x in _plain(name, tensor):
            if x.is_meta:
                raise ValueError(f"model must have its weights in memory, but {part} is offloaded")
            weights.update(f"{part} {x.dtype} {list(x.shape)}".encode())
            weights.update(_sample(x))
    return f"{_of_config(model)}-{weights.hexdigest()[:16]}"


def _of_config(model):
    said = json.dumps(_lasting(model.config.to_diff_dict()), sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _lasting(said):
    """A config's dictionary without what passes, in its parts as well."""
    if not isinstance(said, dict):
        return said
    return {str(key): _lasting(x) for key, x in said.items() if str(key) not in _PASSING}


def _saved(model):
    """Parameters, each once, and the buffers that are saved, by name; what trains along in front is none of them."""
    passing = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    found = dict(model.named_parameters())
    found.update((name, x) for name, x in model.named_buffers() if name not in passing)
    yield from sorted(found.items())


def _plain(name, tensor):
    """The plain tensors that a tensor is made of: itself, or those of a quantised one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor.detach()
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _plain(f"{name}.{part}", getattr(tensor, part))


def _sample(x):
    """The bytes of up to ``_SAMPLE`` numbers, spread evenly."""
    if not x.numel():
        return b""
    flat = x.reshape(-1) if x.is_contiguous() else x.contiguous().reshape(-1)
    if len(flat) > _SAMPLE:
        flat = flat[torch.linspace(0, len(flat) - 1, _SAMPLE, dtype=torch.float64, device="cpu").long().to(flat.device)]
    return flat.cpu().contiguous().view(torch.uint8).numpy().tobytes()
