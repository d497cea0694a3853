"""All of an answer at once: the same as its chunks, with one wake-up; and what an event loop does by itself."""

import asyncio
import inspect
from contextlib import suppress
from threading import get_ident
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage

from langchain_latentmas import ChatLatentMAS, LatentService
from langchain_latentmas.errors import ContextTooLong
from langchain_latentmas.service.base import Chunk
from langchain_latentmas.service.local import LocalService
from langchain_latentmas.service.mailbox import Mailbox
from langchain_latentmas.service.recipes import QUICK_TEXT

from ..conftest import Fresh
from ..support import Gate, wait_for

PROMPT = [SystemMessage("You are a judger."), HumanMessage("What is 12 plus 30?")]


def joined(chunks: list[Chunk]) -> Any:
    last = chunks[-1]
    ids = tuple(token for chunk in chunks for token in chunk.token_ids)
    return "".join(chunk.text for chunk in chunks), ids, last.ref, last.usage, last.finish_reason


@pytest.mark.parametrize("sampling", [{}, {"stop": ["e"]}, {"temperature": 1.0, "seed": 5}, {"max_tokens": 1}], ids=str)
async def test_the_whole_is_its_chunks(service: LocalService, sampling: dict[str, Any]) -> None:
    how: dict[str, Any] = {"max_tokens": 12, "agent": "judger", **sampling}
    ref = service.think("Plan.", steps=2)
    expected = joined(list(service.speak(PROMPT, [ref], **how)))
    assert joined([service.say(PROMPT, [ref], **how)]) == expected
    assert joined([await service.asay(PROMPT, [ref], **how)]) == expected
    # What every service does that does not know better.
    assert joined([LatentService.say(service, PROMPT, [ref], **how)]) == expected
    assert joined([await LatentService.asay(service, PROMPT, [ref], **how)]) == expected


async def test_the_whole_wakes_the_event_loop_once(service: LocalService, monkeypatch: pytest.MonkeyPatch) -> None:
    put, told = Mailbox.put, []
    monkeypatch.setattr(Mailbox, "put", lambda box, *event: (told.append(event), put(box, *event))[1])
    said = await service.asay(PROMPT, max_tokens=8)
    assert (len(said.token_ids), len(told)) == (8, 1)
    llm = ChatLatentMAS(service=service, max_tokens=7)
    assert (await llm.ainvoke(PROMPT)).usage_metadata["output_tokens"] == 7  # type: ignore[index]
    assert len(told) == 2
    assert len([chunk async for chunk in llm.astream(PROMPT)]) > 7
    assert len(told) == 2 + 7 + 1


async def test_a_request_wakes_the_event_loop_once(service: LocalService, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, woken = asyncio.get_running_loop(), []
    wake = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *call: (woken.append(call), wake(*call))[1])
    before = asyncio.all_tasks()
    await service.athink([HumanMessage("Nobody asked this yet.")], steps=3)
    assert len(woken) == 1
    await service.asay(PROMPT, max_tokens=3)
    assert len(woken) == 2
    assert asyncio.all_tasks() == before  # nothing is left to be closed


