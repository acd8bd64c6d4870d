"""Who may import whom: arrows point one way, and PEFT is known in one folder."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fastprompt"
# A folder of the package, and what of the package its modules may import beside one another.
MAY_IMPORT = {
    "layout": {"checks", "kernels"},
    "ops": {"backends", "checks", "kernels", "layout", "native"},
    "methods": {"checks", "ops"},
    "hf": {"checks", "layout", "methods", "ops"},
    "peft": {"checks", "hf", "layout", "methods", "ops"},
}


def imported(path):
    """The modules that a file imports, relative ones by their full names."""
    package = ("fastprompt", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            front = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join((*front, *(node.module or "").split("."))).rstrip(".")
            yield from (f"{name}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_arrows_point_one_way(folder):
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "fastprompt":
                assert parts[1] in MAY_IMPORT[folder] | {folder}, f"{path.name} imports {name}"
            elif folder != "peft":
                assert parts[0] != "peft", f"{path.name} imports {name}"
