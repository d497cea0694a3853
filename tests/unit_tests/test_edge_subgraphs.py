"""Nodes that are subgraphs, or call some: who in them thinks, and what can be told of them."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph

from langchain_latentmas import ChatLatentMAS, LatentAgentNode, LatentService, LatentState, switch_edges
from langchain_latentmas.errors import InvalidEdge

ASKED: Any = {"messages": [("human", "What is 1 plus 2?")]}
TEXT: Any = {"configurable": {"edges": "text"}}
Node = Callable[[Any], Any]


@pytest.fixture(scope="module")
def llm(service32: LatentService) -> ChatLatentMAS:
    return ChatLatentMAS(service=service32, max_tokens=6)


@pytest.fixture
def say(llm: ChatLatentMAS) -> Node:
    return lambda state: {"messages": [llm.invoke(state["messages"])]}


@tool
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def sequence(*nodes: tuple[str, Any], **compile: Any) -> Any:
    return StateGraph(MessagesState).add_sequence(list(nodes)).add_edge(START, nodes[0][0]).compile(**compile)


def before(node: Any, last: Node, name: str = "team") -> StateGraph:
    return StateGraph(MessagesState).add_sequence([(name, node), ("last", last)]).add_edge(START, name)


def thought(state: Any) -> list[bool]:
    """Of each message that an agent left, whether it is a marker."""
    return [m.text.startswith("[latent ") for m in state["messages"] if isinstance(m, AIMessage)]


def run(builder: StateGraph, edges: Any = "*", config: Any = None) -> list[bool]:
    return thought(switch_edges(builder, edges, steps=2).compile().invoke(ASKED, config))


def test_a_node_that_is_called_as_the_last_of_a_nested_graph_is_still_spoken_to(llm: ChatLatentMAS, say: Node) -> None:
    """The last node of an agent is called "model", and so is the first one of the team."""
    team = sequence(("model", say), ("agent", create_agent(llm, system_prompt="Check.")))
    builder = before(team, say)
    assert run(builder) == [False, True, False]
    written = switch_edges(builder, "*").compile().invoke(ASKED, TEXT)
    assert [m.text for m in written["messages"]] == [m.text for m in builder.compile().invoke(ASKED)["messages"]]


def test_tools_of_an_agent_that_is_not_the_last_are_in_nobodys_way(llm: ChatLatentMAS, say: Node) -> None:
    with_tools = sequence(("agent", create_agent(llm, tools=[add])), ("writer", say))
    assert switch_edges(before(with_tools, say), "*", explain=True)[1].mode == "latent"
    assert run(before(sequence(("agent", create_agent(llm)), ("writer", say)), say)) == [False, True, False]


def looping(say: Node) -> Any:
    """A graph of which cannot be told after which node it ends."""
    inner = StateGraph(MessagesState)
    inner.add_node("one", say)
    inner.add_node("two", say)
    inner.add_edge(START, "one")
    inner.add_edge("one", "two")
    inner.add_conditional_edges("two", lambda state: END, ["one", END])
    return inner.compile()


def test_a_graph_that_cannot_be_told_matters_only_where_it_is_the_last(say: Node) -> None:
    builder = before(sequence(("loop", looping(say)), ("writer", say)), say)
    assert run(builder)[-2:] == [True, False]
    with pytest.raises(InvalidEdge, match="whose last node cannot be told"):
        switch_edges(before(sequence(("writer", say), ("loop", looping(say))), say), [("team", "last")])
    nested = sequence(("inner", sequence(("writer", say), ("loop", looping(say)))))
    with pytest.raises(InvalidEdge, match="whose last node cannot be told"):
        switch_edges(before(nested, say), [("team", "last")])


def test_a_nested_last_graph_may_use_tools_before_its_end(llm: ChatLatentMAS, say: Node) -> None:
    inner = sequence(("agent", create_agent(llm, tools=[add])), ("writer", say))
    assert switch_edges(before(sequence(("inner", inner)), say), "*", explain=True)[1].mode == "latent"
    last = sequence(("inner", sequence(("agent", create_agent(llm, tools=[add])))))
    with pytest.raises(InvalidEdge, match="binds tools"):
        switch_edges(before(last, say), [("team", "last")])


def test_a_graph_without_a_model_is_in_nobodys_way(say: Node) -> None:
    looked_up = sequence(("search", lambda state: {"messages": []}))

    def node(state: Any) -> Any:
        looked_up.invoke(state)
        return say(state)

    assert run(before(node, say)) == [True, False]


def test_a_graph_that_calls_itself_is_no_endless_loop(llm: ChatLatentMAS, say: Node) -> None:
    held: dict[str, Any] = {}

    def decompose(state: Any) -> Any:
        return say(state) if len(state["messages"]) > 2 else held["tree"].invoke(state)

    held["tree"] = sequence(("decompose", decompose))
    with pytest.raises(InvalidEdge, match="cannot be told"):
        switch_edges(before(held["tree"], say), [("team", "last")])


@pytest.mark.parametrize("saver", [None, True, "own"], ids=["none", "inherited", "its own"])
def test_an_agent_that_is_called_with_a_thread_of_its_own_thinks_at_its_end(say: Node, saver: Any) -> None:
    inner = sequence(("finder", say), ("checker", say), checkpointer=InMemorySaver() if saver == "own" else saver)
    threads = iter("abcdefgh")

    def team(state: Any) -> Any:
        own: Any = {"configurable": {"thread_id": next(threads)}} if saver == "own" else None
        return {"messages": inner.invoke(state, own)["messages"][1:]}

    assert run(before(team, say)) == [False, True, False]
    assert run(before(team, say, name="finder")) == [False, True, False]  # called as the one inside


def test_edges_into_a_node_of_references_carry_markers_too(service32: LatentService, say: Node) -> None:
    """A thinking `LatentAgentNode` reads the memory of a marker, and not its letters."""
    builder = StateGraph(LatentState)
    builder.add_node("planner", say)
    builder.add_node("refiner", LatentAgentNode("refiner", "Refine.", service=service32, steps=2))
    builder.add_node("judger", LatentAgentNode("judger", "Judge.", service=service32, speak=True, max_tokens=4))
    for edge in [(START, "planner"), ("planner", "refiner"), ("refiner", "judger"), ("judger", END)]:
        builder.add_edge(*edge)
    state = switch_edges(builder, [("planner", "refiner")], steps=2).compile().invoke(ASKED)
    assert thought(state) == [True, False]
    planned = state["messages"][1].response_metadata["latent_ref"]
    [refined] = [ref for ref in state["latents"] if ref["agent"] == "refiner"]
    assert refined["parents"] == [planned["id"]]
    prompt = service32.memory(refined).segments[-1].prompt_ids
    assert "latent" not in service32.model.tokenizer.decode(prompt)  # type: ignore[attr-defined]
    assert run(builder, [("planner", "refiner")], TEXT) == [False, False, False]


def test_what_is_said_of_agents_does_not_depend_on_whether_they_have_run(service32: LatentService, say: Node) -> None:
    inner = StateGraph(LatentState)
    inner.add_node("p", LatentAgentNode("p", "Plan.", service=service32, steps=2))
    inner.add_node("s", LatentAgentNode("s", "Say.", service=service32, speak=True, max_tokens=3))
    for edge in [(START, "p"), ("p", "s"), ("s", END)]:
        inner.add_edge(*edge)
    team = inner.compile()
    builder = before(team, say)
    first = switch_edges(builder, "*", explain=True)
    team.invoke({**ASKED, "latents": []})
    assert switch_edges(builder, "*", explain=True) == first


@pytest.mark.parametrize("edge", ["p->s", "planning->s"])
def test_edges_of_agents_in_a_subgraph_can_be_named(service32: LatentService, say: Node, edge: str) -> None:
    inner = StateGraph(LatentState)
    inner.add_node("planning", LatentAgentNode("p", "Plan.", service=service32, steps=2))
    inner.add_node("s", LatentAgentNode("s", "Say.", service=service32, speak=True, max_tokens=3))
    for one, other in [(START, "planning"), ("planning", "s"), ("s", END)]:
        inner.add_edge(one, other)
    builder = StateGraph(LatentState)
    builder.add_sequence([("one", say), ("two", say), ("team", inner.compile())]).add_edge(START, "one")
    graph = switch_edges(builder, [("one", "two")], steps=2).compile()
    assert thought(graph.invoke(ASKED)) == [True, False, False]
    assert thought(graph.invoke(ASKED, {"configurable": {"edges": {edge: "text"}}})) == [True, False, False, False]


def test_what_one_thought_does_not_reach_a_model_that_cannot_read_it(
    llm: ChatLatentMAS, service: LatentService, say: Node
) -> None:
    other = ChatLatentMAS(service=service, max_tokens=3)
    builder = StateGraph(MessagesState)
    builder.add_sequence([("a", say), ("b", say), ("c", lambda s: {"messages": [other.invoke(s["messages"])]})])
    builder.add_edge(START, "a")
    report = next(r for r in switch_edges(builder, "*", explain=True) if r.source == "a")
    assert (report.mode, "'c', which runs another model" in report.why) == ("text", True)
    assert run(builder) == [False, False, False]


def test_models_are_the_same_whether_the_environment_or_an_argument_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTMAS_DEVICE", "cpu")
    one, other = ChatLatentMAS(), ChatLatentMAS(device="cpu", model="bundled")
    builder = before(
        lambda s: {"messages": [one.invoke(s["messages"])]}, lambda s: {"messages": [other.invoke(s["messages"])]}
    )
    assert switch_edges(builder, "*", explain=True)[1].mode == "latent"


model = FakeListChatModel(responses=["x"])  # that only shares its name with an attribute


def test_names_of_attributes_are_no_globals(llm: ChatLatentMAS, say: Node) -> None:
    def node(state: Any) -> Any:
        getattr(state, "get", None)
        if hasattr(llm, "nothing"):
            return llm.model
        return say(state)

    assert run(before(node, say)) == [True, False]


def test_agents_in_modules_are_seen(llm: ChatLatentMAS, say: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    agents = ModuleType("my_agents")
    agents.writer = create_agent(llm, system_prompt="Write.")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_agents", agents)
    names: dict[str, Any] = {"__name__": "my_graph", "my_agents": agents}
    exec("def node(state):\n    return {'messages': my_agents.writer.invoke(state)['messages'][-1:]}", names)
    assert run(before(names["node"], say)) == [True, False]


def test_a_builder_that_was_compiled_with_an_error_handler_can_be_switched(say: Node) -> None:
    builder = before(say, say)
    builder.set_node_defaults(error_handler=lambda state: {"messages": []})
    graph = builder.compile()
    switched = switch_edges(graph.builder, "*", steps=2)
    assert thought(switched.compile().invoke(ASKED)) == [True, False]


@pytest.mark.parametrize("how", ["a team", "with tags", "with retries"])
def test_what_hands_over_references_by_itself_is_not_switched(service32: LatentService, say: Node, how: str) -> None:
    agent = LatentAgentNode("s", "Say.", service=service32, speak=True, max_tokens=3)
    team = StateGraph(LatentState).add_sequence([("s", agent)]).add_edge(START, "s").compile()
    node = {"a team": team, "with tags": agent.with_config(tags=["s"]), "with retries": agent.with_retry()}[how]
    builder = StateGraph(LatentState).add_sequence([("team", node), ("last", say)]).add_edge(START, "team")
    with pytest.raises(InvalidEdge, match="'team' runs LatentAgentNodes, which hand over references"):
        switch_edges(builder, [("team", "last")])
    assert run(builder) == [False, False]


def test_a_subgraph_that_ends_in_an_agent_is_no_output_of_the_model_before(service32: LatentService, say: Node) -> None:
    judger = LatentAgentNode("judger", "Judge.", service=service32, speak=True, max_tokens=3)
    team = StateGraph(LatentState).add_sequence([("writer", say), ("judger", judger)]).add_edge(START, "writer")
    builder = StateGraph(LatentState).add_sequence([("team", team.compile()), ("last", say)]).add_edge(START, "team")
    assert run(builder) == [False, False, False]
    with pytest.raises(InvalidEdge, match="'team' is a subgraph whose last node cannot be told"):
        switch_edges(builder, [("team", "last")])
