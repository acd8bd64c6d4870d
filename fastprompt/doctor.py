"""``fastprompt doctor``: what is installed, which backend runs where and why, and what to install to get more.

Only the standard library is imported up front: a missing or broken package has to end as a finding, not a traceback.
"""

import importlib
import os
import platform
import re
import shutil
import sys
from importlib import metadata
from typing import Any

from .versions import OLDEST

REQUIRED = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "tqdm", "rich")
OPTIONAL = ("triton",)
# What `fastprompt train` and an accelerated PEFT script import.
MAIN_JOB = ("fastprompt.peft.accelerate", "fastprompt.training")
REINSTALL = "in a checkout of fastprompt: pip install --force-reinstall --no-deps ."
COMPILE = (
    "in a checkout of fastprompt: pip install --force-reinstall --no-deps --verbose . "
    "(which says why, if it fails again)"
)
Finding = tuple[str, str]  # a problem and its remedy
NOT_INSTALLED = "not installed"
NEEDS = "needs {}, which is not installed"

SIMD = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")


def main() -> int:
    """Print the report; 0 if soft prompts can be trained here, 1 if not."""
    errors: list[Finding] = []
    own_errors: list[Finding] = []
    hints: list[Finding] = []
    heading(f"fastprompt {distribution_version('fastprompt') or '(not installed)'}")
    show_versions(errors, hints)
    device_types = show_devices(hints)
    show_library(hints)
    show_operators(device_types, own_errors)
    check_main_job(own_errors)
    # Where a requirement is missing, what fails in fastprompt itself follows from it.
    errors = errors or own_errors

    heading("Findings")
    for label, findings in (("error", errors), ("hint", hints)):
        for problem, remedy in findings:
            row(label, problem, f"remedy: {remedy}")
    row("result", "soft prompts cannot be trained here" if errors else "soft prompts can be trained here")
    return 1 if errors else 0


def show_versions(errors: list[Finding], hints: list[Finding]) -> None:
    """Print the versions of all requirements."""
    heading("Versions")
    row("python", platform.python_version())
    ranges = required_ranges()
    if not ranges:
        hints.append(("fastprompt runs from source, so no version is checked", "pip install -e ."))
    for name in REQUIRED:
        wanted = ranges.get(name, "")
        module, problem = load(name)
        if problem:
            row(name, problem)
            if problem in map(NEEDS.format, REQUIRED):
                continue  # the missing one has an entry of its own
            force = "" if problem == NOT_INSTALLED else "--force-reinstall "
            errors.append((f"{name}: {problem}", f'pip install {force}"{name}{wanted}"'))
            continue
        version = version_of(module)
        row(name, version)
        if not fits(version, wanted):
            errors.append((f"{name} {version} is outside {wanted}", f'pip install "{name}{wanted}"'))
    for name in OPTIONAL:
        module, problem = load(name)
        row(name, f"{problem} (optional)" if problem else version_of(module))


def show_devices(hints: list[Finding]) -> list[str]:
    """Print the devices and return their types as torch names them."""
    heading("Devices")
    name, features = describe_cpu()
    row("cpu", name, f"{os.cpu_count()} logical cores", f"SIMD: {' '.join(features) or 'unknown'}")
    torch, problem = load("torch")
    if problem:
        return ["cpu"]
    try:
        row("", f"torch uses {torch.get_num_threads()} threads and {torch.backends.cpu.get_cpu_capability()}")
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except Exception as error:
        hints.append((f"torch cannot list its devices: {describe(error)}", "the driver or the torch build"))
        return ["cpu"]
    for index, gpu in enumerate(gpus):
        kind = gpu.gcnArchName if torch.version.hip else f"sm_{gpu.major}{gpu.minor}"
        row(f"cuda:{index}", f"{gpu.name}, {kind}, {gpu.total_memory / 2**30:.0f} GiB")
    if gpus:
        backends = load("fastprompt.backends")[0]
        missing = backends and backends.TRITON.missing()
        if missing:
            hints.append((missing, f'pip install "triton>={OLDEST["triton"]}"'))
        return ["cpu", "cuda"]
    row("gpu", "none that torch can use")
    if shutil.which("nvidia-smi") or shutil.which("rocm-smi"):
        hints.append(
            (
                f"a GPU driver is installed, but torch {torch.__version__} finds no GPU",
                "a CUDA or ROCm build of torch that fits the driver: pytorch.org/get-started",
            )
        )
    return ["cpu"]


