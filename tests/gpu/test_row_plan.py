"""The kernels of the row plan against plain PyTorch: the same numbers, whatever the batch."""

import pytest
import torch
from guard import guarded, shuffled
from hypothesis import HealthCheck, given, settings
from row_plans import packed, padded, result_of

from fastprompt.layout import plan_packed_input, plan_padded_input
from fastprompt.layout import triton as launcher


@pytest.fixture(autouse=True, params=[4, 16])
def _columns_at_a_time(monkeypatch, request):
    """So few that a sequence has several blocks of them."""
    monkeypatch.setattr(launcher, "_block", lambda batch: request.param)


def check(make, *arguments, **options):
    """The plan, or the refusal, of both backends."""
    exact = result_of(make, *arguments, **options, backend="reference")
    options = {name: guarded(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    for seed in range(2):
        with shuffled(seed):  # programs run in any order
            assert result_of(make, *arguments, **options, backend="triton") == exact
    return exact


FEW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(padded())
@FEW
def test_padded_input(example):
    *sizes, chosen = example
    check(plan_padded_input, *sizes, **chosen)


@given(packed())
@FEW
def test_packed_input(example):
    *sizes, chosen = example
    check(plan_packed_input, *sizes, **chosen)


def test_what_is_shared_is_written_once():
    """Two prompts, the second without a token in its first row, and one between them that no sequence has."""
    ids = torch.tensor([[1, 2, 3, 4], [9, 9, 9, 9], [5, 6, 0, 0], [5, 6, 7, 0], [1, 2, 4, 4]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]])
    plan = check(
        plan_padded_input, 5, 4, 3, attention_mask=mask, token_ids=ids, prompt_ids=torch.tensor([0, 2, 2, 2, 0])
    )
    assert [node[:2] for node in plan["shared"].nodes] == [(0, 5), (5, 3), (8, 5)]
    assert plan["source"] == [-1, -2, -3, 0, 1, -4, -5, -6, -7, -8, -9, 8, 9, 2, 3, 14, 18]


def test_strided_tensors():
    ints = torch.tensor([5, 1, 5, 0, 6, 1, 5, 2, 5, 0, 7, 3])
    options = dict(labels=ints[::2], token_ids=ints[::2], prompt_ids=ints[1::4])
    plans = [result_of(plan_packed_input, [0, 2, 4, 6], 2, **options, backend=x) for x in ("triton", "reference")]
    assert plans[0] == plans[1]


def test_a_batch_without_sequences():
    check(plan_packed_input, [0], 3, labels=torch.empty(0, dtype=torch.int64))
    check(
        plan_packed_input,
        [0, 0],
        3,
        labels=torch.empty(0, dtype=torch.int64),
        token_ids=torch.empty(0, dtype=torch.int64),
    )


def test_refusals():
    refused = {
        "the attention mask has holes": dict(attention_mask=torch.tensor([[1, 0, 1]])),
        "a label follows a padding token": dict(
            attention_mask=torch.tensor([[0, 1, 1]]), labels=torch.tensor([[-100, 4, 4]])
        ),
        "virtual_tokens must be below num_virtual_tokens 2, got 2": dict(virtual_tokens=torch.tensor([[0, 2, 1]])),
    }
    for message, options in refused.items():
        assert message in check(plan_padded_input, 1, 3, 2, **options)[1]
