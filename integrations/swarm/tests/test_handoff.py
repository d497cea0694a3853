from collections.abc import Callable
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_latentmas_agent import LatentMiddleware
from langchain_latentmas_swarm import LatentSwarmState, create_latent_handoff_tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph.state import CompiledStateGraph
from langgraph_swarm import create_handoff_tool, create_swarm
from langgraph_swarm.handoff import get_handoff_destinations

from langchain_latentmas import ChatLatentMAS, LatentService

ASKED: Any = {"messages": [("human", "What does it cost?")]}
THREAD: Any = {"configurable": {"thread_id": "1"}}


def answer(tools: list[str]) -> str:
    """Who can hand over does so; who cannot answers."""
    return f'<tool_call>{{"name": "{tools[0]}", "arguments": {{}}}}</tool_call>' if tools else "It costs 5."


def swarm(llm: ChatLatentMAS, to_bob: Any) -> CompiledStateGraph:
    alice = create_agent(llm, tools=[to_bob], middleware=[LatentMiddleware("alice")], name="alice")
    bob = create_agent(llm, middleware=[LatentMiddleware("bob")], name="bob")
    built = create_swarm([alice, bob], default_active_agent="alice", state_schema=LatentSwarmState)
    return built.compile(checkpointer=InMemorySaver())


async def test_the_next_agent_reads_the_memory_of_the_one_that_handed_over(
    scripted: Callable[..., ChatLatentMAS],
) -> None:
    graph = swarm(scripted(answer), create_latent_handoff_tool(agent_name="bob"))
    out = graph.invoke(ASKED, THREAD)
    assert out["active_agent"] == "bob"
    assert out["messages"][-1].text == "It costs 5."
    assert [message.type for message in out["messages"]] == ["human", "ai", "tool", "ai"]
    alices, bobs = out["latents"]
    assert (alices["agent"], bobs["agent"]) == ("alice", "bob")
    assert bobs["parents"] == [alices["id"]]
    again = await graph.ainvoke(ASKED, {"configurable": {"thread_id": "2"}})
    assert again["latents"] == out["latents"]


def test_the_next_agent_does_not_read_again_what_was_looked_up_before(
    service: LatentService, scripted: Callable[..., ChatLatentMAS]
) -> None:
    def look_up() -> str:
        """Looks it up."""
        return "five euros"

    left = ["look_up", "transfer_to_bob", ""]

    def turn(tools: list[str]) -> str:
        call = left.pop(0)
        return f'<tool_call>{{"name": "{call}", "arguments": {{}}}}</tool_call>' if call else "It costs 5."

    llm = scripted(turn)
    tools: list[Any] = [look_up, create_latent_handoff_tool(agent_name="bob")]
    alice = create_agent(llm, tools=tools, middleware=[LatentMiddleware("alice")], name="alice")
    bob = create_agent(llm, middleware=[LatentMiddleware("bob")], name="bob")
    graph = create_swarm([alice, bob], default_active_agent="alice", state_schema=LatentSwarmState).compile()
    out = graph.invoke(ASKED)
    assert [message.type for message in out["messages"]] == ["human", "ai", "tool", "ai", "tool", "ai"]
    prompt = service.memory(out["latents"][-1]).segments[-1].prompt_ids
    read = service.model.tokenizer.decode(list(prompt))  # type: ignore[attr-defined]
    assert "Successfully transferred" in read
    assert "five euros" not in read


def test_the_stock_tool_drops_memories(scripted: Callable[..., ChatLatentMAS]) -> None:
    out = swarm(scripted(answer), create_handoff_tool(agent_name="bob")).invoke(ASKED, THREAD)
    assert [(ref["agent"], ref["parents"]) for ref in out["latents"]] == [("bob", [])]


@pytest.mark.parametrize("options", [{}, {"name": "to_bob", "description": "Bob knows."}])
def test_the_tool_is_like_the_stock_one(llm: ChatLatentMAS, options: dict[str, str]) -> None:
    ours = create_latent_handoff_tool(agent_name="bob", **options)
    stock = create_handoff_tool(agent_name="bob", **options)
    assert (ours.name, ours.description, ours.metadata) == (stock.name, stock.description, stock.metadata)
    assert ours.tool_call_schema.model_json_schema() == stock.tool_call_schema.model_json_schema()
    agent = create_agent(llm, tools=[ours])
    assert get_handoff_destinations(agent) == ["bob"]
