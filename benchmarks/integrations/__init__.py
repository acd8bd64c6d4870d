"""Trainers, collators, frozen models, precisions, calls: each really tried. Is it run on packed rows, and right?

``run`` writes ``integrations.csv`` and, of it, the table in ``docs/integrations.md``. Everything is local and tiny, and
what is not installed is said not to be.
"""

import os
import tempfile
import textwrap
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

# Read when transformers and datasets are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import transformers  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from tqdm import tqdm  # noqa: E402

from .. import report  # noqa: E402
from .rows import BOTH, Row, rows  # noqa: E402
from .setting import Setting  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "bitsandbytes", "torchao", "optimum-quanto", "gguf")
RIGHT, WRONG = "packed", "WRONG"


def run(out, quick=False):
    """Try every row, print, and write the tables; False if a run on packed rows gave another loss than PEFT."""
    chosen = [row for row in rows() if not quick or row.group == "Calls"]
    records = try_all(chosen)
    shown = [(r["group"], r["row"], r["method"], r["outcome"], r["difference"]) for r in records]
    print(report.table(["group", "row", "method", "outcome", "difference"], shown), flush=True)
    report.write_csv(out / "integrations.csv", records)
    if not quick:
        (DOCS / "integrations.md").write_text(render(records, versions()), encoding="utf-8")
    return not any(record["outcome"].startswith(WRONG) for record in records)


def try_all(chosen: list[Row]) -> list[dict[str, str]]:
    """A record for every row and method."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    jobs = [(row, method) for row in chosen for method in row.methods]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        setting = Setting(folder)
        return [try_one(setting, row, method) for row, method in tqdm(jobs, desc="integrations")]


def try_one(setting: Setting, row: Row, method: str) -> dict[str, str]:
    """What happens, in words."""
    outcome, difference, against = _outcome(setting, row, method)
    return {
        "group": row.group,
        "row": row.name,
        "method": method,
        "outcome": outcome,
        "difference": difference,
        "tolerance": _short(row.tolerance),
        "against": against,
    }


def _outcome(setting, row, method):
    missing = [name for name in row.needs if not _is_installed(name)]
    if missing:
        return f"{missing[0]} is not installed", "", ""
    plain, fast = _tried(row.train, setting, method, False), _tried(row.train, setting, method, True)
    if isinstance(fast, Exception):
        raised = isinstance(plain, Exception) and str(plain) == str(fast)
        return f"{'PEFT raises' if raised else 'refused'}: {_first_line(fast)}", "", ""
    against, peft_raises = "PEFT", isinstance(plain, Exception)
    if row.reference is not None and (row.peft_is_wrong or peft_raises):
        plain, against = _tried(row.reference, setting, method, False), row.against
    if isinstance(plain, Exception):
        return f"{WRONG}: {how(fast.stats)}, and PEFT raises {_first_line(plain)}", "", ""
    difference = max(abs(a - b) / max(abs(b), 1) for a, b in zip(fast.numbers, plain.numbers, strict=True))
    outcome = how(fast.stats) + (", where PEFT raises" if peft_raises else "")
    if not difference <= row.tolerance:
        outcome = f"{WRONG}: {outcome}"
    return outcome, _short(difference), against


def how(stats) -> str:
    """How the calls of a run were run."""
    reasons = "; ".join(stats.padded)
    if not stats.padded and stats.packed:
        return RIGHT
    if not stats.packed:
        return f"PEFT's forward: {reasons}"
    return f"packed {stats.packed} of {stats.calls} calls, else PEFT's forward: {reasons}"


def render(records: list[dict[str, str]], versions: str) -> str:
    """``docs/integrations.md``."""
    lines = [_HEAD.format(versions=versions)]
    for group in dict.fromkeys(record["group"] for record in records):
        of_group = [record for record in records if record["group"] == group]
        both = [record for record in of_group if record["method"] in BOTH]
        lines += [f"## {group}\n"]
        if both:
            lines += [f"| | {' | '.join(BOTH)} | equal to | within |", "|---|---|---|---|---|"]
        else:
            lines += ["| | | equal to | within |", "|---|---|---|---|"]
        for name in dict.fromkeys(record["row"] for record in of_group):
            found = [record for record in of_group if record["row"] == name]
            equal_to = dict.fromkeys(record["against"] for record in found if record["difference"])
            cells = [name, *(record["outcome"] for record in found), "; ".join(equal_to), found[0]["tolerance"]]
            lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


_HEAD = """# Integrations

Written by `python -m benchmarks integrations`, which really tries every cell: three steps of a tiny random Llama, on a
CPU, without a network, with PEFT alone and accelerated.

- **packed**: every call ran on packed rows.
- **PEFT's forward**: the reason is the one that the warning and `fastprompt.stats(model)` give.
- **refused**, **PEFT raises**: an error of that text.

Wherever a run came to its end, the loss and the norm of the gradient of every step are equal to those of PEFT, or of
what stands in the column "equal to" where PEFT raises or gives something else than was asked for, within the last
column (relative; absolute below 1). A cell where they are not says WRONG. [trainers.md](trainers.md) has what a table
cannot say.

{versions}.
"""


def versions() -> str:
    """Those of the packages that rows need."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name).partition('+')[0]}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return textwrap.fill(", ".join(found), 118)


def _short(number):
    """1e-4 and not 1e-04."""
    mantissa, _, exponent = f"{number:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _is_installed(name):
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False


def _tried(train, setting, method, accelerated):
    """The run, or what it raised."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return train(setting, method, accelerated)
    except Exception as error:  # becomes an entry of the table
        return error


def _first_line(error):
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}".removesuffix(": ")
