import asyncio
import json
import operator
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from langchain.agents import create_agent
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import BaseMessage, HumanMessage, message_to_dict
from langchain_core.output_parsers import JsonOutputParser, StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command, RetryPolicy, Send, interrupt
from typing_extensions import TypedDict

from langchain_latentmas import ChatLatentMAS, LatentService, switch_edges
from langchain_latentmas.calls import Calls
from langchain_latentmas.errors import InvalidEdge, InvalidReference, InvalidRequest

CHAIN = [("planner", "critic"), ("critic", "judger")]


class State(TypedDict, total=False):
    question: str
    plan: str
    critique: str
    answer: str


@pytest.fixture(scope="module")
def llm(service32: LatentService) -> ChatLatentMAS:
    return ChatLatentMAS(service=service32, max_tokens=6)


def chain(planner: Any, critic: Any, judger: Any) -> StateGraph:
    builder = StateGraph(State)
    for name, node in (("planner", planner), ("critic", critic), ("judger", judger)):
        builder.add_node(name, node)
    for edge in [(START, "planner"), *CHAIN, ("judger", END)]:
        builder.add_edge(*edge)
    return builder


def ask(llm: Any, key: str, text: str, state: State) -> dict[str, str]:
    return {key: llm.invoke(text.format(**state)).text}


@pytest.fixture
def builder(llm: ChatLatentMAS) -> StateGraph:
    def planner(state: State) -> dict[str, str]:
        return {"plan": llm.invoke(f"Plan: {state['question']}").text}

    async def acritic(state: State) -> dict[str, str]:
        return {"critique": (await llm.ainvoke([HumanMessage(content=state["plan"]), HumanMessage("Check.")])).text}

    judge = ChatPromptTemplate.from_template("Judge {plan} and {critique}.") | llm | StrOutputParser()
    made = chain(planner, partial(ask, llm, "critique", "Check {plan}"), lambda state: {"answer": judge.invoke(state)})
    made.nodes["critic"].runnable.afunc = acritic  # type: ignore[union-attr]
    return made


QUESTION: State = {"question": "What is 1 plus 2?"}
TEXT: Any = {"configurable": {"edges": "text"}}


def is_marker(text: str) -> bool:
    return text.startswith("[latent ")


def test_a_switched_chain_passes_markers_and_ends_in_text(builder: StateGraph) -> None:
    graph = switch_edges(builder, CHAIN, steps=3).compile()
    state = graph.invoke(QUESTION)
    assert is_marker(state["plan"])
    assert is_marker(state["critique"])
    assert not is_marker(state["answer"])


def test_async_runs_pass_markers_too(builder: StateGraph) -> None:
    state = asyncio.run(switch_edges(builder, "*", steps=3).compile().ainvoke(QUESTION))
    assert is_marker(state["plan"])
    assert is_marker(state["critique"])


def test_one_graph_flips_between_text_and_latent_per_call(builder: StateGraph) -> None:
    plain = builder.compile().invoke(QUESTION)
    graph = switch_edges(builder, CHAIN, steps=3).compile()
    latent = graph.invoke(QUESTION)
    assert graph.invoke(QUESTION, TEXT) == plain
    assert graph.invoke(QUESTION) == latent
    one = graph.invoke(QUESTION, {"configurable": {"edges": {"planner->critic": "text"}}})
    assert one["plan"] == plain["plan"]
    assert is_marker(one["critique"])


def test_the_users_builder_stays_as_it_is(builder: StateGraph) -> None:
    before = (dict(builder.nodes), set(builder.edges), {k: dict(v) for k, v in builder.branches.items()})
    plain = builder.compile().invoke(QUESTION)
    switch_edges(builder, "*", steps=3).compile().invoke(QUESTION)
    assert (dict(builder.nodes), set(builder.edges), {k: dict(v) for k, v in builder.branches.items()}) == before
    assert builder.compile().invoke(QUESTION) == plain