def show_library(hints: list[Finding]) -> None:
    """Print what the C++ and CUDA kernels are compiled for, or say how to get those of C++, which "auto" takes."""
    native, problem = load("fastprompt.native")
    if problem:
        return  # no operator can be imported either, and that is an error
    row("C++ kernels", native.missing or load("torch")[0].ops.fastprompt.cpu_isa())
    row("CUDA kernels", native.missing_cuda or "compiled, run on request")
    if not native.missing:
        return
    compiler = os.environ.get("CXX", "c++").split()[0]
    found = shutil.which(compiler)
    hints.append(
        (
            f"the CPU runs PyTorch code in place of C++ kernels: {native.missing}",
            COMPILE if found else f"install a C++ compiler (there is no {compiler}), then {COMPILE}",
        )
    )


def show_operators(device_types: list[str], errors: list[Finding]) -> None:
    """Print the backends of each operator."""
    heading('Operators: the backend that "auto" takes')
    backends, problem = load("fastprompt.backends")
    if problem:
        row("none", problem)
        errors.append((f"fastprompt.backends: {problem}", REINSTALL))
        return
    for name in backends.OPERATORS:
        try:
            reasons = backends.available(name, device_types)
            chosen = {device: backends.choose(name, "auto", device) for device in device_types}
        except Exception as error:
            problem = f"selects no backend: {describe(error)}"
            row(name, problem)
            errors.append((f"{name}: {problem}", REINSTALL))
            continue
        others = [backend for backend, reason in reasons.items() if not reason and backend not in chosen.values()]
        row(
            name,
            *(f"{device} -> {backend}" for device, backend in chosen.items()),
            *(f"on request: {backend}" for backend in others),
            *(f"not {backend}: {reason}" for backend, reason in reasons.items() if reason),
        )


def check_main_job(errors: list[Finding]) -> None:
    """Import what training needs."""
    for name in MAIN_JOB:
        problem = load(name)[1]
        if problem:
            errors.append((f"{name}: {problem}", REINSTALL))


def load(name: str) -> tuple[Any, str | None]:
    """Import a module and return ``(module, None)``, or ``(None, problem)`` where that fails in any way."""
    try:
        return importlib.import_module(name), None
    except ModuleNotFoundError as error:
        if error.name == name:
            return None, NOT_INSTALLED
        return None, NEEDS.format(error.name)
    except Exception as error:
        return None, f"cannot be imported: {describe(error)}"


def describe(error: BaseException) -> str:
    """Type and first line of an error."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def version_of(module: Any) -> str:
    """The version of an imported module, "unknown" where nothing tells it."""
    return str(getattr(module, "__version__", None) or distribution_version(module.__name__) or "unknown")


def distribution_version(name: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def required_ranges() -> dict[str, str]:
    """Name -> version range of the required packages, as the installed metadata states it; empty if not installed."""
    try:
        requirements = metadata.requires("fastprompt") or []
    except metadata.PackageNotFoundError:
        return {}
    core = [requirement for requirement in requirements if ";" not in requirement]
    found = [re.match(r"([\w.-]+)\s*(.*)", requirement) for requirement in core]
    return {match[1]: match[2] for match in found if match}


def fits(version: str, wanted: str) -> bool:
    """Whether a version lies in a range; True where that cannot be told."""
    specifiers, problem = load("packaging.specifiers")
    if problem or not wanted or version == "unknown":
        return True
    return specifiers.SpecifierSet(wanted).contains(version, prereleases=True)


def describe_cpu() -> tuple[str, list[str]]:
    """Model name and the SIMD features that the kernels may use."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            pairs = (line.partition(":") for line in file)
            fields = {name.strip(): value.strip() for name, colon, value in pairs if colon}
    except OSError:
        fields = {}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return fields.get("model name") or platform.processor() or platform.machine(), [f for f in SIMD if f in flags]


def heading(text: str) -> None:
    """Print the title of a section."""
    print(f"\n{text}")


def row(label: str, *lines: str) -> None:
    """One labelled entry; further lines stand under the first."""
    for line in lines:
        print(f"  {label:<17} {line}")
        label = ""


if __name__ == "__main__":
    sys.exit(main())
