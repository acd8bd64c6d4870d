"""fastprompt: soft prompts for frozen language models, run once per batch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .hf.patch import patch_attention, unpatch_attention
    from .hf.prefix import prefix_of_text
    from .hf.template import Template
    from .layout import Sequences
    from .methods import (
        MultitaskPromptTuning,
        PrefixTuning,
        PromptTuning,
        PTuning,
        distillation_loss,
        ensemble_vote,
    )
    from .ops.gated_activation.api import gated_activation
    from .ops.linear_cross_entropy.api import linear_cross_entropy
    from .ops.multitask_prompt.api import multitask_prompt
    from .ops.prefix_attention.api import prefix_attention
    from .ops.prompt_concat.api import prompt_concat
    from .ops.prompt_lstm.api import prompt_lstm
    from .ops.rms_norm.api import rms_norm
    from .ops.rotary.api import rotary
    from .peft.accelerate import accelerate, get_peft_model
    from .peft.model import SoftPromptModel
    from .peft.sharing import share_prefixes
    from .peft.state import restore
    from .peft.stats import StatsCallback, stats
    from .serving.bank import PromptBank
    from .serving.compile import CompiledPrompt, compile_prompt

__all__ = [
    "CompiledPrompt",
    "MultitaskPromptTuning",
    "PTuning",
    "PrefixTuning",
    "PromptBank",
    "PromptTuning",
    "Sequences",
    "SoftPromptModel",
    "StatsCallback",
    "Template",
    "accelerate",
    "compile_prompt",
    "distillation_loss",
    "ensemble_vote",
    "gated_activation",
    "get_peft_model",
    "linear_cross_entropy",
    "multitask_prompt",
    "patch_attention",
    "prefix_attention",
    "prefix_of_text",
    "prompt_concat",
    "prompt_lstm",
    "restore",
    "rms_norm",
    "rotary",
    "share_prefixes",
    "stats",
    "unpatch_attention",
]

# Where each of these names stands. They are imported when they are asked for: `fastprompt --help` needs no torch, and
# the operators need neither transformers nor PEFT.
_MODULES = {
    "CompiledPrompt": "serving.compile",
    "MultitaskPromptTuning": "methods",
    "PTuning": "methods",
    "PrefixTuning": "methods",
    "PromptBank": "serving.bank",
    "PromptTuning": "methods",
    "Sequences": "layout",
    "SoftPromptModel": "peft.model",
    "StatsCallback": "peft.stats",
    "Template": "hf.template",
    "accelerate": "peft.accelerate",
    "compile_prompt": "serving.compile",
    "distillation_loss": "methods",
    "ensemble_vote": "methods",
    "gated_activation": "ops",
    "get_peft_model": "peft.accelerate",
    "linear_cross_entropy": "ops",
    "multitask_prompt": "ops",
    "patch_attention": "hf.patch",
    "prefix_attention": "ops",
    "prefix_of_text": "hf.prefix",
    "prompt_concat": "ops",
    "prompt_lstm": "ops",
    "restore": "peft.state",
    "share_prefixes": "peft.sharing",
    "rms_norm": "ops",
    "rotary": "ops",
    "stats": "peft.stats",
    "unpatch_attention": "hf.patch",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # not above: it takes longer to import than all of the rest

        return version("fastprompt")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    except Exception as error:
        raise ImportError(f"{error} (`fastprompt doctor` says what to install)") from error
    globals()[name] = value  # found without a detour from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
