"""What the configuration of an adapter says about where its virtual tokens stand."""

from peft import PeftConfig, PeftType, PromptLearningConfig


def is_prefix(config: PeftConfig) -> bool:
    """Does an adapter learn keys and values, and not rows?"""
    return config.peft_type in (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)


def rows_in_front(config: PromptLearningConfig) -> int:
    """P, the rows that an adapter puts in front of the text; 0 if it learns keys and values."""
    return 0 if is_prefix(config) else config.num_virtual_tokens
