"""Is a model the one that a run was trained on? Told from its class, its sizes and a few of its weights."""

from typing import Any

import torch
from transformers import PreTrainedModel

from .errors import InputError

_SAMPLES = 64
_TOLERANCE = 0.5  # of the norm: another precision or quantisation stays far below, another model is near 1.4


@torch.no_grad()
def fingerprint(base: PreTrainedModel) -> dict[str, Any]:
    """What tells a model from others, as JSON values."""
    weight: Any = base.get_input_embeddings().weight
    flat = weight.detach().reshape(-1)
    places = torch.linspace(0, len(flat) - 1, _SAMPLES, dtype=torch.float64).long().to(flat.device)
    return {
        "class": type(base).__name__,
        "embeddings": list(weight.shape),
        "layers": getattr(base.config.get_text_config(), "num_hidden_layers", None),
        "sample": [float(f"{x:.4g}") for x in flat[places].float().tolist()],
    }


def check_base(base: PreTrainedModel, expected: dict[str, Any] | None, model: str) -> None:
    """Raise an `InputError` if ``base``, from ``model``, is another model than that of a fingerprint.

    Runs of earlier versions have none; nothing is checked then.
    """
    if expected is None:
        return
    found = fingerprint(base)
    for name, what in (("class", "is a"), ("embeddings", "has embeddings of shape"), ("layers", "has layers:")):
        if found[name] != expected[name]:
            raise InputError("model", f"{model!r} {what} {found[name]}; the run was trained on {expected[name]}")
    ours, theirs = torch.tensor(found["sample"]), torch.tensor(expected["sample"])
    if (ours - theirs).norm() > _TOLERANCE * theirs.norm():
        raise InputError("model", f"{model!r} has other weights than the model that the run was trained on")


@torch.no_grad()
def check_causal(base: PreTrainedModel, model: str) -> None:
    """Raise an `InputError` if what follows a token changes what ``base``, from ``model``, puts out for it."""
    ids = torch.tensor([[0, 1, 2], [0, 1, 3]], device=base.device)
    first, second = base(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0].float()
    if (first - second).abs().max() > 4 * torch.finfo(base.dtype).eps * first.abs().max():
        kind = f"a {type(base).__name__} whose tokens see those behind them"
        raise InputError("model", f"{model!r} is {kind}; expected a causal language model")
