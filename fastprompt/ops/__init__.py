"""The operators. Each folder holds one: ``api.py`` is its public face, ``reference.py`` its definition."""

from .gated_activation.api import gated_activation
from .linear_cross_entropy.api import linear_cross_entropy
from .multitask_prompt.api import multitask_prompt
from .prefix_attention.api import prefix_attention
from .prompt_concat.api import prompt_concat
from .prompt_lstm.api import prompt_lstm
from .rms_norm.api import rms_norm
from .rotary.api import rotary

__all__ = [
    "gated_activation",
    "linear_cross_entropy",
    "multitask_prompt",
    "prefix_attention",
    "prompt_concat",
    "prompt_lstm",
    "rms_norm",
    "rotary",
]
