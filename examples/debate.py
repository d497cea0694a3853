"""Debate: two experts argue in parallel, one answers the other, a judger decides."""

from langchain_core.language_models import BaseChatModel
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from typing_extensions import TypedDict


class State(TypedDict):
    question: str
    arithmetic: str
    logic: str
    rebuttal: str
    answer: str


class Debater:
    """A node with a model of its own."""

    def __init__(self, llm: BaseChatModel, name: str) -> None:
        self.llm, self.name = llm, name

    def __call__(self, state: State) -> dict[str, str]:
        role = f"You are {'an' if self.name == 'arithmetic' else 'a'} {self.name} expert. Solve the question."
        return {self.name: self.llm.invoke([("system", role), ("human", state["question"])]).text}


def make(llm: BaseChatModel) -> CompiledStateGraph:
    def opened(state: State) -> str:
        return f"arithmetic: {state['arithmetic']}\n\nlogic: {state['logic']}"

    def rebuttal(state: State) -> dict[str, str]:
        role, text = "You are a logic expert. Solve the question.", f"{opened(state)}\n\n{state['question']}"
        return {"rebuttal": llm.invoke([("system", role), ("human", text)]).text}

    def judger(state: State) -> dict[str, str]:
        text = f"{opened(state)}\n\nlogic: {state['rebuttal']}"
        return {"answer": llm.invoke([("system", "You are a judger. Give the final answer."), ("human", text)]).text}

    builder = StateGraph(State)
    for name in ("arithmetic", "logic"):
        builder.add_node(f"{name}_debater", Debater(llm, name))
        builder.add_edge(START, f"{name}_debater")
    builder.add_node("rebuttal_speaker", rebuttal)
    builder.add_node(judger)
    builder.add_edge(["arithmetic_debater", "logic_debater"], "rebuttal_speaker")
    builder.add_edge("rebuttal_speaker", "judger")
    builder.add_edge("judger", END)
    return builder.compile()
