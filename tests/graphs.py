"""A chain of three nodes on string fields, in pieces that tests replace, and a pair of nodes on messages."""

from collections.abc import Callable
from typing import Any

from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, MessagesState, StateGraph
from typing_extensions import TypedDict

from langchain_latentmas import switch_edges

PLANNER = ("planner", "critic")
CRITIC = ("critic", "judger")
TEXT: RunnableConfig = {"configurable": {"edges": "text"}}
ASKED = {"question": "2+3?"}
Node = Callable[[Any], Any]


class Chain(TypedDict, total=False):
    question: str
    plan: str
    critique: str
    answer: str
    latent_steps: int


def planner_of(llm: Any) -> Node:
    return lambda state: {"plan": llm.invoke(f"Plan: {state['question']}").content}


def critic_of(llm: Any) -> Node:
    return lambda state: {"critique": llm.invoke(f"Check {state['plan']} please").content}


def judger_of(llm: Any) -> Node:
    def judger(state: Chain) -> Chain:
        said = llm.invoke([HumanMessage(f"Plan {state['plan']} critique {state['critique']} Q {state['question']}")])
        return {"answer": said.content, "latent_steps": said.usage_metadata["output_token_details"]["latent_steps"]}

    return judger


def chain(llm: Any, planner: Any = None, critic: Any = None, judger: Any = None, **critic_options: Any) -> StateGraph:
    """planner -> critic -> judger, on string fields."""
    builder = StateGraph(Chain)
    builder.add_node("planner", planner or planner_of(llm))
    builder.add_node("critic", critic or critic_of(llm), **critic_options)
    builder.add_node("judger", judger or judger_of(llm))
    builder.add_edge(START, "planner")
    builder.add_edge("planner", "critic")
    builder.add_edge("critic", "judger")
    builder.add_edge("judger", END)
    return builder


def answerer_of(llm: Any) -> Node:
    return lambda state: {"messages": [llm.invoke(state["messages"])]}


def team(planner: Any, judger: Any) -> StateGraph:
    """planner -> judger, on messages."""
    builder = StateGraph(MessagesState)
    builder.add_node("planner", planner)
    builder.add_node("judger", judger)
    builder.add_edge(START, "planner")
    builder.add_edge("planner", "judger")
    builder.add_edge("judger", END)
    return builder


def is_latent(text: str, agent: str, steps: int = 3) -> bool:
    return text.startswith(f"[latent {agent} {steps} steps lat_")


def modes(builder: StateGraph, edges: Any = "*", **options: Any) -> dict[tuple[str, str], tuple[str, str]]:
    reports = switch_edges(builder, edges, explain=True, **options)
    return {(report.source, report.target): (report.mode, report.why) for report in reports}


def latent(builder: StateGraph, edges: Any = "*", **options: Any) -> set[tuple[str, str]]:
    return {edge for edge, (mode, _) in modes(builder, edges, **options).items() if mode == "latent"}
