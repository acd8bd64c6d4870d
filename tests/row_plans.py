"""Batches for row plans, drawn by hypothesis, and plans to compare."""

from dataclasses import fields

import torch
from hypothesis import strategies as st

from fastprompt.layout import CannotPack


def flat(plan):
    """Everything in a plan, tensors as lists."""
    values = {field.name: getattr(plan, field.name) for field in fields(plan)}
    if plan.sequences is not None:
        values["sequences"] = plan.sequences.flat.tolist()
    return {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in values.items()}


def result_of(make, *arguments, **options):
    try:
        return flat(make(*arguments, **options))
    except (CannotPack, ValueError) as error:
        return type(error), str(error)


def draw_ints(draw, shape, low, high, dtype=torch.int64):
    count = torch.Size(shape).numel()
    return torch.tensor(draw(st.lists(st.integers(low, high), min_size=count, max_size=count)), dtype=dtype).view(shape)


@st.composite
def options(draw, shape, batch):
    """What both sorts of input take."""
    length = draw(st.integers(0, 5))
    chosen = dict(prefix_length=draw(st.integers(0, 2)), layout=draw(st.sampled_from(["shared", "packed", "padded"])))
    if chosen["layout"] == "shared":
        chosen["to_last_label"] = draw(st.booleans())
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


@st.composite
def packed(draw):
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    length, chosen = draw(options([sum(lengths)], len(lengths)))
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)], length, chosen
