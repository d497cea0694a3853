import operator
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from langchain.agents import create_agent
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_latentmas_agent import LatentMiddleware
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.graph.state import CompiledStateGraph

from langchain_latentmas import ChatLatentMAS, LatentService, LatentState
from langchain_latentmas.errors import InvalidRequest

ASKED: Any = {"messages": [("human", "2+3?")]}
TEXT: Any = {"configurable": {"edges": "text"}}


def steps_read(message: BaseMessage) -> int:
    assert isinstance(message, AIMessage)
    return message.usage_metadata["output_token_details"]["latent_steps"]  # type: ignore[index, typeddict-item]


def team(llm: ChatLatentMAS, *, reads: list[str] | None = None, steps: int | None = 3) -> CompiledStateGraph:
    builder = StateGraph(LatentState)
    builder.add_node("planner", create_agent(llm, middleware=[LatentMiddleware("planner", steps=steps)]))
    builder.add_node("critic", create_agent(llm, middleware=[LatentMiddleware("critic", steps=steps)]))
    builder.add_node("judger", create_agent(llm, middleware=[LatentMiddleware("judger", reads=reads)]))
    builder.add_edge(START, "planner").add_edge("planner", "critic").add_edge("critic", "judger")
    return builder.compile(checkpointer=InMemorySaver())


def thread(name: str, edges: Any = "latent") -> Any:
    return {"configurable": {"thread_id": name, "edges": edges}}


async def test_agents_think_and_the_last_one_speaks_from_their_thoughts(llm: ChatLatentMAS) -> None:
    graph = team(llm)
    out = graph.invoke(ASKED, thread("1"))
    assert [(ref["agent"], ref["steps"]) for ref in out["latents"]] == [("planner", 3), ("critic", 3), ("judger", 0)]
    assert [message.text.startswith("[latent") for message in out["messages"]] == [False, True, True, False]
    assert out["latents"][1]["parents"] == [out["latents"][0]["id"]]
    assert steps_read(out["messages"][-1]) == 6
    again = await graph.ainvoke(ASKED, thread("2"))
    assert again["latents"] == out["latents"]
    assert graph.get_state(thread("1")).values["latents"] == out["latents"]


def test_reads_chooses_whose_memories_are_read(llm: ChatLatentMAS) -> None:
    out = team(llm, reads=["planner"]).invoke(ASKED, thread("1"))
    assert out["latents"][-1]["parents"] == [out["latents"][0]["id"]]
    with pytest.raises(InvalidRequest, match=r"'judger' reads 'nobody', who left nothing .*critic, planner"):
        team(llm, reads=["nobody"]).invoke(ASKED, thread("1"))


def test_a_text_run_leaves_no_memories_and_equals_plain_agents(llm: ChatLatentMAS) -> None:
    out = team(llm).invoke(ASKED, thread("1", "text"))
    builder = StateGraph(LatentState)
    builder.add_sequence([(name, create_agent(llm)) for name in ("planner", "critic", "judger")])
    plain = builder.add_edge(START, "planner").compile().invoke(ASKED)
    assert [message.text for message in out["messages"]] == [message.text for message in plain["messages"]]
    assert out["latents"] == []


@pytest.mark.parametrize("reads", [None, ["planner", "critic"]])
def test_a_mapping_lets_single_agents_speak(llm: ChatLatentMAS, reads: list[str] | None) -> None:
    out = team(llm, reads=reads).invoke(ASKED, thread("1", {"planner->critic": "text"}))
    assert [message.text.startswith("[latent") for message in out["messages"]] == [False, False, True, False]
    assert [ref["agent"] for ref in out["latents"]] == ["critic", "judger"]
    assert steps_read(out["messages"][-1]) == 3


