"""What stands in a memory is not read again, and nothing else is left out."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    messages_from_dict,
    messages_to_dict,
)
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph

from langchain_latentmas import LatentAgentNode, LatentService, LatentState, unread
from langchain_latentmas.unread import held, key_of, mark


def said(text: str, memory: str, before: list[BaseMessage]) -> AIMessage:
    message = AIMessage(text, id=memory, response_metadata={"latent_ref": {"id": memory}})
    mark(message, before)
    return message


def conversation(*turns: str) -> list[BaseMessage]:
    """Each turn a question and an answer whose memory is called as the turn is."""
    messages: list[BaseMessage] = []
    for turn in turns:
        messages.append(HumanMessage(f"What of {turn}?", id=f"q{turn}"))
        messages.append(said(f"It is {turn}.", turn, messages))
    return messages


def test_all_before_the_last_answer_is_held_but_the_last_question() -> None:
    messages = conversation("a", "b")
    assert held(messages, {"a", "b"}) == {"qa", "a", "b"}
    assert held([*messages, HumanMessage("And c?", id="qc")], {"a", "b"}) == {"qa", "a", "qb", "b"}


def test_of_what_is_not_read_nothing_is_held() -> None:
    messages = [*conversation("a", "b"), HumanMessage("And c?", id="qc")]
    assert held(messages, set()) == set()
    assert held(messages, {"a"}) == {"qa", "a"}


CHANGES = {
    "a message was cut": lambda m: m[1:],
    "a question was edited": lambda m: [HumanMessage("What of z?", id="qa"), *m[1:]],
    "a message was put in": lambda m: [SystemMessage("Be brief.", id="s"), *m],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_of_a_conversation_that_changed_only_answers_are_held(change: Any) -> None:
    messages = [*conversation("a", "b"), HumanMessage("And c?", id="qc")]
    assert held(change(messages), {"a", "b"}) == {"a", "b"}


def test_an_answer_that_was_edited_is_not_held() -> None:
    messages = [*conversation("a", "b"), HumanMessage("And c?", id="qc")]
    corrected = messages[3].model_copy(update={"content": "It is z."})
    assert held([*messages[:3], corrected, messages[4]], {"a", "b"}) == {"a", "qa"}
    corrected = messages[1].model_copy(update={"content": "It is z."})
    assert held([messages[0], corrected, *messages[2:]], {"a", "b"}) == {"b"}


def test_of_agents_that_spoke_side_by_side_one_tells_what_was_before() -> None:
    messages = [*conversation("a"), HumanMessage("And b?", id="qb")]
    pro, con = (said(f"It is {name}.", name, messages) for name in ("pro", "con"))
    messages += [pro, con, HumanMessage("And c?", id="qc")]
    assert held(messages, {"a", "pro", "con"}) == {"qa", "a", "qb", "pro", "con"}


def test_a_checkpoint_changes_nothing() -> None:
    messages = [*conversation("a", "b"), HumanMessage("And c?", id="qc")]
    again = messages_from_dict(json.loads(json.dumps(messages_to_dict(messages))))
    assert held(again, {"a", "b"}) == held(messages, {"a", "b"})


def test_what_calls_tools_stays_beside_answers_that_nobody_has_read() -> None:
    asked: list[BaseMessage] = [HumanMessage("Add.", id="q")]
    call = said("", "call", asked)
    call.tool_calls = [{"name": "add", "args": {}, "id": "1", "type": "tool_call"}]
    answer = ToolMessage("5", tool_call_id="1", id="t")
    assert held([*asked, call, answer], {"call"}) == set()
    done = said("It is 5.", "done", [*asked, call, answer])
    assert held([*asked, call, answer, done], {"call", "done"}) == {"call", "t", "done"}


def test_what_is_said_later_in_the_same_words_is_not_held() -> None:
    asked = HumanMessage("Write.", id="q")
    fails = [AIMessage("Tests failed, try again.", id=f"f{i}") for i in (1, 2, 3)]
    messages: list[BaseMessage] = [asked]
    for i, fail in enumerate(fails, 1):
        messages += [said(f"Draft {i}.", f"w{i}", messages), fail]
    assert held(messages[:5], {"w1", "w2"}) == {"w1", "f1", "w2"}
    assert held(messages, {"w1", "w2", "w3"}) == {"w1", "f1", "w2", "f2", "w3"}
    beside = [asked, AIMessage("An aside.", id="x"), *messages[1:]]
    assert held(beside, {"w1", "w2", "w3"}) == {"w1", "f1", "w2", "f2", "w3"}
    assert held(beside, {"w3"}) == {"w1", "f1", "w2", "f2", "w3"}


def test_what_it_takes_to_see_what_is_held_grows_as_the_conversation_does(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    dumps = json.dumps
    monkeypatch.setattr(
        unread.json, "dumps", lambda value, **how: hashed.append(len(text := dumps(value, **how))) or text
    )

    def work(turns: int) -> int:
        names = [f"{turn:03d}" for turn in range(turns)]
        cut = conversation(*names)[1:]  # so that no answer tells what was before it
        hashed.clear()
        assert held(cut, set(names)) == set(names)
        return sum(hashed)

    assert work(80) < 5 * work(20)


@given(st.lists(st.sampled_from("abcde"), unique=True), st.sets(st.sampled_from("abcde")), st.booleans())
def test_only_what_is_read_is_held(turns: list[str], read: set[str], asks: bool) -> None:
    messages = [*conversation(*turns), *([HumanMessage("And?", id="q")] if asks else [])]
    last = max((i for i, message in enumerate(messages) if message.id in read), default=-1)
    keys = held(messages, read)
    assert keys <= {key_of(message) for message in messages[: last + 1]}
    assert keys >= {message.id for message in messages if message.id in read}


@pytest.mark.parametrize("reads", [None, ["planner"]])
def test_a_long_thread_grows_by_as_much_in_every_turn(service32: LatentService, reads: list[str] | None) -> None:
    builder = StateGraph(LatentState)
    builder.add_node("planner", LatentAgentNode("planner", "Plan.", service=service32, steps=1))
    judger = LatentAgentNode("judger", "Judge.", service=service32, speak=True, max_tokens=2, reads=reads)
    builder.add_node("judger", judger)
    builder.add_edge(START, "planner")
    builder.add_edge("planner", "judger")
    graph = builder.compile(InMemorySaver())
    config: Any = {"configurable": {"thread_id": "1"}}
    positions = []
    for turn in range(6):
        state = graph.invoke({"messages": [("human", f"What of {turn}?")]}, config)  # type: ignore[arg-type]
        positions.append(state["latents"][-1]["positions"])
        own = [service32.memory(ref).segments[-1].prompt_ids for ref in state["latents"][-2:]]
        texts = [service32.model.tokenizer.decode(list(ids)) for ids in own]  # type: ignore[attr-defined]
        for text in texts:
            assert f"What of {turn}?" in text
            assert f"What of {turn - 1}?" not in text
    growth = [after - before for before, after in pairwise(positions)]
    assert max(growth) - min(growth) <= 8  # an answer may end early
