import dataclasses
import operator
from typing import Annotated, Any

import pytest
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, MessagesState, StateGraph, add_messages
from langgraph.types import CachePolicy, Send
from pydantic import BaseModel
from typing_extensions import TypedDict

from langchain_latentmas import ChatLatentMAS, LatentAgentNode, LatentRef, LatentService, LatentState, merge_latents
from langchain_latentmas.errors import InvalidRequest, WrongModel
from langchain_latentmas.service import shared

from ..conftest import Fresh
from ..support import PARITY

ASKED = {"messages": [HumanMessage("What is 1 plus 2?", id="q")], "latents": []}


def text_of(service: LatentService, ref: LatentRef, at: int = -1) -> str:
    """The prompt of a segment, as the model read it."""
    return str(service.model.tokenizer.decode(list(service.memory(ref).segments[at].prompt_ids)))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "prompt",
    [
        "You are a planner.",
        ChatPromptTemplate([("system", "You are a planner."), ("placeholder", "{messages}")]),
        SystemMessage("You are a planner."),
        lambda state: [SystemMessage("You are a planner."), *state["messages"]],
    ],
    ids=["string", "template", "message", "callable"],
)
async def test_a_prompt_may_be_a_string_a_message_a_template_or_a_callable(
    service32: LatentService, prompt: Any
) -> None:
    node = LatentAgentNode("planner", prompt, service=service32, steps=2)
    thought = node.invoke(ASKED)
    read = text_of(service32, thought["latents"][0])
    assert "You are a planner." in read
    assert "What is 1 plus 2?" in read
    assert await node.ainvoke(ASKED) == thought


async def test_an_async_prompt_runs_where_there_is_a_loop(service32: LatentService) -> None:
    async def prompt(state: Any) -> list[Any]:
        return [SystemMessage("You are a planner."), *state["messages"]]

    node = LatentAgentNode("planner", prompt, service=service32, steps=2)
    same = LatentAgentNode("planner", "You are a planner.", service=service32, steps=2)
    assert await node.ainvoke(ASKED) == same.invoke(ASKED)
    with pytest.raises(InvalidRequest, match=r"'planner' is async; run the graph with ainvoke"):
        node.invoke(ASKED)


def test_a_thinker_returns_a_reference_and_a_speaker_a_message_too(service32: LatentService) -> None:
    thought = LatentAgentNode("planner", "Plan.", service=service32, steps=3).invoke(ASKED)
    spoke = LatentAgentNode("judger", "Judge.", service=service32, speak=True, max_tokens=4).invoke(
        {**ASKED, **thought}
    )
    assert list(thought) == ["latents"]
    assert thought["latents"][0]["steps"] == 3
    message = spoke["messages"][0]
    assert isinstance(message, AIMessage)
    assert message.name == "judger"
    assert message.usage_metadata is not None
    assert message.usage_metadata["output_token_details"] == {"latent_steps": 3}
    assert spoke["latents"][0]["parents"] == [thought["latents"][0]["id"]]


async def test_ainvoke_does_what_invoke_does(service32: LatentService) -> None:
    node = LatentAgentNode("judger", "Judge.", service=service32, speak=True, max_tokens=6)
    assert (await node.ainvoke(ASKED))["latents"] == node.invoke(ASKED)["latents"]


def thinkers(service: LatentService, *names: str, after: Any = ()) -> list[LatentRef]:
    state = {**ASKED, "latents": list(after)}
    return [
        ref
        for name in names
        for ref in LatentAgentNode(name, f"You are {name}.", service=service, steps=1).invoke(state)["latents"]
    ]


def test_tips_are_read_by_agent_name_and_reads_says_otherwise(service32: LatentService) -> None:
    refs = thinkers(service32, "b", "c", "a")
    by_agent = {ref["agent"]: ref["id"] for ref in refs}
    state = {**ASKED, "latents": refs}

    def parents(reads: list[str] | None) -> list[str]:
        node = LatentAgentNode("judger", "Judge.", service=service32, steps=1, reads=reads)
        return node.invoke(state)["latents"][0]["parents"]

    assert parents(None) == [by_agent["a"], by_agent["b"], by_agent["c"]]
    assert parents(["c", "a"]) == [by_agent["c"], by_agent["a"]]
    assert parents([]) == []


def test_only_tips_are_read(service32: LatentService) -> None:
    first = thinkers(service32, "first")
    second = thinkers(service32, "second", after=first)
    node = LatentAgentNode("judger", "Judge.", service=service32, steps=1)
    state = {**ASKED, "latents": merge_latents(first, second)}
    assert node.invoke(state)["latents"][0]["parents"] == [second[0]["id"]]