def test_switching_back_gives_text(builder: StateGraph) -> None:
    latent = switch_edges(builder, CHAIN)
    back = switch_edges(latent, [("planner", "critic")], to="text").compile().invoke(QUESTION)
    assert not is_marker(back["plan"])
    assert is_marker(back["critique"])
    assert switch_edges(latent, "*", to="text").compile().invoke(QUESTION) == builder.compile().invoke(QUESTION)


def test_every_edge_is_explained(builder: StateGraph) -> None:
    reports = {(r.source, r.target): r for r in switch_edges(builder, "*", steps=7, explain=True)}
    assert {edge: report.mode for edge, report in reports.items()} == {
        (START, "planner"): "text",
        ("planner", "critic"): "latent",
        ("critic", "judger"): "latent",
        ("judger", END): "text",
    }
    assert all(report.why for report in reports.values())


def test_tokens_and_steps_stream_in_both_modes(builder: StateGraph) -> None:
    graph = switch_edges(builder, CHAIN, steps=3).compile()
    events: list[Any] = list(graph.stream({"question": "And 3?"}, stream_mode=["custom", "messages"]))
    assert [e["step"] for mode, e in events if mode == "custom" and e["agent"] == "critic"] == [1, 2, 3]
    spoken = [e[0].text for mode, e in events if mode == "messages" and e[1]["langgraph_node"] == "judger"]
    assert len(spoken) > 2
    shown = [e for mode, e in events if mode == "messages" and "[latent " not in e[0].text]
    assert [e[0].text for e in shown] == spoken  # and no marker
    text: list[Any] = list(graph.stream({"question": "And 3?"}, TEXT, stream_mode=["custom", "messages"]))
    assert not [e for mode, e in text if mode == "custom"]
    assert len([e for mode, e in text if mode == "messages" and e[1]["langgraph_node"] == "planner"]) > 2


