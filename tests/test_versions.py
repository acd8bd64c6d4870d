"""The oldest versions are stated in ``fastprompt/versions.py``; pyproject.toml and setup.py state the same ones."""

import re
from pathlib import Path

import pytest

from fastprompt.versions import OLDEST, is_older

ROOT = Path(__file__).parents[1]


def floors(text):
    """Every lower bound in a pyproject.toml, by package."""
    found = {}
    for name, version in re.findall(r'"([\w-]+)>=([\d.]+)', text):
        found.setdefault(name, []).append(version)
    return found


def test_pyproject_asks_for_the_oldest_versions():
    asked = floors((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    runs, tests = asked["triton"]  # whose interpreter the tests need
    assert runs == OLDEST["triton"] and not is_older(tests, runs)
    assert all(asked[name] == [OLDEST[name]] for name in ("torch", "transformers", "peft"))


def test_the_libraries_are_compiled_for_the_oldest_torch():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert ".".join(re.search(r"OLDEST_TORCH\b.*?= \((\d+), (\d+)\)", setup).groups()) == OLDEST["torch"]


@pytest.mark.parametrize(
    "version, older",
    [
        ("3.3.1", True),
        ("3.4", False),
        ("3.4.0", False),
        ("3.10.0+git1", False),
        ("3.4rc1", False),
        ("4.0.0rc1", False),
        ("2.99", True),
    ],
)
def test_versions_are_compared_as_numbers(version, older):
    assert is_older(version, "3.4") == older