def test_a_text_that_stands_in_a_read_memory_is_not_read_twice(service32: LatentService) -> None:
    speaker = LatentAgentNode("speaker", "Speak.", service=service32, speak=True, max_tokens=4)
    said = speaker.invoke(ASKED)
    state = {"messages": [*ASKED["messages"], *said["messages"]], "latents": said["latents"]}
    with_memory = LatentAgentNode("next", "Next.", service=service32, steps=1).invoke(state)
    without = LatentAgentNode("next", "Next.", service=service32, steps=1, reads=[]).invoke(state)
    marker = "<|im_start|>assistant"
    assert text_of(service32, with_memory["latents"][0]).count(marker) == 1
    assert text_of(service32, without["latents"][0]).count(marker) == 2


def test_text_mode_puts_what_others_said_at_the_head_of_the_question(service32: LatentService) -> None:
    config: Any = {"configurable": {"edges": "text"}}
    said = AIMessage("A plan.", name="planner", id="p", response_metadata={"agent": "planner"})
    state = {"messages": [*ASKED["messages"], said], "latents": []}
    node = LatentAgentNode("critic", "Check.", service=service32, steps=3, max_tokens=4)
    spoke = node.invoke(state, config)
    assert list(spoke) == ["messages"]
    read = text_of(service32, spoke["messages"][0].response_metadata["latent_ref"])
    assert "planner: A plan.\n\nWhat is 1 plus 2?" in read
    assert read.count("A plan.") == 1
    reads = LatentAgentNode("critic", "Check.", service=service32, reads=["planner"], max_tokens=4)
    assert reads.invoke(state, config)["messages"][0].text == spoke["messages"][0].text


@pytest.mark.parametrize("reads", [None, ["planner"]])
@pytest.mark.parametrize("edges", ["text", {"planner->judger": "text"}])
async def test_a_text_run_is_the_same_whoever_listens(
    service32: LatentService, reads: list[str] | None, edges: Any
) -> None:
    """LangChain makes a streamed message of its chunks, and leaves their name out."""
    builder = StateGraph(LatentState)
    builder.add_node("planner", LatentAgentNode("planner", "Plan.", service=service32, steps=2, max_tokens=5))
    judger = LatentAgentNode("judger", "Judge.", service=service32, speak=True, reads=reads, max_tokens=5)
    builder.add_node("judger", judger)
    for edge in [(START, "planner"), ("planner", "judger"), ("judger", END)]:
        builder.add_edge(*edge)
    graph, config = builder.compile(), {"configurable": {"edges": edges}}

    def plain(state: Any) -> list[Any]:
        return [(m.type, m.name, m.text, m.response_metadata.get("latent_ref")) for m in state["messages"]]

    expected = plain(graph.invoke(ASKED, config))  # type: ignore[arg-type]
    modes: Any = ["messages", "values"]
    streamed = [state for mode, state in graph.stream(ASKED, config, stream_mode=modes) if mode == "values"]  # type: ignore[arg-type]
    assert plain(streamed[-1]) == expected
    later = [state async for mode, state in graph.astream(ASKED, config, stream_mode=modes) if mode == "values"]  # type: ignore[arg-type]
    assert plain(later[-1]) == expected
    assert [name for _, name, *_ in expected[1:]] == ["planner", "judger"]


@pytest.mark.parametrize(
    "asked", [{"role": "user", "content": "Hi"}, ("user", "Hi"), "Hi"], ids=["dict", "tuple", "str"]
)
@pytest.mark.parametrize(
    "prompt",
    ["Plan.", ChatPromptTemplate([("human", "{topic}")]), lambda state: state["messages"]],
    ids=["string", "template", "callable"],
)
async def test_a_state_may_hold_what_langchain_takes_for_messages(
    service32: LatentService, asked: Any, prompt: Any
) -> None:
    node = LatentAgentNode("planner", prompt, service=service32, steps=1)
    state = {"messages": [asked], "latents": [], "topic": "Hi"}
    assert await node.ainvoke(state) == node.invoke(state)


def test_messages_of_a_state_that_are_none_are_refused(service32: LatentService) -> None:
    node = LatentAgentNode("planner", ChatPromptTemplate([("human", "{topic}")]), service=service32, steps=1)
    with pytest.raises(InvalidRequest, match="`messages` in the state of agent 'planner'"):
        node.invoke({"messages": [5], "latents": [], "topic": "Hi"})


@pytest.mark.parametrize(
    "given",
    ["2+3?", [HumanMessage("2+3?")], HumanMessage("2+3?"), {"topic": "sums"}],
    ids=["a text", "messages", "a message", "other fields"],
)
async def test_an_input_of_which_a_prompt_of_words_reads_nothing_is_refused(
    service32: LatentService, given: Any
) -> None:
    node = LatentAgentNode("worker", "Work.", service=service32, steps=1)
    said = "with neither `messages` nor `latents`"
    with pytest.raises(InvalidRequest, match=said):
        node.invoke(given)
    with pytest.raises(InvalidRequest, match=said):
        await node.ainvoke(given)
    builder = StateGraph(LatentState).add_node("worker", node)
    builder.add_conditional_edges(START, lambda state: [Send("worker", given)], ["worker"])
    with pytest.raises(InvalidRequest, match=said):
        builder.compile().invoke(ASKED)
    assert node.invoke({"latents": []})["latents"]  # which is told all that it is to know


