"""The graphs in examples/: each as it stands, and converted by the lines that `benchmarks.conversions` prints."""

import json
import re
from typing import Any

import pytest
from langchain_core.messages import BaseMessage, message_to_dict

from benchmarks.conversions import EDGES, build, changes, run, sources
from langchain_latentmas import ChatLatentMAS, LatentService
from langchain_latentmas.demo import held_out
from langchain_latentmas.service.local import LocalService

STEPS = 12
KINDS = ["values", "updates", "custom", "messages", "checkpoints", "tasks", "debug"]
MARKER = re.compile(r"\[latent \S+ \d+ steps lat_")


@pytest.fixture
def llm(bundled: LatentService) -> ChatLatentMAS:
    return ChatLatentMAS(service=bundled, max_tokens=256)


def question(name: str, seed: int) -> dict[str, Any]:
    asked = held_out(1, seed)[0].question
    return {"messages": [("human", asked)]} if name == "chain_of_messages" else {"question": asked}


def answer(state: dict[str, Any]) -> str:
    return state["messages"][-1].text if "messages" in state else state["answer"]


def plain(value: Any) -> Any:
    """What a server makes of messages; all else has to be JSON by itself."""
    assert isinstance(value, BaseMessage)
    return message_to_dict(value)


@pytest.mark.parametrize("name", EDGES)
def test_a_conversion_changes_at_most_three_lines(name: str) -> None:
    text, latent = sources(name)
    changed = changes(name)
    assert text != latent
    assert "latentmas" not in text
    assert 1 <= sum(line.startswith("+") for line in changed) <= 3
    assert sum(line.startswith("-") for line in changed) <= 3


@pytest.mark.parametrize("name", EDGES)
def test_both_versions_answer_and_the_converted_one_says_less(name: str, bundled: LocalService) -> None:
    problems = held_out(3, seed=5)
    runs = []
    for latent in (False, True):
        with LocalService(bundled.model, bundled.settings) as fresh:
            runs.append(run(build(name, latent, ChatLatentMAS(service=fresh, max_tokens=256)), problems))
            thought = fresh.info()["thoughts"]
        assert (thought > 0) is latent
    assert runs[1].output_tokens < runs[0].output_tokens
    assert min(each.right for each in runs) >= 2  # of 3


@pytest.mark.parametrize("name", EDGES)
async def test_one_graph_flips_per_call_and_all_its_events_are_json(name: str, llm: ChatLatentMAS) -> None:
    before = build(name, False, llm).ainvoke
    graph = build(name, True, llm, STEPS)
    assert answer(await graph.ainvoke(question(name, 1), {"configurable": {"edges": "text"}})) == answer(
        await before(question(name, 1))
    )
    for mode in ("latent", "text", "latent"):
        config: Any = {"configurable": {"edges": mode}}
        events: list[Any] = [e async for e in graph.astream(question(name, 2), config, stream_mode=KINDS)]
        written = [json.dumps(event, default=plain) for event in events]
        assert any(MARKER.search(event) for event in written) is (mode == "latent")
        assert not MARKER.search(answer([event for kind, event in events if kind == "values"][-1]))
        tokens = [event[0].text for kind, event in events if kind == "messages"]
        assert len(tokens) > 3
