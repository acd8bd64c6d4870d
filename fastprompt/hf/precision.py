"""A model run in wider arithmetic than its own, as it is: no copy of it, whatever hooks and wrappers it has."""

from functools import cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LARGE = 10**9  # parameters from which on a CPU would spend minutes on float64
_BLOCK = 2**18  # numbers of a weight that are widened at once
_CHECKED = ("aten", "prims", "fastprompt")  # libraries whose operations check the dtypes that they are given
_PACKED = (torch.int8, torch.uint8)  # of quantised weights


class WideArithmetic(TorchDispatchMode):
    """Inside of this block every operation on floating-point tensors computes and returns ``dtype``.

    Weights keep what they hold and are widened one operation at a time. An operation that has no kernel for it, or is
    another library's on quantised weights, runs in the model's own dtype, and :attr:`exact` is False from then on. What
    an operation writes into keeps its dtype.

    Attributes:
        dtype: the wide one: float64, or float32 where float64 is not to be had, or would take too long.
        exact: did everything run in it so far?
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.narrow = next((p.dtype for p in model.parameters() if p.dtype in _FLOATS), torch.float32)
        device = model.device.type
        large = device == "cpu" and sum(p.numel() for p in model.parameters()) > _LARGE
        self.dtype, self.exact = torch.float32 if large or device == "mps" else torch.float64, True

    @property
    def eps(self) -> float:
        """The relative rounding error of one operation."""
        return torch.finfo(self.dtype if self.exact else self.narrow).eps

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        names, written, is_view = _signature(function)
        if is_view:  # it is widened where it is computed with
            return function(*args, **kwargs)
        if function is torch.ops.aten.embedding.default:  # the rows that are read are all that has to be widened
            return self._widen(function(*args, **kwargs))
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, args[0].dtype):
            return function(*args, **kwargs)  # to another device; hooks keep what they moved there and back
        given = dict(zip(names, args)) | kwargs
        if not any(list(_floats(x)) for x in given.values()):  # new memory is of the dtype that is asked for
            return function(*args, **kwargs)

        def run(dtype):
            new_args = [x if name in written else _cast(x, dtype) for name, x in zip(names, args)]
            return function(*new_args, **{n: x if n in written else _cast(x, dtype) for n, x in kwargs.items()})

        if written:  # what is written keeps its dtype, and what it is computed of gets the same
            into = {x.dtype for name in written for x in _floats(given.get(name))}
            read = {x.dtype for name in given.keys() - written for x in _floats(given[name])}
            dtype = into.pop() if len(into) == 1 else self.dtype
            self.exact &= all(torch.finfo(dtype).eps <= torch.finfo(x).eps for x in read)
            return run(dtype)
        if function is torch.ops.aten.mm.default and args[1].numel() > _BLOCK:
            return self._product(*args)
        if function is torch.ops.aten.addmm.default and args[2].numel() > _BLOCK and not kwargs:
            return self._product(*args[1:]) + self._widen(args[0])
        if function.namespace not in _CHECKED and any(getattr(x, "dtype", None) in _PACKED for x in given.values()):
            # It may take scales in float64 for scales in float32.
            self.exact = False
            return self._widen(self._narrowed(function, args, kwargs))
        try:
            out = run(self.dtype)
        except (RuntimeError, NotImplementedError):  # no kernel for the dtype, or no memory for a widened weight
            self.exact = False
            out = run(self.narrow)
        return self._widen(out)

    def _narrowed(self, function, args, kwargs):
        """``function`` of what it would be given without widening."""

        def narrow(x):
            if type(x) in (list, tuple):
                return type(x)(map(narrow, x))
            is_wide = x == self.dtype if isinstance(x, torch.dtype) else _is_float(x) and x.dtype == self.dtype
            return _cast(x, self.narrow) if is_wide else x

        return function(*map(narrow, args), **{name: narrow(x) for name, x in kwargs.items()})

    def _product(self, a, b):
        """``a @ b`` with a few columns of ``b`` at a time: a widened head would be larger than a step."""
        a, columns = self._widen(a), max(1, _BLOCK // len(b))
        out = a.new_empty(len(a), b.shape[1])
        for into, block in zip(out.split(columns, 1), b.split(columns, 1)):
            into.copy_(a @ self._widen(block))
        return out

    def _widen(self, x):
        return _cast(x, self.dtype)


@cache
def _signature(function):
    """The names of an operation's arguments, those that it writes into, and whether it returns a view."""
    arguments = function._schema.arguments
    aliases = [a for a in arguments if a.alias_info is not None]
    written = frozenset(a.name for a in aliases if a.alias_info.is_write)
    return tuple(a.name for a in arguments), written, bool(aliases) and not written


def _cast(x, dtype):
    if isinstance(x, torch.dtype):
        return dtype if x in _FLOATS else x
    if type(x) in (list, tuple):
        return type(x)(_cast(item, dtype) for item in x)
    return x.to(dtype) if _is_float(x) else x


def _floats(x):
    """The floating-point tensors in an argument."""
    return filter(_is_float, x if isinstance(x, (list, tuple)) else [x])


def _is_float(x):
    # Other kinds of tensors (sharded, quantised) know themselves how to be computed with.
    return type(x) in (torch.Tensor, torch.nn.Parameter) and x.dtype in _FLOATS