@pytest.mark.parametrize("given", ["sums", [HumanMessage("sums")]], ids=["a text", "messages"])
def test_an_input_that_fills_no_template_is_refused(service32: LatentService, given: Any) -> None:
    node = LatentAgentNode("worker", ChatPromptTemplate([("human", "{topic}")]), service=service32, steps=1)
    with pytest.raises(InvalidRequest, match="'worker' is filled from the fields of its input"):
        node.invoke(given)


async def test_a_setting_that_is_given_to_a_run_is_refused(service32: LatentService) -> None:
    node = LatentAgentNode("planner", "Plan.", service=service32, steps=1)
    with pytest.raises(InvalidRequest, match="'planner' takes no steps, seed"):
        node.bind(steps=40).invoke(ASKED, seed=1)
    with pytest.raises(InvalidRequest, match="takes no max_tokens"):
        await node.ainvoke(ASKED, max_tokens=512)


def test_thoughts_that_a_run_as_text_does_not_read_are_named(
    service32: LatentService, caplog: pytest.LogCaptureFixture
) -> None:
    builder = StateGraph(LatentState)
    builder.add_node("planner", LatentAgentNode("planner", "Plan.", service=service32, steps=1, max_tokens=2))
    builder.add_node("judger", LatentAgentNode("judger", "Judge.", service=service32, speak=True, max_tokens=2))
    builder.add_edge(START, "planner").add_edge("planner", "judger")
    graph = builder.compile(InMemorySaver(), interrupt_before=["judger"])

    def turn(thread: str, planned: str, judged: str) -> None:
        given: Any = ASKED
        for edges in (planned, judged):
            graph.invoke(given, {"configurable": {"thread_id": thread, "edges": edges}})
            given = None

    turn("1", "latent", "latent")
    turn("1", "text", "text")  # what was thought in the turn before, the judger has put into words
    assert not caplog.messages
    turn("2", "latent", "text")
    [said] = caplog.messages
    assert said.startswith("Agent 'judger' runs as text and reads nothing")
    assert "by: planner." in said


def test_thoughts_that_a_node_of_ones_own_spoke_from_are_not_said_to_be_lost(
    service32: LatentService, caplog: pytest.LogCaptureFixture
) -> None:
    llm = ChatLatentMAS(service=service32, max_tokens=2)

    def answer(state: LatentState) -> dict[str, Any]:  # leaves no reference
        return {"messages": [llm.invoke(state["messages"], latents=state["latents"])]}

    builder = StateGraph(LatentState)
    builder.add_node("planner", LatentAgentNode("planner", "Plan.", service=service32, steps=1, max_tokens=2))
    builder.add_node("answer", answer)
    graph = builder.add_edge(START, "planner").add_edge("planner", "answer").compile(InMemorySaver())
    for edges in ("latent", "text"):
        graph.invoke(ASKED, {"configurable": {"thread_id": "1", "edges": edges}})
    assert not caplog.messages


def test_agents_on_two_services_hand_over_text(service32: LatentService, fresh_service: Fresh) -> None:
    other = fresh_service("llama-untied", dtype="float32")

    def pair(reads: list[str] | None = None) -> Any:
        builder = StateGraph(LatentState)
        for name, service, read in (("a", service32, None), ("b", other, reads)):
            node = LatentAgentNode(name, f"You are {name}.", service=service, speak=True, max_tokens=4, reads=read)
            builder.add_node(name, node)
        return builder.add_edge(START, "a").add_edge("a", "b").compile()

    with pytest.raises(WrongModel, match=r"""{"edges": {"a->b": "text"}}}; or give 'b' reads=\[...\] without 'a'"""):
        pair().invoke(ASKED)
    as_text = {"configurable": {"edges": {"a->b": "text"}}}
    for state in (pair().invoke(ASKED, as_text), pair(reads=[]).invoke(ASKED)):
        _, said, answer = state["messages"]
        assert said.text in text_of(other, answer.response_metadata["latent_ref"])


QUESTION_ONLY = ChatPromptTemplate([("system", "Check."), ("human", "{question}")])


@pytest.mark.parametrize("prompt", ["Check.", QUESTION_ONLY], ids=["shows the messages", "does not"])
@pytest.mark.parametrize("reads", [None, ["planner"]])
def test_a_human_may_come_in_between_two_agents_that_run_as_text(
    service32: LatentService, prompt: Any, reads: list[str] | None
) -> None:
    class State(LatentState):
        question: str

    builder = StateGraph(State)
    for name, spoken, read in (("planner", "Plan.", None), ("critic", prompt, reads)):
        node = LatentAgentNode(name, spoken, service=service32, max_tokens=4, reads=read)
        builder.add_node(name, node)
    builder.add_edge(START, "planner")
    builder.add_edge("planner", "critic")
    graph = builder.compile(InMemorySaver(), interrupt_before=["critic"])
    config: Any = {"configurable": {"edges": "text", "thread_id": "1"}}
    planned = graph.invoke({**ASKED, "question": "Is it right?"}, config)["messages"][-1]
    graph.update_state(config, {"messages": [HumanMessage("Make it short.")]})
    checked = graph.invoke(None, config)["messages"][-1]
    assert (planned.name, checked.name) == ("planner", "critic")
    read = text_of(service32, checked.response_metadata["latent_ref"])
    assert read.count(planned.text) == 1
    assert ("Make it short." in read) == isinstance(prompt, str)
    if not isinstance(prompt, str):
        assert f"planner: {planned.text}\n\nIs it right?" in read


