"""generate of an accelerated model: its prompts are compiled once, and every row stands behind its own."""

import inspect
from typing import Any

import torch
from peft import PeftModel, PeftModelForCausalLM, PeftType

from ..hf.cache_names import CACHE_NAMES
from ..hf.interventions import NotAsked
from ..hf.per_layer import searching_part
from ..hf.request import beside, tokens_of
from .adapter import is_prefix
from .prompts import prompt_of_adapter


def generate(model: PeftModel, state: Any, *args: Any, **kwargs: Any) -> Any:
    """``PeftModel.generate``, with the rows of each adapter's prompt run once, and ``adapter_names`` row by row.

    What cannot be done so takes PEFT's own, and one warning says why; and so, without one, does a padded batch without
    ``adapter_names``: PEFT's forward counts the padding between prompt and text as positions, in training (GRPO) too.
    Where PEFT's own raises, behind prompts of Gemma 4's E models, each row of such a batch gives what it gives alone.

    Args:
        model: the model.
        state: what it remembers; the other arguments are those of PEFT's generate.

    Raises:
        ValueError: ``adapter_names`` that cannot be honoured.
        NotImplementedError: what cannot be done so, where PEFT's own raises.
    """
    original = state.original(model, "generate")
    kwargs = beside(tokens_of(kwargs), kwargs)
    names = kwargs.get("adapter_names")
    prompts = isinstance(model, PeftModelForCausalLM) and model.active_peft_config.is_prompt_learning
    if not prompts or (names is None and _is_left_to_peft(model, state, kwargs)):
        return original(*args, **kwargs)
    try:
        run = _prepared(model, state, args, kwargs)
    except (ValueError, TypeError, NotImplementedError) as reason:
        if names is not None:
            raise ValueError(f"adapter_names needs compiled prompts, but {reason}") from None
        if not model._adapters_disabled and _peft_raises(model):
            raise NotImplementedError(
                f"PEFT does not generate behind a prompt from a {type(model.base_model).__name__}, which looks "
                f"embeddings up by token id in every layer, nor does fastprompt: {reason}"
            ) from None
        state.tell(f"fastprompt runs PEFT's own generate: {reason}")
        return original(*args, **kwargs)
    try:
        with state.compiled.watched(model.base_model):
            return run()
    except NotAsked:
        return generate(model, state, *args, **kwargs)


def _is_left_to_peft(model, state, given):
    """Is a call without ``adapter_names`` one that PEFT's own generate is meant for? Not a second turn."""
    if model._adapters_disabled:
        return True
    if _peft_raises(model):
        return False
    if state.heads != "text":
        return True
    mask, goes_on = given.get("attention_mask"), any(given.get(name) is not None for name in CACHE_NAMES)
    return mask is not None and not goes_on and not bool(torch.as_tensor(mask).all())


def _peft_raises(model):
    """Does PEFT hand the base model embeddings whose token ids it searches for, and finds none of a prompt?"""
    return not is_prefix(model.active_peft_config) and searching_part(model.base_model) is not None


def _prepared(model, state, args, kwargs):
    """The call, ready to run. Raises what keeps it from that."""
    if model._adapters_disabled:
        raise ValueError("the adapters are disabled")
    base: Any = model.base_model
    mixed = state.compiled.mixed(base)
    options = dict(kwargs)
    names, task_ids = options.pop("adapter_names", None), options.pop("task_ids", None)
    positional = list(inspect.signature(base.generate).parameters)
    options.update(zip(positional, args))
    ids = options.pop("inputs", None)
    ids = options.pop("input_ids", None) if ids is None else ids
    if ids is None:
        raise ValueError("input_ids are not given")
    mask = options.pop("attention_mask", None)
    if any(options.get(name) is not None for name in CACHE_NAMES):
        return mixed.prepare(None, ids, mask, **options)
    keys = _keys(model, len(ids), names, task_ids)
    of_rows = [name for name, _ in keys if not is_prefix(model.peft_config[name])]
    if of_rows and not mixed.takes_prompts:
        raise NotImplementedError(f"a {type(base).__name__} looks more up by token id than embeddings")
    state.compiled.keep_only(lambda key: key[0] in model.peft_config)
    rows = state.compiled.states(
        base,
        keys,
        lambda key: model.prompt_encoder[key[0]],
        lambda key: prompt_of_adapter(model, *key),
        keep=not model.training,
    )
    return mixed.prepare(rows, ids, mask, prompts=keys, **options)


def _keys(model, batch, names, task_ids):
    """The adapter and the task of each row."""
    if names is None:
        names = [model.active_adapter] * batch
    if len(names) != batch:
        raise ValueError(f"it must have one entry for each of the {batch} rows, got {len(names)}")
    if unknown := sorted(set(names) - set(model.peft_config)):
        raise ValueError(f"it must be of {sorted(model.peft_config)}, got {unknown}")
    tasks = [None] * batch if task_ids is None else torch.as_tensor(task_ids).reshape(-1).tolist()
    if len(tasks) not in (1, batch):
        raise ValueError(f"task_ids must have one entry for each of the {batch} rows or one for all, got {len(tasks)}")
    tasks = tasks * (batch if len(tasks) == 1 else 1)
    has_tasks = {name: model.peft_config[name].peft_type == PeftType.MULTITASK_PROMPT_TUNING for name in set(names)}
    return [(name, task if has_tasks[name] else None) for name, task in zip(names, tasks)]
