"""Multitask Prompt Tuning: Wang et al. 2023, Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning,
arXiv 2303.02861."""

import torch
from torch import nn

from ..checks import FLOATS, accumulator, check_tensor
from ..ops.multitask_prompt.api import multitask_prompt
from .prompt_tuning import check_sizes, initial_values


class MultitaskPromptTuning(nn.Module):
    """Prompts of T tasks: the shared prompt times each task's own low-rank factor, ``shared * (rows[t] @ cols[t])``.

    First trained on source tasks together, each with :func:`distillation_loss` against a prompt trained for it alone;
    then :meth:`from_source` starts a target task from what they share.

    Args:
        num_virtual_tokens: P, at least 1.
        token_dim: D, the width of the model's embeddings.
        num_tasks: T, at least 1.
        num_ranks: r, the rank of a task's factor.
        init: ``[P, D]`` starting values of the shared prompt. None: standard normal.

    Attributes:
        shared: ``[P, D]`` fp32 parameter.
        rows: ``[T, P, r]`` fp32 parameter; ``prefix_task_cols`` in PEFT.
        cols: ``[T, r, D]`` fp32 parameter; ``prefix_task_rows`` in PEFT. Both start normal with deviation 0.02. With
            the same seed all three have PEFT's values.

    Raises:
        TypeError: an ``init`` that is no tensor.
        ValueError: a size below 1, or an ``init`` of another shape.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        token_dim: int,
        num_tasks: int,
        *,
        num_ranks: int = 1,
        init: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        check_sizes(
            num_virtual_tokens=num_virtual_tokens, token_dim=token_dim, num_tasks=num_tasks, num_ranks=num_ranks
        )
        shape = (num_virtual_tokens, token_dim)
        self.shared = nn.Parameter(torch.randn(shape) if init is None else initial_values(init, shape))
        self.rows = nn.Parameter(torch.normal(0.0, 0.02, (num_tasks, num_virtual_tokens, num_ranks)))
        self.cols = nn.Parameter(torch.normal(0.0, 0.02, (num_tasks, num_ranks, token_dim)))

    @classmethod
    def from_source(
        cls, source: "MultitaskPromptTuning", task: int | str = "average", num_tasks: int = 1
    ) -> "MultitaskPromptTuning":
        """Start target tasks from trained source tasks; nothing is shared with ``source`` afterwards.

        Args:
            source: a :class:`MultitaskPromptTuning`.
            task: what each target task starts from. An int: that source task (PEFT's EXACT_SOURCE_TASK). "average": the
                mean of ``rows`` and the mean of ``cols`` (AVERAGE_SOURCE_TASKS). "shared": new factors, only the shared
                prompt is taken over (ONLY_SOURCE_SHARED).
            num_tasks: the number of target tasks.

        Raises:
            ValueError: no such task.
        """
        tasks, length, ranks = source.rows.shape
        method = cls(length, source.token_dim, num_tasks, num_ranks=ranks, init=source.shared).to(source.shared.device)
        if task == "shared":
            return method
        is_source_task = isinstance(task, int) and 0 <= task < tasks
        if task != "average" and not is_source_task:
            raise ValueError(f'task must be "average", "shared" or an int in [0, {tasks}), got {task!r}')
        with torch.no_grad():
            for name in ("rows", "cols"):
                factors = getattr(source, name)
                getattr(method, name).copy_(factors.mean(0) if task == "average" else factors[task])
        return method

    @property
    def num_prompts(self) -> int:
        """T: a batch picks its tasks as it picks prompts of another method."""
        return self.rows.shape[0]

    num_tasks = num_prompts

    @property
    def num_virtual_tokens(self) -> int:
        return self.shared.shape[0]

    @property
    def token_dim(self) -> int:
        return self.shared.shape[1]

    @property
    def num_ranks(self) -> int:
        return self.rows.shape[2]

    def forward(self, task_ids: torch.Tensor | None = None) -> torch.Tensor:
        """The prompts of the given tasks, ``[N * P, D]``.

        Args:
            task_ids: ``[N]`` int64 or int32, the distinct tasks of a batch. None: all T.
        """
        if task_ids is None:
            task_ids = torch.arange(self.num_tasks, device=self.shared.device)
        return multitask_prompt(self.shared, self.rows, self.cols, task_ids).flatten(0, 1)

    def parameter_groups(self, lr_shared: float, lr_task: float) -> list[dict]:
        """Groups for a torch optimizer that give the shared prompt and the task factors learning rates of their own."""
        return [{"params": [self.shared], "lr": lr_shared}, {"params": [self.rows, self.cols], "lr": lr_task}]


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    *,
    weight: float = 0.9,
    temperature: float = 1.0,
) -> torch.Tensor:
    """What the source tasks' loss is increased by to learn from teachers, the prompts trained for one task each:

        weight * (KL(teacher || student) + mean((student_hidden - teacher_hidden) ** 2))

    The divergence of the predictions is averaged over the M rows, the difference of hidden states over all elements.
    It is computed in fp32 (float64 inputs: float64); the teacher gets no gradient.

    Args:
        student_logits, teacher_logits: ``[M, V]`` logits of the labelled rows, floating point.
        student_hidden, teacher_hidden: ``[M, D]`` hidden states, floating point. M may differ from that of the logits.
        weight: the paper's lambda.
        temperature: above 0; both logits are divided by it.

    Returns:
        A scalar.

    Raises:
        TypeError, ValueError: other tensors, shapes that differ, no rows, or a temperature that is not above 0.
    """
    pairs = ("logits", "V", student_logits, teacher_logits), ("hidden", "D", student_hidden, teacher_hidden)
    for name, width, student, teacher in pairs:
        check_tensor(f"student_{name}", student, ["M", width], dtypes=FLOATS)
        check_tensor(f"teacher_{name}", teacher, student.shape, dtypes=FLOATS, like=(f"student_{name}", student))
        if student.numel() == 0:
            raise ValueError(f"student_{name} must hold at least one row, got shape {list(student.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature!r}")
    student, teacher = (
        (x.to(accumulator(x.dtype)) / temperature).log_softmax(-1) for x in (student_logits, teacher_logits.detach())
    )
    divergence = nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
    student, teacher = (x.to(accumulator(x.dtype)) for x in (student_hidden, teacher_hidden.detach()))
    return weight * (divergence + nn.functional.mse_loss(student, teacher))
