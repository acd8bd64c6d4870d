"""The error budget: how far a result may be from the exact one. Tests, benchmarks and the check on a GPU share it.

It comes from the inputs alone. The reference runs in float64, exactly, and then several times with errors of the
stated precision drawn at random behind every operation (Monte Carlo arithmetic; Parker 1997). The error of a sum, and
of a matrix product, grows with the terms it is a sum of, not with what is left of them, so a result that cancels is
judged by what cancelled. What other code gives for the same inputs has no say in it: that would make the budget a
matter of its luck, and of the machine.
"""

import random
from functools import cache

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastprompt.ops.prefix_attention import reference

DRAWS = 16
FEW = 8  # draws where each takes long; of fewer all may be small for a number that its neighbours say nothing about
WIDTH = 8  # allowed standard deviations; the errors are drawn with that of the largest rounding, not of the typical one
NEIGHBOURS = 6  # draws that the mean over a result's last dimension counts as
SHARE = 0.25  # of a result's mean deviation that is allowed everywhere: few draws may miss what one number can do

_NUMBERS = 1_000_003  # a prime: what is repeated after them falls on other numbers of other heads and rows
_UNIT = torch.finfo(torch.float32).eps / 2  # of sums, which are kept in fp32 whatever else is rounded
_LOW = (torch.bfloat16, torch.float16)
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "vdot"}
_SUMS = {"sum", "mean", "cumsum", "index_add", "index_put"}
# Their error is absolute for results below 1: they come out of numbers of that size.
_FUNCTIONS = {"logsumexp", "logaddexp", "tanh", "sigmoid"}
# Copies, choices, and what else is exact.
_EXACT = {
    "clone", "copy", "_to_copy", "cat", "stack", "index", "index_select", "gather", "where", "masked_fill", "flip",
    "roll", "repeat", "fill", "zero", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full",
    "full_like", "new_full", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "arange",
    "scalar_tensor", "amax", "amin", "max", "min", "maximum", "minimum", "relu", "neg", "abs", "sign", "embedding",
    "constant_pad_nd", "nan_to_num", "lift_fresh", "lift_fresh_copy", "clamp", "clamp_min", "clamp_max", "bernoulli",
    "sort", "topk", "tril", "triu", "select_backward", "slice_backward", "masked_select", "masked_scatter", "scatter",
    "_unsafe_view", "_reshape_copy",
}  # fmt: skip


