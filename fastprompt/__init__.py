"""fastprompt: soft prompts for frozen language models, run once per batch."""

__all__ = [
    "PromptTuning", "Sequences", "SoftPromptModel", "accelerate", "multitask_prompt", "patch_attention",
    "prefix_attention", "prompt_concat", "prompt_lstm", "restore", "unpatch_attention",
]

try:
    from .accelerate import accelerate, restore
    from .hf.model import SoftPromptModel
    from .hf.patch import patch_attention, unpatch_attention
    from .layout import Sequences
    from .methods import PromptTuning
    from .ops import multitask_prompt, prefix_attention, prompt_concat, prompt_lstm
except Exception as error:
    # `fastprompt doctor` has to run where a requirement is missing or broken; every name below then says why it is.
    _problem = error

    def __getattr__(name):
        if name in __all__:
            raise ImportError(f"{_problem} (`fastprompt doctor` says what to install)") from _problem
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
