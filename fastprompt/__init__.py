"""fastprompt: soft prompts for frozen language models, run once per batch."""

__all__ = [
    "MultitaskPromptTuning",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "Sequences",
    "SoftPromptModel",
    "Template",
    "accelerate",
    "distillation_loss",
    "ensemble_vote",
    "multitask_prompt",
    "patch_attention",
    "prefix_attention",
    "prefix_of_text",
    "prompt_concat",
    "prompt_lstm",
    "restore",
    "unpatch_attention",
]

try:
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
    from .ops import multitask_prompt, prefix_attention, prompt_concat, prompt_lstm
    from .peft.accelerate import accelerate, restore
    from .peft.model import SoftPromptModel
except Exception as error:
    # `fastprompt doctor` has to run where a requirement is missing or broken; every name below then says why it is.
    _problem = error

    def __getattr__(name):
        if name in __all__:
            raise ImportError(f"{_problem} (`fastprompt doctor` says what to install)") from _problem
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
