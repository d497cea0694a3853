"""A chain with string state fields and f-string prompts."""

from langchain_core.language_models import BaseChatModel
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from typing_extensions import TypedDict


class State(TypedDict):
    question: str
    plan: str
    critique: str
    answer: str


def make(llm: BaseChatModel) -> CompiledStateGraph:
    def ask(role: str, text: str) -> str:
        return llm.invoke([("system", role), ("human", text)]).text

    def planner(state: State) -> dict[str, str]:
        return {"plan": ask("You are a planner. Plan the steps for the question.", state["question"])}

    def critic(state: State) -> dict[str, str]:
        text = f"planner: {state['plan']}\n\n{state['question']}"
        return {"critique": ask("You are a critic. Check the plan for the question.", text)}

    def judger(state: State) -> dict[str, str]:
        text = f"planner: {state['plan']}\n\ncritic: {state['critique']}"
        return {"answer": ask("You are a judger. Give the final answer.", text)}

    builder = StateGraph(State)
    builder.add_node(planner)
    builder.add_node(critic)
    builder.add_node(judger)
    builder.add_edge(START, "planner")
    builder.add_edge("planner", "critic")
    builder.add_edge("critic", "judger")
    builder.add_edge("judger", END)
    return builder.compile()
