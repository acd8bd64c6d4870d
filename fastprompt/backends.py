"""Which backend runs a call: one table, which "auto", the error of an explicit request, ``fastprompt doctor`` and
``docs/backends.md`` all read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch

from . import native
from .versions import OLDEST, is_older


class Call(NamedTuple):
    """What of a call decides which backends can run it; the defaults are those of a plain one."""

    device: str
    """The type of the tensors' device, such as "cpu"."""
    dtype: torch.dtype = torch.float32
    empty: bool = False
    """Whether there are no rows."""
    head_dim: int = 64
    """Width of queries and keys."""
    value_dim: int = 64
    """Width of values."""
    decode: bool = False
    softcap: bool = False
    dropout: bool = False
    short_window: int | None = None
    """A sliding window that hides something: one shorter than the longest sequence."""
    alibi: bool = False
    position_bias: bool = False
    cross: bool = False
    """Whether the keys are of other rows than the queries."""
    activation: str = "silu"
    """The name of a gated activation's function, or "a function" for one without a name."""


@dataclass(frozen=True)
class Limit:
    """What a backend does not take, or what "auto" leaves to another one."""

    text: str
    """The predicate of a sentence whose subject is the backend."""
    breaks: Callable[[Call], bool | str]
    """Whether a call goes beyond the limit; a text says what came."""


@dataclass(frozen=True)
class Need:
    """What has to be installed."""

    text: str
    missing: Callable[[], str | None]
    """None if it is there, else the reason why not."""


@dataclass(frozen=True)
class Backend:
    """One backend of one operator."""

    operator: str
    name: str
    subject: str
    """Who runs the call, as the beginning of a sentence."""
    devices: tuple[str, ...]
    """Types of devices; none stands for all."""
    dtypes: tuple[torch.dtype, ...]
    """None stands for all."""
    needs: Need | None = None
    limits: tuple[Limit, ...] = ()
    """Calls that it cannot run."""
    passed_over: tuple[Limit, ...] = ()
    """Calls that it can run and that "auto" leaves to a backend below."""
    module: str = ""
    """Where it is implemented, if not in ``fastprompt.ops.<operator>.<name>``."""

    def why_not(self, call: Call) -> str | None:
        """None if the backend can run such a call, else the reason why not."""
        if self.needs is not None:
            missing = self.needs.missing()
            if missing:
                return missing
        if self.dtypes and call.dtype not in self.dtypes:
            return f"{self.subject} have no {str(call.dtype).removeprefix('torch.')}"
        if self.devices and call.device not in self.devices and not self.interpreted:
            return f"{self.subject} run on {_list_devices(self.devices)}, the tensors are on {call.device}"
        return self._beyond(self.limits, call)

    def is_left_out(self, call: Call) -> bool:
        """Whether "auto" goes past the backend. Where its devices decide, what it needs is not looked at: it is slow to
        import Triton."""
        if self.devices and call.device not in self.devices:
            return True
        return bool(self.why_not(call) or self._beyond(self.passed_over, call))

    @property
    def interpreted(self) -> bool:
        """Triton's interpreter, for tests, takes tensors on any device."""
        return self.name == "triton" and import_module("fastprompt.kernels.launch").INTERPRETED

    def load(self) -> ModuleType:
        """The module that implements it."""
        return import_module(self.module or f"fastprompt.ops.{self.operator}.{self.name}")

    def _beyond(self, limits, call):
        for limit in limits:
            came = limit.breaks(call)
            if came:
                return f"{self.subject} {limit.text}" + (f", {came}" if isinstance(came, str) else "")
        return None


@cache
def _triton_missing():
    try:
        version = import_module("triton").__version__
    except ImportError as error:
        return f"the Triton kernels cannot be imported: {error}"
    if is_older(version, OLDEST["triton"]):
        return f"the Triton kernels need triton >= {OLDEST['triton']}, installed is {version}"
    return None


