"""What a model's structure says before anything is run: what is known not to pack, and what is random."""

import inspect
import types
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedModel
from transformers.utils.deprecation import deprecate_kwarg

# Layers whose tokens meet in attention only, and only in attention that transformers' masks describe.
_PACKS = {"full_attention", "sliding_attention", "attention", "moe", "mlp", "dense", "sparse"}
# Packed or refused by what its masks say.
_KNOWN_ELSEWHERE = {"chunked_attention"}
# Packed if the state that they keep is one of those below.
_WITH_STATE = {"linear_attention", "conv", "mamba", "mamba2", "hybrid", "hybrid_sliding"}
# Packed while no row sees more keys than an indexer chooses (indexers.py).
_INDEXED = {"indexed_attention"}
_LAYER_LISTS = ("layer_types", "layers_block_type", "block_types")
# What a layer calls to read and write a state, so that it can be given another one.
_STATE_METHODS = {"get_conv_state", "get_recurrent_state", "update_conv_state", "update_recurrent_state"}
# Before transformers 5.21 layers reach into their cache, some into one of their own, and can be given no other.
_STATES_CAN_BE_GIVEN = hasattr(Cache, "get_conv_state")
_STATE_NAMES = _STATE_METHODS if _STATES_CAN_BE_GIVEN else _STATE_METHODS | {"conv_states", "ssm_states"}
# The flag by which T5's attention says that it adds a bias by distance.
RELATIVE = "has_relative_attention_bias"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The part of a causal LM that turns embeddings into hidden states; the model itself if no part does."""
    table = model.get_input_embeddings()
    # get_decoder is the model itself in Llama 4, and its head in ModernBERT's decoder.
    for part in (model.get_decoder(), model.base_model, getattr(model, "model", None)):
        if isinstance(part, nn.Module) and part is not model and any(module is table for module in part.modules()):
            return part
    return model


def why_never_packed(
    base: PreTrainedModel, backbone: nn.Module, by_distance: bool = False, has_indexer: bool = False
) -> str | None:
    """The reason why rows of this model cannot be packed, as far as its parts tell; None if they do not.

    ``by_distance``: does attention see where tokens stand by their distance alone? ``has_indexer``: do indexers that
    are known choose the keys of some layers?
    """
    name = type(backbone).__name__
    if backbone is base and base.get_output_embeddings() is not None:
        return f"{name} has no part that is its backbone"
    with_state = outermost(backbone, keeps_state)
    if (reason := why_not_given(backbone)) is not None:
        return reason
    known = _PACKS | _KNOWN_ELSEWHERE | (_WITH_STATE if with_state else set()) | (_INDEXED if has_indexer else set())
    counts = not (with_state or by_distance or _takes_positions(backbone) or position_embeddings(backbone))
    if counts:
        return f"{name} takes no position_ids"
    for attribute in _LAYER_LISTS:
        kinds = getattr(backbone.config, attribute, None) or ()
        unknown = sorted({str(kind) for kind in kinds} - known)
        if unknown:
            return (
                f"{name} has layers of type {', '.join(unknown)}, through which one sequence would reach into the next"
            )
    images = (module for module in backbone.modules() if module is not backbone and _reads_no_text(module))
    understood = {part for module in (*with_state, *images) for part in module.modules()}
    for module in backbone.modules():
        carries = None if module in understood else _carries_state(module)
        if carries is not None:
            return f"{type(module).__name__} {carries}, through which one sequence would reach into the next"
    for module in backbone.modules():
        if getattr(module, "attention_type", None) == "block_sparse":
            return f"{type(module).__name__} attends to blocks, or to all that it sees, by the width of the batch"
    if getattr(base, "_is_stateful", False) and not with_state:
        return f"{type(base).__name__} carries a state from token to token"
    return None


def position_embeddings(backbone: nn.Module) -> list[nn.Module]:
    """The modules that can be told the positions which a backbone without ``position_ids`` counts itself (BART)."""
    if _takes_positions(backbone):
        return []
    tables = (module for module in backbone.modules() if isinstance(module, nn.Embedding))
    return [module for module in tables if module.padding_idx is None and _takes_positions(module)]


def tell_positions(module: nn.Module, positions: torch.Tensor) -> RemovableHandle:
    """Let one of :func:`position_embeddings` embed these, ``[R]``, in place of those that it would count."""
    signature = inspect.signature(module.forward)

    def tell(module, args, kwargs):
        return (), {**signature.bind(*args, **kwargs).arguments, "position_ids": positions}

    return module.register_forward_pre_hook(tell, with_kwargs=True)


def _takes_positions(module):
    return "position_ids" in inspect.signature(module.forward).parameters


def is_relative_attention(module: nn.Module) -> bool:
    """Is it attention that adds a bias by distance as T5's does?"""
    kind: Any = type(module)
    return callable(getattr(module, "compute_bias", None)) and {"compute_bias", RELATIVE} <= names_used(kind)


