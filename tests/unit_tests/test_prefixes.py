"""What prompts begin with is computed once: which prompt is found, and that nobody can tell from the results."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from langchain_latentmas.service.local import LocalService
from langchain_latentmas.service.prefixes import Prefixes

from ..conftest import load_parts
from ..support import PARITY, at_once, kv_difference, messages, say

EXACT = 1e-10  # relative, in float64
ROLE = "You are a planner. Plan the steps for the question, each in a sentence of its own."
QUESTIONS = [f"What is {i} plus 30 minus {i + 2}?" for i in range(6)]

prompts = st.lists(st.integers(0, 2), max_size=6).map(tuple)
parents = st.sampled_from([(), ("a",), ("a", "b")])


@pytest.fixture
def service() -> Iterator[LocalService]:
    with LocalService.from_model(*load_parts("qwen3-tied", "float64")) as service:
        yield service


def fresh(service: LocalService) -> LocalService:
    """One that has computed nothing yet, of the same model."""
    return LocalService(service.model, service.settings)


@given(
    kept=st.lists(st.tuples(parents, prompts), max_size=12), gone=st.sets(st.integers(0, 11)), new=prompts, on=parents
)
def test_the_longest_beginning_is_found(
    kept: list[tuple[tuple[str, ...], tuple[int, ...]]], gone: set[int], new: tuple[int, ...], on: tuple[str, ...]
) -> None:
    found = Prefixes()
    for i, (after, ids) in enumerate(kept):
        found.add(str(i), after, ids)
        found.add(str(i), after, ids)
    for i in gone:
        found.remove(str(i))
    left = {str(i): ids for i, (after, ids) in enumerate(kept) if i not in gone and after == on}
    alike = {
        key: max(n for n in range(len(new) + 1) if ids[:n] == new[:n] and n <= len(ids)) for key, ids in left.items()
    }
    key, length = found.longest(on, new)
    assert length == max(alike.values(), default=0)
    assert alike[key] == length if length else key == ""
    assert len(found) == sum(i not in gone for i in range(len(kept)))


def test_a_role_is_prefilled_once(service: LocalService) -> None:
    refs = [service.think(messages(question, ROLE), steps=3, agent="planner") for question in QUESTIONS]
    memories = [service.memory(ref) for ref in refs]
    whole = sum(len(memory.segments[0].prompt_ids) for memory in memories)
    info = service.info()
    assert info["prefilled"] + info["reused"] == whole
    role = len(service.encode([("system", ROLE)], "")) - 10
    assert info["reused"] >= role * (len(QUESTIONS) - 1)
    with fresh(service) as alone:
        for question, memory in zip(reversed(QUESTIONS), reversed(memories), strict=True):
            again = alone.memory(alone.think(messages(question, ROLE), steps=3, agent="planner"))
            assert kv_difference(again, memory) < EXACT


def test_prompts_on_one_memory_share_what_they_begin_with(service: LocalService) -> None:
    plan = service.think(messages(QUESTIONS[0], ROLE), steps=3, agent="planner")
    other = service.think(messages(QUESTIONS[1], "Solve it."), steps=3, agent="planner")
    judge = "You are a judger. Give the final answer to the question, and nothing else."
    say(service, messages(QUESTIONS[0], judge), [plan])
    before = service.info()["reused"]
    say(service, messages(QUESTIONS[1], judge), [other])  # another memory before it: nothing is alike
    assert service.info()["reused"] == before
    said = say(service, messages(QUESTIONS[1], judge), [plan])
    assert service.info()["reused"] > before
    with fresh(service) as alone:
        plan = alone.think(messages(QUESTIONS[0], ROLE), steps=3, agent="planner")
        assert say(alone, messages(QUESTIONS[1], judge), [plan]).token_ids == said.token_ids


def test_together_or_one_by_one_is_the_same(service: LocalService) -> None:
    say(service, messages("What is 1?", ROLE))
    calls = [lambda question=question: say(service, messages(question, ROLE)) for question in QUESTIONS]  # type: ignore[misc]
    together = [said.token_ids for said in at_once(calls)]
    assert service.info()["reused"] > 0
    with fresh(service) as alone:
        assert together == [say(alone, messages(question, ROLE)).token_ids for question in QUESTIONS]


def test_the_same_prompt_leaves_one_position_to_compute(service: LocalService) -> None:
    first = service.memory(service.think(messages(QUESTIONS[0], ROLE), steps=2))
    before = service.info()["prefilled"]
    longer = service.memory(service.think(messages(QUESTIONS[0], ROLE), steps=4))
    assert service.info()["prefilled"] == before + 1
    n = first.positions
    cut = type(longer)(longer.segments, n, [k[:, :n] for k in longer.keys], [v[:, :n] for v in longer.values], "none")
    assert kv_difference(cut, first) < EXACT


def test_what_is_gone_is_not_reused(service: LocalService) -> None:
    service.drop(service.think(messages(QUESTIONS[0], ROLE), steps=1))
    service.think(messages(QUESTIONS[1], ROLE), steps=1)
    assert service.info()["reused"] == 0


def test_what_other_weights_made_is_not_reused() -> None:
    with LocalService.load(str(PARITY / "qwen3-tied" / "model"), device="cpu") as service:
        service.think(messages(QUESTIONS[0], ROLE), steps=1)
        with torch.no_grad():
            service.model.model.get_parameter("model.norm.weight").mul_(2)
        service.think(messages(QUESTIONS[1], ROLE), steps=1)
        assert service.info()["reused"] == 0


@pytest.mark.parametrize("settings", [{"kv_budget": 0}, {"kv_dtype": "int8"}])
def test_nothing_is_reused_without_room_or_from_8_bits(settings: dict[str, object]) -> None:
    with LocalService.from_model(*load_parts("qwen3-tied", "float32"), **settings) as service:
        for question in QUESTIONS[:2]:
            service.think(messages(question, ROLE), steps=1)
        assert service.info()["reused"] == 0


def test_a_lens_computes_all_of_its_states(service: LocalService) -> None:
    service.think(messages(QUESTIONS[0], ROLE), steps=2)
    ref = service.think(messages(QUESTIONS[1], ROLE), steps=2)
    before = service.info()["reused"]
    assert len(service.lens(ref)) == 2
    assert service.info()["reused"] == before
