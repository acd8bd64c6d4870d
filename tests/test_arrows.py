"""Who may import whom inside the package: arrows point one way, and each library stays where it belongs."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A part of the package -> the parts that it may import. What is not named is a part that may import everything.
ARROWS = {
    "checks": (),
    "versions": (),
    "native": (),
    "kernels": (),
    "backends": ("checks", "versions", "native", "kernels"),
    "layout": ("checks", "native", "kernels", "backends"),
    "ops": ("checks", "native", "kernels", "backends", "layout"),
    "methods": ("checks", "ops"),
    "hf": ("checks", "versions", "backends", "layout", "ops", "methods"),
    "peft": ("checks", "versions", "backends", "layout", "ops", "methods", "hf"),
    "integrations": (),
    "serving": ("checks", "versions", "backends", "layout", "ops", "methods", "hf", "peft"),
}
# A library -> the parts that may import it; the others may not.
LIBRARIES = {
    "peft": ("peft", "training", "doctor"),
    "transformers": ("hf", "peft", "serving", "training", "inspect"),
    "vllm": ("integrations",),
    "triton": ("kernels", "ops", "layout"),
}
# Inside ops/<operator> and layout: backends, none of which imports another; "reference" is the definition of all.
BACKENDS = ("cpu", "triton", "cuda", "composed")


def modules():
    """Dotted name -> file, of the package; ``kernels/`` is installed as ``fastprompt.kernels``."""
    found = {}
    for folder, prefix in ((ROOT / "fastprompt", "fastprompt"), (ROOT / "kernels", "fastprompt.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((prefix, *parts))] = path
    return found


MODULES = modules()


def imports_of(name):
    """Every module that a module imports, wherever in its text: full dotted names."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base


def part(name):
    """``fastprompt.hf.engine`` -> ``hf``; "" for the package itself."""
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("name", MODULES)
def test_imports_follow_the_arrows(name):
    own = part(name)
    if own not in ARROWS:
        return
    for imported in imports_of(name):
        if imported.split(".")[0] == "fastprompt":
            assert part(imported) in (own, *ARROWS[own]), f"{name} imports {imported}"


@pytest.mark.parametrize("name", MODULES)
def test_libraries_stay_where_they_belong(name):
    for imported in imports_of(name):
        library = imported.split(".")[0]
        assert part(name) in LIBRARIES.get(library, (part(name),)), f"{name} imports {imported}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.rpartition(".")[2] in BACKENDS])
def test_backends_do_not_import_one_another(name):
    package, _, own = name.rpartition(".")
    others = {f"{package}.{backend}" for backend in BACKENDS if backend != own}
    assert not others & set(imports_of(name))


def test_there_are_no_circles():
    graph = {name: sorted({i for i in imports_of(name) if i in MODULES and i != name}) for name in MODULES}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for imported in graph[name]:
            visit(imported)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)