def is_encoder_decoder(base: nn.Module) -> bool:
    """Has a model an encoder and a decoder that attends to its states? UMT5's encoder alone has the config of both."""
    config: Any = getattr(base, "config", None)
    kind: Any = type(base)
    takes_both = "decoder_input_ids" in inspect.signature(kind.forward).parameters
    return takes_both and bool(getattr(config, "is_encoder_decoder", False))


def keeps_state(module: nn.Module) -> bool:
    """Does a module read and write a recurrent or convolution state through the cache that it is given?"""
    kind: Any = type(module)
    return bool(_STATE_NAMES & names_used(kind))


def why_not_given(model: nn.Module) -> str | None:
    """Why layers of a model cannot be given a state; None: they can, or keep none."""
    mixer = None if _STATES_CAN_BE_GIVEN else next(filter(keeps_state, model.modules()), None)
    return None if mixer is None else f"{type(mixer).__name__} cannot be given a state before transformers 5.21"


def outermost(model: nn.Module, condition: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """The modules that meet a condition, but for those inside of another one."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module not in inside and condition(module):
            found.append(module)
            inside.update(module.modules())
    return found


def _reads_no_text(module):
    """Is it an encoder of images or sound, which a batch of text does not reach?"""
    return isinstance(module, PreTrainedModel) and "text" not in module.input_modalities


def _carries_state(module):
    """What carries something from one token to others beside attention, or None."""
    if "expert_capacity" in vars(module):
        return "leaves tokens out beyond an expert's capacity"
    if isinstance(module, _CONVOLUTIONS) and any(size > 1 for size in module.kernel_size):
        return "is a convolution over tokens"
    return "is recurrent" if isinstance(module, nn.RNNBase) else None


@cache
def names_used(kind: type) -> set[str]:
    """The names of attributes that the methods of a module's class use."""
    names: set[str] = set()
    for parent in kind.__mro__:
        if parent is nn.Module:
            break
        for method in vars(parent).values():
            code = getattr(inspect.unwrap(method) if callable(method) else None, "__code__", None)
            names.update(() if code is None else code.co_names)
    return names


_WHOLE_FEATURES = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout)


class Survey(NamedTuple):
    """What a model's modules are at the moment.

    Attributes:
        draws: does it draw random numbers?
        otherwise: the first part that packed rows would draw from another distribution, or None.
        compiled: the parts that torch.compile runs.
    """

    draws: bool
    otherwise: str | None
    compiled: list[nn.Module]