def test_words_before_the_question_are_not_read_twice(service32: LatentService) -> None:
    """What an agent thought about, or spoke after, it does not get as a note again in the next turn."""
    said = AIMessage("A plan.", name="planner", id="p", response_metadata={"agent": "planner"})
    again = HumanMessage("And 2 more?", id="q2")
    critic = LatentAgentNode("critic", QUESTION_ONLY, service=service32, steps=1, max_tokens=2)
    state: Any = {"messages": [*ASKED["messages"], said], "latents": [], "question": "Right?"}
    thought = critic.invoke(state)["latents"][0]
    assert text_of(service32, thought).count("A plan.") == 1
    later = critic.invoke({**state, "messages": [*state["messages"], again], "latents": [thought]})
    assert "A plan." not in text_of(service32, later["latents"][0])
    config: Any = {"configurable": {"edges": "text"}}
    checked = critic.invoke(state, config)["messages"][0].model_copy(update={"id": "c"})
    spoke = critic.invoke({**state, "messages": [*state["messages"], checked, again]}, config)["messages"][0]
    assert "A plan." not in text_of(service32, spoke.response_metadata["latent_ref"])


@pytest.mark.parametrize("reads", [None, ["planner"]])
def test_words_before_a_humans_are_read_by_an_agent_with_memories_of_its_own(
    service32: LatentService, reads: list[str] | None
) -> None:
    class State(LatentState):
        question: str

    builder = StateGraph(State)
    builder.add_node("planner", LatentAgentNode("planner", "Plan.", service=service32, steps=1, max_tokens=4))
    builder.add_node("review", lambda state: {"messages": [HumanMessage("Make it short.")]})
    judger = LatentAgentNode("judger", QUESTION_ONLY, service=service32, speak=True, max_tokens=4, reads=reads)
    builder.add_node("judger", judger)
    builder.add_edge(START, "planner").add_edge("planner", "review").add_edge("review", "judger")
    graph = builder.compile(InMemorySaver())
    config: Any = {"configurable": {"thread_id": "1"}}
    asked: Any = {"question": "Is it right?"}
    graph.invoke({"messages": [HumanMessage("What is 1 plus 2?")], **asked}, config)
    config["configurable"]["edges"] = {"planner->review": "text"}
    *_, planned, _, judged = graph.invoke({"messages": [HumanMessage("And 2 more?")], **asked}, config)["messages"]
    assert (planned.name, judged.name) == ("planner", "judger")
    read = text_of(service32, judged.response_metadata["latent_ref"])
    assert f"planner: {planned.text}\n\nIs it right?" in read


def test_pictures_beside_a_question_are_not_lost_where_others_spoke(service32: LatentService) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    asked = HumanMessage([{"type": "text", "text": "What is it?"}, picture], id="q")
    said = AIMessage("A plan.", name="planner", id="p", response_metadata={"agent": "planner"})
    node = LatentAgentNode("critic", "Check.", service=service32, max_tokens=2)
    with pytest.raises(InvalidRequest, match="holds more than text"):
        node.invoke({"messages": [asked, said], "latents": []}, {"configurable": {"edges": "text"}})


@pytest.mark.parametrize("made", [None, 5, {"messages": [HumanMessage("Hi")]}, [5], [{"role": "human"}]], ids=repr)
def test_a_prompt_that_gives_no_messages_is_refused(service32: LatentService, made: Any) -> None:
    with pytest.raises(InvalidRequest, match="The prompt of agent 'a' must give messages"):
        LatentAgentNode("a", lambda state: made, service=service32).invoke(ASKED)


def test_a_prompt_may_give_a_text_or_one_message(service32: LatentService) -> None:
    text, message = (
        LatentAgentNode("a", lambda state, made=made: made, service=service32, steps=1).invoke(ASKED)
        for made in ("Hi", HumanMessage("Hi"))
    )
    assert text == message


def test_messages_may_be_what_langchain_takes_for_them(service32: LatentService) -> None:
    node = LatentAgentNode("judger", "Judge.", service=service32, speak=True, max_tokens=4)
    plain = node.invoke({"messages": [("human", "What is 1 plus 2?")], "latents": []})
    assert plain["latents"] == node.invoke(ASKED)["latents"]


def test_a_text_ends_before_its_stop_which_may_be_one_string(service32: LatentService) -> None:
    def spoken(stop: Any) -> str:
        node = LatentAgentNode("a", "A.", service=service32, speak=True, max_tokens=24, stop=stop)
        return str(node.invoke(ASKED)["messages"][0].text)

    whole = spoken(None)
    stop = next(character for character in whole[1:] if character.isprintable())
    assert spoken("zebra") == whole
    assert spoken(stop) == spoken(["zebra", stop]) == whole[: whole.index(stop)]


