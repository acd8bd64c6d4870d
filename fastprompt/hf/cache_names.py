"""What models call their cache: transformers 5.24 renamed ``past_key_values`` to ``cache``, wherever it is named."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # the last in models without attention
_OF_OUTPUTS = {field.name for field in fields(BaseModelOutputWithPast)}
# The name in this transformers.
CACHE_NAME = next(name for name in CACHE_NAMES if name in _OF_OUTPUTS)


def cache_argument(forward: Callable[..., Any], cache: Any) -> dict[str, Any]:
    """``{name: cache}``, as ``forward`` names it: code that comes with a model may keep to the other name."""
    parameters = inspect.signature(forward).parameters
    names = [name for name in (CACHE_NAME, *CACHE_NAMES) if name in parameters]
    return {names[0] if names else CACHE_NAME: cache}


def cache_in(given: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments or in a model's output, under either name; None if there is none."""
    return next((given[name] for name in given if name in CACHE_NAMES and given[name] is not None), None)
