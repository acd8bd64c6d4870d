"""The state dict of a SoftPromptModel: what trains. The frozen model is its owner's, and is loaded by him.

A checkpoint of transformers' Trainer or of Accelerate is then as small as the prompts are. A state that holds the
frozen model, too, is loaded as any other.
"""

from typing import Any

from torch import nn

HEADS = {"score", "classifier", "qa_outputs"}


def is_head(name: str) -> bool:
    """Does a parameter of a base model belong to a head that trains along?"""
    return name.split(".")[0] in HEADS


def keep_what_trains(model: nn.Module) -> None:
    """From now on ``model.state_dict()`` leaves out what is frozen of ``model.base``, and loading does not miss it."""
    model.register_state_dict_post_hook(_drop_frozen)
    model.register_load_state_dict_post_hook(_do_not_miss_frozen)


def _drop_frozen(model: Any, state: Any, prefix: str, metadata: Any) -> None:
    trained = {prefix + name for name, frozen in _parameters(model) if not frozen}
    for name in list(state):
        if name.startswith(f"{prefix}base.") and name not in trained:  # quantised weights have more than parameters
            del state[name]


def _do_not_miss_frozen(model: Any, incompatible: Any) -> None:
    # In front of the names stands the prefix of what the model is a part of, which is not known here.
    frozen = [name for name, frozen in _parameters(model) if frozen]
    frozen += [f"base.{name}" for name, _ in model.base.named_buffers(remove_duplicate=False)]
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if not name.endswith(tuple(frozen))]


def _parameters(model):
    """The base's parameters: (name in the model, is it frozen?)."""
    for name, parameter in model.base.named_parameters(remove_duplicate=False):
        yield f"base.{name}", not parameter.requires_grad and not is_head(name)
