import operator
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import ToolStrategy
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, RemoveMessage
from langchain_core.tools import tool
from langchain_latentmas_agent import LatentMiddleware
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph, add_messages
from langgraph.graph.message import REMOVE_ALL_MESSAGES
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Overwrite
from pydantic import BaseModel

from langchain_latentmas import ChatLatentMAS, LatentAgentNode, LatentService, LatentState
from langchain_latentmas.errors import InvalidRequest, TamperedReference

ASKED: Any = {"messages": [HumanMessage("2+3?", id="q")]}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
TEXT: Any = {"configurable": {"edges": "text"}}


def steps_read(message: BaseMessage) -> int:
    assert isinstance(message, AIMessage)
    return message.usage_metadata["output_token_details"]["latent_steps"]  # type: ignore[index, typeddict-item]


def prompt_of(message: BaseMessage, service: LatentService) -> str:
    """What was prefilled for a message."""
    prompt = service.memory(message.response_metadata["latent_ref"]).segments[-1].prompt_ids
    return str(service.model.tokenizer.decode(list(prompt)))  # type: ignore[attr-defined]


def saying(scripted: Callable[..., ChatLatentMAS], *turns: str) -> ChatLatentMAS:
    """A model that says these, one after the other."""
    left = iter(turns)
    return scripted(lambda tools: next(left))


@tool
def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


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


def test_who_may_not_have_run_is_not_to_be_named_in_reads(llm: ChatLatentMAS) -> None:
    def ask(reads: list[str] | None) -> Any:
        builder = StateGraph(LatentState)
        for name in ("math", "law"):
            builder.add_node(name, create_agent(llm, middleware=[LatentMiddleware(name, steps=2)]))
            builder.add_edge(name, "judger")
        builder.add_node("judger", create_agent(llm, middleware=[LatentMiddleware("judger", reads=reads)]))
        builder.add_conditional_edges(START, lambda state: "math", ["math", "law"])
        return builder.compile().invoke(ASKED)

    assert [ref["agent"] for ref in ask(None)["latents"]] == ["math", "judger"]
    with pytest.raises(InvalidRequest, match=r"'judger' reads 'law', who left nothing .*leave reads out"):
        ask(["math", "law"])


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
    llm = saying(scripted, CALL, "It is 5.", "Five.")
    agent = create_agent(llm, tools=[add], middleware=[LatentMiddleware("solver")])
    thought = service.think("Plan.", steps=4, agent="planner")
    out = agent.invoke({**ASKED, "latents": [thought]})
    assert [message.type for message in out["messages"]] == ["human", "ai", "tool", "ai"]
    assert out["messages"][2].text == "5"
    assert out["messages"][-1].text == "It is 5."
    assert [steps_read(message) for message in out["messages"] if message.type == "ai"] == [4, 4]
    assert [ref["agent"] for ref in out["latents"]] == ["planner", "solver"]  # and not one for each call
    judger = create_agent(llm, middleware=[LatentMiddleware("judger")])
    # The calls and their answers stand in the memory of what was said after them.
    assert prompt_of(judger.invoke(out)["messages"][-1], service).count("<|im_start|>") == 2


def test_agents_with_tools_side_by_side_are_read_once(
    service: LatentService, scripted: Callable[..., ChatLatentMAS]
) -> None:
    llm = saying(scripted, CALL, "It is 5.", CALL, "Five.", "So 5.")
    outs = [
        create_agent(llm, tools=[add], middleware=[LatentMiddleware(name)]).invoke({**ASKED, "latents": []})
        for name in ("pro", "con")
    ]
    messages: Any = add_messages(outs[0]["messages"], outs[1]["messages"])
    state: Any = {"messages": messages, "latents": [*outs[0]["latents"], *outs[1]["latents"]]}
    assert [message.type for message in messages] == ["human", "ai", "tool", "ai", "ai", "tool", "ai"]
    judger = create_agent(llm, middleware=[LatentMiddleware("judger")])
    read = prompt_of(judger.invoke(state)["messages"][-1], service)
    assert read.count("<|im_start|>") == 2  # the question, and where the answer begins
    # Of an answer that somebody corrected, what is new is read, beside the call that it belongs to.
    edited = messages[5].model_copy(update={"content": "six"})
    state["messages"] = [*messages[:5], edited, messages[6]]
    llm = saying(scripted, "So 6.")
    judger = create_agent(llm, middleware=[LatentMiddleware("judger")])
    read = prompt_of(judger.invoke(state)["messages"][-1], service)
    assert read.count("<|im_start|>") == 4
    assert "six" in read