class Rounding(TorchDispatchMode):
    """Inside of this block, float64 code makes the errors of another precision, drawn at random.

    Args:
        results: the dtype that the code rounds the result of every operation to.
        operands: the dtype that it rounds both operands of a matrix product to; None: to none.
        seed: of the draw.
    """

    def __init__(self, results=torch.float32, operands=None, seed=0):
        super().__init__()
        self.unit, self.operands = torch.finfo(results).eps / 2, operands
        self._places = random.Random(seed)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace != "aten":
            raise TypeError(
                f"{function} hides what it computes: call the reference itself, not the registered operator"
            )
        name = function._schema.name.removeprefix("aten::")
        kind = name.rstrip("_") if function._schema.is_mutable else name
        overwrites = kind == "index_put" and not any(args[3:])
        if function.is_view or kind in _EXACT or overwrites:
            return function(*args, **kwargs)
        inner = _error_of_sums(function, kind, args, kwargs)  # before an operation in place changes its inputs
        result = function(*args, **kwargs)
        for out in result if isinstance(result, (tuple, list)) else (result,):
            if _is_double(out):
                size = out.abs().clamp_(min=1.0) if kind in _FUNCTIONS else out.abs()
                error = size.mul_(self.unit) if inner is None else size.mul_(self.unit).add_(inner)
                out.add_(error.mul_(self._draw(out)).nan_to_num_(0.0, 0.0, 0.0))  # infinite numbers have no error
        return result

    def __enter__(self):
        if self.operands is not None:
            self._operands = _RoundedOperands(lambda x: self.stored(x, self.operands))
            self._operands.__enter__()
        return super().__enter__()

    def __exit__(self, *problem):
        super().__exit__(*problem)
        if self.operands is not None:
            self._operands.__exit__(*problem)

    def stored(self, x, dtype):
        """``x`` as it comes back from memory that holds it in ``dtype``; numbers that it can hold are not changed."""
        info = torch.finfo(dtype)
        step = (info.eps / 2 * x.abs()).clamp_(min=info.smallest_normal * info.eps / 2)
        return torch.where(x.to(dtype).double() == x, x, x + step * self._draw(x))

    def _draw(self, like):
        """Normal numbers: a stretch of many from a place drawn at random, as to make each anew takes the most time."""
        numbers, first, count = _normal_numbers(like.device), self._places.randrange(_NUMBERS), like.numel()
        found = numbers[first : first + min(count, _NUMBERS)]
        if count > _NUMBERS:
            found = found.repeat(-(-count // _NUMBERS))[:count]
        return found.view(like.shape)


@cache
def _normal_numbers(device):
    """Twice the same, so that a stretch may start anywhere."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_NUMBERS, generator=generator, dtype=torch.float64).repeat(2).to(device)


class _RoundedOperands(TorchFunctionMode):
    """Rounds what products are written of: below, products of one term are no products any more."""

    _functions = {torch.einsum, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.bmm}

    def __init__(self, stored):
        super().__init__()
        self.stored = stored

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self._functions:
            args = tuple(self.stored(x) if _is_double(x) else x for x in args)
        return function(*args, **(kwargs or {}))


def _is_double(x):
    return isinstance(x, torch.Tensor) and x.dtype == torch.float64


def _error_of_sums(function, kind, args, kwargs):
    """The standard deviation that adding up in fp32 gives each number of a result; None for what is no sum.

    Of n terms of either sign it is u sqrt(n) times the root of the sum of their squares, one after the other; for terms
    of one sign that is u times their sum, as blocks and trees lose (Higham, Accuracy and Stability, 4.2 and 4.3).
    """
    if (kind not in _PRODUCTS and kind not in _SUMS) or not any(_is_double(x) for x in args):
        return None
    squares = function(*(x.square() if _is_double(x) else x for x in args), **kwargs)
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    if kind in _PRODUCTS:
        terms = tensors[-2].shape[-1]
    elif kind in ("index_add", "index_put"):
        terms = len(tensors[-1])
    else:
        terms = 1 if kind == "mean" else tensors[0].numel() / max(squares.numel(), 1)
    return squares.mul_(terms).sqrt_().mul_(_UNIT)


class Budget:
    """What may come out of a computation in a stated precision.

    Args:
        exact: the exact results, a list of float64 tensors and None.
        squares: for each of them the mean square of how far random ones are from it.
        dtypes: what each of them is rounded to at the end.
        draws: how many random ones there were.

    Attributes:
        exact: as above.
        allowed: for each how far a result may be from it, a tensor of the same shape.
    """

    def __init__(self, exact, squares, dtypes, draws=DRAWS):
        self.exact, self.allowed = exact, []
        for x, square, dtype in zip(exact, squares, dtypes, strict=True):
            self.allowed.append(None if x is None else _allowed(x, square, dtype, draws))

    @classmethod
    def of(cls, evaluate, dtype, *, results=torch.float32, operands=True, draws=DRAWS):
        """
        Args:
            evaluate: takes a function ``stored(x)``, what memory gives back of ``x``, and returns the results, in
                float64. It calls ``stored`` on what the real code keeps in ``dtype`` from one kernel to the next.
            dtype: of the inputs and of the results.
            results: see :class:`Rounding`.
            operands: does the code round the operands of matrix products to ``dtype``?
            draws: how many random evaluations.
        """
        exact = evaluate(lambda x: x)
        squares = [None if x is None else torch.zeros_like(x) for x in exact]
        for seed in range(draws):
            with Rounding(results, dtype if operands and dtype in _LOW else None, seed) as rounding:
                drawn = evaluate(lambda x, by=rounding: by.stored(x, dtype) if dtype in _LOW else x)
            for square, x, other in zip(squares, exact, drawn, strict=True):
                if x is not None:
                    square += _squared_distance(other.detach(), x.detach()) / draws
        return cls(exact, squares, [dtype] * len(exact), draws)

    def ratios(self, results):
        """For each result its largest error over what is allowed there; at most 1 is right, nan is not."""
        return [_ratio(*three) for three in zip(results, self.exact, self.allowed, strict=True)]

    def ratio(self, results):
        """The largest of :meth:`ratios`, nan if one is."""
        ratios = torch.tensor([0.0, *self.ratios(results)])
        return float(ratios.max())  # of torch's: nan wins


def _squared_distance(x, exact):
    return torch.where(exact.isfinite(), x - exact, 0.0).square()


def _allowed(exact, square, dtype, draws):
    info = torch.finfo(dtype)
    if square.dim() and square.numel():  # few draws may all be small for a number: its neighbours count as some more
        neighbours = square.mean(-1, keepdim=True)
        square = (draws * square + NEIGHBOURS * neighbours) / (draws + NEIGHBOURS)
    mean = square.mean() if square.numel() else 0.0
    lost = WIDTH * (square + SHARE**2 * mean).sqrt()
    # One rounding to the dtype of the result; and numbers too small for a full mantissa, which hardware may take for 0.
    tiny = info.smallest_normal * info.eps + torch.finfo(torch.float32).smallest_normal
    return lost + info.eps / 2 * (exact.abs() + lost) + tiny


def _ratio(result, exact, allowed):
    if exact is None or result is None:
        return 0.0 if result is exact else float("nan")
    if result.shape != exact.shape:
        return float("nan")
    if not exact.numel():
        return 0.0
    result, finite = result.detach().to(exact.device).double(), exact.isfinite()
    same = (result == exact) | (result.isnan() & exact.isnan())
    ratio = torch.where(finite, (result - exact).abs() / allowed, torch.where(same, 0.0, torch.nan))
    return float(ratio.max())


def attention_budget(inputs, grad, seq, *, results=torch.float32, draws=DRAWS, **flags):
    """The budget of prefix_attention's out and lse and of the gradients of its inputs, eight results.

    Args:
        inputs: q, k, v, prefix_k, prefix_v, sinks; the last three may be None.
        grad: the gradient of out.
        seq: see :func:`fastprompt.prefix_attention`, as the ``flags`` causal, window, softcap, scale, alibi_slopes,
            position_bias and key_seq.
        results: see :class:`Rounding`.
        draws: how many random evaluations. All run at once, as so many times the heads.
    """
    dtype = inputs[0].dtype
    options = dict(causal=True, window=None, softcap=None, scale=inputs[0].shape[-1] ** -0.5) | flags
    heads = [1, 1, 1, 2, 2, 0]  # the dimension of each input
    of_heads = {name: options.pop(name) for name in ("alibi_slopes", "position_bias") if options.get(name) is not None}

    def run(copies, stored):
        *tensors, sinks = (x if x is None else _repeat(x.detach().double(), at, copies) for x, at in zip(inputs, heads))
        given = _repeat(grad.detach().double(), 1, copies)
        flags = options | {name: _repeat(x.detach().double(), 0, copies) for name, x in of_heads.items()}
        out, lse = reference.forward(*tensors, seq, sinks=sinks, **flags)
        out = stored(out)  # the backward reads it again
        return [out, lse, *reference.backward(given, *tensors, out, lse, seq, sinks=sinks, **flags)]

    with Rounding(results, dtype if dtype in _LOW else None) as rounding:
        drawn = run(draws, lambda x: rounding.stored(x, dtype) if dtype in _LOW else x)
    exact = run(1, lambda x: x)
    squares = []
    for x, several, at in zip(exact, drawn, [1, 0, *heads]):
        copies = None if x is None else several.unflatten(at, (draws, -1)).movedim(at, 0)
        squares.append(None if x is None else _squared_distance(copies, x).mean(0))
    return Budget(exact, squares, [dtype, torch.float32, *[dtype] * 6], draws)


def _repeat(x, dim, copies):
    return torch.cat([x] * copies, dim)
