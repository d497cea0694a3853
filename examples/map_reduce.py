"""Map-reduce with `Send`: three workers solve the question apart, a judger reads what they collected."""

import operator
from typing import Annotated

from langchain_core.language_models import BaseChatModel
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Send
from typing_extensions import TypedDict

WORKERS = ("an arithmetic", "a logic", "a reading")


class State(TypedDict):
    question: str
    results: Annotated[list[str], operator.add]
    answer: str


class Task(TypedDict):
    question: str
    expert: str


def make(llm: BaseChatModel) -> CompiledStateGraph:
    def send(state: State) -> list[Send]:
        return [Send("worker", {"question": state["question"], "expert": expert}) for expert in WORKERS]

    def worker(task: Task) -> dict[str, list[str]]:
        role = f"You are {task['expert']} expert. Solve the question."
        return {"results": [llm.invoke([("system", role), ("human", task["question"])]).text]}

    def judger(state: State) -> dict[str, str]:
        text = "\n\n".join(state["results"])
        return {"answer": llm.invoke([("system", "You are a judger. Give the final answer."), ("human", text)]).text}

    builder = StateGraph(State)
    builder.add_node(worker)
    builder.add_node(judger)
    builder.add_conditional_edges(START, send, ["worker"])
    builder.add_edge("worker", "judger")
    builder.add_edge("judger", END)
    return builder.compile()