async def test_how_a_node_samples_reaches_the_service(
    service32: LatentService, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"max_tokens": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 7, "stop": ["zebra"]}
    asked = list[dict[str, Any]]()
    for name in ("say", "asay"):
        call = getattr(service32, name)
        spy = lambda *given, call=call, **options: (asked.append(options), call(*given, **options))[1]  # noqa: E731
        monkeypatch.setattr(service32, name, spy)
    node = LatentAgentNode("a", "A.", service=service32, speak=True, **how)
    assert (await node.ainvoke(ASKED))["latents"] == node.invoke(ASKED)["latents"]
    assert [{name: options[name] for name in how} for options in asked] == [how, how]


@pytest.mark.parametrize("edges", ["latent", "text"])
def test_reads_that_names_nobody_is_refused(service32: LatentService, edges: str) -> None:
    node = LatentAgentNode("judger", "Judge.", service=service32, speak=True, reads=["nobody"])
    with pytest.raises(InvalidRequest, match="'nobody'"):
        node.invoke(ASKED, {"configurable": {"edges": edges}})


@pytest.mark.parametrize("edges", ["latent", "text"])
def test_of_a_node_that_has_not_run_nothing_is_read(
    service32: LatentService, edges: Any, caplog: pytest.LogCaptureFixture
) -> None:
    how: dict[str, Any] = {"service": service32, "steps": 1, "max_tokens": 2}
    config: Any = {"configurable": {"edges": edges}}
    branches = StateGraph(LatentState)
    for name in ("math", "law"):
        branches.add_node(name, LatentAgentNode(name, f"You know {name}.", **how)).add_edge(name, "judger")
    branches.add_node("judger", LatentAgentNode("judger", "Judge.", speak=True, reads=["law", "math"], **how))
    branches.add_conditional_edges(START, lambda state: "math", ["math", "law"])
    graph = branches.compile()
    state = graph.invoke(ASKED, config)
    whole = LatentAgentNode("judger", "Judge.", speak=True, reads=["math"], **how)
    before = {**state, "messages": state["messages"][:-1], "latents": state["latents"][:-1]}
    again = whole.invoke(before, config)
    assert state["messages"][-1].text == again["messages"][0].text
    assert [ref["parents"] for ref in state["latents"][-1:]] == [ref["parents"] for ref in again.get("latents", [])]

    loop = StateGraph(LatentState)
    loop.add_node("planner", LatentAgentNode("planner", "Plan.", reads=["critic"], **how))
    loop.add_node("critic", LatentAgentNode("critic", "Check.", reads=["planner"], **how))
    loop.add_edge(START, "planner").add_edge("planner", "critic")
    loop.add_conditional_edges(
        "critic", lambda state: "planner" if len(state["latents"]) + len(state["messages"]) < 5 else END
    )
    refs = loop.compile().invoke(ASKED)["latents"]
    assert [(ref["agent"], len(ref["parents"])) for ref in refs] == [
        *(("planner", 0), ("critic", 1)),
        *(("planner", 1), ("critic", 1)),
    ]

    lost = StateGraph(LatentState)
    lost.add_node("math", LatentAgentNode("math", "Add.", **how))
    lost.add_node("judger", LatentAgentNode("judger", "Judge.", speak=True, reads=["maths"], **how))
    lost.add_edge(START, "math").add_edge("math", "judger")
    with pytest.raises(InvalidRequest, match="'maths'"):
        lost.compile().invoke(ASKED, config)
    assert not caplog.messages


@pytest.mark.parametrize("edges", ["latent", "text"])
def test_a_node_that_is_named_for_its_agent_is_said_to_be_none(
    service32: LatentService, edges: Any, caplog: pytest.LogCaptureFixture
) -> None:
    builder = StateGraph(LatentState)
    builder.add_node("planner", LatentAgentNode("plan_agent", "Plan.", service=service32, steps=1, max_tokens=2))
    judger = LatentAgentNode("judger", "Judge.", service=service32, speak=True, max_tokens=2, reads=["planner"])
    builder.add_node("judger", judger).add_edge(START, "planner").add_edge("planner", "judger")
    for _ in range(2):
        builder.compile().invoke(ASKED, {"configurable": {"edges": edges}})
    [said] = caplog.messages
    assert said.startswith("Agent 'judger' reads nothing of node 'planner'")
    assert "(there: plan_agent)" in said