CPP = Need("the C++ library", lambda: native.missing)
CUDA = Need("the CUDA library", lambda: native.missing_cuda)
TRITON = Need(f"triton >= {OLDEST['triton']}", _triton_missing)

_REAL = (torch.float32, torch.float16, torch.bfloat16)
_ALWAYS = lambda call: True  # noqa: E731


def _cpp(operator, *limits):
    return Backend(operator, "cpu", "the C++ kernels", ("cpu",), _REAL, CPP, limits)


def _triton(operator, *limits, **options):
    return Backend(operator, "triton", "the Triton kernels", ("cuda",), _REAL, TRITON, limits, **options)


def _reference(operator, **options):
    return Backend(operator, "reference", "PyTorch's own operations", (), (*_REAL, torch.float64), **options)


_COMPOSED = (
    Limit("take no ALiBi slopes", lambda call: call.alibi),
    Limit("take no position bias", lambda call: call.position_bias),
    Limit("take no keys of other rows than the queries", lambda call: call.cross),
    Limit("take no softcap", lambda call: call.softcap),
    Limit("take no decode", lambda call: call.decode),
    Limit("take no dropout mask", lambda call: call.dropout),
    Limit(
        "take no window shorter than the longest sequence",
        lambda call: call.short_window is not None and f"the window is {call.short_window}",
    ),
)

TABLE = (
    _cpp("prompt_concat"),
    _triton("prompt_concat"),
    _reference("prompt_concat"),
    _cpp("prefix_attention"),
    _triton(
        "prefix_attention",
        Limit("take heads of at most 256", lambda call: call.head_dim > 256 and f"q has {call.head_dim}"),
        Limit("take values of at most 256", lambda call: call.value_dim > 256 and f"v has {call.value_dim}"),
    ),
    Backend(
        "prefix_attention",
        "composed",
        "torch's attention kernels for a CPU",
        ("cpu",),
        (*_REAL, torch.float64),
        limits=_COMPOSED,
    ),
    _reference("prefix_attention"),
    _cpp("multitask_prompt"),
    _triton("multitask_prompt"),
    _reference("multitask_prompt"),
    _cpp("prompt_lstm"),
    Backend(
        "prompt_lstm",
        "cuda",
        "the CUDA kernels",
        ("cuda",),
        _REAL,
        CUDA,
        passed_over=(Limit("have not been measured on a GPU yet", _ALWAYS),),
    ),
    Backend(
        "prompt_lstm",
        "torch",
        "nn.LSTM",
        (),
        (*_REAL, torch.float64),
        limits=(Limit("takes no sequence of length 0", lambda call: call.empty),),
        passed_over=(
            Limit("is unrolled step by step by torch.compile", lambda call: torch.compiler.is_compiling()),
            Limit(
                "trains slower than the reference on a CPU in other dtypes than float32",
                lambda call: call.device == "cpu" and call.dtype != torch.float32,
            ),
        ),
    ),
    _reference("prompt_lstm"),
    Backend("linear_cross_entropy", "blocked", "PyTorch's own operations", (), (*_REAL, torch.float64)),
    _reference("linear_cross_entropy"),
    _cpp(
        "gated_activation",
        Limit(
            "take silu and gelu_tanh",
            lambda call: call.activation not in ("silu", "gelu_tanh") and f"the activation is {call.activation}",
        ),
    ),
    _reference("gated_activation"),
    _cpp("rms_norm"),
    _reference("rms_norm"),
    _cpp("rotary"),
    _triton("rotary"),
    _reference("rotary"),
    Backend("row_plan", "cpu", "the C++ kernels", ("cpu",), (), CPP, module="fastprompt.layout.cpu"),
    Backend(
        "row_plan",
        "triton",
        "the Triton kernels",
        ("cuda",),
        (),
        TRITON,
        module="fastprompt.layout.triton",
    ),
    Backend("row_plan", "reference", "PyTorch's own operations", (), (), module="fastprompt.layout.cells"),
)
"""Per operator in the order in which "auto" looks for one that can run the call; the last one always can."""

