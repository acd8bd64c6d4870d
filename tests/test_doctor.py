"""`fastprompt doctor` reports every operator and turns whatever is missing or broken into a finding with a remedy."""

import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from fastprompt import backends, doctor

RUN = "import sys; sys.argv = ['fastprompt', 'doctor']; from fastprompt.cli import main; sys.exit(main())"


def run_doctor(before=""):
    """The command in a process of its own, after the statement ``before``."""
    return subprocess.run([sys.executable, "-c", f"{before}\n{RUN}"], capture_output=True, text=True, timeout=300)


def test_reports_every_operator_and_succeeds():
    result = run_doctor()
    assert result.returncode == 0, result.stdout + result.stderr
    operators = result.stdout.split("Operators", 1)[1]
    for name in backends.OPERATORS:
        assert f"\n  {name:<17} cpu -> " in operators
    assert f"torch             {torch.__version__}" in result.stdout
    assert "CUDA kernels      " in result.stdout
    assert "soft prompts can be trained here" in result.stdout


@pytest.mark.parametrize("names", [["peft", "transformers"], ["torch"]], ids=" ".join)
def test_survives_a_missing_package(names):
    result = run_doctor(f"import sys; sys.modules |= dict.fromkeys({names!r})")
    assert result.returncode == 1
    for name in names:
        assert f"{name}: not installed" in result.stdout
        assert f'remedy: pip install "{name}' in result.stdout
    assert "soft prompts cannot be trained here" in result.stdout
    assert "Traceback" not in result.stderr


def test_survives_a_broken_package(tmp_path):
    (tmp_path / "peft.py").write_text("raise OSError('libmissing.so: cannot open shared object file')")
    result = run_doctor(f"import sys; sys.path.insert(0, {str(tmp_path)!r})")
    assert result.returncode == 1
    assert "peft: cannot be imported: OSError: libmissing.so" in result.stdout
    assert 'remedy: pip install --force-reinstall "peft' in result.stdout
    assert "Traceback" not in result.stderr


def test_a_version_out_of_range_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "required_ranges", lambda: {"tqdm": "<1"})
    assert doctor.main() == 1
    assert "is outside <1\n" + " " * 20 + 'remedy: pip install "tqdm<1"' in capsys.readouterr().out


def test_runs_from_source_without_metadata(monkeypatch, capsys):
    found = metadata.distribution

    def all_but_this(name):
        if name == "fastprompt":
            raise metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(metadata, "distribution", all_but_this)
    assert doctor.main() == 0
    assert "no version is checked" in capsys.readouterr().out


def test_names_the_backend_for_each_device(monkeypatch, capsys):
    gpu = SimpleNamespace(name="Some GPU", major=9, minor=0, total_memory=80 * 2**30, gcnArchName="gfx942")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    doctor.main()
    out = capsys.readouterr().out
    assert "cuda:1            Some GPU, " in out and "80 GiB" in out
    assert out.count("cuda -> ") == len(backends.OPERATORS)


def test_survives_an_operator_that_selects_nothing(monkeypatch, capsys):
    choose = backends.choose

    def fail_for_one(operator, requested, device):
        if operator == "prompt_lstm":
            raise RuntimeError("no backend for this device")
        return choose(operator, requested, device)

    monkeypatch.setattr(backends, "choose", fail_for_one)
    assert doctor.main() == 1
    assert "prompt_lstm: selects no backend: RuntimeError: no backend for this device" in capsys.readouterr().out


@pytest.mark.parametrize(
    "compiler, remedy", [("/bin/sh", "remedy: in a checkout"), ("/none/c++", "there is no /none/c++")]
)
def test_says_how_to_get_the_library(compiler, remedy, monkeypatch, capsys):
    from fastprompt import native

    monkeypatch.setattr(native, "missing", "the C++ library was not compiled")
    monkeypatch.setenv("CXX", f"{compiler} -pipe")
    assert doctor.main() == 0
    out = capsys.readouterr().out
    assert "prompt_concat     cpu -> reference" in out and "not cpu: the C++ library was not compiled" in out
    assert "PyTorch code in place of C++ kernels" in out and remedy in out