def test_what_stands_in_a_memory_is_not_read_again_as_text(llm: ChatLatentMAS) -> None:
    out = team(llm, steps=None).invoke(ASKED, thread("1"))
    sizes = {message.usage_metadata["input_tokens"] for message in out["messages"][1:]}
    assert len(sizes) == 1  # each agent's prompt is the question alone
    longer = team(llm, steps=None).invoke(ASKED, thread("2", "text"))
    assert longer["messages"][-1].usage_metadata["input_tokens"] > min(sizes)


def test_an_agent_with_tools_reads_memories_and_keeps_its_calls(
    service: LatentService, scripted: Callable[..., ChatLatentMAS]
) -> None:
    turns = iter(['<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>', "It is 5."])

    def add(a: int, b: int) -> int:
        """Adds."""
        return operator.add(a, b)

    llm = scripted(lambda tools: next(turns))
    agent = create_agent(llm, tools=[add], middleware=[LatentMiddleware("solver")])
    thought = service.think("Plan.", steps=4, agent="planner")
    out = agent.invoke({**ASKED, "latents": [thought]})
    assert [message.type for message in out["messages"]] == ["human", "ai", "tool", "ai"]
    assert out["messages"][2].text == "5"
    assert out["messages"][-1].text == "It is 5."
    assert [steps_read(message) for message in out["messages"] if message.type == "ai"] == [4, 4]
    assert [ref["agent"] for ref in out["latents"]] == ["planner", "solver"]  # and not one for each call
    judger = create_agent(llm, middleware=[LatentMiddleware("judger")])
    turns = iter(["Five."])
    judged = judger.invoke(out)["latents"][-1]
    prompt = service.memory(judged).segments[-1].prompt_ids
    read = service.model.tokenizer.decode(list(prompt))  # type: ignore[attr-defined]
    assert "tool" not in read  # the calls and their answers stand in the memory of what was said after them
    assert len(prompt) < len(service.memory(out["latents"][-1]).segments[-1].prompt_ids)


def test_an_agent_goes_on_from_its_own_memory(llm: ChatLatentMAS) -> None:
    agent = create_agent(llm, middleware=[LatentMiddleware("solver")], checkpointer=InMemorySaver())
    for _ in range(3):
        out = agent.invoke({"messages": [("human", "And then?")]}, thread("1"))
    refs = out["latents"]
    assert [ref["parents"] for ref in refs] == [[], *([ref["id"]] for ref in refs[:-1])]
    assert len({m.usage_metadata["input_tokens"] for m in out["messages"] if isinstance(m, AIMessage)}) == 1


def test_an_agent_that_thinks_can_have_no_tools(llm: ChatLatentMAS) -> None:
    def add(a: int, b: int) -> int:
        """Adds."""
        return a + b

    agent = create_agent(llm, tools=[add], middleware=[LatentMiddleware("solver", steps=3)])
    with pytest.raises(InvalidRequest, match="'solver' has tools"):
        agent.invoke(ASKED)


def test_another_vendors_model_is_refused() -> None:
    agent = create_agent(FakeListChatModel(responses=["x"]), middleware=[LatentMiddleware("solver")])
    with pytest.raises(InvalidRequest, match="'solver' runs FakeListChatModel, which reads no memories"):
        agent.invoke(ASKED)


def test_parallel_agents_are_merged(llm: ChatLatentMAS) -> None:
    class State(LatentState):
        notes: Annotated[list[str], operator.add]

    builder = StateGraph(State)
    for name in ("pro", "con"):
        agent = create_agent(llm, system_prompt=f"You are {name}.", middleware=[LatentMiddleware(name, steps=2)])
        builder.add_node(name, agent)
        builder.add_edge(START, name)
    builder.add_node("judger", create_agent(llm, middleware=[LatentMiddleware("judger")]))
    builder.add_edge(["pro", "con"], "judger")
    out = builder.compile().invoke({**ASKED, "notes": []})
    judged = out["messages"][-1]
    assert steps_read(judged) == 4
    assert judged.response_metadata["merge"] == "rotated"