def test_the_stream_filter_of_the_docs_leaves_out_a_marker_in_a_new_message(
    llm: ChatLatentMAS, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-it-works.md").read_text()
    (loop,) = re.findall(r"```python\n(for message.*?)```", page, re.DOTALL)
    builder = StateGraph(MessagesState)
    builder.add_node("planner", lambda state: {"messages": [HumanMessage(llm.invoke(state["messages"]).text)]})
    builder.add_node("judger", lambda state: {"messages": [llm.invoke(state["messages"])]})
    builder.add_edge(START, "planner").add_edge("planner", "judger")
    graph = switch_edges(builder, "*", steps=2).compile()
    inputs: Any = {"messages": [("human", "2+3?")]}
    exec(loop, {"graph": graph, "inputs": inputs})
    assert capsys.readouterr().out == graph.invoke(inputs)["messages"][-1].text


def test_every_streamed_event_is_json(llm: ChatLatentMAS) -> None:
    builder = StateGraph(MessagesState)
    for name in ("planner", "judger"):
        builder.add_node(name, lambda state: {"messages": [llm.invoke(state["messages"])]})
    builder.add_edge(START, "planner")
    builder.add_edge("planner", "judger")
    builder.add_edge("judger", END)
    graph = switch_edges(builder, [("planner", "judger")], steps=2).compile()

    def plain(value: Any) -> Any:
        assert isinstance(value, BaseMessage)
        return message_to_dict(value)

    events = list(graph.stream({"messages": [("human", "Hello")]}, stream_mode=["values", "updates", "custom"]))
    assert all(json.loads(json.dumps(event, default=plain)) for event in events)


def test_agents_and_subgraphs_think_at_their_end(llm: ChatLatentMAS) -> None:
    inner = StateGraph(MessagesState)
    inner.add_node("draft", lambda state: {"messages": [llm.invoke(state["messages"])]})
    inner.add_node("final", lambda state: {"messages": [llm.invoke(state["messages"])]})
    inner.add_edge(START, "draft")
    inner.add_edge("draft", "final")
    inner.add_edge("final", END)
    builder = StateGraph(MessagesState)
    builder.add_node("team", inner.compile())
    builder.add_node("agent", create_agent(llm, system_prompt="Check."))
    builder.add_node("judger", create_agent(llm))
    builder.add_edge(START, "team")
    builder.add_edge("team", "agent")
    builder.add_edge("agent", "judger")
    builder.add_edge("judger", END)
    state = switch_edges(builder, "*", steps=2).compile().invoke({"messages": [("human", "Hello")]})
    assert [is_marker(m.text) for m in state["messages"]] == [False, False, True, True, False]


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

    builder = StateGraph(MessagesState)
    builder.add_node("planner", by_default if held == "a default argument" else by_hiding)
    builder.add_node("judger", lambda state: {"messages": [llm.invoke(state["messages"])]})
    builder.add_edge(START, "planner")
    builder.add_edge("planner", "judger")
    graph = switch_edges(builder, [("planner", "judger")], steps=2).compile()
    planned = graph.invoke({"messages": [("human", "Hello")]})["messages"][1]
    assert is_marker(planned.text) == (held == "a default argument")
    assert (
        "'planner' calls the model in a graph or task that switch_edges cannot see (at 'model')" in caplog.text
    ) == (not is_marker(planned.text))


def test_graphs_in_graphs_in_graphs_are_looked_through_once(
    llm: ChatLatentMAS, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    monkeypatch.setattr(Calls, "of", lambda *how, of=Calls.of, **more: (looked.append(1), of(*how, **more))[1])
    graph: Any = lambda state: {"messages": [llm.invoke(state["messages"])]}  # noqa: E731
    for _ in range(8):
        graph = ending_in(graph)
    builder = StateGraph(MessagesState)
    builder.add_node("planner", graph)
    builder.add_node("judger", lambda state: {"messages": [llm.invoke(state["messages"])]})
    builder.add_edge(START, "planner")
    builder.add_edge("planner", "judger")
    state = switch_edges(builder, "*", steps=2).compile().invoke({"messages": [("human", "Hello")]})
    assert is_marker(state["messages"][1].text)
    assert len(looked) < 2000  # and not a hundred thousand


def test_parallel_workers_of_a_send_are_merged(llm: ChatLatentMAS) -> None:
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
    assert all(map(is_marker, state["results"]))
    assert len(set(state["results"])) == 3
    assert not is_marker(state["answer"])


def loop(llm: ChatLatentMAS, **options: Any) -> StateGraph:
    builder = StateGraph(State)
    builder.add_node("planner", lambda state: {"plan": llm.invoke(state["question"]).text})
    builder.add_node("judger", lambda state: {"answer": llm.invoke(f"Judge {state['plan']}").text}, **options)
    builder.add_edge(START, "planner")
    builder.add_conditional_edges("planner", lambda state: "judger", ["judger"])
    builder.add_edge("judger", END)
    return builder


def test_a_conditional_edge_stays_text_unless_its_router_reads_none(llm: ChatLatentMAS) -> None:
    builder = loop(llm)
    with pytest.raises(InvalidEdge, match="router_reads_text=False"):
        switch_edges(builder, [("planner", "judger")])
    assert not is_marker(switch_edges(builder, "*").compile().invoke(QUESTION)["plan"])
    switched = switch_edges(builder, "*", router_reads_text=False, steps=2)
    assert is_marker(switched.compile().invoke(QUESTION)["plan"])


def test_a_node_that_returns_command_counts_as_a_router(llm: ChatLatentMAS) -> None:
    def planner(state: State) -> Command[Literal["judger"]]:
        return Command(goto="judger", update={"plan": llm.invoke(state["question"]).text})

    builder = StateGraph(State)
    builder.add_node("planner", planner)
    builder.add_node("judger", lambda state: {"answer": llm.invoke(f"Judge {state['plan']}").text})
    builder.add_edge(START, "planner")
    builder.add_edge("judger", END)
    with pytest.raises(InvalidEdge, match="Command"):
        switch_edges(builder, [("planner", "judger")])
    switched = switch_edges(builder, [("planner", "judger")], router_reads_text=False, steps=2)
    assert is_marker(switched.compile().invoke(QUESTION)["plan"])


def test_policies_and_defer_are_kept(llm: ChatLatentMAS) -> None:
    policy = RetryPolicy(max_attempts=2)
    switched = switch_edges(loop(llm, retry_policy=policy, defer=True), "*", router_reads_text=False)
    assert switched.nodes["judger"].retry_policy == policy
    assert switched.nodes["judger"].defer


def test_a_node_that_is_interrupted_thinks_once(llm: ChatLatentMAS) -> None:
    markers: list[str] = []

    def planner(state: State) -> dict[str, str]:
        markers.append(llm.invoke(state["question"]).text)
        return {"plan": markers[-1] + interrupt("Go on?")}

    graph = switch_edges(
        chain(planner, partial(ask, llm, "critique", "Check {plan}"), partial(ask, llm, "answer", "Judge {critique}")),
        CHAIN,
        steps=2,
    ).compile(checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "1"}}
    graph.invoke(QUESTION, config)
    state = graph.invoke(Command(resume=" yes"), config)
    assert len(markers) == 2
    assert len(set(markers)) == 1
    assert state["answer"]


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
        lambda state: {"plan": sends.invoke("Plan")},
        lambda state: {"critique": receives.invoke(state["plan"])},
        lambda state: {"answer": llm.invoke(state["critique"]).text},
    )
    with pytest.raises(InvalidEdge, match=why) as raised:
        switch_edges(builder, [("planner", "critic")])
    assert "'planner' -> 'critic'" in str(raised.value)
    report = next(r for r in switch_edges(builder, "*", explain=True) if r.source == "planner")
    assert report.mode == "text"
    assert why in report.why


