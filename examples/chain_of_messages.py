"""A chain on `MessagesState`: every agent reads the whole conversation."""

from collections.abc import Callable

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import SystemMessage
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.graph.state import CompiledStateGraph

ROLES = {
    "planner": "You are a planner. Plan the steps for the question.",
    "critic": "You are a critic. Check the plan for the question.",
    "judger": "You are a judger. Give the final answer.",
}


def make(llm: BaseChatModel) -> CompiledStateGraph:
    def agent(role: str) -> Callable[[MessagesState], dict]:
        def run(state: MessagesState) -> dict:
            return {"messages": [llm.invoke([SystemMessage(role), *state["messages"]])]}

        return run

    builder = StateGraph(MessagesState)
    for name, role in ROLES.items():
        builder.add_node(name, agent(role))
    builder.add_edge(START, "planner")
    builder.add_edge("planner", "critic")
    builder.add_edge("critic", "judger")
    builder.add_edge("judger", END)
    return builder.compile()