def test_a_state_whose_references_overwrite_each_other_is_said_to_lack_its_reducer(
    service32: LatentService, caplog: pytest.LogCaptureFixture
) -> None:
    class Overwritten(TypedDict):
        messages: Annotated[list[AnyMessage], add_messages]
        latents: list[LatentRef]

    builder = StateGraph(Overwritten)
    for name, reads in (("planner", []), ("critic", ["planner"]), ("judger", ["planner", "critic"])):
        builder.add_node(name, LatentAgentNode(name, f"You are {name}.", service=service32, steps=1, reads=reads))
    builder.add_edge(START, "planner").add_edge("planner", "critic").add_edge("critic", "judger")
    asked: Any = ASKED
    builder.compile().invoke(asked)
    [said] = caplog.messages
    assert said.startswith("Agent 'judger' reads nothing of node 'planner'")
    assert "`latents` needs merge_latents" in said


@pytest.mark.parametrize(
    ("state", "said"),
    [({"latents": []}, r"nobody yet\). Correct reads="), ({}, "Its input has no `latents`: let the Send")],
)
def test_who_reads_nobody_is_told_whether_anything_was_handed_to_it(
    service32: LatentService, state: dict[str, Any], said: str
) -> None:
    node = LatentAgentNode("judger", "Judge.", service=service32, steps=1, reads=["planner"])
    with pytest.raises(InvalidRequest, match=said):
        node.invoke({"messages": ASKED["messages"], **state})


def test_what_leaves_a_subgraph_is_text_where_its_edge_is(service32: LatentService) -> None:
    team, builder = StateGraph(LatentState), StateGraph(LatentState)
    for name in ("planner", "critic"):
        team.add_node(name, LatentAgentNode(name, f"You are {name}.", service=service32, steps=2, max_tokens=4))
    builder.add_node("team", team.add_edge(START, "planner").add_edge("planner", "critic").compile())
    builder.add_node("judger", LatentAgentNode("judger", "Judge.", service=service32, speak=True, max_tokens=4))
    graph = builder.add_edge(START, "team").add_edge("team", "judger").compile()
    said = graph.invoke(ASKED, {"configurable": {"edges": {"team->judger": "text"}}})
    assert [message.name for message in said["messages"][1:]] == ["planner", "critic", "judger"]
    assert [ref["agent"] for ref in said["latents"]] == ["judger"]
    thought = graph.invoke(ASKED, {"configurable": {"edges": {"somebody->judger": "text"}}})
    assert [ref["agent"] for ref in thought["latents"]] == ["planner", "critic", "judger"]


def test_nodes_of_one_name_in_two_graphs_share_no_cache(service32: LatentService) -> None:
    cache = InMemoryCache[Any]()

    def run(prompt: Any, steps: int = 1) -> tuple[str, bool]:
        builder = StateGraph(LatentState)
        node = LatentAgentNode("planner", prompt, service=service32, steps=steps)
        builder.add_node("planner", node, cache_policy=CachePolicy()).add_edge(START, "planner")
        (update,) = builder.compile(cache=cache).stream(ASKED, stream_mode="updates")
        return update["planner"]["latents"][0]["id"], "__metadata__" in update

    again = [run("Plan."), run("Plan.")]
    assert again == [(again[0][0], False), (again[0][0], True)]
    templates = [ChatPromptTemplate([("system", words), ("placeholder", "{messages}")]) for words in ("Do.", "Undo.")]
    others = [run("Criticize."), run("Plan.", 2), *map(run, templates)]
    assert not any(cached for _, cached in others)
    assert len({id for id, _ in [*again, *others]}) == 5


def test_a_mapping_runs_single_agents_as_text(service32: LatentService) -> None:
    def team(reads: list[str] | None = None) -> Any:
        builder = StateGraph(LatentState)
        for name in ("planner", "critic"):
            builder.add_node(name, LatentAgentNode(name, f"You are {name}.", service=service32, steps=2, max_tokens=4))
        builder.add_node(
            "judger", LatentAgentNode("judger", "Judge.", service=service32, speak=True, max_tokens=4, reads=reads)
        )
        for edge in [(START, "planner"), ("planner", "critic"), ("critic", "judger"), ("judger", END)]:
            builder.add_edge(*edge)
        return builder.compile()

    latent = team().invoke(ASKED)
    for edges in ({}, {"planner->critic": "latent"}, {"somebody->else": "text"}):
        assert team().invoke(ASKED, {"configurable": {"edges": edges}})["latents"] == latent["latents"]
    for reads in (None, ["planner", "critic"]):
        mixed = team(reads).invoke(ASKED, {"configurable": {"edges": {"planner->critic": "text"}}})
        assert [message.name for message in mixed["messages"][1:]] == ["planner", "judger"]
        assert [ref["agent"] for ref in mixed["latents"]] == ["critic", "judger"]
        planned = f"planner: {mixed['messages'][1].text}"
        assert planned in text_of(service32, mixed["latents"][0])
        assert planned in text_of(service32, mixed["latents"][1])
        usage = mixed["messages"][-1].usage_metadata
        assert usage["output_token_details"]["latent_steps"] == 2
    text = team().invoke(ASKED, {"configurable": {"edges": {"planner->critic": "text", "critic->judger": "text"}}})
    assert [ref["agent"] for ref in text["latents"]] == ["judger"]


