"""What pyproject.toml cannot say: the libraries of C++ and CUDA, and ``kernels/`` installed inside the package.

``kernels/`` at the top level would collide with the PyPI package of that name, which transformers imports.

A library is compiled where its compiler and torch's headers are found, and left out where not: an installation never
fails for it, and ``fastprompt doctor`` says what is missing. That of CUDA is tried where torch is a build with CUDA.
torch itself is never imported, nor needed in an isolated build: its headers are looked for in the environment that is
installed into. The libraries use torch's stable C interface and nothing of Python's, so that one build runs on all
versions of both; ``fastprompt/native.py`` loads them.
"""

import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, PlatformError
from setuptools.modified import newer_group

NAME, CUDA_NAME = "fastprompt._cpu", "fastprompt._cuda"
OLDEST_TORCH, OLDEST_PYTHON = (2, 10), "cp310"
MACROS = [("TORCH_TARGET_VERSION", hex(OLDEST_TORCH[0] << 56 | OLDEST_TORCH[1] << 48))]
FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]

# By the end of a file's name; no other file may assume more than the architecture's minimum.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # that GCC finds in headers of its own
X86 = {"_avx2": AVX2, "_avx512": AVX512, "_avx512_bf16": [*AVX512, "-mavx512bf16"]}


class BuildLibrary(build_ext):
    """Compile the files side by side, each with the flags of its instruction set; no library rather than an error."""

    def run(self):
        in_place = self.inplace
        try:
            super().run()
        except (BaseError, CCompilerError, OSError) as error:
            self.warn(f"no C++ kernels: {error}")
            for folder in [self.build_lib, "."] if in_place else [self.build_lib]:
                Path(folder, self.get_ext_filename(NAME)).unlink(missing_ok=True)  # of an earlier build
            self.extensions = self.distribution.ext_modules = []

    def build_extension(self, ext):
        if os.name != "posix":
            raise PlatformError("they are not built on this system")
        if ext.name == CUDA_NAME:
            return self.build_cuda(ext)
        torch, macros = find_torch(), [*MACROS]
        x86 = X86 if platform.machine().lower() in ("x86_64", "amd64") else {}
        if x86:
            macros.append(("FASTPROMPT_X86", "1"))

        def compile_one(source):
            (result,) = self.compiler.object_filenames([source], output_dir=self.build_temp)
            if self.force or newer_group([source, *ext.depends], result):
                suffix = max((s for s in X86 if Path(source).stem.endswith(s)), key=len, default=None)
                flags = FLAGS + ([] if self.debug else ["-g0"]) + (x86[suffix] if suffix else [])
                self.compiler.compile([source], self.build_temp, macros, [str(torch / "include")], extra_postargs=flags)
            return result

        sources = [s for s in ext.sources if x86 or not Path(s).stem.endswith(tuple(X86))]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        # torch has loaded libtorch_cpu by then, so its name is enough and no path of this machine is kept.
        # The C++ runtime first: libtorch_cpu exports some of its functions, too, and another torch may not.
        runtime = ["stdc++"] if sys.platform == "linux" else []
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=[*runtime, "torch_cpu"],
            library_dirs=[str(torch / "lib")],
            target_lang="c++",
        )

    def build_cuda(self, ext):
        torch, library = find_torch(), self.get_ext_fullpath(ext.name)
        if not self.force and not newer_group([*ext.sources, *ext.depends], library):
            return
        self.mkpath(str(Path(library).parent))
        nvcc, flags = find_nvcc(), Path("csrc/cuda/nvcc.txt").read_text().split()
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
        flags = [
            f for f in flags if "code=" not in f or re.search(r"code=(sm_\d+)", f)[1] in known
        ]  # an older nvcc has fewer
        flags += ["-shared", "-Xcompiler=-fPIC,-fvisibility=hidden", f"--threads={os.cpu_count()}", "-DUSE_CUDA"]
        flags += [f"-D{name}={value}" for name, value in MACROS]
        paths = [f"-I{torch / 'include'}", f"-L{torch / 'lib'}"]
        self.spawn([nvcc, *flags, *paths, *ext.sources, "-ltorch_cuda", "-ltorch_cpu", "-o", library])


class Wheel(bdist_wheel):
    """Tagged after the library is built, or not."""

    def run(self):
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


def find_torch():
    """The folder of torch where the package goes; an isolated build hides it from sys.path, not from sysconfig."""
    paths = [*sys.path, *(sysconfig.get_path(name) for name in ("purelib", "platlib")), site.getusersitepackages()]
    for path in paths:
        if Path(path, "torch/include/torch/csrc/stable/library.h").is_file():
            return Path(path, "torch")
    raise PlatformError("torch is not installed (its headers are needed)")


def find_nvcc():
    """nvcc, if there is one and torch is a build with CUDA."""
    folders = [f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    try:
        has_cuda = (find_torch() / "lib/libtorch_cuda.so").is_file()
    except PlatformError:
        return None
    return shutil.which("nvcc", path=os.pathsep.join([*folders, os.environ.get("PATH", "")])) if has_cuda else None


def library(name, folder, **options):
    files = {
        suffix: sorted(str(p) for p in Path(folder).glob(f"*{suffix}"))
        for suffix in (".cpp", ".cu", ".h", ".cuh", ".txt")
    }
    sources, others = files.pop(".cpp") + files.pop(".cu"), sum(files.values(), [])
    return Extension(name, sources, py_limited_api=True, depends=["setup.py", *others], **options)


kernels = [f"fastprompt.{name}" for name in find_packages(include=["kernels", "kernels.*"])]
libraries = [library(NAME, "csrc/cpu")]
if find_nvcc():
    libraries.append(library(CUDA_NAME, "csrc/cuda", optional=True))

setup(
    packages=[*find_packages(include=["fastprompt", "fastprompt.*"]), *kernels],
    package_dir={"fastprompt.kernels": "kernels"},
    package_data={"fastprompt.kernels.prefix_attention": ["tuned.json"]},  # where benchmarks/gpu/tune.py has written it
    ext_modules=libraries,
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": OLDEST_PYTHON}},
)