def test_one_of_several_receivers_that_needs_text_keeps_the_sender_speaking(llm: ChatLatentMAS) -> None:
    builder = chain(*(partial(ask, llm, key, "Go {question}") for key in ("plan", "critique", "answer")))
    builder.add_node("logger", lambda state: {})
    builder.add_edge("planner", "logger")
    with pytest.raises(InvalidEdge, match="'logger'"):
        switch_edges(builder, [("planner", "critic")])


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
def test_edges_that_do_not_exist_are_refused(builder: StateGraph, edges: Any, match: str) -> None:
    with pytest.raises(InvalidEdge, match=match):
        switch_edges(builder, edges)


def test_a_workflow_of_the_functional_api_is_told_what_to_do_instead() -> None:
    @entrypoint()
    def workflow(question: str) -> str:
        return question

    with pytest.raises(InvalidRequest, match=r"call the model with steps="):
        switch_edges(workflow, "*")  # type: ignore[call-overload]


def test_a_compiled_graph_is_refused(builder: StateGraph) -> None:
    with pytest.raises(InvalidRequest, match=r"graph\.builder"):
        switch_edges(builder.compile(), "*")  # type: ignore[call-overload]


@pytest.mark.parametrize("edges", ["other", {"planner->critic": "other"}, {"planner->judger": "text"}])
def test_unknown_edges_at_run_time_are_refused(builder: StateGraph, edges: Any) -> None:
    graph = switch_edges(builder, CHAIN, steps=2).compile()
    with pytest.raises(InvalidRequest, match=r"configurable\.edges"):
        graph.invoke(QUESTION, {"configurable": {"edges": edges}})


def test_tools_on_a_thinking_node_are_refused_when_it_runs(llm: ChatLatentMAS) -> None:
    hidden: dict[str, Any] = {}

    def planner(state: State) -> dict[str, str]:
        return {"plan": hidden["llm"].invoke("Plan").text}

    builder = chain(planner, *(partial(ask, llm, key, "Go {plan}") for key in ("critique", "answer")))
    graph = switch_edges(builder, CHAIN, steps=2).compile()
    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
    hidden["llm"] = llm.bind(tools=[tool])
    with pytest.raises(InvalidRequest, match="planner->critic"):
        graph.invoke(QUESTION)


def test_an_edited_marker_is_refused_by_the_next_call(llm: ChatLatentMAS, builder: StateGraph) -> None:
    marker = switch_edges(builder, CHAIN, steps=2).compile().invoke(QUESTION)["plan"]
    with pytest.raises(InvalidReference):
        llm.invoke(marker.replace(" 2 steps", " 3 steps"))
    with pytest.raises(InvalidReference):
        llm.invoke(marker[:-5])
