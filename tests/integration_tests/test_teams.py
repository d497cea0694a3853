"""Whole graphs: parallel thinkers, many readers, small budgets, streams."""

import threading
from typing import Any

import pytest
from langchain_core.messages import AIMessageChunk, SystemMessage
from langgraph.graph import END, START, StateGraph

from langchain_latentmas import LatentAgentNode, LatentState
from langchain_latentmas.service.local import LocalService
from langchain_latentmas.teams import hierarchical, sequential

from ..support import at_once, kv_difference, say

QUESTION = {"messages": [("human", "What is 12 plus 30 minus 5?")]}
EXPERTS = ("arithmetic", "logic", "reading")


def experts_in_order(service: LocalService, order: tuple[str, ...]) -> dict[str, Any]:
    """Runs three parallel experts that are made to finish in this order, then a judger."""
    done = {name: threading.Event() for name in order}
    builder = StateGraph(LatentState)

    def held_back(name: str) -> Any:
        node = LatentAgentNode(name, f"You are the {name} expert.", service=service, steps=3)

        def run(state: LatentState) -> dict[str, Any]:
            before = order.index(name) - 1
            assert before < 0 or done[order[before]].wait(60)
            update = node.invoke(state)
            done[name].set()
            return update

        return run

    for name in EXPERTS:
        builder.add_node(name, held_back(name))
        builder.add_edge(START, name)
    builder.add_node("judger", LatentAgentNode("judger", "Judge.", service=service, speak=True, max_tokens=8))
    builder.add_edge(list(EXPERTS), "judger")
    builder.add_edge("judger", END)
    return builder.compile().invoke(QUESTION)


def test_the_order_in_which_experts_finish_changes_nothing(fresh_service: Any) -> None:
    one, other = fresh_service(), fresh_service()
    forwards = experts_in_order(one, EXPERTS)
    backwards = experts_in_order(other, EXPERTS[::-1])
    assert forwards["messages"][-1].text == backwards["messages"][-1].text
    assert forwards["latents"][-1]["id"] == backwards["latents"][-1]["id"]
    difference = kv_difference(one.memory(forwards["latents"][-1]), other.memory(backwards["latents"][-1]))
    assert difference < 1e-8


def test_a_merge_equals_a_rebuild_from_scratch_at_the_same_positions(fresh_service: Any) -> None:
    rotated, rebuilt = fresh_service(merge="rotate"), fresh_service(merge="rebuild")
    states = [
        hierarchical(service, steps=6, max_tokens=12).compile().invoke(QUESTION) for service in (rotated, rebuilt)
    ]
    merges = [state["messages"][-1].response_metadata["merge"] for state in states]
    assert merges == ["rotated", "rebuilt"]
    memories = [service.memory(state["latents"][-1]) for service, state in zip((rotated, rebuilt), states, strict=True)]
    assert kv_difference(*memories) < 1e-3
    assert states[0]["messages"][-1].text == states[1]["messages"][-1].text


def test_eight_readers_of_one_reference_at_once_and_later_get_what_each_gets_alone(fresh_service: Any) -> None:
    service: LocalService = fresh_service()
    ref = service.think("Plan.", steps=5, agent="planner")
    prompts = [[("system", "Read."), ("human", f"Say {'more ' * i}")] for i in range(8)]
    together = at_once([lambda p=prompt: say(service, p, [ref]).token_ids for prompt in prompts])
    again = [say(service, prompt, [ref]).token_ids for prompt in prompts]
    alone = [
        say(fresh, prompt, [fresh.think("Plan.", steps=5, agent="planner")]).token_ids
        for prompt in prompts
        for fresh in [fresh_service()]
    ]
    assert together == again == alone


@pytest.mark.parametrize("budget", [0, 90_000])
def test_a_graph_of_twelve_nodes_answers_the_same_with_a_budget_of_one_memory(fresh_service: Any, budget: int) -> None:
    def run(service: LocalService) -> Any:
        builder = StateGraph(LatentState)
        names = [f"agent{i:02}" for i in range(11)]
        for name in names:
            builder.add_node(
                name, LatentAgentNode(name, lambda _, n=name: [SystemMessage(n)], service=service, steps=3)
            )
        builder.add_node("judger", LatentAgentNode("judger", "Judge.", service=service, speak=True, max_tokens=12))
        for one, following in zip([START, *names], [*names, "judger"], strict=True):
            builder.add_edge(one, following)
        builder.add_edge("judger", END)
        return builder.compile().invoke(QUESTION)

    small, large = fresh_service(kv_budget=budget), fresh_service()
    assert run(small)["messages"][-1].text == run(large)["messages"][-1].text
    assert small.info()["evictions"] > 0
    assert small.info()["rebuilds"] > 0
    assert small.info()["kv_bytes"] <= budget
    assert large.info()["rebuilds"] == 0


def spoken(events: list[Any]) -> list[str]:
    return [event[0].text for mode, event in events if mode == "messages" and isinstance(event[0], AIMessageChunk)]


def test_tokens_and_thinking_steps_stream(fresh_service: Any) -> None:
    graph = sequential(fresh_service(dtype="float32"), steps=4, max_tokens=10).compile()
    events: list[Any] = list(graph.stream(QUESTION, stream_mode=["messages", "custom"]))
    answer = graph.invoke(QUESTION)["messages"][-1].text
    assert len(spoken(events)) > 5
    assert "".join(spoken(events)) == answer
    steps = [event["step"] for mode, event in events if mode == "custom" and event["agent"] == "critic"]
    assert steps == [1, 2, 3, 4]


async def test_tokens_and_thinking_steps_stream_from_an_event_loop(fresh_service: Any) -> None:
    graph = hierarchical(fresh_service(dtype="float32"), steps=4, max_tokens=10).compile()
    events: list[Any] = [event async for event in graph.astream(QUESTION, stream_mode=["messages", "custom"])]
    answer = (await graph.ainvoke(QUESTION))["messages"][-1].text
    assert len(spoken(events)) > 5
    assert "".join(spoken(events)) == answer
    for expert in EXPERTS:
        steps = [event["step"] for mode, event in events if mode == "custom" and event["agent"] == expert]
        assert steps == [1, 2, 3, 4]


async def test_the_same_graph_runs_as_text(fresh_service: Any) -> None:
    graph = sequential(fresh_service(dtype="float32"), steps=4, max_tokens=6).compile()
    state = await graph.ainvoke(QUESTION, {"configurable": {"edges": "text"}})
    assert [message.name for message in state["messages"][1:]] == ["planner", "critic", "refiner", "judger"]
    assert state["latents"] == []