def test_a_node_reads_an_agent_with_tools_in_both_modes(
    service: LatentService, scripted: Callable[..., ChatLatentMAS]
) -> None:
    def read(edges: str) -> str:
        llm = saying(scripted, CALL, "It is 5.", "Five.")
        builder = StateGraph(LatentState)
        builder.add_node("solver", create_agent(llm, tools=[add], middleware=[LatentMiddleware("solver")]))
        how: Any = {"service": service, "speak": True, "temperature": 1.0}
        builder.add_node("judger", LatentAgentNode("judger", "Answer.", **how))
        builder.add_edge(START, "solver").add_edge("solver", "judger")
        out = builder.compile().invoke(ASKED, {"configurable": {"edges": edges}})
        return prompt_of(out["messages"][-1], service)

    latent = read("latent")
    assert "solver" not in latent
    assert latent.count("<|im_start|>") == 3  # system, question, and where the answer begins
    text = read("text")
    places = [text.index(part) for part in ("2+3?", "<tool_call>add", "tool\n5", "solver: It is 5.")]
    assert places == sorted(places)
    assert text.count("solver:") == 1


@pytest.mark.parametrize("how", ["structured", "direct"])
def test_an_agent_that_ends_on_a_call_leaves_a_memory(
    service: LatentService, scripted: Callable[..., ChatLatentMAS], how: str
) -> None:
    class Sum(BaseModel):
        """The sum."""

        value: int

    @tool(return_direct=True)
    def tell(value: int) -> str:
        """Tells the user."""
        return f"It is {value}."

    structured = how == "structured"
    opening = '<tool_call>{"name": "'
    calls = [CALL, opening + ("Sum" if structured else "tell") + '", "arguments": {"value": 5}}</tool_call>']
    if structured:  # its calls are forced, and begin with the name
        calls = [call.removeprefix(opening) for call in calls]
    llm = saying(scripted, *calls, "Five.")
    options: Any = {"response_format": ToolStrategy(Sum)} if structured else {}
    tools = [add] if structured else [add, tell]
    solver = create_agent(llm, tools=tools, middleware=[LatentMiddleware("solver")], **options)
    out = solver.invoke({**ASKED, "latents": []})
    assert [ref["agent"] for ref in out["latents"]] == ["solver"]
    judger = create_agent(llm, middleware=[LatentMiddleware("judger", reads=["solver"])])
    read = prompt_of(judger.invoke(out)["messages"][-1], service)
    assert read.count("<|im_start|>") == 4  # the question, the last call with its answer, and where the answer begins


def test_an_agent_that_runs_as_text_says_once_whose_thoughts_it_loses(
    service: LatentService, scripted: Callable[..., ChatLatentMAS], caplog: pytest.LogCaptureFixture
) -> None:
    llm = saying(scripted, CALL, "It is 5.", CALL, "It is 5.")

    def turns(planner: Any, thread_id: str) -> None:
        builder = StateGraph(LatentState)
        builder.add_node("planner", planner)
        builder.add_node("solver", create_agent(llm, tools=[add], middleware=[LatentMiddleware("solver")]))
        builder.add_edge(START, "planner").add_edge("planner", "solver")
        graph = builder.compile(InMemorySaver(), interrupt_before=["solver"])
        graph.invoke(ASKED, thread(thread_id))
        assert graph.invoke(None, thread(thread_id, "text"))["messages"][-1].text == "It is 5."

    turns(create_agent(llm, middleware=[LatentMiddleware("planner", steps=2)]), "marked")
    assert not caplog.messages  # its thoughts stand in the conversation, as a marker that is read
    turns(LatentAgentNode("planner", "Plan.", service=service, steps=2), "lost")
    [said] = caplog.messages
    assert said.startswith("Agent 'solver' runs as text and reads nothing")
    assert "by: planner." in said


