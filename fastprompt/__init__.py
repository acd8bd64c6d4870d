"""fastprompt: soft prompts for frozen language models, run once per batch."""

from .accelerate import accelerate, restore
from .layout import Sequences
from .ops import prefix_attention, prompt_concat

__all__ = ["Sequences", "accelerate", "prefix_attention", "prompt_concat", "restore"]
