"""prompt_lstm: the LSTM that turns P-Tuning's embeddings into prompt vectors, batch 1."""

from collections.abc import Sequence
from typing import Any

import torch

from ...backends import choose, is_eager, module_of
from ...checks import FLOATS, accumulator, check_tensor, without_autocast


def prompt_lstm(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    *,
    num_layers: int = 2,
    bidirectional: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Run an LSTM over one sequence: the outputs of ``nn.LSTM(x.unsqueeze(1))``, from a zero state, of any depth.

    The prompt encoder of P-Tuning (Liu et al. 2021, arXiv 2103.10385). In every layer and direction, over the steps t
    (the backward direction runs them from the last to the first):

        i, f, g, o = split(W_ih x[t] + b_ih + W_hh h[t-1] + b_hh)
        c[t] = sigmoid(f) * c[t-1] + sigmoid(i) * tanh(g)
        h[t] = sigmoid(o) * tanh(c[t])

    The next layer reads the hidden states of both directions side by side; in training each is dropped with
    probability ``dropout`` in between, as drawn from torch's generator, but not after the last layer.

    "auto" takes the C++ library ("cpu") on a CPU: it was the faster one for every size measured, but for the forward
    pass alone of 200 steps in bfloat16, which oneDNN multiplies without widening it. For float64 and where there is no
    library it takes nn.LSTM's own code ("torch": oneDNN) for float32 and the reference for the other dtypes, where that
    trains faster. On accelerators it takes nn.LSTM's own code ("torch": cuDNN); the reference for an empty ``x``, which
    nn.LSTM refuses, and under torch.compile, which would unroll nn.LSTM step by step.

    Args:
        x: ``[P, E]`` float32, float16, bfloat16 or float64.
        weights: ``list(nn.LSTM(E, H, ...).parameters())``: for each layer and in it each direction the weights
            ``[4H, K]`` and ``[4H, H]``, and unless made with ``bias=False`` two biases ``[4H]``; ``K`` is ``E`` in the
            first layer. The dtype and device of ``x``.
        num_layers, bidirectional, dropout: as given to nn.LSTM.
        training: whether to drop (``module.training``).
        backend: "auto", "reference", "torch", "cpu" or "cuda". "auto" never takes "cuda", a fused kernel that has
            not been measured on a GPU yet.

    Returns:
        ``[P, 2H]``, or ``[P, H]`` for one direction, in the dtype of ``x``, under autocast too; differentiable in
        ``x`` and every weight. The reference and the C++ kernel keep half precision in fp32 throughout and round once;
        the kernel's results are the same bits every time, with any number of threads.

    Raises:
        TypeError, ValueError: an argument with another dtype, shape or device, or another number of weights.
        RuntimeError: a backend that was asked for and cannot run.
    """
    check_tensor("x", x, ["P", "E"], dtypes=FLOATS)
    weights = _check_weights(x, weights, num_layers, bidirectional)
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must lie in [0, 1], got {dropout!r}")
    dropout = float(dropout) if training else 0.0
    backend = choose("prompt_lstm", backend, x.device.type, x.dtype, empty=x.shape[0] == 0)
    if backend == "torch":
        return _torch_lstm(x, weights, num_layers, bidirectional, dropout)
    return PromptLstm.apply(x, num_layers, bool(bidirectional), dropout, backend, *weights)


class PromptLstm(torch.autograd.Function):
    """Autograd of :func:`prompt_lstm` for every backend but "torch", which brings its own; arguments are positional and
    already checked."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        num_layers: int,
        bidirectional: bool,
        dropout: float,
        backend: str,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        keep = _dropout_masks(x, weights, num_layers, bidirectional, dropout)
        run = _forward if is_eager(x) else torch.ops.fastprompt.prompt_lstm
        out, steps = run(x, weights, keep, num_layers, bidirectional, backend)
        ctx.save_for_backward(x, steps, *keep, *weights)
        ctx.num_layers, ctx.bidirectional, ctx.backend, ctx.masks = num_layers, bidirectional, backend, len(keep)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        x, steps, *rest = ctx.saved_tensors
        keep, weights = rest[: ctx.masks], rest[ctx.masks :]
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]]
        run: Any = _backward if is_eager(grad) else torch.ops.fastprompt.prompt_lstm_backward
        grads = run(grad, x, weights, keep, steps, ctx.num_layers, ctx.bidirectional, needs, ctx.backend)
        dx, *dweights = (g if need else None for g, need in zip(grads, needs))
        return dx, None, None, None, None, *dweights


