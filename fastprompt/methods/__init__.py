"""The methods: modules that produce prompts. They know neither kernels nor Hugging Face."""

from .prompt_tuning import PromptTuning

__all__ = ["PromptTuning"]
