"""The kernels of the row plan against plain PyTorch: the same numbers, whatever the batch."""

from dataclasses import fields

import pytest
import torch
from guard import guarded, shuffled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastprompt.layout import CannotPack, Sequences, plan_packed_input, plan_padded_input
from fastprompt.layout import triton as launcher


@pytest.fixture(autouse=True, params=[4, 16])
def _columns_at_a_time(monkeypatch, request):
    """So few that a sequence has several blocks of them."""
    monkeypatch.setattr(launcher, "_block", lambda batch: request.param)


def flat(plan):
    """Everything in a plan, tensors as lists."""
    return {field.name: listed(getattr(plan, field.name)) for field in fields(plan)}


def listed(value):
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, Sequences):
        return [listed(x) for x in value.tensors()]
    return value


def result_of(make, *arguments, **options):
    try:
        return flat(make(*arguments, **options))
    except (CannotPack, ValueError) as error:
        return type(error), str(error)


def check(make, *arguments, **options):
    """The plan, or the refusal, of both backends."""
    exact = result_of(make, *arguments, **options, backend="reference")
    options = {name: guarded(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    for seed in range(2):
        with shuffled(seed):  # programs run in any order
            assert result_of(make, *arguments, **options, backend="triton") == exact
    return exact


def draw_ints(draw, shape, low, high, dtype=torch.int64):
    count = torch.Size(shape).numel()
    return torch.tensor(draw(st.lists(st.integers(low, high), min_size=count, max_size=count)), dtype=dtype).view(shape)


@st.composite
def options(draw, shape, batch):
    """What both sorts of input take."""
    length = draw(st.integers(0, 5))
    chosen = dict(prefix_length=draw(st.integers(0, 2)), layout=draw(st.sampled_from(["shared", "packed", "padded"])))
    if draw(st.booleans()):
        chosen["prompt_ids"] = draw_ints(draw, [batch], 0, 2)
    ints = st.sampled_from([torch.int64, torch.int32])
    if draw(st.booleans()):
        labels = draw_ints(draw, shape, -4, 4, draw(ints))
        chosen["labels"] = torch.where(labels < 0, -100, labels)
    if draw(st.booleans()):
        chosen["token_ids"] = draw_ints(draw, shape, 7, 8, draw(ints))
    if draw(st.booleans()):
        chosen["virtual_tokens"] = draw_ints(draw, shape, -3, length, draw(ints)).clamp(min=-1)
    return length, chosen


@st.composite
def padded(draw):
    batch, width = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    length, chosen = draw(options([batch, width], batch))
    mask = torch.zeros(batch, width, dtype=draw(st.sampled_from([torch.int64, torch.bool])))
    left = draw(st.booleans())
    for row in mask:
        size = draw(st.integers(0, width))
        first = draw(st.integers(0, width - size)) if left else 0
        row[first : first + size] = 1
    if draw(st.integers(0, 9)) == 0:
        column = draw(st.integers(0, width - 1))
        mask[0, column] = mask[0, column] == 0
    if draw(st.integers(0, 4)):
        chosen["attention_mask"] = mask
        if "labels" in chosen and draw(st.integers(0, 4)):
            chosen["labels"][mask == 0] = -100
    return batch, width, length, chosen


FEW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(padded())
@FEW
def test_padded_input(example):
    *sizes, chosen = example
    check(plan_padded_input, *sizes, **chosen)


@given(st.data())
@FEW
def test_packed_input(data):
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    length, chosen = data.draw(options([sum(lengths)], len(lengths)))
    check(plan_packed_input, [sum(lengths[:i]) for i in range(len(lengths) + 1)], length, **chosen)


def test_what_is_shared_is_written_once():
    """Two prompts, the second without a token in its first row, and one between them that no sequence has."""
    ids = torch.tensor([[1, 2, 3, 4], [9, 9, 9, 9], [5, 6, 0, 0], [5, 6, 7, 0], [1, 2, 4, 4]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]])
    plan = check(
        plan_padded_input, 5, 4, 3, attention_mask=mask, token_ids=ids, prompt_ids=torch.tensor([0, 2, 2, 2, 0])
    )
    assert plan["shared"] == ((0, 5), (5, 3), (8, 5))
    assert plan["source"] == [-1, -2, -3, 0, 1, -4, -5, -6, -7, -8, -9, 8, 9, 2, 3, 14, 18]


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
