"""The methods: modules that produce prompts. They may use the operators, and know nothing of Hugging Face.

All have ``num_prompts`` N and ``num_virtual_tokens`` P, and calling one gives its prompts. The methods at the input,
which are :class:`PromptTuning`, :class:`PTuning` and :class:`MultitaskPromptTuning`, also have ``token_dim`` D and give
``[N * P, D]``; :class:`PrefixTuning` gives keys and values of every layer, ``[L, 2, N, P, Hkv, Dh]``.
"""

from .multitask_prompt_tuning import MultitaskPromptTuning, distillation_loss
from .p_tuning import PTuning
from .prefix_tuning import PrefixTuning
from .prompt_tuning import PromptTuning, ensemble_vote

__all__ = ["MultitaskPromptTuning", "PTuning", "PrefixTuning", "PromptTuning", "distillation_loss", "ensemble_vote"]
