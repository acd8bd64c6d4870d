"""Row plans against a plan written cell by cell, and their refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from row_plans import flat, packed, padded, result_of

from fastprompt import native
from fastprompt.layout import CannotPack, plan_packed_input, plan_padded_input


@st.composite
def batches(draw):
    batch, width, length, prompts = (draw(st.integers(*r)) for r in ((1, 5), (1, 7), (1, 4), (1, 3)))
    mask = torch.zeros(batch, width, dtype=torch.int64)
    for row in range(batch):
        size = draw(st.integers(0, width))
        first = draw(st.integers(0, width - size))
        mask[row, first : first + size] = 1
    ids = torch.tensor([draw(st.integers(0, prompts - 1)) for _ in range(batch)])
    ids[0] = prompts - 1  # every plan sees the bank it is told about
    labels = torch.tensor([[draw(st.sampled_from([-100, 5, 6])) for _ in range(width)] for _ in range(batch)])
    labels[mask == 0] = -100
    first = mask.argmax(1)
    padded_left = (first > 0) & (mask.sum(1) > 0)
    labels[padded_left, first[padded_left]] = -100
    return mask, length, ids, labels


@given(batches(), st.sampled_from(["shared", "packed", "padded"]))
@settings(max_examples=150, deadline=None)
def test_every_cell_is_where_it_belongs(example, layout):
    mask, length, ids, labels = example
    batch, width = mask.shape
    try:
        plan = plan_padded_input(
            batch, width, length, attention_mask=mask, labels=labels, prompt_ids=ids, layout=layout
        )
    except CannotPack as error:
        assert layout == "packed" and "left padding" in str(error)
        return
    assert plan.grid.shape == (batch, length + width)
    for b in range(batch):
        for c in range(length + width):
            row = int(plan.grid[b, c])
            real = c < length or layout == "padded" or mask[b, c - length]
            assert (row >= 0) == bool(real)
            if row >= 0:
                expected = -1 - (int(ids[b]) * length + c) if c < length else b * width + c - length
                assert int(plan.source[row]) == expected and int(plan.position_ids[row]) == c
    rows = len(plan.source)
    tokens, prompts = int(mask.sum()), int(ids.max()) + 1
    assert (
        rows
        == {"shared": prompts * length + tokens, "packed": batch * length + tokens, "padded": batch * (length + width)}[
            layout
        ]
    )
    wanted = [(b, c) for b in range(batch) for c in range(width) if labels[b, c] != -100]
    assert plan.labels.tolist() == [int(labels[b, c]) for b, c in wanted]
    assert plan.label_rows.tolist() == [int(plan.grid[b, length + c - 1]) for b, c in wanted]
    assert torch.equal(plan.predicting[plan.places], plan.label_rows)
    assert torch.equal(plan.predicting, plan.label_rows.unique())
    unpacked = plan.unpack(torch.arange(rows)[:, None], fill=-7)[..., 0]
    assert torch.equal(unpacked, torch.where(plan.grid >= 0, plan.grid, -7))


@pytest.mark.skipif(native.missing is not None, reason=str(native.missing))
@pytest.mark.parametrize("make, examples", [(plan_padded_input, padded()), (plan_packed_input, packed())])
def test_the_library_plans_as_pytorch_does(make, examples):
    @given(examples)
    @settings(max_examples=150, deadline=None)
    def check(example):
        *sizes, options = example
        exact = result_of(make, *sizes, **options, backend="reference")
        assert result_of(make, *sizes, **options, backend="cpu") == exact

    check()


@given(padded())
@settings(max_examples=200, deadline=None)
def test_what_no_label_depends_on_is_left_out(example):
    *sizes, options = example
    options.update(layout="shared", to_last_label=False)
    labels = options.get("labels")
    try:
        whole = plan_padded_input(*sizes, **options)
    except (CannotPack, ValueError) as error:
        with pytest.raises(type(error), match=str(error)):
            plan_padded_input(*sizes, **dict(options, to_last_label=True))
        return
    plan = plan_padded_input(*sizes, **dict(options, to_last_label=True))
    if labels is None or not len(whole.labels):
        assert torch.equal(plan.source, whole.source) and not plan.to_last_label
        return
    assert plan.to_last_label and torch.equal(plan.labels, whole.labels)
    width, front = labels.shape[1], whole.grid.shape[1] - labels.shape[1]
    first_label = 0 if front else 1
    column = torch.arange(width)
    needed = ((labels != -100) & (column >= first_label)).flip(1).long().argmax(1)
    none = ~((labels != -100) & (column >= first_label)).any(1)
    end = (width - 1 - needed).masked_fill(none, 0)  # the column of the last label
    stays = torch.cat([torch.ones(len(labels), front), (column < end[:, None]).float()], 1).bool()
    stays &= whole.grid >= 0
    assert torch.equal(plan.grid >= 0, stays)
    for name in ("source", "position_ids"):  # a shared token may be that of another sequence
        kept, all_of_them = (getattr(p, name)[p.grid[stays]] for p in (plan, whole))
        if name == "source" and options.get("token_ids") is not None:
            ids = options["token_ids"].flatten().long()
            kept, all_of_them = (torch.where(x >= 0, ids[x.clamp(min=0)], x) for x in (kept, all_of_them))
        assert torch.equal(kept, all_of_them)
    before = (labels != -100) & (column >= first_label)
    assert torch.equal(plan.label_rows, torch.nn.functional.pad(plan.grid, (1, 0))[:, front : front + width][before])
    assert sorted(
        set(plan.grid[plan.grid >= 0].tolist()) | set(range(sum(node.length for node in plan.shared.nodes)))
    ) == list(range(len(plan.source)))
    assert plan.sequences.rows == len(plan.source) == int(plan.sequences.lengths.sum())


@given(batches())
@settings(max_examples=60, deadline=None)
def test_sequences_join_each_text_to_its_prompt(example):
    mask, length, ids, _ = example
    plan = plan_padded_input(*mask.shape, length, attention_mask=mask, prompt_ids=ids)
    prompts = int(ids.max()) + 1
    starts, lengths = plan.sequences.starts.tolist(), plan.sequences.lengths.tolist()
    assert lengths == [length] * prompts + mask.sum(1).tolist()
    assert starts == [sum(lengths[:i]) for i in range(len(lengths))]
    assert plan.sequences.prefix_ids.tolist() == [-1] * prompts + ids.tolist()
    gaps = [0] * len(lengths) if plan.sequences.gaps is None else plan.sequences.gaps.tolist()
    for gap, n, row in zip(gaps[prompts:], lengths[prompts:], mask):
        assert n == 0 or gap == int(row.argmax())
    assert [node[:2] for node in plan.shared.nodes] == [(i * length, length) for i in range(prompts) if length]


def test_packed_input_is_the_padded_batch_without_padding():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]])
    ids = torch.tensor([1, 0, 1])
    labels = torch.arange(12).view(3, 4).masked_fill(mask == 0, -100)
    padded = plan_padded_input(3, 4, 2, attention_mask=mask, labels=labels, prompt_ids=ids)
    packed = plan_packed_input([0, 3, 4, 6], 2, labels=labels[mask == 1], prompt_ids=ids)
    position = torch.full((12,), -1)
    position[mask.flatten() == 1] = torch.arange(6)
    expected = torch.where(padded.source >= 0, position[padded.source.clamp(min=0)], padded.source)
    assert torch.equal(packed.source, expected)
    for name in ("position_ids", "label_rows", "predicting", "labels"):
        assert torch.equal(getattr(packed, name), getattr(padded, name))
    assert torch.equal(packed.grid, padded.grid[:, :5])  # as wide as the longest sequence


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_virtual_tokens_inside_a_template(layout):
    """[text, P0, text, P1]: the prompt stands where the template says, and not in front."""
    virtual = torch.tensor([[-1, 0, -1, 1], [0, -1, 1, -1]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    plan = plan_padded_input(
        2, 4, 2, attention_mask=mask, virtual_tokens=virtual, prompt_ids=torch.tensor([0, 1]), layout=layout
    )
    expected = [0, -1, 2, -2, -3, 5, -4, 7]
    assert plan.source.tolist() == (expected if layout == "padded" else expected[:-1])
    assert plan.position_ids.tolist()[:7] == [0, 1, 2, 3, 0, 1, 2]


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_prompts_that_a_sequence_has_are_numbered(layout):
    """Ids may be any then, and are what they are numbered by in ascending order."""
    options = dict(attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0]]), layout=layout)
    dense = plan_padded_input(4, 3, 2, prompt_ids=torch.tensor([2, 1, 2, 0]), **options)
    ids = torch.tensor([1 << 40, 7, 1 << 40, -3])
    plan = plan_padded_input(4, 3, 2, prompt_ids=ids, only_used_prompts=True, **options)
    assert (plan.prompts, dense.prompts) == ((-3, 7, 1 << 40), (0, 1, 2))
    assert plan.prompt_ids == dense.prompt_ids == (2, 1, 2, 0)
    found, expected = flat(plan), flat(dense)
    assert found.pop("prompts") != expected.pop("prompts") and found == expected


def test_token_ids_replace_positions():
    ids = torch.tensor([[11, 12], [13, 14]])
    plan = plan_padded_input(2, 2, 1, attention_mask=torch.tensor([[1, 0], [1, 1]]))
    assert plan.token_ids(ids).tolist() == [-1, 11, 13, 14]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(attention_mask=torch.tensor([[1, 0, 1]])), "the attention mask has holes"),
        (
            dict(attention_mask=torch.tensor([[0, 1, 1]]), labels=torch.tensor([[-100, 4, 4]])),
            "a label follows a padding token",
        ),
        (
            dict(attention_mask=torch.tensor([[1, 1, 0]]), labels=torch.tensor([[4, 4, 4]])),
            None,
        ),  # predicted by a real token
        (
            dict(attention_mask=torch.tensor([[1, 0, 0]]), labels=torch.tensor([[4, 4, 4]])),
            "a label follows a padding token",
        ),
    ],
)
def test_what_cannot_be_packed_exactly_is_refused(options, message):
    if message is None:
        plan_padded_input(1, 3, 2, **options)
        return
    with pytest.raises(CannotPack, match=message):
        plan_padded_input(1, 3, 2, **options)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: plan_padded_input(2, 3, -1), "num_virtual_tokens must be an int >= 0, got -1"),
        (
            lambda: plan_padded_input(2, 3, 1, layout="dense"),
            "layout must be 'shared', 'packed' or 'padded', got 'dense'",
        ),
        (
            lambda: plan_padded_input(2, 3, 1, labels=torch.zeros(2, 4, dtype=torch.int64)),
            r"labels must have shape \[2, 3\]",
        ),
        (
            lambda: plan_padded_input(2, 3, 1, prompt_ids=torch.zeros(3, dtype=torch.int64)),
            r"prompt_ids must have shape \[2\]",
        ),
        (lambda: plan_padded_input(2, 3, 1, prompt_ids=torch.tensor([0, -1])), "prompt_ids must be at least 0, got -1"),
        (
            lambda: plan_padded_input(2, 3, 1, layout="packed", to_last_label=True),
            "to_last_label needs the layout 'shared', got 'packed'",
        ),
        (lambda: plan_packed_input([0, 2], 1, layout="padded"), "layout must be 'shared' or 'packed' for packed input"),
        (
            lambda: plan_padded_input(1, 2, 1, virtual_tokens=torch.tensor([[0, 1]]), layout="packed"),
            "virtual_tokens must be below num_virtual_tokens 1, got 1",
        ),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
