"""Rule 3 on trained weights in float32: company, eviction and another process' batch change no greedy token."""

import random
from collections.abc import Iterator
from typing import Any

import pytest

from langchain_latentmas import LatentRef, LatentService
from langchain_latentmas.bundled import ROLES
from langchain_latentmas.bundled.tasks import problem
from langchain_latentmas.service.local import LocalService
from langchain_latentmas.teams import hierarchical, sequential

from ..support import Said, at_once, say

PROBLEMS = [problem(random.Random(i), split="test") for i in range(24)]


@pytest.fixture(scope="module")
def others(bundled: LocalService) -> Iterator[LatentService]:
    """The same model with little room."""
    little = bundled.settings.model_copy(update={"kv_budget": 0, "max_rows": 3, "prefill_chunk": 16})
    with LocalService(bundled.model, little) as service:
        yield service


def prompt(role: str, user: str | None = None) -> list[tuple[str, str]]:
    return [("system", ROLES[role]), *([("human", user)] if user else [])]


def relay(service: LatentService, i: int) -> Said:
    """A planner and, for some, a critic think; a judger that never saw the question speaks."""
    refs: list[LatentRef] = []
    for role in ("planner", "critic")[: 1 + i % 2]:
        refs = [service.think(prompt(role, PROBLEMS[i].question), refs, steps=8 + i, agent=role)]
    return say(service, prompt("judger"), refs, max_tokens=24)


def test_24_ragged_requests_at_once_speak_as_each_alone_with_much_room_or_little(
    bundled: LocalService, others: LatentService
) -> None:
    together = at_once([lambda i=i: relay(bundled, i) for i in range(24)])  # type: ignore[misc]
    squeezed = at_once([lambda i=i: relay(others, i) for i in range(24)])  # type: ignore[misc]
    with LocalService(bundled.model, bundled.settings) as single:
        alone = [relay(single, i) for i in range(24)]
    assert [said.token_ids for said in together] == [said.token_ids for said in alone]
    assert [said.token_ids for said in squeezed] == [said.token_ids for said in alone]
    assert len({said.token_ids for said in alone}) > 3


@pytest.mark.parametrize("team", [sequential, hierarchical])
def test_a_team_answers_the_same_when_everything_is_evicted(
    bundled: LatentService, others: LatentService, team: Any
) -> None:
    questions: list[Any] = [{"messages": [("human", PROBLEMS[i].question)]} for i in range(4)]
    answers = [
        [state["messages"][-1].text for state in team(service, steps=12, max_tokens=24).compile().batch(questions)]
        for service in (bundled, others)
    ]
    assert answers[0] == answers[1]
    assert others.info()["kv_bytes"] == 0
    assert others.info()["rebuilds"] > 0


def test_the_lens_of_a_thinker_reads_words_of_its_own(bundled: LatentService) -> None:
    ref = bundled.think(prompt("planner", PROBLEMS[0].question), steps=12, agent="planner")
    rows = bundled.lens(ref, top_k=3)
    assert [row.step for row in rows] == list(range(1, 13))
    assert {row.agent for row in rows} == {"planner"}
    assert all(0 < row.tokens[0][1] <= 1 for row in rows)
    assert len({row.tokens[0][0] for row in rows}) > 3
