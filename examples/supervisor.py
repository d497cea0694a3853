"""A supervisor team: the supervisor reads what there is and says who acts next."""

from typing import Literal

from langchain_core.language_models import BaseChatModel
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Command
from typing_extensions import TypedDict


class State(TypedDict, total=False):
    question: str
    work: str
    answer: str


def make(llm: BaseChatModel) -> CompiledStateGraph:
    def ask(role: str, text: str) -> str:
        return llm.invoke([("system", role), ("human", text)]).text

    def known(state: State) -> str:
        return f"solver: {state['work']}" if "work" in state else ""

    def supervisor(state: State) -> Command[Literal["solver", "judger"]]:
        role = "You are a supervisor. Say who acts next, solver or judger."
        text = "\n\n".join(part for part in (known(state), state["question"]) if part)
        return Command(goto="judger" if "judger" in ask(role, text) else "solver")

    def solver(state: State) -> dict[str, str]:
        return {"work": ask("You are a helpful assistant. Solve the question step by step.", state["question"])}

    def judger(state: State) -> dict[str, str]:
        return {"answer": ask("You are a judger. Give the final answer.", known(state))}

    builder = StateGraph(State)
    builder.add_node(supervisor)
    builder.add_node(solver)
    builder.add_node(judger)
    builder.add_edge(START, "supervisor")
    builder.add_edge("solver", "supervisor")
    builder.add_edge("judger", END)
    return builder.compile()
