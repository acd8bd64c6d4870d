"""The operators. Each folder holds one: ``api.py`` is its public face, ``reference.py`` its definition."""

from .multitask_prompt.api import multitask_prompt
from .prefix_attention.api import prefix_attention
from .prompt_concat.api import prompt_concat
from .prompt_lstm.api import prompt_lstm

__all__ = ["multitask_prompt", "prefix_attention", "prompt_concat", "prompt_lstm"]
