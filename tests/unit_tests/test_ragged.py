"""Rows of different lengths, one behind the other: every position attends once, and comes back to its place."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from langchain_latentmas.engine.ragged import PADDED, Ragged, bucket, taken

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")  # plans as for a GPU
ROWS = st.lists(st.tuples(st.integers(1, 9) | st.integers(1, 600), st.integers(0, 700)), min_size=1, max_size=12)


def planned(rows: list[tuple[int, int]], device: torch.device = CPU) -> Ragged:
    return Ragged([n for n, _ in rows], [start for _, start in rows], device)


@given(ROWS)
def test_every_position_comes_back_to_its_place(rows: list[tuple[int, int]]) -> None:
    plan, total = planned(rows), torch.arange(sum(n for n, _ in rows))
    owners = [row for row, (n, _) in enumerate(rows) for _ in range(n)]
    assert plan.cells.tolist() == [start + i for n, start in rows for i in range(n)]
    assert plan.firsts.tolist() == [owners.index(row) for row in range(len(rows))]
    assert (plan.lasts - plan.firsts + 1).tolist() == list(plan.counts) == [n for n, _ in rows]
    assert plan.owners is None if plan.even else plan.owners.tolist() == owners
    placed, place = taken(total, plan.spread), 0
    assert torch.equal(taken(placed, plan.back), total)
    for run in plan.runs:
        within = placed[place : (place := place + (run.rows.stop - run.rows.start) * run.new)].view(-1, run.new)
        for row, positions in zip(range(run.rows.start, run.rows.stop), within.tolist(), strict=True):
            last = plan.lasts[row].item()
            assert positions == [min(plan.firsts[row].item() + i, last) for i in range(run.new)]
    assert place == len(placed)


@given(ROWS, st.sampled_from([CPU, ELSEWHERE]))
def test_rows_that_attend_together_are_about_as_long_and_on_a_cpu_see_about_as_far(
    rows: list[tuple[int, int]], device: torch.device
) -> None:
    plan = planned(rows, device)
    assert [row for run in plan.runs for row in range(run.rows.start, run.rows.stop)] == list(range(len(rows)))
    for run in plan.runs:
        mine = rows[run.rows]
        assert run.new == max(n for n, _ in mine)
        assert run.length == max(n + start for n, start in mine)
        assert len(mine) * run.new <= PADDED * sum(n for n, _ in mine)
        if device is CPU and plan.new > 1:
            assert len({bucket(n + start) for n, start in mine}) == 1
    assert plan.length == max(n + start for n, start in rows)
    assert (plan.cuts is None) == (len(plan.runs) == 1)
    assert len(plan.runs) == 1 or plan.new > 1  # as rows that decode


def test_a_long_prompt_widens_no_short_one() -> None:
    for device in (CPU, ELSEWHERE):
        runs = planned([(8, 1500)] * 60 + [(512, 1024)], device).runs
        assert [(run.rows, run.new) for run in runs] == [(slice(0, 60), 8), (slice(60, 61), 512)]


def test_prompts_that_differ_little_attend_together() -> None:
    assert len(planned([(100 + 7 * i % 61, 0) for i in range(64)], ELSEWHERE).runs) == 1


def test_rows_that_are_even_are_not_copied() -> None:
    even = planned([(5, 0), (5, 85)])
    assert even.spread is even.back is even.owners is None


def test_a_plan_goes_to_a_gpu_once_and_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else the host would wait for all that the GPU has to do."""
    pinned, sent = list[int](), list[tuple[str, Any]]()

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(id(tensor))
        return tensor

    def to(tensor: Tensor, device: torch.device, **how: Any) -> Tensor:
        assert id(tensor) in pinned
        sent.append((device.type, how))
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    planned([(6, 0), (1, 70), (4, 3)], torch.device("cuda"))
    assert sent == [("cuda", {"non_blocking": True})]
