from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain_core.language_models import FakeListChatModel
from langchain_core.output_parsers import JsonOutputParser, StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnableParallel, RunnablePassthrough
from langgraph.func import task
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command
from pydantic import BaseModel

from langchain_latentmas import ChatLatentMAS, LatentAgentNode, LatentService, LatentState, switch_edges
from langchain_latentmas.errors import InvalidEdge, InvalidRequest

from ..graphs import (
    ASKED,
    CRITIC,
    PLANNER,
    TEXT,
    Chain,
    chain,
    critic_of,
    is_latent,
    judger_of,
    latent,
    modes,
    planner_of,
    team,
)


@pytest.fixture
def llm(service32: LatentService) -> ChatLatentMAS:
    return ChatLatentMAS(service=service32, max_tokens=6)


class Critic:
    """A node that is an object."""

    def __init__(self, llm: ChatLatentMAS) -> None:
        self.llm = llm

    def __call__(self, state: Chain) -> Chain:
        return self.check(state)

    def check(self, state: Chain) -> Chain:
        return {"critique": self.llm.invoke(f"Check {state['plan']} please").content}


def as_function(llm: ChatLatentMAS) -> Any:
    return critic_of(llm)


def as_lcel(llm: ChatLatentMAS) -> Any:
    prompt = ChatPromptTemplate.from_template("Check {plan} please")
    return prompt | llm | StrOutputParser() | (lambda text: {"critique": text})


def as_parallel(llm: ChatLatentMAS) -> Any:
    prompt = ChatPromptTemplate.from_template("Check {plan} please")
    return RunnableParallel(critique=prompt | llm | StrOutputParser())


def as_assign(llm: ChatLatentMAS) -> Any:
    prompt = ChatPromptTemplate.from_template("Check {plan} please")
    return RunnablePassthrough.assign(critique=prompt | llm.with_retry() | StrOutputParser())


def as_lambda(llm: ChatLatentMAS) -> Any:
    return RunnableLambda(critic_of(llm))


def as_object(llm: ChatLatentMAS) -> Any:
    return Critic(llm)


def as_method(llm: ChatLatentMAS) -> Any:
    return Critic(llm).check


def as_partial(llm: ChatLatentMAS) -> Any:
    def critic(llm: ChatLatentMAS, state: Chain) -> Chain:
        return {"critique": llm.invoke(f"Check {state['plan']} please").content}

    return partial(critic, llm)


def as_bound(llm: ChatLatentMAS) -> Any:
    return critic_of(llm.bind(temperature=0.0).with_config(tags=["critic"]))


def as_subgraph(llm: ChatLatentMAS) -> Any:
    return StateGraph(Chain).add_sequence([("critic", critic_of(llm))]).add_edge(START, "critic").compile()


def as_two_step_subgraph(llm: ChatLatentMAS) -> Any:
    def finder(state: Chain) -> Chain:
        return {"critique": llm.invoke(f"Find {state['plan']} faults").content}

    def checker(state: Chain) -> Chain:
        assert "[latent" not in state["critique"], "text inside of a subgraph stays text"
        return {"critique": llm.invoke(f"Check {state['plan']} please").content}

    return StateGraph(Chain).add_sequence([finder, checker]).add_edge(START, "finder").compile()


def as_caller_of_a_subgraph(llm: ChatLatentMAS) -> Any:
    subgraph = as_subgraph(llm)
    return lambda state: {"critique": subgraph.invoke(state)["critique"]}


KINDS = [
    as_function,
    as_lcel,
    as_parallel,
    as_assign,
    as_lambda,
    as_object,
    as_method,
    as_partial,
    as_bound,
    as_subgraph,
    as_two_step_subgraph,
    as_caller_of_a_subgraph,
]


@pytest.mark.parametrize("kind", KINDS)
async def test_nodes_of_every_kind_think_and_flip(llm: ChatLatentMAS, kind: Callable[[ChatLatentMAS], Any]) -> None:
    builder = chain(llm, critic=kind(llm))
    assert latent(builder) == {PLANNER, CRITIC}
    graph = switch_edges(builder, "*", steps=3).compile()
    out = graph.invoke(ASKED)
    assert is_latent(out["critique"], "critic")
    assert out["latent_steps"] == 6
    assert await graph.ainvoke(ASKED) == out
    assert graph.invoke(ASKED, TEXT) == builder.compile().invoke(ASKED)


GLOBAL_LLM: Any = None