def test_unknown_edges_are_refused(service32: LatentService) -> None:
    with pytest.raises(InvalidRequest, match=r"configurable\.edges"):
        LatentAgentNode("a", "A.", service=service32).invoke(ASKED, {"configurable": {"edges": "other"}})


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": -1},
        {"steps": "3"},
        {"steps": True},
        {"max_tokens": 0},
        {"max_tokens": 2.5},
        {"service": "bundled"},
        {"name": ""},
        {"name": None},
        {"prompt": None},
        {"prompt": ["You plan."]},
        {"reads": "planner"},
        {"reads": 5},
        {"stop": 5},
    ],
    ids=str,
)
def test_a_bad_agent_is_refused_when_it_is_made(bad: dict[str, Any]) -> None:
    (what,) = bad
    with pytest.raises(InvalidRequest, match=what):
        LatentAgentNode(**{"name": "a", "prompt": "A.", **bad})


def test_a_prompt_without_messages_is_refused(service32: LatentService) -> None:
    with pytest.raises(InvalidRequest, match="'a'"):
        LatentAgentNode("a", lambda state: [], service=service32).invoke(ASKED)


def test_in_a_later_turn_a_named_agent_is_read_as_it_thought_in_that_turn(service32: LatentService) -> None:
    class State(LatentState):
        topics: list[str]

    builder = StateGraph(State)
    worker = LatentAgentNode("worker", lambda task: [HumanMessage(task["topic"])], service=service32, steps=1)
    how: dict[str, Any] = {"service": service32, "speak": True, "max_tokens": 2}
    builder.add_node("worker", worker)
    builder.add_node("judger", LatentAgentNode("judger", "Judge.", reads=["worker"], **how))
    builder.add_node("again", LatentAgentNode("judger", "Judge again.", reads=["worker"], **how))
    builder.add_conditional_edges(
        START, lambda state: [Send("worker", {"topic": topic, "latents": []}) for topic in state["topics"]], ["worker"]
    )
    for edge in (("worker", "judger"), ("judger", "again"), ("again", END)):
        builder.add_edge(*edge)
    graph, thread = builder.compile(InMemorySaver()), {"configurable": {"thread_id": "1"}}
    for topics in (["history", "geography"], ["history", "biology"], ["history", "geography"]):
        refs = graph.invoke({"messages": ASKED["messages"], "topics": topics}, thread)["latents"]
        thought, (first, second) = [ref["id"] for ref in refs[-4:-2]], refs[-2:]
        assert all(topic in text_of(service32, ref) for topic, ref in zip(topics, refs[-4:-2], strict=True))
        assert first["parents"] == second["parents"] == thought  # also where nothing new has been thought since
    assert len(refs) == 9  # what was thought again is there once


def test_same_named_agents_of_a_send_are_all_read(service32: LatentService) -> None:
    class State(LatentState):
        topics: list[str]

    builder = StateGraph(State)
    worker = LatentAgentNode("worker", lambda task: [HumanMessage(task["topic"])], service=service32, steps=1)
    builder.add_node("worker", worker)
    builder.add_node("judger", LatentAgentNode("judger", "Judge.", service=service32, speak=True, max_tokens=2))
    builder.add_conditional_edges(
        START, lambda state: [Send("worker", {"topic": topic}) for topic in state["topics"]], ["worker"]
    )
    builder.add_edge("worker", "judger")
    builder.add_edge("judger", END)
    state = builder.compile().invoke({**ASKED, "topics": ["one", "two", "three"]})
    assert state["latents"][-1]["parents"] == [ref["id"] for ref in state["latents"][:3]]
    assert len({ref["id"] for ref in state["latents"]}) == 4


def only(node: Any, state: type = MessagesState) -> Any:
    builder = StateGraph(state)
    builder.add_node("planner", node)
    builder.add_edge(START, "planner")
    return builder.compile()


async def test_a_graph_whose_state_has_no_latents_is_refused(service32: LatentService) -> None:
    node = LatentAgentNode("planner", "Plan.", service=service32, steps=1)
    asked: Any = {"messages": ASKED["messages"]}
    for graph in (only(node), only(only(node), LatentState)):
        with pytest.raises(InvalidRequest, match="Derive the state from LatentState"):
            graph.invoke(asked)
        with pytest.raises(InvalidRequest, match="LatentState"):
            await graph.ainvoke(asked)
    assert node.invoke(asked)["latents"]
    assert only(only(node, LatentState), LatentState).invoke(asked)["latents"]


def test_a_graph_whose_state_has_no_messages_is_refused_where_something_is_said(service32: LatentService) -> None:
    class Asked(TypedDict):
        question: str
        latents: Annotated[list[LatentRef], merge_latents]

    prompt = ChatPromptTemplate([("system", "Judge."), ("human", "{question}")])
    thinker = LatentAgentNode("planner", prompt, service=service32, steps=1)
    speaker = LatentAgentNode("planner", prompt, service=service32, speak=True, max_tokens=2)
    asked: Any = {"question": "2+3?", "latents": []}
    assert only(thinker, Asked).invoke(asked)["latents"]
    for node, edges in ((speaker, "latent"), (thinker, "text")):
        with pytest.raises(InvalidRequest, match=r"no `messages`: what it says would be lost.*add_messages"):
            only(node, Asked).invoke(asked, {"configurable": {"edges": edges}})


