"""The wheel holds exactly what the tree holds, and is built without torch, compiler or network."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastprompt import doctor

ROOT = Path(__file__).parents[1]


def python(*arguments, **options):
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def copy_tree(target):
    for name in ("fastprompt", "kernels", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)


@pytest.mark.parametrize("compiler", [None, "/bin/false"], ids=["default compiler", "no compiler"])
def test_wheel(tmp_path, compiler):
    tree, wheels, site = tmp_path / "tree", tmp_path / "wheels", tmp_path / "site"
    tree.mkdir()
    copy_tree(tree)
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise ImportError('torch was imported to build the package')")
    env = {**os.environ, "PYTHONPATH": str(blocked)}
    if compiler:
        env |= {"CC": compiler, "CXX": compiler}

    build = ["wheel", str(tree), "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(wheels)]
    python("-m", "pip", *build, env=env)
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (info,) = site.glob("fastprompt-*.dist-info")

    modules = {path.relative_to(ROOT) for path in (ROOT / "fastprompt").rglob("*.py")}
    modules |= {"fastprompt" / path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")}
    assert {path.relative_to(site) for path in site.rglob("*.py")} == modules
    assert {path.name for path in site.iterdir()} == {"fastprompt", info.name}
    assert (info / "licenses/LICENSE").is_file()
    assert "fastprompt = fastprompt.cli:main" in (info / "entry_points.txt").read_text()

    header = (info / "METADATA").read_text().split("\n\n", 1)[0]
    core = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", header, flags=re.MULTILINE)
    assert sorted(core) == sorted(doctor.REQUIRED)

    show = "import fastprompt.kernels; print(fastprompt.kernels.__file__)"
    where = python("-c", show, cwd=site, env={**os.environ, "PYTHONPATH": str(site)})
    assert Path(where.strip()) == site / "fastprompt/kernels/__init__.py"


def test_kernels_are_importable_from_the_editable_install():
    spec = find_spec("fastprompt.kernels")
    assert spec is not None, "install the checkout first: pip install -e ."
    assert Path(spec.origin) == ROOT / "kernels/__init__.py"