def critic_on_a_global(state: Chain) -> Chain:
    return {"critique": GLOBAL_LLM.invoke(f"Check {state['plan']} please").content}


def test_a_model_in_a_global_is_seen(llm: ChatLatentMAS, monkeypatch: pytest.MonkeyPatch) -> None:
    assert latent(chain(llm, critic=critic_on_a_global)) == set()
    monkeypatch.setitem(globals(), "GLOBAL_LLM", llm)
    assert latent(chain(llm, critic=critic_on_a_global)) == {PLANNER, CRITIC}


def test_a_model_that_cannot_be_seen_needs_named_edges(llm: ChatLatentMAS) -> None:
    hidden = {"models": [lambda: llm]}.__getitem__
    builder = chain(llm, critic=lambda state: critic_of(hidden("models")[0]())(state))
    reports = modes(builder)
    assert reports[CRITIC][0] == "text"
    assert "no ChatLatentMAS can be seen in 'critic'; name the edge" in reports[CRITIC][1]
    out = switch_edges(builder, [PLANNER, CRITIC], steps=3).compile().invoke(ASKED)
    assert is_latent(out["critique"], "critic")


def test_a_node_with_a_number_for_a_name_thinks(llm: ChatLatentMAS) -> None:
    builder = StateGraph(Chain)
    builder.add_node("1", as_subgraph(llm))
    builder.add_node("2", judger_of(llm))
    builder.add_edge(START, "1")
    builder.add_edge("1", "2")
    out = switch_edges(builder, "*", steps=3).compile().invoke({**ASKED, "plan": "add"})
    assert is_latent(out["critique"], "1")


def test_edges_inside_of_a_subgraph_switch_by_themselves(llm: ChatLatentMAS) -> None:
    inner = switch_edges(chain(llm), "*", steps=3).compile()
    outer = StateGraph(Chain).add_node("team", inner).add_node("last", judger_of(llm))
    outer.add_edge(START, "team").add_edge("team", "last").add_edge("last", END)
    assert latent(outer) == {("team", "last")}
    graph = outer.compile()
    assert is_latent(graph.invoke(ASKED)["plan"], "planner")
    assert is_latent(graph.invoke(ASKED, {"configurable": {"edges": {"critic->judger": "text"}}})["plan"], "planner")
    assert "[latent" not in graph.invoke(ASKED, TEXT)["plan"]
    both = switch_edges(outer, "*", steps=4).compile()
    handed_on, _ = (update.get("team", {}) for update in both.stream(ASKED, stream_mode="updates"))
    assert is_latent(handed_on["plan"], "planner")
    assert is_latent(handed_on["answer"], "team", 4)
    mixed = both.invoke(ASKED, {"configurable": {"edges": {"planner->critic": "text", "team->last": "latent"}}})
    assert "[latent" not in mixed["plan"]
    assert is_latent(mixed["critique"], "critic")
    with pytest.raises(InvalidRequest, match="critic->judger, planner->critic, team->last"):
        both.invoke(ASKED, {"configurable": {"edges": {"planner->judger": "text"}}})


def test_a_switched_graph_draws_its_subgraphs(llm: ChatLatentMAS) -> None:
    builder = chain(llm, critic=as_two_step_subgraph(llm))
    plain = builder.compile().get_graph(xray=True).draw_mermaid()
    assert "finder" in plain
    assert switch_edges(builder, "*").compile().get_graph(xray=True).draw_mermaid() == plain


