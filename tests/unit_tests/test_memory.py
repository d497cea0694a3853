import tracemalloc
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from langchain_latentmas.service import memory
from langchain_latentmas.service.memory import Layout, Lineage, Piece, Recipe, Segment, merge


def recipe(key: str, parents: tuple[str, ...], positions: int) -> Recipe:
    return Recipe(key, "model", "realign", parents, Segment("agent", tuple(range(positions)), torch.zeros(0, 4)))


@st.composite
def lineages(draw: st.DrawFn) -> tuple[Lineage, list[str]]:
    """A random history: every memory reads some of those made before it."""
    recipes: dict[str, Recipe] = {}
    for i in range(draw(st.integers(1, 10))):
        parents = draw(st.lists(st.sampled_from(sorted(recipes)), max_size=3, unique=True)) if recipes else []
        recipes[f"m{i}"] = recipe(f"m{i}", tuple(parents), draw(st.integers(1, 5)))
    return Lineage(recipes.__getitem__), sorted(recipes)


def starts_are_contiguous(layout: Layout) -> bool:
    ends = list(accumulate(piece.positions for piece in layout))
    return [piece.start for piece in layout] == [0, *ends][: len(layout)]


@given(lineages(), st.data())
def test_a_merge_has_every_segment_once_after_all_that_it_saw(
    made: tuple[Lineage, list[str]], data: st.DataObject
) -> None:
    lineage, keys = made
    read = data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=4, unique=True))
    layout = lineage.layout(read)
    ids = [piece.id for piece in layout]
    assert len(ids) == len(set(ids))
    assert set(ids) == {piece.id for key in read for piece in lineage.line(key)}
    assert starts_are_contiguous(layout)
    for at, key in enumerate(ids):
        assert {piece.id for piece in lineage.line(key)[:-1]} <= set(ids[:at])


@given(lineages(), st.data())
def test_common_ancestry_comes_first(made: tuple[Lineage, list[str]], data: st.DataObject) -> None:
    lineage, keys = made
    read = data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=4, unique=True))
    common = set.intersection(*({piece.id for piece in lineage.line(key)} for key in read))
    ids = [piece.id for piece in lineage.layout(read)]
    assert set(ids[: len(common)]) == common


@given(lineages(), st.data())
def test_reading_an_ancestor_as_well_changes_no_position_of_tips(
    made: tuple[Lineage, list[str]], data: st.DataObject
) -> None:
    lineage, keys = made
    read = data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=4))
    tips = lineage.tips(read)
    assert tips
    assert set(tips) <= set(read)
    assert {p.id for p in lineage.layout(tips)} == {p.id for p in lineage.layout(read)}
    for tip in tips:
        assert all(tip not in {p.id for p in lineage.line(other)[:-1]} for other in tips)


def test_branches_follow_in_the_order_of_reading() -> None:
    recipes = {
        "plan": recipe("plan", (), 3),
        "a": recipe("a", ("plan",), 2),
        "b": recipe("b", ("plan",), 4),
    }
    lineage = Lineage(recipes.__getitem__)
    assert [piece[:4] for piece in lineage.layout(["b", "a"])] == [("plan", 0, 3, 0), ("b", 3, 4, 3), ("a", 7, 2, 3)]
    assert [piece[:4] for piece in lineage.layout(["a", "b"])] == [("plan", 0, 3, 0), ("a", 3, 2, 3), ("b", 5, 4, 3)]


def test_a_memory_may_be_thousands_of_segments_deep() -> None:
    recipes = {f"m{i}": recipe(f"m{i}", (f"m{i - 1}",) if i else (), 1) for i in range(3000)}
    assert Lineage(recipes.__getitem__).line("m2999")[-1] == Piece("m2999", 2999, 1, 2999, 0, False)


def test_a_long_thread_is_laid_out_in_room_for_its_length() -> None:
    recipes = {f"m{i}": recipe(f"m{i}", (f"m{i - 1}",) if i else (), 1) for i in range(4000)}
    lineage = Lineage(recipes.__getitem__)
    tracemalloc.start()
    try:
        assert len(lineage.line("m3999")) == 4000
        assert tracemalloc.get_traced_memory()[1] < 1 << 23  # a line for each of them would take 64 MB
    finally:
        tracemalloc.stop()


def one_by_one(lineage: Lineage, key: str) -> Layout:
    """A line made of those of its parents, each of which is made likewise."""
    made = lineage._recipe(key)
    seen = merge([one_by_one(lineage, parent) for parent in made.parents])
    start, looked_at = seen[-1].end if seen else 0, seen[-1:] if len(made.parents) == 1 else seen
    on_moved = any(piece.moved or piece.on_moved for piece in looked_at)
    return (*seen, Piece(key, start, made.segment.positions, start, 0, on_moved))


@given(lineages(), st.sampled_from([0, 700, 2000, 10**6]))
def test_a_run_in_one_line_is_what_it_is_one_by_one(made: tuple[Lineage, list[str]], kept: int) -> None:
    lineage, keys = made
    lineage._lines.limit = kept
    for key in [*keys, *reversed(keys)]:
        assert lineage.line(key) == one_by_one(lineage, key)


@pytest.mark.parametrize("kept", [0, 1200, 5000])
def test_lines_that_are_not_kept_are_worked_out_again(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = {f"m{i}": recipe(f"m{i}", tuple(f"m{j}" for j in (i - 1, i - 2) if j >= 0), 1) for i in range(30)}
    whole = Lineage(recipes.__getitem__)
    monkeypatch.setattr(memory, "LINES_KEPT", kept)
    forgetful = Lineage(recipes.__getitem__)
    for key in [*recipes, "m7", "m29", "m7.zeroed", "m7.zeroed.random3"]:
        assert forgetful.line(key) == whole.line(key)


def test_merging_nothing_is_nothing() -> None:
    assert merge([]) == ()


def test_common_ancestry_comes_before_a_branch_that_was_read_earlier() -> None:
    recipes = {
        "x": recipe("x", (), 2),
        "plan": recipe("plan", (), 3),
        "both": recipe("both", ("x", "plan"), 1),
        "other": recipe("other", ("plan",), 4),
    }
    ids = [piece.id for piece in Lineage(recipes.__getitem__).layout(["both", "other"])]
    assert ids == ["plan", "x", "both", "other"]
