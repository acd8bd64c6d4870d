"""Tests of what older releases of a package do not do."""

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import pytest

from fastprompt.versions import is_older


def needs(package: str, release: str, lack: str) -> pytest.MarkDecorator:
    """Skip a test where ``package`` is older than ``release``; ``lack`` is what those releases cannot do."""
    reason = f"{package} before {release} {lack}"
    return pytest.mark.skipif(is_older(version(package), release), reason=reason)


def cases(values: Iterable[Any], marks: Mapping[Any, pytest.MarkDecorator]) -> list[Any]:
    """What to parametrize a test by: ``values``, those in ``marks`` marked."""
    return [pytest.param(value, marks=marks[value]) if value in marks else value for value in values]


needs_t5 = needs("transformers", "5.15", "computes T5's attention in code of its own")
needs_states = needs("transformers", "5.21", "has no interface by which layers are given a state")