class Noisy(AgentMiddleware):
    """Has a node before and one after the model."""

    def before_model(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        return None

    def after_model(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        return None


@pytest.mark.parametrize("middleware", [[], [Noisy()]])
async def test_agents_hand_over_memories(llm: ChatLatentMAS, middleware: list[AgentMiddleware]) -> None:
    builder = team(create_agent(llm, system_prompt="Plan.", middleware=middleware), create_agent(llm))
    assert latent(builder) == {("planner", "judger")}
    graph = switch_edges(builder, "*", steps=3).compile()
    _, plan, answer = graph.invoke({"messages": [("human", "2+3?")]})["messages"]
    assert is_latent(plan.content, "planner")
    assert answer.usage_metadata["output_token_details"]["latent_steps"] == 3
    again = await graph.ainvoke({"messages": [("human", "2+3?")]})
    assert [message.content for message in again["messages"][1:]] == [plan.content, answer.content]
    _, plan, answer = graph.invoke({"messages": [("human", "2+3?")]}, TEXT)["messages"]
    assert "[latent" not in plan.content
    assert answer.usage_metadata["output_token_details"]["latent_steps"] == 0


def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


def test_an_agent_with_tools_stays_text(llm: ChatLatentMAS) -> None:
    builder = team(create_agent(llm, tools=[add]), create_agent(llm))
    assert latent(builder) == set()
    with pytest.raises(InvalidEdge, match=r"'planner' -> 'judger' cannot be latent: 'planner' binds tools"):
        switch_edges(builder, [("planner", "judger")])
    assert latent(team(create_agent(llm), create_agent(llm, tools=[add]))) == {("planner", "judger")}


@pytest.mark.parametrize("hidden", [False, True])
def test_a_thinking_node_that_binds_tools_is_refused(llm: ChatLatentMAS, hidden: bool) -> None:
    bound = llm.bind_tools([add])
    builder = chain(llm, planner=planner_of(bound))
    if not hidden:
        with pytest.raises(InvalidEdge, match=r"'planner' -> 'critic' cannot be latent: 'planner' binds tools"):
            switch_edges(builder, [PLANNER])
        assert "binds tools" in modes(builder)[PLANNER][1]
        return
    graph = switch_edges(chain(llm, planner=lambda state: planner_of(llm.bind_tools([add]))(state)), "*").compile()
    with pytest.raises(InvalidRequest, match=r"Node 'planner' has tools .*planner->critic.*switch these to text"):
        graph.invoke(ASKED)


class Plan(BaseModel):
    """A plan."""

    text: str


@pytest.mark.parametrize("raw", [False, True])
def test_structured_output_of_a_sender_stays_text(llm: ChatLatentMAS, raw: bool) -> None:
    structured = llm.with_structured_output(Plan, include_raw=raw)
    assert "structured output" in modes(chain(llm, planner=planner_of(structured)))[PLANNER][1]


def test_a_parser_of_a_sender_keeps_its_edge_text(llm: ChatLatentMAS) -> None:
    planner = ChatPromptTemplate.from_template("Plan {question}") | llm | JsonOutputParser()
    builder = chain(llm, planner=planner)
    assert latent(builder) == {CRITIC}
    with pytest.raises(InvalidEdge, match=r"'planner' -> 'critic' cannot be .* parses its own text \(JsonOutputPars"):
        switch_edges(builder, [PLANNER])
    receives = ChatPromptTemplate.from_template("Check {plan}") | llm | JsonOutputParser()
    assert latent(chain(llm, critic=receives)) == {PLANNER}


def test_a_latent_agent_node_keeps_its_own_references(llm: ChatLatentMAS, service32: LatentService) -> None:
    builder = StateGraph(LatentState)
    builder.add_node("planner", LatentAgentNode("planner", "Plan.", service=service32))
    builder.add_node("judger", lambda state: {"messages": [llm.invoke(state["messages"])]})
    builder.add_edge(START, "planner")
    builder.add_edge("planner", "judger")
    assert latent(builder) == set()
    with pytest.raises(InvalidEdge, match="'planner' is a LatentAgentNode"):
        switch_edges(builder, [("planner", "judger")])


def test_a_mapping_may_name_edges_of_latent_agent_nodes_too(llm: ChatLatentMAS, service32: LatentService) -> None:
    class State(LatentState, total=False):
        plan: str
        check: str

    builder = StateGraph(State)
    builder.add_node("planner", lambda state: {"plan": llm.invoke("Plan").content})
    builder.add_node("critic", lambda state: {"check": llm.invoke(f"Check {state['plan']}").content})
    builder.add_node("refiner", LatentAgentNode("refiner", "Refine.", service=service32, steps=2, max_tokens=4))
    builder.add_node("judger", LatentAgentNode("judger", "Judge.", service=service32, speak=True, max_tokens=4))
    for edge in [(START, "planner"), ("planner", "critic"), ("critic", "refiner"), ("refiner", "judger")]:
        builder.add_edge(*edge)
    graph = switch_edges(builder, "*", steps=2).compile()
    out = graph.invoke({"messages": [("human", "Hello")]}, {"configurable": {"edges": {"refiner->judger": "text"}}})
    assert is_latent(out["plan"], "planner", 2)
    assert [ref["agent"] for ref in out["latents"]] == ["judger"]
    with pytest.raises(InvalidRequest, match="no latent edge of this graph"):
        graph.invoke({"messages": []}, {"configurable": {"edges": {"refiner->nobody": "text"}}})


class Verdict(BaseModel):
    good: bool


class Team:
    """Agents that are methods, with what other nodes use on the same object."""

    def __init__(self, llm: ChatLatentMAS) -> None:
        self.llms = {"own": llm}
        self.grader = llm.with_structured_output(Verdict)
        self.big = FakeListChatModel(responses=["It is 5."])

    @property
    def llm(self) -> ChatLatentMAS:
        return self.llms["own"]

    def ask(self, text: str, deep: bool = True) -> str:
        if not deep:
            return self.llm.invoke(text).content
        return "".join(self.ask(text, deep=False) for _ in range(1))

    def planner(self, state: Chain) -> Chain:
        return {"plan": self.ask(f"Plan: {state['question']}")}

    def critic(self, state: Chain) -> Chain:
        return {"critique": self.ask(f"Check {state['plan']} please")}

    def stranger(self, state: Chain) -> Chain:
        return {"critique": self.big.invoke(f"Check {state['plan']} please").content}


class Named(Critic):
    """Its `__call__` is inherited."""


def test_of_a_team_that_is_an_object_only_what_a_node_uses_counts(llm: ChatLatentMAS) -> None:
    team = Team(llm)
    builder = chain(llm, planner=team.planner, critic=team.critic)
    assert latent(builder) == {PLANNER, CRITIC}
    out = switch_edges(builder, "*", steps=3).compile().invoke(ASKED)
    assert is_latent(out["plan"], "planner")
    assert is_latent(out["critique"], "critic")
    assert "runs another model (FakeListChatModel)" in modes(chain(llm, critic=team.stranger))[PLANNER][1]
    assert latent(chain(llm, critic=Named(llm))) == {PLANNER, CRITIC}


def test_a_named_edge_may_lead_to_a_node_that_chooses_among_models(llm: ChatLatentMAS) -> None:
    llms = {"small": llm, "big": FakeListChatModel(responses=["It is 5."])}
    builder = chain(llm, critic=lambda state: {"critique": llms["small"].invoke(f"Check {state['plan']}").content})
    assert latent(builder) == set()
    assert latent(builder, [PLANNER, CRITIC]) == {PLANNER, CRITIC}


def test_tasks_that_a_node_calls_think(llm: ChatLatentMAS) -> None:
    @task
    def ask(text: str) -> str:
        return llm.invoke(text).content

    builder = chain(llm, critic=lambda state: {"critique": ask(f"Check {state['plan']} please").result()})
    assert latent(builder) == {PLANNER, CRITIC}
    out = switch_edges(builder, "*", steps=3).compile().invoke(ASKED)
    assert is_latent(out["critique"], "critic")
    assert out["latent_steps"] == 6


def test_a_call_may_speak_in_a_node_that_thinks(llm: ChatLatentMAS) -> None:
    queries = []

    def critic(state: Chain) -> Chain:
        queries.append(llm.invoke("Name two queries.", speak=True).content)
        return critic_of(llm)(state)

    out = switch_edges(chain(llm, critic=critic), "*", steps=3).compile().invoke(ASKED)
    assert queries == [llm.invoke("Name two queries.", agent="critic").content]
    assert is_latent(out["critique"], "critic")
    with pytest.raises(InvalidRequest, match="speak=True takes no latent steps"):
        llm.invoke("Name two queries.", speak=True, steps=2)


def test_an_agent_whose_answer_is_looked_at_afterwards_is_no_sender(llm: ChatLatentMAS) -> None:
    class Guard(AgentMiddleware):
        def after_agent(self, state: Any, runtime: Any) -> None:
            llm.invoke(f"SAFE or UNSAFE? {state['messages'][-1].text}")

    builder = StateGraph(MessagesState)
    builder.add_sequence([("agent", create_agent(llm, middleware=[Guard()])), ("judger", create_agent(llm))])
    builder.add_edge(START, "agent")
    assert "last node cannot be told" in modes(builder)["agent", "judger"][1]


def test_who_judges_and_may_end_the_graph_gets_the_text_that_is_its_answer(llm: ChatLatentMAS) -> None:
    judge = llm.with_structured_output(Verdict)

    def evaluator(state: Chain) -> Chain:
        return {"critique": str(judge.invoke(f"Good? {state['plan']}"))}

    builder = StateGraph(Chain)
    builder.add_node("planner", planner_of(llm))
    builder.add_node("evaluator", evaluator)
    builder.add_edge(START, "planner").add_edge("planner", "evaluator")
    builder.add_conditional_edges("evaluator", lambda state: END, {END: END, "planner": "planner"})
    assert "may end the graph" in modes(builder)["planner", "evaluator"][1]
    named = [("planner", "evaluator")]
    assert latent(builder, named) == {named[0]}


def test_a_node_further_down_that_calls_no_model_is_named(llm: ChatLatentMAS) -> None:
    builder = chain(llm)
    assert modes(builder)[PLANNER] == ("latent", "20 latent steps")
    builder.add_node("save", lambda state: {})
    builder.add_edge("judger", "save")
    assert modes(builder)[PLANNER][1].startswith("20 latent steps; 'save' calls no model that can be seen")


def test_errors_about_edges_lead_out_of_them(llm: ChatLatentMAS) -> None:
    builder = StateGraph(Chain)
    builder.add_node("planner", planner_of(llm))
    builder.add_node("critic", critic_of(llm))
    builder.add_edge(START, "planner")
    builder.add_conditional_edges("planner", lambda state: "critic", ["critic", END])
    with pytest.raises(InvalidEdge, match="'__end__' stays text: what leaves the graph is text"):
        switch_edges(builder, [PLANNER], router_reads_text=False)
    builder = StateGraph(Chain)
    builder.add_node("planner", lambda state: Command(goto="critic"))
    builder.add_node("critic", critic_of(llm))
    builder.add_edge(START, "planner")
    with pytest.raises(InvalidEdge, match=r"nowhere \(a node that returns Command says where"):
        switch_edges(builder, [PLANNER])


def test_edges_between_agents_are_latent_and_go_back_at_run_time_alone(service32: LatentService) -> None:
    builder = StateGraph(LatentState)
    for name in ("planner", "judger"):
        node = LatentAgentNode(name, f"You are {name}.", service=service32, steps=2, speak=name == "judger")
        builder.add_node(name, node)
    builder.add_edge(START, "planner").add_edge("planner", "judger").add_edge("judger", END)
    for to in ("latent", "text"):
        reports = switch_edges(builder, "*", to=to, explain=True)  # type: ignore[call-overload]
        assert [(report.target, report.mode) for report in reports if "LatentAgentNode" in report.why] == [
            ("judger", "latent")
        ]
        assert len(reports) == 3
    with pytest.raises(InvalidEdge, match=r'cannot be switched: .*"planner->judger": "text"'):
        switch_edges(builder, [("planner", "judger")], to="text")


async def test_an_agent_that_was_made_to_speak_speaks_inside_of_a_node_that_thinks(
    llm: ChatLatentMAS, service32: LatentService
) -> None:
    helper = LatentAgentNode("helper", "Name a query.", service=service32, speak=True, max_tokens=3)
    asked: Any = {"messages": [("human", "What?")], "latents": []}
    named = helper.invoke(asked)["messages"][0].text

    def sync(state: Chain) -> Chain:
        found = helper.invoke(asked)["messages"][0].text
        return {"plan": llm.invoke(f"Plan with {found}").text, "critique": found}

    async def later(state: Chain) -> Chain:
        found = (await helper.ainvoke(asked))["messages"][0].text
        return {"plan": (await llm.ainvoke(f"Plan with {found}")).text, "critique": found}

    for planner in (sync, later):
        builder = StateGraph(Chain)
        builder.add_node("planner", planner)
        builder.add_node("judger", judger_of(llm))
        builder.add_edge(START, "planner").add_edge("planner", "judger")
        graph = switch_edges(builder, [("planner", "judger")], steps=2).compile()
        update, _ = [state async for state in graph.astream(ASKED, stream_mode="updates")]
        assert is_latent(update["planner"]["plan"], "planner", 2)
        assert update["planner"]["critique"] == named


def test_a_timeout_that_langgraph_refuses_is_refused_in_a_switched_graph_too(llm: ChatLatentMAS) -> None:
    async def planner(state: Chain) -> Chain:
        return {"plan": (await llm.ainvoke("Plan")).text}

    for node, refused in ((planner_of(llm), True), (planner, False)):
        builder = StateGraph(Chain)
        builder.add_node("planner", node, timeout=60)
        builder.add_node("critic", critic_of(llm))
        builder.add_edge(START, "planner").add_edge("planner", "critic")
        for graph in (builder, switch_edges(builder, [PLANNER])):
            with pytest.raises(ValueError, match="timeout") if refused else nullcontext():
                graph.compile()
