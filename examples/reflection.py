"""Reflection: a solver drafts, a critic reads the draft, the solver drafts again, twice."""

from langchain_core.language_models import BaseChatModel
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from typing_extensions import TypedDict

DRAFTS = 2


class State(TypedDict, total=False):
    question: str
    critique: str
    answer: str
    drafts: int


def make(llm: BaseChatModel) -> CompiledStateGraph:
    def solver(state: State) -> dict:
        critique = f"critic: {state['critique']}\n\n" if "critique" in state else ""
        role = "You are a helpful assistant. Solve the question step by step."
        answer = llm.invoke([("system", role), ("human", critique + state["question"])])
        return {"answer": answer.text, "drafts": state.get("drafts", 0) + 1}

    async def critic(state: State) -> dict:
        role = "You are a critic. Check the plan for the question."
        text = f"solver: {state['answer']}\n\n{state['question']}"
        return {"critique": (await llm.ainvoke([("system", role), ("human", text)])).text}

    def again(state: State) -> str:
        return "critic" if state["drafts"] < DRAFTS else END

    builder = StateGraph(State)
    builder.add_node(solver)
    builder.add_node(critic)
    builder.add_edge(START, "solver")
    builder.add_conditional_edges("solver", again, ["critic", END])
    builder.add_edge("critic", "solver")
    return builder.compile()
