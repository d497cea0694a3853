"""What the bundled model is asked is not what it was trained on, and the answers are right."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_latentmas.bundled.tasks import (
    HE_ENDS,
    HER_NAMES,
    HIS_NAMES,
    PHRASINGS,
    SHE_ENDS,
    STARTS,
    Problem,
    problem,
    shared_problem,
)

HELD_OUT = {*HIS_NAMES["test"], *HER_NAMES["test"]}
SEEDS = st.integers(0, 2**32)


def words(story: str) -> set[str]:
    return set(re.findall(r"\w+", story))


def solved(story: Problem) -> int:
    """The chain, computed anew."""
    first, *rest = story.chain.split()
    value = int(first)
    for operation, result in zip(rest[::2], rest[1::2], strict=True):
        value = eval(f"{value}{operation}")  # digits and one sign
        assert value == int(result)
        assert 0 <= value <= 99
    return value


@given(seed=SEEDS)
def test_a_held_out_name_never_occurs_in_training(seed: int) -> None:
    rng = random.Random(seed)
    told, shared = problem(rng), shared_problem(rng)
    for text in (told.question, told.sentences, *shared.facts, shared.question):
        assert not words(text) & HELD_OUT


@given(seed=SEEDS)
def test_a_held_out_story_is_about_held_out_names(seed: int) -> None:
    rng = random.Random(seed)
    assert words(problem(rng, "test").question) & HELD_OUT
    assert all(words(fact) & HELD_OUT for fact in shared_problem(rng, "test").facts)


@pytest.mark.parametrize(("names", "ends"), [(HIS_NAMES, HE_ENDS), (HER_NAMES, SHE_ENDS)])
def test_both_halves_of_a_held_out_name_are_trained(names: dict[str, list[str]], ends: list[str]) -> None:
    for name in names["test"]:
        start, end = next((s, e) for s in STARTS for e in ends if s + e == name)
        assert sum(other.startswith(start) and other.removeprefix(start) in ends for other in names["train"]) > 4
        assert sum(other.endswith(end) and other.removesuffix(end) in STARTS for other in names["train"]) > 4


def test_held_out_phrasings_are_none_of_training() -> None:
    for operation, held_out in PHRASINGS["test"].items():
        assert len(held_out) >= 2
        assert not set(held_out) & set(PHRASINGS["train"][operation])


@given(seed=SEEDS, split=st.sampled_from(["train", "test"]))
def test_answers_are_those_of_the_chain(seed: int, split: str) -> None:
    rng = random.Random(seed)
    told, shared = problem(rng, split), shared_problem(rng, split)
    assert solved(told) == told.answer
    assert [solved(part) for part in shared.parts] == [part.answer for part in shared.parts]
    assert shared.answer == sum(part.answer for part in shared.parts) <= 99
