"""Multitask Prompt Tuning against PEFT's embedding, and its distillation loss."""

import copy

import pytest
import torch
from method_sizes import COMMON, HEADS, D, P, backward
from peft import MultitaskPromptTuningConfig
from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding
from torch import nn

from fastprompt.methods import MultitaskPromptTuning, distillation_loss

WORDS = nn.Embedding(9, D)


def peft_multitask(tasks=3, ranks=2, **options):
    config = MultitaskPromptTuningConfig(
        token_dim=D, num_attention_heads=HEADS, num_tasks=tasks, num_ranks=ranks, **options, **COMMON
    )
    return MultitaskPromptEmbedding(config, WORDS)


def test_multitask_equals_peft_s_embedding():
    torch.manual_seed(0)
    theirs = peft_multitask()
    torch.manual_seed(0)
    ours = MultitaskPromptTuning(P, D, 3, num_ranks=2)
    named = dict(shared=theirs.embedding.weight, rows=theirs.prefix_task_cols, cols=theirs.prefix_task_rows)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, named[name])
    tasks = torch.tensor([2, 0])
    expected, got = theirs(torch.arange(P).expand(2, P), tasks).flatten(0, 1), ours(tasks)
    assert got.shape == (2 * P, D)
    torch.testing.assert_close(got, expected)
    backward(theirs, expected)
    for name, grad in backward(ours, got).items():
        torch.testing.assert_close(grad, named[name].grad)
    assert not ours.rows.grad[1].any() and ours.rows.grad[0].any()
    assert torch.equal(ours(), ours(torch.arange(3))) and torch.equal(ours()[:P], ours(torch.tensor([0])))


@pytest.mark.parametrize(
    "task, mode",
    [
        ("average", "AVERAGE_SOURCE_TASKS"),
        (1, "EXACT_SOURCE_TASK"),
        ("shared", "ONLY_SOURCE_SHARED"),
    ],
)
def test_target_tasks_start_as_in_peft(tmp_path, task, mode):
    source = MultitaskPromptTuning(P, D, 3, num_ranks=2)
    state = dict(prompt_embeddings=source.shared, prefix_task_cols=source.rows, prefix_task_rows=source.cols)
    torch.save({name: x.detach() for name, x in state.items()}, tmp_path / "source.bin")
    torch.manual_seed(0)
    path = str(tmp_path / "source.bin")
    theirs = peft_multitask(
        1, prompt_tuning_init=mode, prompt_tuning_init_task=1, prompt_tuning_init_state_dict_path=path
    )
    ours = MultitaskPromptTuning.from_source(source, task)
    assert torch.equal(ours.shared, theirs.embedding.weight) and ours.num_tasks == 1
    if task == "shared":
        assert ours.rows.std() < 0.1 and not (ours.rows == source.rows[:1]).any()
        assert MultitaskPromptTuning.from_source(source, task, 4).cols.shape == (4, 2, D)
    else:
        assert torch.equal(ours.rows, theirs.prefix_task_cols) and torch.equal(ours.cols, theirs.prefix_task_rows)
        assert torch.equal(MultitaskPromptTuning.from_source(source, task, 2).rows, ours.rows.expand(2, -1, -1))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert source.shared.all() and source.rows.all() and source.cols.all()


def test_parameter_groups_give_the_parts_their_own_learning_rate():
    method = MultitaskPromptTuning(P, D, 2)
    before = copy.deepcopy(method)
    optimizer = torch.optim.SGD(method.parameter_groups(0.5, 0.25))
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, lr in dict(shared=0.5, rows=0.25, cols=0.25).items():
        torch.testing.assert_close(getattr(method, name), getattr(before, name) - lr)


def test_distillation_loss_is_the_written_formula():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 9, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    near, far = (torch.randn(6, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    loss = distillation_loss(student, teacher, near, far, weight=0.5, temperature=2.0)
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    expected = 0.5 * ((p * (p / q).log()).sum() / 4 + ((near - far) ** 2).sum() / 18)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    torch.testing.assert_close(near.grad, (near - far).detach() / 18)
    torch.testing.assert_close(student.grad, 0.5 * (q - p).detach() / 2 / 4)
    assert teacher.grad is None and far.grad is None
    assert distillation_loss(teacher, teacher, far, far) == 0


def test_distillation_loss_is_summed_in_fp32():
    student, teacher = (torch.randn(3, 5000).bfloat16() for _ in range(2))
    hidden = torch.zeros(3, 4, dtype=torch.bfloat16), torch.zeros(3, 4)
    got = distillation_loss(student, teacher, *hidden, weight=1)
    expected = distillation_loss(student.double(), teacher.double(), *(x.double() for x in hidden), weight=1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
