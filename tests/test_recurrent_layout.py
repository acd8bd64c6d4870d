"""The buckets in which layers with a state run packed rows: every row once, behind the rows of its own prompt."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprompt.layout import final_buckets, plan_padded_input, recurrent_schedule


def plan_of(lengths, first, prompts, length, prefix=0, common=0):
    width = max((a + n for a, n in zip(first, lengths)), default=0) + 1
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, (begin, count) in enumerate(zip(first, lengths)):
        mask[row, begin : begin + count] = 1
    ids = torch.arange(mask.numel()).view(mask.shape)
    ids[:, :common] = 7
    return plan_padded_input(
        *mask.shape,
        length,
        attention_mask=mask,
        prompt_ids=torch.tensor(prompts),
        prefix_length=prefix,
        token_ids=ids,
    )


def histories(plan):
    """For each packed row the rows that its state has seen, itself included; -1 for a row of zeros before it."""
    schedule, seen, states = recurrent_schedule(plan), {}, []
    shared = sum(schedule.shared, ())
    for bucket in shared + schedule.own:
        for number, cells in enumerate(bucket.rows.tolist()):
            history = [] if bucket.parents is None else list(states[int(bucket.parents[number])])
            real = [cell >= 0 for cell in cells]
            if bucket.mask is not None:
                assert bucket.mask[number].tolist() == real
            for cell in cells:
                history.append(cell)
                if cell >= 0:
                    assert cell not in seen
                    seen[cell] = list(history)
            if bucket in shared:
                assert real[-1]
                states.append(history)
    cells = torch.cat([bucket.rows.flatten() for bucket in shared + schedule.own] or [torch.zeros(0).long()])
    assert torch.equal(cells[schedule.places], torch.arange(plan.sequences.rows))
    return seen


rows = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=7)


@settings(max_examples=150, deadline=None)
@given(rows, st.integers(0, 4), st.sampled_from([0, 3]), st.integers(0, 3))
def test_a_state_sees_its_prompt_the_gap_and_its_own_tokens(rows, length, prefix, common):
    lengths, first, prompts = zip(*rows)
    _, prompts = np.unique(prompts, return_inverse=True)
    plan = plan_of(lengths, first, prompts.tolist(), length, prefix, common)
    seen = histories(plan)
    assert sorted(seen) == list(range(plan.sequences.rows))
    for row in range(len(lengths)):
        cells = plan.grid[row].tolist()
        for column, cell in enumerate(cells):
            assert cell < 0 or seen[cell] == cells[: column + 1]


@settings(max_examples=50, deadline=None)
@given(rows, st.integers(0, 4))
def test_final_buckets_hold_every_column_of_every_row(rows, length):
    lengths, first, prompts = zip(*rows)
    _, prompts = np.unique(prompts, return_inverse=True)
    plan = plan_of(lengths, first, prompts.tolist(), length)
    schedule = recurrent_schedule(plan)
    states = [cells for bucket in sum(schedule.shared, ()) for cells in bucket.rows.tolist()]
    found = {}
    for members, bucket in zip(*final_buckets(plan)):
        for number, row in enumerate(members.tolist()):
            front = [] if bucket.parents is None else states[int(bucket.parents[number])]
            found[row] = front + bucket.rows[number].tolist()
    assert found == {row: cells for row, cells in enumerate(plan.grid.tolist())}


def test_buckets_trade_padding_for_calls():
    """One long row among many short ones stands alone; rows of like lengths stand together."""
    lengths = [200] + [5, 6, 7] * 20
    plan = plan_of(lengths, [0] * 61, [0] * 61, 4)
    own = recurrent_schedule(plan).own
    assert sorted(bucket.rows.shape for bucket in own) == [(1, 200), (60, 7)]


@pytest.mark.parametrize("length", [0, 4])
def test_a_row_of_one_token_is_no_step_of_generation(length):
    plan = plan_of([1, 1], [0, 0], [0, 0], length)
    (bucket,) = recurrent_schedule(plan).own
    assert bucket.rows.shape[1] == (2 if length else 1)
