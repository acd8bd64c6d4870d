"""Trees of shared rows against a plan without: every row sees its own left context, and nothing else."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from row_plans import flat

from fastprompt.layout import NODE_COST, final_buckets, plan_packed_input, plan_padded_input, recurrent_schedule


@st.composite
def batches(draw):
    """Rows of blocks of tokens out of few, so that groups of them begin alike, behind prompts or learned keys."""
    size, prompts = draw(st.integers(1, 9)), draw(st.integers(1, 2))
    block = st.tuples(st.integers(0, 2), st.integers(1, 12))
    texts = [
        [token for number, length in draw(st.lists(block, min_size=0, max_size=4)) for token in [number] * length]
        for _ in range(size)
    ]
    for row in range(1, size):
        if draw(st.integers(0, 2)) == 0:
            texts[row] = texts[row - 1] + texts[row][: draw(st.integers(0, 2))]
    width = max(map(len, texts)) + draw(st.integers(1, 2))
    side = draw(st.sampled_from(["right", "left", "some"]))
    ids, mask = torch.full((size, width), 9), torch.zeros(size, width, dtype=torch.int64)
    for row, text in enumerate(texts):
        room = width - len(text)
        first = {"right": 0, "left": room, "some": draw(st.sampled_from([0, 0, min(2, room)]))}[side]
        ids[row, first : first + len(text)] = torch.tensor(text, dtype=torch.int64)
        mask[row, first : first + len(text)] = 1
    labels = torch.where(
        (mask == 1) & torch.tensor(np.array(draw(st.lists(st.booleans(), min_size=width, max_size=width)))), ids, -100
    )
    labels[torch.arange(size), mask.argmax(1)] = -100
    labels[:, 0] = -100
    options = dict(
        num_virtual_tokens=draw(st.integers(0, 3)),
        prefix_length=draw(st.integers(0, 2)),
        attention_mask=mask,
        labels=labels,
        prompt_ids=torch.tensor([prompts - 1] + [draw(st.integers(0, prompts - 1)) for _ in range(size - 1)]),
        to_last_label=draw(st.booleans()),
    )
    if draw(st.booleans()):
        options["virtual_tokens"] = torch.where(ids == 0, 0 if options["num_virtual_tokens"] else -1, -1)
    return ids, options


def planned(ids, options, **changes):
    return plan_padded_input(*ids.shape, **{**options, "token_ids": ids, **changes})


def contents(plan, ids, prefix):
    """For each row what it holds, and for each cell all that its row sees, learned keys among it, in order."""
    flat_ids = ids.flatten()
    hold = [(int(flat_ids[s]) if s >= 0 else int(s), int(p)) for s, p in zip(plan.source, plan.position_ids)]
    host = plan.sequences.host
    seen = {}
    for start, length, entry in zip(host.starts, host.lengths, host.prefix_ids):
        front = []
        if plan.shared.nodes and entry >= 0:
            count = host.chains.shape[1] if host.prefix_lens is None else host.prefix_lens[entry]
            front = [("learned", int(-1 - x)) if x < 0 else hold[x] for x in host.chains[entry][:count]]
        elif not plan.shared.nodes:
            front = [("learned", int(entry) * prefix + i) for i in range(prefix)]
        for row in range(start, start + length):
            seen[row] = front + hold[start : row + 1]
    return hold, seen


@given(batches(), st.sampled_from([1, NODE_COST]))
@settings(max_examples=100, deadline=None)
def test_every_row_sees_its_own_left_context(example, cost):
    ids, options = example
    plain, tree = planned(ids, options, token_ids=None), planned(ids, options, node_cost=cost)
    prefix = options["prefix_length"]
    _, expected = contents(plain, ids, prefix)
    _, seen = contents(tree, ids, prefix)
    assert torch.equal(tree.grid >= 0, plain.grid >= 0)
    used = set()
    for ours, theirs in zip(tree.grid.flatten().tolist(), plain.grid.flatten().tolist()):
        if ours >= 0:
            assert seen[ours] == expected[theirs]
            used.add(ours)
    assert torch.equal(tree.labels, plain.labels)
    assert torch.equal(tree.predicting[tree.places], tree.label_rows)
    assert torch.equal(tree.predicting, tree.label_rows.unique())
    for ours, theirs in zip(tree.label_rows.tolist(), plain.label_rows.tolist()):
        assert seen[ours] == expected[theirs]
    assert len(tree.source) <= len(planned(ids, options, node_cost=None).source)
    lengths = tree.sequences.lengths
    assert tree.sequences.rows == len(tree.source) == len(tree.position_ids) == int(lengths.sum())
    assert [node.length for node in tree.shared.nodes] == lengths[: len(tree.shared.nodes)].tolist()


@given(batches())
@settings(max_examples=50, deadline=None)
def test_positions_say_where_padding_is(example):
    """Own positions start behind what is in front and the padding that is given: what a window counts."""
    ids, options = example
    tree = planned(ids, options, share_padded=False)
    host, padding = tree.sequences.host, tree.padding()
    padding = np.zeros_like(host.starts) if padding is None else padding.numpy()
    learned = options["prefix_length"]
    before = learned + np.append(tree.shared.depths, 0)[tree.shared.parents] if tree.shared.nodes else learned
    for start, length, position in zip(host.starts, host.lengths, before + padding):
        assert not length or int(tree.position_ids[start]) == position
    assert not tree.shared.pads_between(learned)
    if learned or ("virtual_tokens" not in options and options["num_virtual_tokens"]):
        assert (padding == host.gaps).all()  # so that gaps are all that a window has to know


@given(batches())
@settings(max_examples=50, deadline=None)
def test_states_continue_from_node_to_node(example):
    ids, options = example
    options = {**options, "prefix_length": 0, "prompt_ids": torch.zeros_like(options["prompt_ids"])}
    tree = planned(ids, options)
    schedule, seen, states = recurrent_schedule(tree), {}, []
    shared = sum(schedule.shared, ())
    for bucket in shared + schedule.own:
        for number, cells in enumerate(bucket.rows.tolist()):
            history = [] if bucket.parents is None else list(states[int(bucket.parents[number])])
            for cell in cells:
                history.append(cell)
                seen[cell] = list(history)
            if bucket in shared:
                assert cells[-1] >= 0
                states.append(history)
    for row in tree.grid.tolist():
        for column, cell in enumerate(row):
            assert cell < 0 or seen[cell] == row[: column + 1]
    for members, buckets in zip(*final_buckets(tree)):
        for number, row in enumerate(members.tolist()):
            front = [] if buckets.parents is None else states[int(buckets.parents[number])]
            text = tree.grid[row, -ids.shape[1] :][options["attention_mask"][row] == 1]
            is_run = len(text) > 0 and bool((text >= 0).all())  # of other rows nobody asks for the last state
            assert not is_run or front + buckets.rows[number].tolist() == tree.grid[row].tolist()


def grouped(groups=3, members=4, shared=20, own=5):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, (groups * members, shared + own), generator=generator)
    ids[:, :shared] = ids[::members, :shared].repeat_interleave(members, 0)
    return ids


def test_a_group_runs_its_text_once():
    ids = grouped()
    plan = plan_padded_input(*ids.shape, 4, token_ids=ids)
    assert len(plan.source) == 4 + 3 * 20 + 12 * 5
    assert [node[:4] for node in plan.shared.nodes] == [(0, 4, -1, 0), *((4 + 20 * i, 20, 0, 0) for i in range(3))]


def test_packed_input_has_the_same_tree():
    ids = grouped()
    padded = plan_padded_input(*ids.shape, 4, token_ids=ids, labels=ids)
    packed = plan_packed_input(list(range(0, ids.numel() + 1, 25)), 4, token_ids=ids.flatten(), labels=ids.flatten())
    assert flat(packed) == flat(padded)


def test_text_goes_as_deep_as_it_pays():
    """Two groups of a group; a text that would save less than it costs stays with its rows."""
    ids = torch.arange(9 * 40).view(9, 40) + 1000
    ids[:8, :12] = torch.arange(12)
    ids[:4, 12:30] = torch.arange(100, 118)
    ids[4:8, 12:30] = torch.arange(200, 218)
    ids[2:4, 30:33] = torch.arange(300, 303)  # 3 rows less
    plan = plan_padded_input(9, 40, 2, token_ids=ids)
    assert [node.length for node in plan.shared.nodes] == [2, 12, 18, 18]
    assert [node.parent for node in plan.shared.nodes] == [-1, 0, 1, 1]
    assert plan.shared.leaves == (2, 2, 2, 2, 3, 3, 3, 3, 0)
    assert len(plan.source) == 2 + 12 + 2 * 18 + 8 * 10 + 40


def test_a_caller_may_tell_what_ids_would():
    ids = torch.cat([grouped(), grouped(groups=1, members=3)[:, :25]])
    prompts = torch.tensor([0] * 12 + [1] * 3)
    alike = torch.tensor([0, 20, 20, 20] * 3 + [0, 20, 20])
    told = plan_padded_input(*ids.shape, 2, common=alike, prompt_ids=prompts)
    found = plan_padded_input(*ids.shape, 2, token_ids=ids, prompt_ids=prompts)
    assert len(told.source) == len(found.source) == 2 * 2 + 4 * 20 + 15 * 5
    for grid in (told.grid, found.grid):
        assert len(grid[:12, 2:22].unique()) == 3 * 20 and len(grid[12:, 2:22].unique()) == 20


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(common=torch.tensor([0, 26, 0])),
            "common must be at most .* got 26 for sequence 1, which has room for 25",
        ),
        (dict(common=torch.tensor([0, -1, 0])), "common must be at most"),
        (dict(common=torch.tensor([0, 3])), r"common must have shape \[3\]"),
        (
            dict(common=torch.tensor([0, 3, 3]), token_ids=torch.zeros(3, 25, dtype=torch.int64)),
            "must not both be given",
        ),
        (
            dict(
                common=torch.tensor([0, 9, 9]),
                attention_mask=(torch.arange(25) >= torch.tensor([[0], [2], [2]])).long(),
            ),
            "got 9 for sequence 1, which has room for 0",
        ),
    ],
)
def test_what_a_caller_cannot_mean_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan_padded_input(3, 25, 2, **options)


def test_nothing_is_looked_for_where_nothing_is_shared():
    ids = torch.arange(64).view(8, 8)
    plan = plan_padded_input(8, 8, 0, token_ids=ids)
    assert plan.shared.nodes == () and len(plan.source) == 64


@pytest.mark.parametrize("front, expected", [(0, 60 + 60), (4, 4 + 60 + 60)])
def test_left_padded_groups_share_behind_their_padding(front, expected):
    ids = grouped()
    mask = torch.ones_like(ids)
    mask[4:8, :3] = 0
    plan = plan_padded_input(*ids.shape, front, token_ids=ids, attention_mask=mask)
    assert len(plan.source) == expected - 3 - 0
    assert plan.shared.pads_between(0) == (front > 0)