def _check_weights(x, weights, num_layers, bidirectional):
    if isinstance(weights, torch.Tensor):
        raise TypeError("weights must be a list of tensors, list(nn.LSTM(...).parameters()), got one tensor")
    if not isinstance(num_layers, int) or num_layers < 1:
        raise ValueError(f"num_layers must be an int of at least 1, got {num_layers!r}")
    weights = list(weights)
    directions = 2 if bidirectional else 1
    cells = num_layers * directions
    if len(weights) not in (4 * cells, 2 * cells):
        raise ValueError(
            f"weights must hold {4 * cells} tensors, or {2 * cells} without biases, "
            f"for num_layers={num_layers}, bidirectional={bool(bidirectional)}, got {len(weights)}"
        )
    check_tensor("weights[1]", weights[1], ["4H", "H"], like=("x", x))
    hidden = weights[1].shape[1]
    check_tensor("weights[1]", weights[1], [4 * hidden, hidden])
    size = len(weights) // cells
    for at, weight in enumerate(weights):
        inputs = x.shape[1] if at < size * directions else directions * hidden
        shape = ([4 * hidden, inputs], [4 * hidden, hidden], [4 * hidden], [4 * hidden])[at % size]
        check_tensor(f"weights[{at}]", weight, shape, like=("x", x))
    return weights


def _dropout_masks(x, weights, num_layers, bidirectional, dropout):
    """One mask of 0 and 1 / (1 - dropout) for what each layer but the last hands on; none without dropout."""
    if dropout == 0:
        return []
    width = weights[1].shape[1] * (2 if bidirectional else 1)
    ones = x.new_ones(x.shape[0], width, dtype=accumulator(x.dtype))
    return [torch.nn.functional.dropout(ones, dropout) for _ in range(num_layers - 1)]


def _torch_lstm(x, weights, num_layers, bidirectional, dropout):
    """nn.LSTM's own code and autograd. Autocast is kept out: oneDNN's LSTM fails under it."""
    directions = 2 if bidirectional else 1
    zero = x.new_zeros(num_layers * directions, 1, weights[1].shape[1])
    biased = len(weights) == 4 * num_layers * directions
    train = dropout > 0 or torch.is_grad_enabled()  # cuDNN has no backward of what ran as evaluation
    with without_autocast(x.device.type):
        out, _, _ = torch.lstm(
            x.unsqueeze(1), (zero, zero), weights, biased, num_layers, dropout, train, bool(bidirectional), False
        )
    return out.squeeze(1)


_library = torch.library.Library("fastprompt", "FRAGMENT")
_library.define(
    "prompt_lstm(Tensor x, Tensor[] weights, Tensor[] keep, int num_layers, bool bidirectional, str backend) "
    "-> (Tensor, Tensor)"
)
_library.define(
    "prompt_lstm_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor[] keep, Tensor steps, int num_layers, "
    "bool bidirectional, bool[] needs, str backend) -> Tensor[]"
)


@torch.library.impl(_library, "prompt_lstm", "CompositeExplicitAutograd")
def _forward(x, weights, keep, num_layers, bidirectional, backend):
    with without_autocast(x.device.type):
        return module_of("prompt_lstm", backend).forward(x, weights, keep, num_layers, bidirectional)


@torch.library.register_fake("fastprompt::prompt_lstm", lib=_library)
def _forward_fake(x, weights, keep, num_layers, bidirectional, backend):
    steps, hidden, directions = x.shape[0], weights[1].shape[1], 2 if bidirectional else 1
    state = x.new_empty(num_layers, directions, steps, 5, hidden, dtype=accumulator(x.dtype))
    return x.new_empty(steps, directions * hidden), state


@torch.library.impl(_library, "prompt_lstm_backward", "CompositeExplicitAutograd")
def _backward(grad, x, weights, keep, steps, num_layers, bidirectional, needs, backend):
    with without_autocast(x.device.type):
        return module_of("prompt_lstm", backend).backward(
            grad, x, weights, keep, steps, num_layers, bidirectional, needs
        )


@torch.library.register_fake("fastprompt::prompt_lstm_backward", lib=_library)
def _backward_fake(grad, x, weights, keep, steps, num_layers, bidirectional, needs, backend):
    return [t.new_empty(t.shape if need else 0) for t, need in zip((x, *weights), needs)]
