import json
import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
from langchain.agents import create_agent
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import BaseMessage, HumanMessage, message_to_dict
from langchain_core.output_parsers import JsonOutputParser
from langgraph.func import entrypoint
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import RetryPolicy, Send
from typing_extensions import TypedDict

from langchain_latentmas import ChatLatentMAS, LatentAgentNode, LatentService, LatentState, switch_edges
from langchain_latentmas.calls import Calls
from langchain_latentmas.errors import InvalidEdge, InvalidReference, InvalidRequest

from ..graphs import ASKED, PLANNER, answerer_of, chain, is_latent, team

HELLO: Any = {"messages": [("human", "Hello")]}


@pytest.fixture(scope="module")
def llm(service32: LatentService) -> ChatLatentMAS:
    return ChatLatentMAS(service=service32, max_tokens=6)


def test_the_stream_filter_of_the_docs_leaves_out_a_marker_in_a_new_message(
    llm: ChatLatentMAS, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-it-works.md").read_text()
    (loop,) = re.findall(r"```python\n(for message.*?)```", page, re.DOTALL)
    planner = lambda state: {"messages": [HumanMessage(llm.invoke(state["messages"]).text)]}  # noqa: E731
    graph = switch_edges(team(planner, answerer_of(llm)), "*", steps=2).compile()
    inputs: Any = {"messages": [("human", "2+3?")]}
    exec(loop, {"graph": graph, "inputs": inputs})
    assert capsys.readouterr().out == graph.invoke(inputs)["messages"][-1].text


def test_messages_of_a_state_stream_as_json(llm: ChatLatentMAS) -> None:
    graph = switch_edges(team(answerer_of(llm), answerer_of(llm)), "*", steps=2).compile()

    def plain(value: Any) -> Any:
        assert isinstance(value, BaseMessage)
        return message_to_dict(value)

    events = list(graph.stream(HELLO, stream_mode=["values", "updates", "custom"]))
    assert all(json.loads(json.dumps(event, default=plain)) for event in events)


def test_agents_and_subgraphs_think_at_their_end(llm: ChatLatentMAS) -> None:
    inner = team(answerer_of(llm), answerer_of(llm)).compile()
    builder = StateGraph(MessagesState)
    builder.add_sequence(
        [("team", inner), ("agent", create_agent(llm, system_prompt="Check.")), ("judger", create_agent(llm))]
    )
    builder.add_edge(START, "team")
    asked, draft, final, check, answer = switch_edges(builder, "*", steps=2).compile().invoke(HELLO)["messages"]
    assert is_latent(final.text, "team", 2)
    assert is_latent(check.text, "agent", 2)
    assert not any("[latent " in message.text for message in (asked, draft, answer))


def ending_in(step: Any) -> Any:
    return StateGraph(MessagesState).add_sequence([("last", step)]).add_edge(START, "last").compile()


class Desk:
    """Holds an agent where nobody looks for it."""

    __slots__ = ("agent",)


@pytest.mark.parametrize("held", ["a default argument", "an object that hides it"])
def test_an_agent_that_a_node_calls_thinks_or_the_log_says_that_it_speaks(
    llm: ChatLatentMAS, held: str, caplog: pytest.LogCaptureFixture
) -> None:
    desk = Desk()
    desk.agent = create_agent(llm, system_prompt="Plan.")  # type: ignore[attr-defined]

    def by_default(state: Any, agent: Any = desk.agent) -> Any:  # type: ignore[attr-defined]
        return {"messages": agent.invoke(state)["messages"][-1:]}

    def by_hiding(state: Any) -> Any:
        return {"messages": desk.agent.invoke(state)["messages"][-1:]}  # type: ignore[attr-defined]

    seen = held == "a default argument"
    builder = team(by_default if seen else by_hiding, answerer_of(llm))
    planned = switch_edges(builder, [("planner", "judger")], steps=2).compile().invoke(HELLO)["messages"][1]
    assert is_latent(planned.text, "planner", 2) == seen
    assert (
        "'planner' calls the model in a graph or task that switch_edges cannot see (at 'model')" in caplog.text
    ) == (not seen)


def test_graphs_in_graphs_in_graphs_are_looked_through_once(
    llm: ChatLatentMAS, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    monkeypatch.setattr(Calls, "of", lambda *how, of=Calls.of, **more: (looked.append(1), of(*how, **more))[1])
    graph: Any = answerer_of(llm)
    for _ in range(8):
        graph = ending_in(graph)
    state = switch_edges(team(graph, answerer_of(llm)), "*", steps=2).compile().invoke(HELLO)
    assert is_latent(state["messages"][1].text, "planner", 2)
    assert len(looked) < 2000  # and not a hundred thousand


def test_a_router_before_the_first_node_keeps_no_edge_text(llm: ChatLatentMAS) -> None:
    class Topics(TypedDict, total=False):
        topics: list[str]
        results: Annotated[list[str], operator.add]
        answer: str

    builder = StateGraph(Topics)
    builder.add_node("worker", lambda task: {"results": [llm.invoke(task["topic"]).text]})
    builder.add_node("judger", lambda state: {"answer": llm.invoke("\n".join(["Sum up.", *state["results"]])).text})
    builder.add_conditional_edges(START, lambda s: [Send("worker", {"topic": t}) for t in s["topics"]], ["worker"])
    builder.add_edge("worker", "judger")
    builder.add_edge("judger", END)
    state = switch_edges(builder, "*", steps=2).compile().invoke({"topics": ["one", "two", "three"]})
    assert all(is_latent(result, "worker", 2) for result in state["results"])
    assert len(set(state["results"])) == 3
    assert "[latent " not in state["answer"]


def test_policies_and_defer_are_kept(llm: ChatLatentMAS) -> None:
    policy = RetryPolicy(max_attempts=2)
    critic = switch_edges(chain(llm, retry_policy=policy, defer=True), "*").nodes["critic"]
    assert critic.retry_policy == policy
    assert critic.defer


REFUSED: list[tuple[str, Callable[[ChatLatentMAS, LatentService], Any], str]] = [
    ("another model receives", lambda llm, _: (llm, FakeListChatModel(responses=["x"])), "another model"),
    ("another model sends", lambda llm, _: (FakeListChatModel(responses=["x"]), llm), "another model"),
    ("another service", lambda llm, other: (llm, ChatLatentMAS(service=other)), "same service"),
    ("tools", lambda llm, _: (llm.bind(tools=[{"type": "function"}]), llm), "tools"),
    ("a parser", lambda llm, _: (llm | JsonOutputParser(), llm), "parses"),
]


@pytest.mark.parametrize(("models", "why"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_an_edge_that_cannot_be_latent_says_why(
    llm: ChatLatentMAS, service: LatentService, models: Callable[..., Any], why: str
) -> None:
    sends, receives = models(llm, service)
    builder = chain(
        llm,
        planner=lambda state: {"plan": sends.invoke("Plan")},
        critic=lambda state: {"critique": receives.invoke(state["plan"])},
    )
    with pytest.raises(InvalidEdge, match=why) as raised:
        switch_edges(builder, [PLANNER])
    assert "'planner' -> 'critic'" in str(raised.value)
    report = next(r for r in switch_edges(builder, "*", explain=True) if r.source == "planner")
    assert report.mode == "text"
    assert why in report.why


def test_one_of_several_receivers_that_needs_text_keeps_the_sender_speaking(llm: ChatLatentMAS) -> None:
    builder = chain(llm)
    builder.add_node("logger", lambda state: {})
    builder.add_edge("planner", "logger")
    with pytest.raises(InvalidEdge, match="'logger'"):
        switch_edges(builder, [PLANNER])


@pytest.mark.parametrize(
    ("edges", "match"),
    [
        ([("planner", "nobody")], "no node 'nobody'"),
        ([("planner", "judger")], "go to: 'critic'"),
        ([("judger", END)], "leaves the graph"),
        ([(START, "planner")], "enters the graph"),
        (["planner"], "pair"),
        ("planner", "pairs"),
    ],
)
def test_edges_that_do_not_exist_are_refused(llm: ChatLatentMAS, edges: Any, match: str) -> None:
    with pytest.raises(InvalidEdge, match=match):
        switch_edges(chain(llm), edges)


def test_a_workflow_of_the_functional_api_is_told_what_to_do_instead() -> None:
    @entrypoint()
    def workflow(question: str) -> str:
        return question

    with pytest.raises(InvalidRequest, match=r"call the model with steps="):
        switch_edges(workflow, "*")  # type: ignore[call-overload]


def test_a_compiled_graph_is_refused(llm: ChatLatentMAS) -> None:
    with pytest.raises(InvalidRequest, match=r"graph\.builder"):
        switch_edges(chain(llm).compile(), "*")  # type: ignore[call-overload]


def test_an_agent_that_a_node_wraps_is_seen(llm: ChatLatentMAS, service32: LatentService) -> None:
    planner = LatentAgentNode("planner", "Plan.", service=service32, steps=2, max_tokens=3)
    builder = StateGraph(LatentState)
    say = answerer_of(llm)
    builder.add_sequence([("one", say), ("two", say), ("planning", planner.with_retry()), ("last", say)])
    builder.add_edge(START, "one")
    report = switch_edges(builder, [("one", "two")], steps=2, explain=True)[1]
    assert (report.source, report.mode, report.why) == ("one", "latent", "2 latent steps")
    graph = switch_edges(builder, [("one", "two")], steps=2).compile()
    assert [ref["agent"] for ref in graph.invoke(HELLO)["latents"]] == ["planner"]
    for name in ("planner", "planning"):
        named: Any = {"configurable": {"edges": {f"{name}->last": "text", "one->two": "latent"}}}
        assert not graph.invoke(HELLO, named)["latents"]


def test_an_edited_marker_is_refused_by_the_next_call(llm: ChatLatentMAS) -> None:
    marker = switch_edges(chain(llm), "*", steps=2).compile().invoke(ASKED)["plan"]
    with pytest.raises(InvalidReference):
        llm.invoke(marker.replace(" 2 steps", " 3 steps"))
    with pytest.raises(InvalidReference):
        llm.invoke(marker[:-5])
