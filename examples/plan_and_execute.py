"""Plan and execute: the executor sees the plan and not the question, the judger sees what was executed."""

from langchain_core.language_models import BaseChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from typing_extensions import TypedDict


class State(TypedDict):
    question: str
    plan: str
    result: str
    answer: str


def make(llm: BaseChatModel) -> CompiledStateGraph:
    def chain(role: str, text: str):
        return ChatPromptTemplate([("system", role), ("human", text)]) | llm | StrOutputParser()

    plan = chain("You are a planner. Plan the steps for the question.", "{question}")
    execute = chain("You are an executor. Carry out the plan.", "planner: {plan}")
    judge = chain("You are a judger. Give the final answer.", "executor: {result}")

    builder = StateGraph(State)
    builder.add_node("planner", lambda state: {"plan": plan.invoke(state)})
    builder.add_node("executor", lambda state: {"result": execute.invoke(state)})
    builder.add_node("judger", lambda state: {"answer": judge.invoke(state)})
    builder.add_edge(START, "planner")
    builder.add_edge("planner", "executor")
    builder.add_edge("executor", "judger")
    builder.add_edge("judger", END)
    return builder.compile()
