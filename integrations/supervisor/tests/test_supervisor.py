from collections.abc import Callable
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import BaseMessage
from langchain_latentmas_supervisor import create_latent_supervisor
from langgraph.checkpoint.memory import InMemorySaver
from langgraph_supervisor.handoff import create_forward_message_tool

from langchain_latentmas import ChatLatentMAS
from langchain_latentmas.errors import InvalidEdge, InvalidRequest

ASKED: Any = {"messages": [("human", "2+3?")]}
TEXT: Any = {"configurable": {"edges": "text"}}


def talk(*calls: str) -> Callable[[list[str]], str]:
    """A supervisor that hands over to these, one after the other, then answers; workers say a word."""
    left = [*calls, ""]

    def answer(tools: list[str]) -> str:
        if not any(tool.startswith("transfer_to_") for tool in tools):
            return "I say so."
        call = left.pop(0)
        return f'<tool_call>{{"name": "transfer_to_{call}", "arguments": {{}}}}</tool_call>' if call else "It is 5."

    return answer


def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


def reports(messages: list[BaseMessage]) -> dict[str, bool]:
    """Whether each worker's report is a marker."""
    said = [message for message in messages if message.name in ("math", "law") and not message.tool_calls]
    return {message.name: message.text.startswith(f"[latent {message.name} 3 steps") for message in said}


@pytest.mark.parametrize("run", ["invoke", "ainvoke"])
async def test_workers_report_latently_and_the_supervisor_routes_by_text(
    scripted: Callable[..., ChatLatentMAS], run: str
) -> None:
    llm = scripted(talk("math", "law"))
    math = create_agent(llm, system_prompt="You are a mathematician.", name="math")
    law = create_agent(llm, system_prompt="You are a lawyer.", name="law")
    graph = create_latent_supervisor([math, law], model=llm, steps=3).compile(checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "1"}}
    out = graph.invoke(ASKED, config) if run == "invoke" else await graph.ainvoke(ASKED, config)
    assert reports(out["messages"]) == {"math": True, "law": True}
    assert out["messages"][-1].text == "It is 5."
    assert out["messages"][-1].usage_metadata["output_token_details"]["latent_steps"] == 6


def test_a_tool_that_shows_reports_to_the_user_is_refused_beside_latent_ones(
    scripted: Callable[..., ChatLatentMAS],
) -> None:
    llm = scripted(talk("math"))
    workers, tools = [create_agent(llm, name="math")], [create_forward_message_tool()]
    with pytest.raises(InvalidRequest, match=r"a latent one is a marker: .* latent=\[\]"):
        create_latent_supervisor(workers, model=llm, tools=tools)
    out = create_latent_supervisor(workers, model=llm, tools=tools, latent=[]).compile().invoke(ASKED)
    assert reports(out["messages"]) == {"math": False}


def test_a_text_run_reports_in_text(scripted: Callable[..., ChatLatentMAS]) -> None:
    llm = scripted(talk("math"))
    graph = create_latent_supervisor([create_agent(llm, name="math")], model=llm, steps=3).compile()
    out = graph.invoke(ASKED, TEXT)
    assert reports(out["messages"]) == {"math": False}
    assert "I say so." in [message.text for message in out["messages"]]
    assert out["messages"][-1].usage_metadata["output_token_details"]["latent_steps"] == 0


def test_workers_with_tools_go_on_in_text(scripted: Callable[..., ChatLatentMAS]) -> None:
    llm = scripted(talk("math", "law"))
    workers = [create_agent(llm, tools=[add], name="math"), create_agent(llm, name="law")]
    out = create_latent_supervisor(workers, model=llm, steps=3).compile().invoke(ASKED)
    assert reports(out["messages"]) == {"math": False, "law": True}
    with pytest.raises(InvalidEdge, match="'math' -> 'supervisor' cannot be latent: 'math' binds tools"):
        create_latent_supervisor(workers, model=llm, latent=["math"])


def test_only_the_named_workers_report_latently(scripted: Callable[..., ChatLatentMAS]) -> None:
    llm = scripted(talk("math", "law"))
    workers = [create_agent(llm, name="math"), create_agent(llm, name="law")]
    builder = create_latent_supervisor(workers, model=llm, steps=3, latent=["law"], supervisor_name="boss")
    assert reports(builder.compile().invoke(ASKED)["messages"]) == {"math": False, "law": True}
    with pytest.raises(InvalidEdge, match="no node 'tax'"):
        create_latent_supervisor(workers, model=llm, latent=["tax"])