def survey(model: Any) -> Survey:
    """What a model draws at random, and what of it is compiled: in one walk over its modules, once in every call, for
    adapters may be added, modes changed and layers compiled at any time.

    Dropout of single numbers is not drawn otherwise by packed rows: every row of a batch sees a prompt, and text it
    shares with others, whose numbers are dropped with the same probability as in the padded forward, and its own tokens
    draw their own mask. So the loss and the gradient of each row have the distribution they have there; rows that share
    a prompt share its mask.
    """
    config = getattr(model, "config", None)
    draws = config is not None and model.training and any(_is_dropout(*item) for item in vars(config).items())
    otherwise, compiled = None, []
    for part in model.modules():
        own = vars(part)
        if is_compiled(part):
            compiled.append(part)
        if not part.training:
            continue
        if isinstance(part, _DropoutNd) and part.p > 0:
            draws = True
            if isinstance(part, _WHOLE_FEATURES):
                otherwise = otherwise or f"{type(part).__name__}, which drops a feature of a whole row,"
        for name, value in own.items():
            if type(value) in (int, float) and value > 0:
                if "jitter" in name:
                    draws, otherwise = True, otherwise or f"{type(part).__name__}.{name} = {value}"
                draws = draws or _is_dropout(name, value)
    return Survey(draws, otherwise, compiled)


def is_compiled(part: nn.Module) -> bool:
    """Does torch.compile run this module, whatever it does with its parts?"""
    return vars(part).get("_compiled_call_impl") is not None or "_orig_mod" in part._modules


def is_transformed() -> bool:
    """Is a transform of torch.func at work (grad, vmap), whose tensors have no memory that a kernel could read?"""
    return torch._C._are_functorch_transforms_active()


def _is_dropout(name, value):
    return "drop" in name and type(value) is float and value > 0


def rope_limit(backbone: nn.Module) -> int | None:
    """The number of positions from which on rotary frequencies depend on the largest position of a call; None: never.

    Dynamic NTK scaling and LongRoPE choose them so, and padding counts.
    """
    limits = [_rope_limit(module) for module in backbone.modules()]
    return min((limit for limit in limits if limit is not None), default=None)


def _rope_limit(module):
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    if not any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds):
        return None
    lengths = _lengths(getattr(module, "original_max_seq_len", None))
    lengths += _lengths(getattr(getattr(module, "config", None), "rope_parameters", None))
    return min(lengths, default=0)


def _lengths(value):
    """The lengths in ``value``: a number, or rope parameters, of all layers or of each type of layer."""
    if isinstance(value, int):
        return [value]
    if not isinstance(value, dict):
        return []
    own = value.get("original_max_position_embeddings")
    return ([own] if own else []) + [n for x in value.values() if isinstance(x, dict) for n in _lengths(x)]


def row_limit(backbone: nn.Module) -> int | None:
    """The number of rows from which on a layer scales attention by a row's place in the batch; None: none does.

    Llama 4 counts rows where it means positions, in its layers without rotary embeddings.
    """
    modules: list[Any] = list(backbone.modules())
    scales = [
        int(module.floor_scale)
        for module in modules
        if getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True)
    ]
    return min(scales, default=None)


def has_own_forward(module: nn.Module) -> bool:
    """Has this one module another forward than its class? A pickle writes down that of the class."""
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


# What stands around a method that torch, or transformers for an old name of an argument, has decorated.
_DECORATIONS = {
    decorate(lambda new: new).__code__ for decorate in (torch.no_grad(), deprecate_kwarg("old", "0", new_name="new"))
}


def undecorated(method: types.FunctionType) -> types.FunctionType:
    """The function that is decorated with ``no_grad`` or ``deprecate_kwarg``; ``method`` itself if it is not."""
    return inspect.unwrap(method, stop=lambda function: function.__code__ not in _DECORATIONS)


def computes_the_same(function: Any, other: types.FunctionType) -> bool:
    """Has one function the code of another, whatever its variables, annotations and docstring are?"""
    return isinstance(function, types.FunctionType) and _computed_by(function.__code__) == _computed_by(other.__code__)


@cache
def _computed_by(code):
    constants = [x for x in code.co_consts if x is not None and not isinstance(x, str)]  # without a docstring
    return code.co_code, code.co_names, code.co_argcount, code.co_flags, constants


def is_plain_linear(module: nn.Module) -> bool:
    """Is it a frozen ``nn.Linear`` that may be replaced by its weight: no subclass, no hook?"""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is nn.Linear and not hooked and not any(p.requires_grad for p in module.parameters())
