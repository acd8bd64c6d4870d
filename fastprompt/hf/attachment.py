"""What attaching changes in a model, and its exact undoing.

A model is sent to prefix_attention by ``config._attn_implementation``. The config object may belong to other models
too, so this one gets a copy. Several users may be attached to one model (two adapters on one base,
``patch_attention``): the record of what was changed stands in the model, counts them, and the last one to leave undoes
it.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .attention import IMPLEMENTATIONS
from .masks import UnsupportedAttention
from .mlp import GATED_MLPS
from .norms import NORMS
from .own_attention import patch_own_attention, unpatch_own_attention
from .positions import RELATIVE_ATTENTION
from .recurrent import MIXERS
from .rotary import ROTARY

_RECORD = "_fastprompt_attachment"
REPLICATE = "_replicate_for_data_parallel"  # the method by which nn.DataParallel copies a module
_OURS = {before: name for name, before in IMPLEMENTATIONS.items()}
_FOR_PACKED_ROWS = (GATED_MLPS, NORMS, MIXERS, RELATIVE_ATTENTION, ROTARY)


class _Record:
    """The configs of a model before and while its attention is switched."""

    def __init__(self) -> None:
        self.users: dict[object, bool] = {}  # user -> does it run packed rows?
        self.replaced: list[tuple[Any, Any, Any]] = []  # (module, its config before, its config meanwhile)
        self.roots: list[Any] = []  # the configs meanwhile
        self.unchanged: Any = None  # what they would still equal had nobody changed them
        self.complete = False

    def __setstate__(self, state):
        vars(self).update(state, complete=False)  # a pickle brings layers back unpatched


def attach(model: PreTrainedModel, user: object, packs: bool = False) -> None:
    """Make ``model`` run on prefix_attention inside of ``running`` blocks; :func:`detach` undoes it.

    Args:
        model: a Hugging Face model.
        user: who asks; a plain ``object()`` to name in :func:`detach`.
        packs: does it run packed rows? Then layers with a state run these, gated MLPs keep less for their backward, and
            norms and rotary embeddings pass over their rows once.

    Raises:
        UnsupportedAttention: the model's present attention is not one that can be handed back to.
    """
    record = model.__dict__.get(_RECORD)
    if record is None:
        copies: dict[int, Any] = {}
        roots = copy.deepcopy(_roots(model), copies)
        configs = [(module, module.__dict__.get("config")) for module in model.modules()]
        found = [(module, config, copies[id(config)]) for module, config in configs if id(config) in copies]
        _check(config for _, config, _ in found)
        record = _Record()
        record.replaced, record.roots = found, roots
        model.__dict__[_RECORD] = record
        model.__dict__[REPLICATE] = refuse_replicas
    record.users[user] = packs
    if record.unchanged is None:
        for module, _, own in record.replaced:
            module.config = own
        _switch(model)
        record.unchanged = copy.deepcopy(record.roots)
    record.complete = False
    attach_again(model)


def is_attached(model: PreTrainedModel) -> bool:
    """Does ``model`` still run on prefix_attention? ``set_attn_implementation`` may have changed that."""
    record = model.__dict__.get(_RECORD)
    return record is not None and record.complete and model.config._attn_implementation in IMPLEMENTATIONS


def attach_again(model: PreTrainedModel) -> None:
    """Make complete what :func:`is_attached` misses."""
    record = model.__dict__[_RECORD]
    _check(_configs(model))
    _switch(model)
    patch_own_attention(model)
    if any(record.users.values()):
        for patch in _FOR_PACKED_ROWS:
            patch.apply(model)
    record.complete = True


def detach(model: PreTrainedModel, user: object) -> None:
    """Undo :func:`attach` for one user, whole or interrupted; the last one's leaving undoes it for the model.

    Every module then gets the config object back that it had. If the config was changed meanwhile, the changes count:
    the model keeps its own copy.
    """
    record = model.__dict__.get(_RECORD)
    if record is None:
        return
    record.users.pop(user, None)
    if not any(record.users.values()):
        _unpatch(model)
    if record.users:
        return
    unpatch_own_attention(model)
    changed = record.unchanged is not None and not all(map(_same, record.roots, record.unchanged))
    _switch_back(model)
    if not changed:
        for module, config, own in record.replaced:
            if module.__dict__.get("config") is own:
                module.config = config
    model.__dict__.pop(_RECORD, None)
    model.__dict__.pop(REPLICATE, None)


@contextmanager
def suspended(model: PreTrainedModel) -> Iterator[None]:
    """While the block runs, an attached model computes as it did before, whoever is attached to it."""
    try:
        _switch_back(model)
        unpatch_own_attention(model)
        _unpatch(model)
        yield
    finally:
        attach_again(model)


def _unpatch(model):
    for patch in _FOR_PACKED_ROWS:
        patch.undo(model)


def refuse_replicas(*args: Any) -> NoReturn:
    """In place of a module's method :data:`REPLICATE`.

    Raises:
        NotImplementedError: always; a replica would run parts of the module that it was made of, in another thread.
    """
    raise NotImplementedError(
        "nn.DataParallel cannot copy a model that fastprompt runs: start one process a device with torchrun "
        "(DistributedDataParallel), or let the script see one device"
    )


def _same(config, other):
    """Do two configs hold the same, attention implementations included, which their own comparison passes over?"""
    mine, theirs = vars(config), vars(other)
    if mine.keys() != theirs.keys():
        return False
    for name, value in mine.items():
        if isinstance(value, PreTrainedConfig):
            if not _same(value, theirs[name]):
                return False
        elif value != theirs[name]:
            return False
    return True


def _roots(model):
    """The model's config, and others of its kind in it: T5's encoder and decoder have one each, made of it."""
    kind, found = type(model.config), {id(model.config): model.config}
    for module in model.modules():
        config = module.__dict__.get("config")
        if type(config) is kind:
            found[id(config)] = config
    return list(found.values())


def _configs(model):
    """The config objects of a model's modules that belong to the model's own, each once."""
    known = {}
    copy.deepcopy(_roots(model), known)
    configs = {id(config): config for config in (module.__dict__.get("config") for module in model.modules())}
    return [config for key, config in configs.items() if config is not None and key in known]


def _check(configs):
    for config in configs:
        name = config._attn_implementation
        if name not in _OURS and name not in IMPLEMENTATIONS:
            raise UnsupportedAttention(f"attention implementation {name!r} is not one of {sorted(_OURS)}")


def _switch(model):
    for config in _configs(model):
        # The public setter would also overwrite sub-configs, which may run on something else.
        config._attn_implementation_internal = _OURS.get(config._attn_implementation, config._attn_implementation)


def _switch_back(model):
    for config in _configs(model):
        before = IMPLEMENTATIONS.get(config._attn_implementation)
        if before is not None:
            config._attn_implementation_internal = before


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without autocast for a while; every module gets its own flag back.

    And what else a run changed in it for good: BigBird's attention becomes another one at the first short row, rotary
    frequencies, routers and others remember the batch before.

    4-bit layers of bitsandbytes are in training mode meanwhile: on some CPUs the first evaluation repacks their weights
    for good, and no gradient passes through them afterwards. What they compute is the same in both modes.
    """
    modules = list(model.modules())
    attributes = [(found, dict(found)) for module in modules for found in _attributes(module)]
    try:
        for module in modules:
            module.training = hasattr(module, "quant_state")
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        try:
            _give_back(attributes)
        except BaseException:  # Ctrl-C in the middle of it
            _give_back(attributes)
            raise


def _attributes(module):
    """Where the attributes of a module stand, its weights apart."""
    return vars(module), module._modules, module._buffers


def _give_back(attributes):
    """Make attributes what they were, but for those of libraries and those that attaching changes."""
    for found, before in attributes:
        ours = {name for name in (*found, *before) if name.startswith("_") or name in ("config", "forward")}
        for name in found.keys() - before.keys() - ours:
            del found[name]
        found.update({name: x for name, x in before.items() if name not in ours and found.get(name, found) is not x})
