"""Rows of different lengths, one behind the other: every position attends once, and comes back to its place."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from langchain_latentmas.engine.ragged import Ragged, bucket, taken

CPU = torch.device("cpu")
ROWS = st.lists(st.tuples(st.integers(1, 9) | st.integers(1, 600), st.integers(0, 700)), min_size=1, max_size=12)


def ragged(rows: list[tuple[int, int]]) -> Ragged:
    return Ragged([n for n, _ in rows], [n + past for n, past in rows], CPU)


@given(ROWS)
def test_every_position_comes_back_to_its_place(rows: list[tuple[int, int]]) -> None:
    plan, total = ragged(rows), torch.arange(sum(n for n, _ in rows))
    ends = [*plan.starts.tolist()[1:], len(total)]
    placed, place = taken(total, plan.spread), 0
    assert torch.equal(taken(placed, plan.back), total)
    assert plan.new == max(plan.counts)
    if plan.even:
        assert plan.owners is None
    else:
        assert plan.owners is not None
        assert plan.owners.tolist() == [row for row, (n, _) in enumerate(rows) for _ in range(n)]
    for run in plan.runs:
        within = placed[place : (place := place + (run.rows.stop - run.rows.start) * run.new)].view(-1, run.new)
        for row, positions in zip(range(run.rows.start, run.rows.stop), within.tolist(), strict=True):
            start, count = ends[row] - rows[row][0], rows[row][0]
            assert positions == [min(start + i, ends[row] - 1) for i in range(run.new)]  # its last one again
            assert plan.counts[row] == count
    assert place == len(placed)


@given(ROWS)
def test_rows_that_attend_together_are_about_as_long_and_see_about_as_far(rows: list[tuple[int, int]]) -> None:
    plan = ragged(rows)
    assert [row for run in plan.runs for row in range(run.rows.start, run.rows.stop)] == list(range(len(rows)))
    for run in plan.runs:
        mine = rows[run.rows]
        assert run.new == max(n for n, _ in mine)
        assert run.length == max(n + past for n, past in mine)
        assert len({(bucket(n), bucket(n + past)) for n, past in mine}) == 1 or plan.new == 1
    kinds = [(bucket(run.new), bucket(run.length)) for run in plan.runs]
    assert all(a != b for a, b in pairwise(kinds))
    assert len(plan.runs) == 1 or plan.new > 1  # as rows that decode
    assert plan.length == max(n + past for n, past in rows)


def test_a_long_prompt_widens_no_short_one() -> None:
    plan = ragged([(8, 1500)] * 60 + [(512, 1024)])
    assert [(run.rows, run.new) for run in plan.runs] == [(slice(0, 60), 8), (slice(60, 61), 512)]


def test_rows_that_are_even_are_not_copied() -> None:
    even = ragged([(5, 0), (5, 85)])
    assert even.spread is even.back is None
