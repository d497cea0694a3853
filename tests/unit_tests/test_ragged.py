"""Rows of different lengths without padding: every position is computed once, and comes back to its place."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from langchain_latentmas.engine.ragged import Ragged, bucket, taken

CPU = torch.device("cpu")
ROWS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 700)), min_size=1, max_size=12)


@given(ROWS, st.integers(0, 3))
def test_every_position_comes_back_to_its_place(rows: list[tuple[int, int]], padding: int) -> None:
    counts, lengths = [n for n, _ in rows], [n + past for n, past in rows]
    new = max(counts) + padding
    ragged = Ragged(counts, lengths, new, CPU)
    padded = torch.arange(len(rows) * new)
    real = taken(padded, ragged.real)
    assert real.tolist() == [row * new + i for row, n in enumerate(counts) for i in range(n)]
    assert real[ragged.starts].tolist() == [row * new for row in range(len(rows))]
    placed = taken(real, ragged.spread)
    assert torch.equal(taken(placed, ragged.back), real)
    place = 0
    for run in ragged.runs:
        within = placed[place : (place := place + (run.rows.stop - run.rows.start) * run.new)].view(-1, run.new)
        for row, positions in zip(range(run.rows.start, run.rows.stop), within, strict=True):
            assert positions[: counts[row]].tolist() == [row * new + i for i in range(counts[row])]
            assert set(positions[counts[row] :].tolist()) <= {row * new + counts[row] - 1}  # its last one again
    assert place == len(placed)


@given(ROWS)
def test_rows_that_attend_together_see_about_as_far(rows: list[tuple[int, int]]) -> None:
    counts, lengths = [n for n, _ in rows], [n + past for n, past in rows]
    runs = Ragged(counts, lengths, max(counts), CPU).runs
    assert [row for run in runs for row in range(run.rows.start, run.rows.stop)] == list(range(len(rows)))
    for run in runs:
        assert run.new == max(counts[run.rows])
        assert run.length == max(lengths[run.rows])
        assert len({bucket(n) for n in lengths[run.rows]}) == 1
    assert all(bucket(a.length) != bucket(b.length) for a, b in pairwise(runs))


def test_rows_that_are_even_are_not_copied() -> None:
    even = Ragged([5, 5], [5, 90], 5, CPU)
    assert even.real is even.spread is even.back is None