_INTRODUCTION = """\
# Backends

What `fastprompt.backends.render()` makes of the table in `fastprompt/backends.py`. `fastprompt doctor` says which of
them run on a machine, and why the others do not.

Every operator takes `backend="auto"` or the name of one. "auto" takes the first one below that runs on the call's
device, has its dtype, finds what it needs, and beyond whose limits the call does not go. An explicit request runs, or
raises with the reason.

| operator | backend | runs on | dtypes | needs | limits | "auto" leaves to the next one |
|---|---|---|---|---|---|---|
"""

OPERATORS = tuple(dict.fromkeys(row.operator for row in TABLE))
_NAMES = frozenset(row.name for row in TABLE)
_OF = {operator: tuple(row for row in TABLE if row.operator == operator) for operator in OPERATORS}


def choose(operator: str, requested: str, device: str, dtype: torch.dtype = torch.float32, **facts: Any) -> str:
    """The name of the backend that runs a call.

    Args:
        operator: one of ``OPERATORS``.
        requested: "auto", or the name of a backend.
        device, dtype, facts: the fields of :class:`Call`.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a known backend that cannot run this call; says why.
    """
    return _row(operator, requested, Call(device, dtype, **facts)).name


@cache
def implementation(
    operator: str, requested: str, device: str, dtype: torch.dtype = torch.float32, **facts: Any
) -> ModuleType:
    """The module of the backend that :func:`choose` names, remembered: the answer is the same for every such call."""
    return _row(operator, requested, Call(device, dtype, **facts)).load()


def module_of(operator: str, name: str) -> ModuleType:
    """The module that implements a backend which has been chosen before."""
    return next(row for row in _OF[operator] if row.name == name).load()


def available(operator: str, devices: Sequence[str] | None = None) -> dict[str, str | None]:
    """For each backend None if it runs a plain float32 call on one of these devices, else the reason why not.

    Args:
        operator: one of ``OPERATORS``.
        devices: types of devices; None: those of this machine.
    """
    if devices is None:
        devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    found = {}
    for row in _OF[operator]:
        reasons = [row.why_not(Call(device)) for device in devices]
        found[row.name] = None if None in reasons else reasons[0]
    return found


def is_eager(tensor: torch.Tensor) -> bool:
    """Whether the call may go straight to the function that implements a registered operator, which saves microseconds.

    torch.compile has to see the operator itself, and a subclass of Tensor, such as a FakeTensor, torch's dispatcher.
    """
    return not torch.compiler.is_compiling() and type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _row(operator, requested, call):
    rows = _OF[operator]
    if requested == "auto":
        for row in rows[:-1]:
            if not row.is_left_out(call):
                return row
        return rows[-1]
    if requested not in _NAMES:
        names = sorted(row.name for row in rows)
        raise ValueError(f"backend of {operator} must be 'auto' or one of {names}, got {requested!r}")
    for row in rows:
        if row.name == requested:
            reason = row.why_not(call)
            if reason is None:
                return row
            break
    else:
        reason = f"this operator has no backend of that name, only {sorted(row.name for row in rows)}"
    raise RuntimeError(f"backend {requested!r} of {operator} cannot run this call: {reason}")


def _list_devices(devices):
    return " or ".join({"cpu": "a CPU", "cuda": "a GPU"}[device] for device in devices) or "any device"


def render() -> str:
    """``docs/backends.md``: the table for readers."""
    lines = []
    for row in TABLE:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in row.dtypes)
        limits, passed_over = ("; ".join(limit.text for limit in limits) for limits in (row.limits, row.passed_over))
        needs = row.needs.text if row.needs else ""
        cells = (f"`{row.operator}`", f"`{row.name}`", _list_devices(row.devices), dtypes, needs, limits, passed_over)
        lines.append("| " + " | ".join(cells) + " |")
    return _INTRODUCTION + "\n".join(lines) + "\n"