def test_what_a_human_corrects_is_read_as_it_stands_now(service32: LatentService) -> None:
    builder = StateGraph(LatentState)
    writer = LatentAgentNode("writer", "Write.", service=service32, speak=True, max_tokens=4)
    builder.add_node("writer", writer)
    builder.add_node("reviewer", LatentAgentNode("reviewer", "Review.", service=service32, steps=1))
    builder.add_edge(START, "writer").add_edge("writer", "reviewer")
    graph = builder.compile(InMemorySaver(), interrupt_before=["reviewer"])
    config: Any = {"configurable": {"thread_id": "1"}}
    draft = graph.invoke(ASKED, config)["messages"][-1]
    graph.update_state(config, {"messages": [draft.model_copy(update={"content": "A corrected draft."})]})
    state = graph.invoke(None, config)
    assert "A corrected draft." in text_of(service32, state["latents"][-1])


def test_who_calls_an_agent_by_themselves_keep_its_memory_by_themselves(service32: LatentService) -> None:
    node = LatentAgentNode("planner", "Plan.", service=service32, steps=1)
    kept = []

    def call(state: Any) -> Any:
        kept.extend(node.invoke({**state, "latents": []})["latents"])
        return {}

    only(call).invoke({"messages": ASKED["messages"]})
    assert [ref["agent"] for ref in kept] == ["planner"]
    thinking = task(lambda messages: node.invoke({"messages": messages}), name="thinking")
    flow = entrypoint()(lambda messages: thinking(messages).result())
    assert flow.invoke(ASKED["messages"])["latents"] == kept


class PydanticState(BaseModel):
    messages: list[Any]
    latents: Annotated[list[dict[str, Any]], operator.add] = []


@dataclasses.dataclass
class DataclassState:
    messages: list[Any]
    latents: Annotated[list[dict[str, Any]], operator.add] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True)
class SlotsState:
    messages: list[Any]
    latents: Annotated[list[dict[str, Any]], operator.add] = dataclasses.field(default_factory=list)


@pytest.mark.parametrize("prompt", ["Plan.", ChatPromptTemplate([("placeholder", "{messages}")])], ids=["words", "it"])
@pytest.mark.parametrize("schema", [PydanticState, DataclassState, SlotsState])
def test_a_state_may_be_an_object(service32: LatentService, schema: Any, prompt: Any) -> None:
    builder = StateGraph(schema)
    builder.add_node("planner", LatentAgentNode("planner", prompt, service=service32, steps=1))
    builder.add_edge(START, "planner")
    state = builder.compile().invoke({"messages": [HumanMessage("Hello")]})
    assert state["latents"][0]["agent"] == "planner"


@pytest.mark.parametrize("alone", [True, False], ids=["a node", "in a chain that is one"])
async def test_the_service_may_come_from_the_runtime_context(
    service32: LatentService, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    monkeypatch.setattr("langchain_latentmas.node.shared_service", lambda: pytest.fail("it is in the context"))

    class Context(TypedDict):
        service: LatentService

    builder = StateGraph(LatentState, context_schema=Context)
    node: Any = LatentAgentNode("planner", "Plan.", steps=1)
    builder.add_node("planner", node if alone else RunnableLambda(lambda state: state) | node)
    builder.add_edge(START, "planner")
    state = builder.compile().invoke(ASKED, context={"service": service32})
    assert state["latents"][0]["model"] == service32.info()["fingerprint"]
    assert await builder.compile().ainvoke(ASKED, context={"service": service32}) == state


def test_the_service_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTMAS_SERVICE", str(PARITY / "llama-untied" / "model"))
    monkeypatch.setenv("LATENTMAS_DEVICE", "cpu")
    monkeypatch.setattr(shared, "_services", {})
    ref = LatentAgentNode("planner", "Plan.", steps=1).invoke(ASKED)["latents"][0]
    assert ref["model"] == shared.shared_service().info()["fingerprint"]
    shared.shared_service().close()


@pytest.mark.parametrize("reads", [None, ["planner"]])
def test_a_thinker_reads_the_memory_behind_a_marker_and_not_its_words(
    service32: LatentService, reads: list[str] | None
) -> None:
    marker = ChatLatentMAS(service=service32).invoke(ASKED["messages"], agent="planner", steps=2)
    node = LatentAgentNode("critic", "Check.", service=service32, steps=1, reads=reads)
    (ref,) = node.invoke({"messages": [*ASKED["messages"], marker], "latents": []})["latents"]
    assert len(ref["parents"]) == 1
    assert text_of(service32, ref, at=0) in text_of(service32, service32.take_markers(marker.text)[1][0], at=0)
    assert "What is 1 plus 2?" in text_of(service32, ref)
    assert "latent" not in text_of(service32, ref)
