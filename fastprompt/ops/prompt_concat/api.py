"""prompt_concat: token embeddings and prompt rows gathered into one packed batch."""

from typing import Any

import torch

from ...backends import implementation, is_eager
from ...checks import FLOATS, INTS, check_range, check_tensor
from . import cpu


def prompt_concat(
    source: torch.Tensor, table: torch.Tensor, prompt: torch.Tensor, scale: float = 1.0, *, backend: str = "auto"
) -> torch.Tensor:
    """Build the rows of a batch from token embeddings and prompt vectors.

    ``rows[r]`` is ``table[source[r]] * scale`` where ``source[r] >= 0`` and ``prompt[-1 - source[r]]`` where it is
    negative. Concatenating a prompt in front, virtual tokens inside a template, padding, packing and a bank of
    prompts are all this one gather; ``fastprompt.layout`` builds ``source``.

    Args:
        source: ``[R]`` int64 or int32, values in ``[-M, V)``.
        table: ``[V, D]`` token embeddings (or any rows to gather from).
        prompt: ``[M, D]`` prompt vectors, the dtype and device of ``table``. N prompts of P tokens are ``M = N * P``.
        scale: factor on the rows of ``table`` only, for models that scale embeddings inside the embedding module.
        backend: "auto", "reference", "cpu" or "triton". "auto" takes "cpu" on a CPU and "triton" on a GPU, but
            "reference" for float64 and where the C++ library or Triton is missing.

    Returns:
        ``[R, D]`` rows, differentiable in ``table`` and ``prompt``. A row read several times receives the sum of its
        readers' gradients, added in a fixed order.

    Raises:
        TypeError, ValueError: an argument with another dtype, shape or device, or a source out of range.
        RuntimeError: a backend that was asked for and cannot run.
    """
    check_tensor("table", table, ["V", "D"], dtypes=FLOATS)
    check_tensor("prompt", prompt, ["M", table.shape[1]], like=("table", table))
    check_tensor("source", source, ["R"], dtypes=INTS, like=("table", table))
    return PromptConcat.apply(source, table, prompt, float(scale), backend)


class PromptConcat(torch.autograd.Function):
    """Autograd of :func:`prompt_concat`; arguments are positional and already checked.

    The ``grad_fn`` of rows says by ``of_prompt_alone`` that no gradient of the table is wanted.
    """

    @staticmethod
    def forward(
        ctx: Any, source: torch.Tensor, table: torch.Tensor, prompt: torch.Tensor, scale: float, backend: str
    ) -> torch.Tensor:
        ctx.save_for_backward(source)
        ctx.scale, ctx.table_rows, ctx.prompt_rows = scale, table.shape[0], prompt.shape[0]
        ctx.backend, ctx.of_prompt_alone = backend, not ctx.needs_input_grad[1]
        run = _forward if is_eager(table) else torch.ops.fastprompt.prompt_concat
        return run(source, table, prompt, scale, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        (source,) = ctx.saved_tensors
        need_table, need_prompt = ctx.needs_input_grad[1:3]
        run: Any = _backward if is_eager(grad) else torch.ops.fastprompt.prompt_concat_backward
        dtable, dprompt = run(
            grad, source, ctx.scale, ctx.table_rows, ctx.prompt_rows, need_table, need_prompt, ctx.backend
        )
        return None, dtable if need_table else None, dprompt if need_prompt else None, None, None


_library = torch.library.Library("fastprompt", "FRAGMENT")
_library.define("prompt_concat(Tensor source, Tensor table, Tensor prompt, float scale, str backend) -> Tensor")
_library.define(
    "prompt_concat_backward(Tensor grad, Tensor source, float scale, SymInt table_rows, SymInt prompt_rows, "
    "bool need_table, bool need_prompt, str backend) -> (Tensor, Tensor)"
)


@torch.library.impl(_library, "prompt_concat", "CompositeExplicitAutograd")
def _forward(source, table, prompt, scale, backend):
    runner = implementation("prompt_concat", backend, table.device.type, table.dtype)
    if runner is not cpu:  # which finds them while it copies
        check_range("source", source, -prompt.shape[0], table.shape[0])
    return runner.forward(source, table, prompt, scale)


@torch.library.register_fake("fastprompt::prompt_concat", lib=_library)
def _forward_fake(source, table, prompt, scale, backend):
    return table.new_empty(source.shape[0], table.shape[1])


@torch.library.impl(_library, "prompt_concat_backward", "CompositeExplicitAutograd")
def _backward(grad, source, scale, table_rows, prompt_rows, need_table, need_prompt, backend):
    runner = implementation("prompt_concat", backend, grad.device.type, grad.dtype)
    return runner.backward(grad, source, scale, table_rows, prompt_rows, need_table, need_prompt)


@torch.library.register_fake("fastprompt::prompt_concat_backward", lib=_library)
def _backward_fake(grad, source, scale, table_rows, prompt_rows, need_table, need_prompt, backend):
    width = grad.shape[1]
    dtable = grad.new_empty(table_rows, width) if need_table else grad.new_empty(0)
    dprompt = grad.new_empty(prompt_rows, width) if need_prompt else grad.new_empty(0)
    return dtable, dprompt
