"""The wheel holds what the tree holds and, with a compiler, the C++ library; it is built without importing torch."""

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
COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0]) if os.name == "posix" else None


def python(*arguments, **options):
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def copy_tree(target):
    for name in ("fastprompt", "kernels", "csrc", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)


def without_optimisation(folder):
    """The default compiler, for a library that is looked at and not timed."""
    script = folder / "c++"
    script.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)


def without_nvcc(folder):
    """The variable by which an nvcc that fails is found first: the library of CUDA would take minutes."""
    script = folder / "bin/nvcc"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    return {"CUDA_HOME": str(folder)}


@pytest.mark.parametrize("compiles", [True, False], ids=["default compiler", "no compiler"])
def test_wheel(tmp_path, compiles):
    tree, wheels, site = tmp_path / "tree", tmp_path / "wheels", tmp_path / "site"
    tree.mkdir()
    copy_tree(tree)
    (tree / "kernels/prefix_attention/tuned.json").write_text("{}")  # as benchmarks/gpu/tune.py would
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise ImportError('torch was imported to build the package')")
    env = {**os.environ, "PYTHONPATH": str(blocked)}
    compiler = without_optimisation(tmp_path) if compiles and COMPILER else "/bin/false"
    env |= {"CC": compiler, "CXX": compiler} | without_nvcc(tmp_path)

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
    assert (info / "licenses/LICENSE").is_file() and (site / "fastprompt/kernels/prefix_attention/tuned.json").is_file()
    assert "fastprompt = fastprompt.cli:main" in (info / "entry_points.txt").read_text()

    libraries = [path.relative_to(site).as_posix() for path in site.rglob("*.so")]
    if compiles and COMPILER:
        assert "-cp310-abi3-" in wheel.name and libraries == ["fastprompt/_cpu.abi3.so"]
        check_library(site)
    else:
        assert wheel.name.endswith("-py3-none-any.whl") and not libraries

    header = (info / "METADATA").read_text().split("\n\n", 1)[0]
    core = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", header, flags=re.MULTILINE)
    assert sorted(core) == sorted(doctor.REQUIRED)

    show = "import fastprompt.kernels; print(fastprompt.kernels.__file__)"
    where = python("-c", show, cwd=site, env={**os.environ, "PYTHONPATH": str(site)})
    assert Path(where.strip()) == site / "fastprompt/kernels/__init__.py"


def check_library(site):
    """It loads, and asks torch for nothing but its stable C interface; where from, this machine alone knows."""
    show = (
        "import torch; from fastprompt import native; "
        "print(native.LIBRARY, native.missing, torch.ops.fastprompt.cpu_isa())"
    )
    library, missing, _ = python("-c", show, cwd=site, env={**os.environ, "PYTHONPATH": str(site)}).split()
    assert missing == "None" and Path(library).parent == site / "fastprompt"
    if shutil.which("nm") and sys.platform == "linux":
        listing = subprocess.run(
            ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
        ).stdout
        needed = [line.split()[1] for line in listing.splitlines() if line.split()[0] == "U"]
        unversioned = [name for name in needed if "@" not in name]  # others are of the C and C++ runtimes
        assert unversioned and all(name.startswith(("aoti_torch_", "torch_")) for name in unversioned)
    if shutil.which("readelf"):
        dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
        assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


@pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
def test_the_library_is_there():
    from fastprompt import native

    assert native.missing is None, "install the checkout first: pip install -e ."


def test_kernels_are_importable_from_the_editable_install():
    spec = find_spec("fastprompt.kernels")
    assert spec is not None, "install the checkout first: pip install -e ."
    assert Path(spec.origin) == ROOT / "kernels/__init__.py"


def test_public_names_are_found_where_they_stand():
    import fastprompt

    assert sorted(fastprompt.__all__) == sorted(fastprompt._MODULES)
    for name in fastprompt.__all__:
        assert getattr(fastprompt, name).__module__.startswith("fastprompt.")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        fastprompt.nothing  # noqa: B018
