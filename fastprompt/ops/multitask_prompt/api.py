"""multitask_prompt: the prompts of several tasks from one shared prompt and a low-rank factor per task."""

from typing import Any

import torch

from ...backends import implementation, is_eager
from ...checks import FLOATS, INTS, check_range, check_tensor, without_autocast
from . import cpu


def multitask_prompt(
    shared: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, task_ids: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """Make the prompts of the given tasks: ``prompts[n] = shared * (rows[t] @ cols[t])`` with ``t = task_ids[n]``.

    The prompt of Multitask Prompt Tuning (Wang et al. 2023, arXiv 2303.02861), with a factor of any rank ``r``. PEFT
    names the two the other way round: its ``prefix_task_cols`` are ``rows`` here, its ``prefix_task_rows`` ``cols``.

    Args:
        shared: ``[P, D]`` the prompt that all tasks share: float32, float16, bfloat16 or float64.
        rows: ``[T, P, r]`` the left factors, the dtype and device of ``shared``.
        cols: ``[T, r, D]`` the right factors, likewise.
        task_ids: ``[N]`` int64 or int32, values in ``[0, T)``. Pass the distinct tasks of a batch: a task given twice
            is right, but computed twice.
        backend: "auto", "reference", "cpu" or "triton". "auto" takes "cpu" on a CPU and "triton" on a GPU, but
            "reference" for float64 and where the C++ library or Triton is missing.

    Returns:
        ``[N, P, D]`` prompts in the dtype of ``shared``, under autocast too, differentiable in ``shared``, ``rows``
        and ``cols``. Half precision is computed in fp32 and rounded once. Gradients are added in a fixed order.

    Raises:
        TypeError, ValueError: an argument with another dtype, shape or device, or a task out of range.
        RuntimeError: a backend that was asked for and cannot run.
    """
    check_tensor("shared", shared, ["P", "D"], dtypes=FLOATS)
    check_tensor("rows", rows, ["T", shared.shape[0], "r"], like=("shared", shared))
    check_tensor("cols", cols, [rows.shape[0], rows.shape[2], shared.shape[1]], like=("shared", shared))
    check_tensor("task_ids", task_ids, ["N"], dtypes=INTS, like=("shared", shared))
    return MultitaskPrompt.apply(shared, rows, cols, task_ids, backend)


class MultitaskPrompt(torch.autograd.Function):
    """Autograd of :func:`multitask_prompt`; arguments are positional and already checked."""

    @staticmethod
    def forward(
        ctx: Any, shared: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, task_ids: torch.Tensor, backend: str
    ) -> torch.Tensor:
        ctx.save_for_backward(shared, rows, cols, task_ids)  # the factors [N, P, D] are made again
        ctx.backend = backend
        run = _forward if is_eager(shared) else torch.ops.fastprompt.multitask_prompt
        return run(shared, rows, cols, task_ids, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        needs = ctx.needs_input_grad[:3]
        run: Any = _backward if is_eager(grad) else torch.ops.fastprompt.multitask_prompt_backward
        grads = run(grad, *ctx.saved_tensors, *needs, ctx.backend)
        return *(g if need else None for g, need in zip(grads, needs)), None, None


_library = torch.library.Library("fastprompt", "FRAGMENT")
_library.define("multitask_prompt(Tensor shared, Tensor rows, Tensor cols, Tensor task_ids, str backend) -> Tensor")
_library.define(
    "multitask_prompt_backward(Tensor grad, Tensor shared, Tensor rows, Tensor cols, Tensor task_ids, "
    "bool need_shared, bool need_rows, bool need_cols, str backend) -> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(_library, "multitask_prompt", "CompositeExplicitAutograd")
def _forward(shared, rows, cols, task_ids, backend):
    runner = implementation("multitask_prompt", backend, shared.device.type, shared.dtype)
    if runner is not cpu:  # which finds them itself
        check_range("task_ids", task_ids, 0, rows.shape[0])
    with without_autocast(shared.device.type):
        return runner.forward(shared, rows, cols, task_ids)


@torch.library.register_fake("fastprompt::multitask_prompt", lib=_library)
def _forward_fake(shared, rows, cols, task_ids, backend):
    return shared.new_empty(task_ids.shape[0], *shared.shape)


@torch.library.impl(_library, "multitask_prompt_backward", "CompositeExplicitAutograd")
def _backward(grad, shared, rows, cols, task_ids, need_shared, need_rows, need_cols, backend):
    runner = implementation("multitask_prompt", backend, shared.device.type, shared.dtype)
    with without_autocast(shared.device.type):
        return runner.backward(grad, shared, rows, cols, task_ids, need_shared, need_rows, need_cols)


@torch.library.register_fake("fastprompt::multitask_prompt_backward", lib=_library)
def _backward_fake(grad, shared, rows, cols, task_ids, need_shared, need_rows, need_cols, backend):
    pairs = ((shared, need_shared), (rows, need_rows), (cols, need_cols))
    return tuple(shared.new_empty(x.shape if need else 0) for x, need in pairs)
