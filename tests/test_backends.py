"""The table of backends: what is documented is what runs, and every refusal says why."""

from pathlib import Path

import pytest
import torch

from fastprompt import backends, native

ROOT = Path(__file__).parents[1]


def test_the_documentation_is_what_the_table_renders():
    """After a change: python -c "from fastprompt.backends import *; print(render(), end='')" > docs/backends.md"""
    assert (ROOT / "docs/backends.md").read_text(encoding="utf-8") == backends.render()


def test_every_folder_of_an_operator_has_rows_and_every_row_a_module():
    folders = {path.parent.name for path in (ROOT / "fastprompt/ops").glob("*/api.py")}
    assert folders | {"row_plan"} == set(backends.OPERATORS)
    in_api = {("prompt_lstm", "torch")}  # which is nn.LSTM's own code
    for row in backends.TABLE:
        where = (row.module or f"fastprompt.ops.{row.operator}.{row.name}").replace(".", "/")
        assert (ROOT / f"{where}.py").is_file() or (row.operator, row.name) in in_api
    rows = [(row.operator, row.name) for row in backends.TABLE]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("operator", backends.OPERATORS)
def test_the_last_row_of_an_operator_runs_everything(operator, monkeypatch):
    monkeypatch.setattr(native, "missing", "no library here")
    monkeypatch.setattr(native, "missing_cuda", "no library here")
    last = [row for row in backends.TABLE if row.operator == operator][-1]
    call = backends.Call("meta", torch.float64, True, 1024, 1024, True, True, True, 1)
    assert last.why_not(call) is None
    chosen = backends.choose(operator, "auto", *call[:2], **dict(zip(call._fields[2:], call[2:])))
    assert backends.choose(operator, chosen, *call[:2]) == chosen


def test_auto_does_not_look_at_what_its_device_cannot_use(monkeypatch):
    """It is slow to import Triton, and on a CPU of no use."""
    triton = backends.Need("triton", lambda: pytest.fail("triton was looked for"))
    rows = tuple(
        backends.Backend(row.operator, row.name, row.subject, row.devices, row.dtypes, triton)
        if row.name == "triton"
        else row
        for row in backends._OF["prompt_concat"]
    )
    monkeypatch.setitem(backends._OF, "prompt_concat", rows)
    for dtype in (torch.float32, torch.float64):
        assert backends.choose("prompt_concat", "auto", "cpu", dtype) in ("cpu", "reference")


@pytest.mark.parametrize(
    "version, problem",
    [("3.4.0", None), ("3.10.1+git0", None), ("4.0.0", None), ("3.3.1", "need triton >= 3.4, installed is 3.3.1")],
)
def test_an_old_triton_is_a_reason(version, problem, monkeypatch):
    """triton 3.3 has no ``triton.knobs``, and the kernels cannot be imported with it."""
    import sys
    from types import SimpleNamespace

    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    found = backends._triton_missing.__wrapped__()
    assert found is None if problem is None else problem in found
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "the Triton kernels cannot be imported" in backends._triton_missing.__wrapped__()


def test_refusals():
    with pytest.raises(ValueError, match=r"backend of prompt_concat must be 'auto' or one of \['cpu', 'reference"):
        backends.choose("prompt_concat", "fast", "cpu")
    with pytest.raises(RuntimeError, match="'cuda' of prompt_concat cannot run this call: this operator has no"):
        backends.choose("prompt_concat", "cuda", "cpu")
    with pytest.raises(RuntimeError, match="'composed' of .*: torch's attention kernels for a CPU take no decode"):
        backends.choose("prefix_attention", "composed", "cpu", decode=True)
    with pytest.raises(RuntimeError, match="'composed' of .* run on a CPU, the tensors are on cuda"):
        backends.choose("prefix_attention", "composed", "cuda")
    for widths in (dict(head_dim=264), dict(value_dim=264)):
        assert backends.choose("prefix_attention", "auto", "cuda", **widths) == "reference"
    with pytest.raises(RuntimeError, match="longest sequence, the window is 3"):
        backends.choose("prefix_attention", "composed", "cpu", short_window=3)