@pytest.mark.parametrize("edges", ["latent", "text"])
def test_a_malformed_reference_in_the_state_is_said_to_be_one(llm: ChatLatentMAS, edges: str) -> None:
    judger = create_agent(llm, middleware=[LatentMiddleware("judger")])
    with pytest.raises(TamperedReference):
        judger.invoke({**ASKED, "latents": [{"id": "lat_0"}]}, {"configurable": {"edges": edges}})


def test_nodes_may_be_named_for_their_edges(llm: ChatLatentMAS) -> None:
    builder = StateGraph(LatentState)
    builder.add_node("plan", create_agent(llm, middleware=[LatentMiddleware("planner", steps=2)]))
    builder.add_node("judge", create_agent(llm, middleware=[LatentMiddleware("judger")]))
    builder.add_edge(START, "plan").add_edge("plan", "judge")
    out = builder.compile().invoke(ASKED, {"configurable": {"edges": {"plan->judge": "text"}}})
    assert [ref["agent"] for ref in out["latents"]] == ["judger"]
    assert not out["messages"][1].text.startswith("[latent")
    assert steps_read(out["messages"][-1]) == 0


def test_a_node_leaves_out_the_markers_of_those_whom_it_does_not_read(
    llm: ChatLatentMAS, service: LatentService
) -> None:
    builder = StateGraph(LatentState)
    for name in ("pro", "con"):
        builder.add_node(name, create_agent(llm, system_prompt=name, middleware=[LatentMiddleware(name, steps=2)]))
        builder.add_edge(START, name)
    judge = LatentAgentNode("judge", "Decide.", service=service, speak=True, reads=["pro"], max_tokens=2)
    builder.add_node("judge", judge)
    builder.add_edge(["pro", "con"], "judge")
    out = builder.compile().invoke(ASKED)
    by_agent = {ref["agent"]: ref for ref in out["latents"]}
    assert by_agent["judge"]["parents"] == [by_agent["pro"]["id"]]


def test_an_agent_goes_on_from_its_own_memory(llm: ChatLatentMAS) -> None:
    agent = create_agent(llm, middleware=[LatentMiddleware("solver")], checkpointer=InMemorySaver())
    for _ in range(3):
        out = agent.invoke({"messages": [("human", "And then?")]}, thread("1"))
    refs = out["latents"]
    assert [ref["parents"] for ref in refs] == [[], *([ref["id"]] for ref in refs[:-1])]
    assert len({m.usage_metadata["input_tokens"] for m in out["messages"] if isinstance(m, AIMessage)}) == 1


def test_a_thread_begins_anew_without_its_markers_too(llm: ChatLatentMAS) -> None:
    graph = team(llm)
    first = graph.invoke(ASKED, thread("1"))
    anew: Any = {"messages": [RemoveMessage(id=REMOVE_ALL_MESSAGES), *ASKED["messages"]], "latents": Overwrite([])}
    again = graph.invoke(anew, thread("1"))
    assert again["latents"] == first["latents"]
    assert [steps_read(m) for m in again["messages"][1:]] == [steps_read(m) for m in first["messages"][1:]]


def test_an_agent_in_a_subgraph_speaks_where_the_edge_of_that_is_text(llm: ChatLatentMAS) -> None:
    inner, builder = StateGraph(LatentState), StateGraph(LatentState)
    inner.add_node("planner", create_agent(llm, middleware=[LatentMiddleware("planner", steps=2)]))
    builder.add_node("team", inner.add_edge(START, "planner").compile())
    builder.add_node("judger", create_agent(llm, middleware=[LatentMiddleware("judger")]))
    graph = builder.add_edge(START, "team").add_edge("team", "judger").compile()
    out = graph.invoke(ASKED, {"configurable": {"edges": {"team->judger": "text"}}})
    assert [ref["agent"] for ref in out["latents"]] == ["judger"]
    assert not out["messages"][1].text.startswith("[latent")


def test_an_agent_that_thinks_can_have_no_tools(llm: ChatLatentMAS) -> None:
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