async def test_to_cancel_the_whole_frees_its_slot(fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    service, gate = fresh_service(), Gate()
    hidden = service.model.hidden
    monkeypatch.setattr(service.model, "hidden", lambda *a: (gate.wait(), hidden(*a))[1])
    task = asyncio.create_task(service.asay(PROMPT, max_tokens=100))
    await asyncio.to_thread(gate.entered.wait, 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.open()
    await asyncio.to_thread(wait_for, lambda: service.info()["rows"] == 0)
    assert service._store._reserved == 0


@pytest.mark.parametrize(
    ("prompt", "references", "aside"),
    [
        (PROMPT, 1, False),
        (PROMPT, 17, True),
        ([HumanMessage("a" * (QUICK_TEXT + 1))], 0, True),
        ("What is 12 plus 30?", 0, True),
        ([{"role": "user", "content": "Hello."}], 0, True),
        ([HumanMessage([{"type": "text", "text": "Hello."}])], 0, True),
    ],
)
async def test_only_a_short_prompt_is_encoded_on_the_event_loop(
    fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch, prompt: Any, references: int, aside: bool
) -> None:
    service = fresh_service()
    refs = [service.think(f"Plan {i}.", steps=0) for i in range(references)]
    to_thread, called = asyncio.to_thread, []
    monkeypatch.setattr(asyncio, "to_thread", lambda call, *given: (called.append(call), to_thread(call, *given))[1])
    with suppress(ContextTooLong):  # this model has few positions
        await service.athink(prompt, refs, steps=0)
    assert bool(called) == aside
    assert len(called) <= 1  # what is kept in this process is kept without waiting


async def test_references_may_come_in_any_form(service: LocalService) -> None:
    ref = service.think("Plan.", steps=1)
    assert (await service.athink(PROMPT, None, steps=1))["parents"] == []  # type: ignore[arg-type]
    forms: list[Any] = [[ref], (ref,), iter([ref]), ref]
    for given_as in forms:
        assert (await service.athink(PROMPT, given_as, steps=1))["parents"] == [ref["id"]]


async def test_a_service_with_a_folder_works_aside(
    fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    service, to_thread, called = fresh_service(store=tmp_path), asyncio.to_thread, []
    monkeypatch.setattr(asyncio, "to_thread", lambda call, *given: (called.append(call), to_thread(call, *given))[1])
    stored, threads = service._store._stored, []
    monkeypatch.setattr(service._store, "_stored", lambda made: (threads.append(get_ident()), stored(made))[1])
    await service.athink(PROMPT, steps=1)
    await service.asay(PROMPT, max_tokens=1)
    assert len(called) == 2  # to begin
    assert len(threads) == 2
    assert get_ident() not in threads


texts = st.lists(
    st.sampled_from(["<think>", "<|im_end|>", "<|im_start|>", " ", "a", "12", "\n", "é", "😀"]) | st.text()
)


@given(texts.map("".join))
def test_a_text_has_the_tokens_that_the_tokenizer_gives_it(service: LocalService, text: str) -> None:
    assert service._prompts.plain
    assert service.token_ids(text) == service.model.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_that_was_told_to_cut_cuts_no_prompt(fresh_service: Fresh) -> None:
    service = fresh_service()
    backend = service.model.tokenizer.backend_tokenizer
    expected = service.encode(PROMPT, "")
    backend.enable_truncation(3)
    try:
        assert service.encode(PROMPT, "") == expected
    finally:
        backend.no_truncation()


def test_a_tokenizer_with_an_encoding_of_its_own_is_asked(
    fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = fresh_service()

    class Own(type(service.model.tokenizer)):  # type: ignore[misc]
        def __call__(self, *text: Any, **how: Any) -> Any:
            return {"input_ids": [7, 8, 9]}

    own = Own.__new__(Own)
    vars(own).update(vars(service.model.tokenizer))
    monkeypatch.setattr(service.model, "tokenizer", own)
    with LocalService(service.model, service.settings) as other:
        assert other.encode(PROMPT, "") == (7, 8, 9)


def test_langchain_finds_the_signature_that_is_there() -> None:
    for call in (ChatLatentMAS._generate, ChatLatentMAS._agenerate):
        given = vars(call).pop("__signature__")
        assert inspect.signature(call) == given
        vars(call)["__signature__"] = given


def test_messages_are_those_of_before(service: LocalService) -> None:
    asked: list[BaseMessage] = list(PROMPT)
    said = ChatLatentMAS(service=service, max_tokens=3).invoke(asked, agent="judger")
    streamed = list(ChatLatentMAS(service=service, max_tokens=3).stream(asked, agent="judger"))
    whole = streamed[0]
    for chunk in streamed[1:]:
        whole += chunk  # type: ignore[assignment]
    assert (said.name, said.content) == ("judger", whole.content)
    assert said.usage_metadata == whole.usage_metadata
    assert said.response_metadata == whole.response_metadata
