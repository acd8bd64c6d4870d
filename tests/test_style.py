"""What every file has to keep: lint, format, types, and sizes that a reader can hold in mind."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("fastprompt", "kernels", "csrc", "tests", "benchmarks", "examples", "docs")
SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cuh", ".md")
MOST_LINES, WIDEST = 400, 120


def source_files(*suffixes):
    found = [path for path in ROOT.iterdir() if path.suffix in suffixes]
    for folder in SOURCES:
        found += [path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("tool", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join)
def test_tools_find_nothing(tool):
    done = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_is_too_long():
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in source_files(*SUFFIXES)}
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_no_line_is_too_wide():
    """Rows of a table in markdown cannot be broken."""
    wide = []
    for path in source_files(*SUFFIXES):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if len(line) > WIDEST and not line.startswith("|"):
                wide.append(f"{name_of(path)}:{number}")
    assert not wide


def unannotated(path):
    """The public functions and methods of a file that leave the type of an argument or of the result open."""
    tree = ast.parse(path.read_text())
    scopes = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_"))]
    for scope in scopes:
        for node in scope.body:
            if not isinstance(node, ast.FunctionDef) or is_private(node.name):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            typed = [argument.annotation for argument in arguments if argument.arg not in ("self", "cls")]
            if node.returns is None or None in typed:
                yield f"{name_of(path)}:{node.lineno} {node.name}"


def is_private(name):
    return name.startswith("_") and name != "__init__"


def is_backend(path):
    """Of an operator's modules ``api.py`` is the public one; the others are given what it has checked."""
    parts = path.relative_to(ROOT / "fastprompt").parts
    return parts[0] == "ops" and len(parts) == 3 and parts[2] != "api.py"


def test_public_functions_have_types():
    """Those of all modules; mypy looks into what has types."""
    modules = [path for path in sorted((ROOT / "fastprompt").rglob("*.py")) if not is_backend(path)]
    assert not [found for path in modules for found in unannotated(path)]
