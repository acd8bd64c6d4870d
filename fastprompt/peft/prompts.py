"""The prompt of an adapter, as its encoder gives it now."""

import os
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, PeftModelForCausalLM, PeftType
from transformers import Cache, PreTrainedModel

from ..hf.attachment import evaluation_mode
from ..hf.compiled_prompts import checked_task, prompt_of_method
from ..hf.prompt_state import Prompt
from ..hf.shared_state import SharedState
from . import checkpoint
from .adapter import is_prefix


def is_peft_model(model: object) -> bool:
    """Is it a model with PEFT's adapters?"""
    return isinstance(model, PeftModel)


@torch.no_grad()
def prompt_of_adapter(model: PeftModel, adapter_name: str | None = None, task_id: int | None = None) -> Prompt:
    """The prompt of an adapter of a PEFT model, accelerated or not; in evaluation mode.

    Args:
        model: a causal LM of PEFT's.
        adapter_name: one of its adapters; None: the active one.
        task_id: the task, of an adapter of Multitask Prompt Tuning; None for every other.

    Raises:
        TypeError: another model, or an adapter that learns no prompt.
        ValueError: no such adapter or task.
    """
    if not isinstance(model, PeftModelForCausalLM):
        raise TypeError(f"model must be a causal LM of PEFT's, got {type(model).__name__}")
    name = model.active_adapter if adapter_name is None else adapter_name
    if name not in model.peft_config:
        raise ValueError(f"adapter_name must be one of {sorted(model.peft_config)}, got {name!r}")
    config: Any = model.peft_config[name]
    kind = PeftType(config.peft_type)
    if not config.is_prompt_learning:
        raise TypeError(f"adapter_name must name an adapter that learns a prompt, got {name!r}, {kind.value}")
    has_tasks = kind == PeftType.MULTITASK_PROMPT_TUNING
    task = torch.tensor([checked_task(task_id, config.num_tasks if has_tasks else 1, f"the adapter {name!r}")])
    active, base = model.active_adapter, cast(PreTrainedModel, model.base_model)
    try:
        model.active_adapter = name
        with evaluation_mode(model):
            found: Any = model.get_prompt(batch_size=1, task_ids=task if has_tasks else None)
    finally:
        model.active_adapter = active
    if not is_prefix(config):
        return Prompt(method_name(kind.value), rows=found[0, : config.num_virtual_tokens])
    if not isinstance(found, Cache):
        raise ValueError(f"model must take its prefix as a cache, got a {type(found).__name__}")
    return Prompt(method_name(kind.value), shared=SharedState.of_cache(found, base.config))


def prompt_of_folder(base: PreTrainedModel, folder: str | os.PathLike[str], task_id: int | None = None) -> Prompt:
    """The prompt in an adapter's folder, written by PEFT or by us; ``base`` gets no wrapper.

    Raises:
        FileNotFoundError, ValueError: no adapter there, none of a prompt, or no such task.
    """
    return prompt_of_method(base, checkpoint.load(Path(folder)).to(base.device), task_id)


def method_name(peft_type: str) -> str:
    """``P_TUNING`` -> ``p-tuning``."""
    return peft_type.lower().replace("_", "-")
