"""The oldest versions that fastprompt runs on; ``pyproject.toml`` asks for the same ones."""

import re

OLDEST = {"torch": "2.10", "transformers": "5.4", "peft": "0.20", "triton": "3.4"}


def is_older(version: str, oldest: str) -> bool:
    """Whether ``version``, such as "3.2.0+git1", comes before ``oldest``, such as "3.4"."""
    wanted, given = ([int(number) for number in re.findall(r"\d+", text)] for text in (oldest, version))
    return given[: len(wanted)] < wanted
