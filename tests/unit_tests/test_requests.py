"""Calls of the service that come at once, are wrong, are given up, or fail."""

import asyncio
import gc
import threading
import weakref
from copy import deepcopy
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.stores import InMemoryByteStore

from langchain_latentmas import LatentRef, LatentService
from langchain_latentmas.engine.kv import AnyKV
from langchain_latentmas.engine.text import TextStream
from langchain_latentmas.errors import (
    EngineFailed,
    InvalidReference,
    InvalidRequest,
    ServiceClosed,
    StoreCorrupted,
    TamperedReference,
    UnknownReference,
)
from langchain_latentmas.service import recipes
from langchain_latentmas.service.local import LocalService
from langchain_latentmas.service.memory import Layout

from ..conftest import Fresh, load_parts
from ..support import FIELDS, Gate, at_once, kv_copy, kv_difference, kv_equal, messages, say, wait_for

PROMPT = messages("What is 12 plus 30?")


def hold(service: LocalService, monkeypatch: pytest.MonkeyPatch, passes: int = 1) -> Gate:
    """Stops the tick thread inside of its next but `passes` forward pass."""
    gate, hidden, left = Gate(), service.model.hidden, passes

    def wait(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            gate.wait()
        return hidden(*arguments)

    monkeypatch.setattr(service.model, "hidden", wait)
    return gate


SQUEEZED: list[dict[str, Any]] = [
    {"prefill_chunk": 5},
    {"max_rows": 2},
    {"live_budget": 1},
    {"kv_budget": 0},
    {"max_rows": 3, "prefill_chunk": 7, "kv_budget": 30_000},
]


@pytest.mark.parametrize("settings", SQUEEZED, ids=str)
def test_little_room_changes_no_result(fresh_service: Fresh, settings: dict[str, Any]) -> None:
    def work(service: LocalService, i: int) -> tuple[Any, Any]:
        ref = service.think(messages("What is " + "1 plus " * i + "2?"), steps=2 + i % 3)
        said = say(service, PROMPT, [ref], max_tokens=5)
        return said.token_ids, kv_copy(service.memory(said.ref))

    squeezed, roomy = fresh_service(**settings), fresh_service()
    ours = at_once([lambda i=i: work(squeezed, i) for i in range(8)])  # type: ignore[misc]
    for i, (tokens, kv) in enumerate(ours):
        expected, expected_kv = work(roomy, i)
        assert tokens == expected
        assert kv_difference(kv, expected_kv) < 1e-8


def test_the_same_words_spoken_again_in_company_leave_their_memory_as_it_was(fresh_service: Fresh) -> None:
    service = fresh_service(dtype="float32")
    first = say(service, PROMPT)
    before = kv_copy(service.memory(first.ref))
    again = at_once([lambda n=n: say(service, PROMPT if n == 0 else messages("x" * n * 9)) for n in range(6)])  # type: ignore[misc]
    assert again[0].ref == first.ref
    assert kv_equal(service.memory(first.ref), before)


def test_the_same_think_from_many_threads_is_one_memory(fresh_service: Fresh) -> None:
    service = fresh_service(dtype="float32")
    refs = at_once([lambda: service.think(PROMPT, steps=6)] * 6)
    assert refs == [refs[0]] * 6
    assert len(service.references()) == 1


async def test_requests_of_an_event_loop_share_ticks(fresh_service: Fresh) -> None:
    service = fresh_service()
    prompts = [messages("What is " + "1 plus " * i + "2?") for i in range(6)]
    alone = [fresh_service().think(prompt, steps=20) for prompt in prompts]
    refs = await asyncio.gather(*(service.athink(prompt, steps=20) for prompt in prompts))
    assert [ref["id"] for ref in refs] == [ref["id"] for ref in alone]
    assert service.info()["thoughts"] == 120
    assert service.info()["ticks"] < 120


async def test_speaking_in_an_event_loop_is_speaking(service: LatentService) -> None:
    chunks = [chunk async for chunk in service.aspeak(PROMPT, max_tokens=9)]
    said = say(service, PROMPT, max_tokens=9)
    assert len(chunks) > 2
    assert "".join(chunk.text for chunk in chunks) == said.text
    assert chunks[-1].ref == said.ref
    assert chunks[-1].usage == said.usage
    assert all(chunk.ref is None and chunk.usage is None and chunk.finish_reason is None for chunk in chunks[:-1])


def test_nothing_begins_before_the_first_next(fresh_service: Fresh) -> None:
    service = fresh_service()
    stream = service.speak(PROMPT)
    assert service.info()["ticks"] == service.info()["waiting"] == 0
    next(stream)
    assert service.info()["ticks"] > 0


def test_a_stream_that_was_given_up_stores_nothing(fresh_service: Fresh) -> None:
    service = fresh_service()
    stream = service.speak(PROMPT, max_tokens=1000)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    service.think(PROMPT, steps=2)
    assert service.info()["rows"] == 0
    assert len(service.references()) == 1  # what was thought


async def test_leaving_an_async_stream_frees_its_slot(fresh_service: Fresh) -> None:
    service = fresh_service()
    stream = service.aspeak(PROMPT, max_tokens=1000)
    async for _ in stream:
        break
    assert service.info()["rows"] == 1
    await stream.aclose()  # type: ignore[attr-defined]
    await service.athink(PROMPT, steps=2)
    assert service.info()["rows"] == 0


async def test_cancelling_a_speaking_task_frees_its_slot(fresh_service: Fresh) -> None:
    service, begun = fresh_service(), asyncio.Event()

    async def listen() -> None:
        async for _ in service.aspeak(PROMPT, max_tokens=1000):
            begun.set()

    task = asyncio.create_task(listen())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await service.athink(PROMPT, steps=2)
    assert service.info()["rows"] == 0


async def test_whoever_leaves_while_a_lost_memory_is_looked_up_held_up_nobody_and_leaves_nothing(
    fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, gate = fresh_service(), Gate()
    ref = service.think(PROMPT, steps=2)
    service._pool.kept.clear()
    place = service._pool.place

    def slow(layout: Layout) -> Any:
        gate.wait()
        return place(layout)

    monkeypatch.setattr(service._pool, "place", slow)
    task = asyncio.create_task(service.athink(messages("Never."), [ref], steps=3))
    assert await asyncio.wait_for(asyncio.to_thread(gate.entered.wait, 60), 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.open()
    assert (await service.athink(messages("Next."), [ref], steps=1))["steps"] == 1
    assert service.info()["thoughts"] == 3
    assert service.info()["rows"] == service.info()["waiting"] == 0


async def test_an_event_loop_asks_no_thread_for_a_memory_that_is_here(
    fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = fresh_service()
    monkeypatch.setattr(asyncio, "to_thread", lambda *_: pytest.fail("a thread costs as much as all else here"))
    ref = await service.athink([HumanMessage("Plan.")], steps=2)
    assert (await service.athink([HumanMessage("Next.")], [ref], steps=1))["steps"] == 1


SLOW_TO_KEEP: list[dict[str, Any]] = [
    {"kv_dtype": "int8"},
    {"kv_budget": 1, "kv_cpu_budget": "1GiB"},
    {"kv_budget": 1, "kv_disk_budget": "1GiB"},
]


@pytest.mark.parametrize("settings", SLOW_TO_KEEP, ids=str)
async def test_an_event_loop_neither_rounds_nor_copies_what_is_kept(
    fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: dict[str, Any]
) -> None:
    service, threads = fresh_service(kv_folder=tmp_path, **settings), list[int]()
    keep = service._pool.keep

    def noted(key: str, kv: AnyKV) -> AnyKV:
        threads.append(threading.get_ident())
        return keep(key, kv)

    monkeypatch.setattr(service._pool, "keep", noted)
    await service.athink(PROMPT, steps=2)
    said = await service.asay(PROMPT, max_tokens=3)
    heard = [chunk async for chunk in service.aspeak(messages("Next."), max_tokens=3)]
    assert said.ref is not None
    assert heard[-1].ref is not None
    assert len(threads) == 3
    assert threading.get_ident() not in threads


def test_cancelling_a_row_that_waits_lets_the_next_one_pass(
    fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = fresh_service(max_rows=1)
    gate = hold(service, monkeypatch)
    with_thread: list[Any] = []
    thinker = threading.Thread(target=lambda: with_thread.append(service.think(PROMPT, steps=3)))
    thinker.start()
    assert gate.entered.wait(60)

    async def give_up() -> None:
        task = asyncio.create_task(service.athink(messages("Never."), steps=3))
        await asyncio.to_thread(wait_for, lambda: service.info()["waiting"] == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())
    gate.open()
    thinker.join(60)
    assert with_thread[0]["steps"] == 3
    assert service.think(messages("Next."), steps=1)["steps"] == 1
    assert service.info()["waiting"] == 0
    assert service.info()["thoughts"] == 4


def test_a_failing_engine_fails_the_rows_at_work_and_serves_those_that_wait(
    fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = fresh_service(max_rows=2)
    entered, go, plain = threading.Event(), threading.Event(), service.model.hidden
    failing = True

    def fail(*arguments: Any) -> Any:
        nonlocal failing
        if failing and len(service._ticker.rows) == 2:
            entered.set()
            assert go.wait(60)
            failing = False
            raise RuntimeError("out of memory")
        return plain(*arguments)

    monkeypatch.setattr(service.model, "hidden", fail)
    outcomes: list[Any] = []

    def think(i: int) -> None:
        try:
            outcomes.append(service.think(messages(f"Number {i}."), steps=60)["steps"])
        except EngineFailed as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=think, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    assert entered.wait(60)
    wait_for(lambda: service.info()["waiting"] == 1)
    go.set()
    for thread in threads:
        thread.join(60)
    assert sum(outcome == 60 for outcome in outcomes) == 1
    assert sum("out of memory" in str(outcome) for outcome in outcomes) == 2
    assert service.info()["rows"] == 0


def test_a_row_that_cannot_be_finished_is_told(fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    service = fresh_service()

    def end(text: TextStream) -> str:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as full:
        full.setattr(TextStream, "end", end)
        with pytest.raises(EngineFailed, match="out of memory"):
            say(service, PROMPT)
    assert say(service, PROMPT).finish in ("stop", "length")


def test_closing_wakes_all_who_wait(fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    service = fresh_service(max_rows=1)
    gate = hold(service, monkeypatch)
    outcomes: list[Any] = []

    def think(i: int) -> None:
        try:
            outcomes.append(service.think(messages(f"Number {i}."), steps=500))
        except ServiceClosed as error:
            outcomes.append(error)

    threads = [threading.Thread(target=think, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    assert gate.entered.wait(60)
    wait_for(lambda: service.info()["waiting"] == 2)
    closing = threading.Thread(target=service.close)
    closing.start()
    gate.open()
    for thread in (*threads, closing):
        thread.join(60)
        assert not thread.is_alive()
    assert [type(outcome) for outcome in outcomes] == [ServiceClosed] * 3


def test_a_closed_service_takes_nothing_not_even_what_it_knows(fresh_service: Fresh) -> None:
    service = fresh_service()
    ref = service.think(PROMPT, steps=1)
    service.close()
    for call in (
        lambda: service.think(PROMPT, steps=1),
        lambda: service.speak(PROMPT),
        lambda: service.aspeak(PROMPT),
        lambda: service.memory(ref),
        lambda: service.lens(ref),
    ):
        with pytest.raises(ServiceClosed):
            call()


def test_a_service_is_a_context_manager_and_info_is_plain_json(fresh_service: Fresh) -> None:
    with fresh_service() as service:
        service.think(PROMPT, steps=1)
        info = service.info()
    assert all(isinstance(value, (str, int, float, bool)) for value in info.values())
    with pytest.raises(ServiceClosed):
        service.think(PROMPT)


def test_a_forgotten_service_ends_its_thread() -> None:
    service = LocalService.from_model(*load_parts("qwen3-tied", "float64"))
    service.think(PROMPT, steps=1)
    thread, gone = service._scheduler._thread, weakref.ref(service)
    assert thread is not None
    del service
    gc.collect()
    thread.join(60)
    assert gone() is None
    assert not thread.is_alive()


WRONG_THINKS: list[dict[str, Any]] = [
    {"agent": 5},
    {"agent": "a\ud800"},
    {"agent": "x" * 201},
    {"steps": True},
    {"steps": "3"},
    {"messages": 5},
    {"messages": None},
    {"messages": [("bogus", "x")]},
    {"messages": "a\ud800"},
    {"messages": [HumanMessage([{"type": "image_url", "image_url": {"url": "data:,"}}])]},
    {"latents": 5},
    {"latents": [None]},
    {"latents": [[]]},
    {"latents": b"lat_"},
]


@pytest.mark.parametrize("wrong", WRONG_THINKS, ids=[str(i) for i in range(len(WRONG_THINKS))])
def test_a_wrong_call_is_refused_before_any_work_and_leaves_nothing(
    fresh_service: Fresh, wrong: dict[str, Any]
) -> None:
    service = fresh_service()
    with pytest.raises((InvalidRequest, InvalidReference)):
        service.think(**{"messages": PROMPT, **wrong})
    assert service.info()["ticks"] == service.info()["waiting"] == 0
    assert service.references() == []


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 1.5}, {"seed": 1.5}, {"top_k": 2.5}, {"stop": [5]}, {"max_tokens": "9"}]
)
def test_a_value_of_another_type_does_not_reach_the_engine(fresh_service: Fresh, wrong: dict[str, Any]) -> None:
    service = fresh_service()
    with pytest.raises(InvalidRequest):
        service.speak(PROMPT, **{"temperature": 0.5, **wrong})
    assert service.info()["ticks"] == 0


def test_more_memories_than_one_request_reads_are_refused(
    fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = fresh_service()
    refs = [service.think(PROMPT, steps=steps) for steps in range(3)]
    monkeypatch.setattr(recipes, "MAX_PARENTS", 2)
    assert service.think(PROMPT, refs[:2], steps=1)["parents"] == [ref["id"] for ref in refs[:2]]
    with pytest.raises(InvalidRequest, match="at most 2 memories, not 3"):
        service.think(PROMPT, refs, steps=1)


def test_a_template_that_writes_nothing_is_refused(fresh_service: Fresh) -> None:
    service = fresh_service(chat_template="{{ '' }}")
    with pytest.raises(InvalidRequest, match="no tokens"):
        service.think(PROMPT)


def test_a_template_that_refuses_is_quoted(fresh_service: Fresh) -> None:
    service = fresh_service(chat_template="{{ raise_exception('no system messages here') }}")
    with pytest.raises(InvalidRequest, match="no system messages here"):
        service.think(PROMPT)


GEMMA_LIKE = (
    "{% if messages[0]['role'] == 'system' %}{% set told = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set told = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}<{{ m['role'] }}>{{ told if loop.first else '' }} {{ m['content'] }}{% endfor %}<model>"
)
QUERY = (
    "{% if messages | selectattr('role', 'equalto', 'user') | list == [] %}{{ raise_exception('No query') }}{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<model>"
)


@pytest.mark.parametrize("template", [GEMMA_LIKE, QUERY], ids=["puts it into the user's turn", "wants a query"])
def test_an_agent_without_a_question_keeps_its_role_under_any_template(fresh_service: Fresh, template: str) -> None:
    """What else it reads is a memory: a message that was a marker and nothing else is taken out."""
    service = fresh_service(chat_template=template)
    read = service.model.tokenizer.decode(list(service.encode([("system", "You are a judger.")], "")))
    assert "You are a judger." in read
    both = [("system", "You are a judger."), ("human", "How many?")]
    assert "How many?" in service.model.tokenizer.decode(list(service.encode(both, "")))


ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
)


def test_roles_alternate_where_the_template_wants_it(fresh_service: Fresh) -> None:
    """Two messages of the user are left where the text between them was a marker."""
    service = fresh_service(chat_template=ALTERNATING)
    read = service.model.tokenizer.decode(list(service.encode([("human", "How many?"), ("human", "Check it.")], "")))
    assert "How many?\n\nCheck it." in read
    again = [("human", "a"), ("ai", "b"), ("ai", "c"), ("human", "d")]
    assert "b\n\nc" in service.model.tokenizer.decode(list(service.encode(again, "")))


def test_messages_in_a_row_stay_apart_where_the_template_lets_them(fresh_service: Fresh) -> None:
    service = fresh_service()
    read = service.model.tokenizer.decode(list(service.encode([("human", "One."), ("human", "Two.")], "")))
    assert read.count("<|im_start|>user") == 2


def test_a_system_message_stands_alone_where_the_template_lets_it(fresh_service: Fresh) -> None:
    service = fresh_service()
    read = service.model.tokenizer.decode(list(service.encode([("system", "You are a judger.")], "")))
    assert "user" not in read


@pytest.mark.parametrize("top_k", [0, -1, 385])
def test_a_lens_reads_between_one_and_all_tokens(fresh_service: Fresh, top_k: int) -> None:
    service = fresh_service()
    with pytest.raises(InvalidRequest, match="between 1 and 384"):
        service.lens(service.think(PROMPT, steps=1), top_k=top_k)


def test_memory_and_prompt_beyond_the_models_positions_are_refused_to_the_position(fresh_service: Fresh) -> None:
    service = fresh_service(max_positions=100)
    ref = service.think("x", steps=30)
    room = 100 - ref["positions"]
    prompt = len(service.encode("x", ""))
    full = service.think("x", [ref], steps=room - prompt)
    assert full["positions"] == 100
    assert say(service, "x", [ref], max_tokens=room - prompt).usage["positions_read"] == ref["positions"]
    for call in (
        lambda: service.think("x", [ref], steps=room - prompt + 1),
        lambda: service.speak("x", [full], max_tokens=1),
        lambda: service.think("x", [full], steps=0),
    ):
        ticks = service.info()["ticks"]
        with pytest.raises(InvalidRequest, match="the model has 100"):
            call()
        assert service.info()["ticks"] == ticks


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_no_tampered_reference_is_accepted_nor_raises_something_else(
    service: LatentService, data: st.DataObject
) -> None:
    ref: Any = deepcopy(service.think(PROMPT, [service.think("a", steps=1)], steps=1))
    genuine = deepcopy(ref)
    field = data.draw(st.sampled_from([*FIELDS, "extra"]))
    how = data.draw(st.sampled_from(["replace", "delete", "flip", "add"]))
    if how == "delete" and field in ref:
        del ref[field]
    elif how == "flip" and isinstance(ref.get(field), str) and ref[field]:
        at = data.draw(st.integers(0, len(ref[field]) - 1))
        ref[field] = ref[field][:at] + data.draw(st.characters()) + ref[field][at + 1 :]
    elif how == "add" and isinstance(ref.get(field), (int, list)):
        ref[field] = ref[field] + (data.draw(st.integers()) if isinstance(ref[field], int) else [data.draw(JSON)])
    else:
        ref[field] = data.draw(JSON)
    if ref == genuine and all(type(ref[name]) is type(genuine[name]) for name in FIELDS):
        return
    for call in (service.memory, service.lens, service.marker, lambda bad: service.think(PROMPT, [bad])):
        with pytest.raises(InvalidReference):
            call(ref)


def test_a_key_is_not_drawn_from_torchs_random_numbers(fresh_service: Fresh) -> None:
    macs = []
    for _ in range(2):
        torch.manual_seed(0)
        macs.append(fresh_service().think(PROMPT, steps=0)["mac"])
    assert macs[0] != macs[1]


def test_services_with_one_key_take_each_others_references_and_others_do_not(fresh_service: Fresh) -> None:
    store = InMemoryByteStore()
    one, other = (fresh_service(store=store, key=b"k" * 32) for _ in range(2))
    ref = one.think(PROMPT, steps=3)
    assert kv_difference(other.memory(ref), one.memory(ref)) < 1e-8
    with pytest.raises(TamperedReference, match="another key"):
        fresh_service(store=store, key=b"x" * 32).memory(ref)


@pytest.mark.parametrize("key", [b"", b"short"])
def test_a_key_that_is_too_short_is_refused(fresh_service: Fresh, tmp_path: Path, key: bytes) -> None:
    with pytest.raises(InvalidRequest, match="16 bytes"):
        fresh_service(key=key)
    with pytest.raises(InvalidRequest, match="16 bytes"):
        fresh_service(key=key, store=tmp_path)


def test_an_emptied_key_file_is_refused(fresh_service: Fresh, tmp_path: Path) -> None:
    fresh_service(store=tmp_path).close()
    (tmp_path / "key").write_text("")
    with pytest.raises(InvalidRequest, match="no signing key"):
        fresh_service(store=tmp_path)


@pytest.mark.parametrize("read", [True, False])
def test_a_damaged_recipe_is_set_aside_and_thinking_again_mends_it(
    fresh_service: Fresh, tmp_path: Path, read: bool
) -> None:
    ref = fresh_service(store=tmp_path).think(PROMPT, steps=3)
    (path,) = (tmp_path / "recipes").glob("*.recipe")
    damaged = path.read_bytes()[:-7]
    path.write_bytes(damaged)
    service = fresh_service(store=tmp_path)
    other = service.think(messages("Something else."), steps=1)
    if read:
        with pytest.raises(StoreCorrupted, match="Run the graph again"):
            service.memory(ref)
        with pytest.raises(UnknownReference):
            service.memory(ref)
    assert service.memory(other).positions == other["positions"]
    assert service.think(PROMPT, steps=3) == ref
    assert (tmp_path / "recipes.aside" / path.name).read_bytes() == damaged
    assert fresh_service(store=tmp_path).memory(ref).positions == ref["positions"]


def test_a_store_serves_one_model_in_every_dtype(fresh_service: Fresh, tmp_path: Path) -> None:
    ref = fresh_service(dtype="float64", store=tmp_path).think(PROMPT, steps=3)
    narrow = fresh_service(dtype="float32", store=tmp_path)
    assert narrow.memory(ref).keys[0].dtype == torch.float32
    assert say(narrow, PROMPT, [ref]).usage["latent_steps"] == 3


def test_all_kinds_of_messages_are_messages(fresh_service: Fresh) -> None:
    service = fresh_service()
    ids = {
        service.think(same, steps=0)["id"]
        for same in (
            "Hello",
            [("human", "Hello")],
            [HumanMessage("Hello")],
            [{"role": "user", "content": "Hello"}],
            [HumanMessage([{"type": "text", "text": "Hello"}])],
            ChatPromptTemplate([("human", "{word}")]).invoke({"word": "Hello"}),
        )
    }
    assert len(ids) == 1


def test_answers_of_tools_are_messages(fresh_service: Fresh) -> None:
    call = {"name": "add", "args": {"a": 1}, "id": "1", "type": "tool_call"}
    said = [HumanMessage("Add."), AIMessage("", tool_calls=[call]), ToolMessage("2", tool_call_id="1")]
    assert fresh_service().think(said, steps=0)["positions"] > 0


def test_think_and_speak_tags_end_the_prompt(fresh_service: Fresh) -> None:
    service = fresh_service(think_tag="<think>", speak_tag="So:")
    decode = service.model.tokenizer.decode
    thought, said = service.think("Hi", steps=1), say(service, "Hi", max_tokens=1)
    assert decode(list(service.memory(thought).segments[0].prompt_ids)).endswith("assistant\n<think>")
    assert decode(list(service.memory(said.ref).segments[0].prompt_ids)).endswith("assistant\nSo:")


def test_steps_are_reported_in_the_callers_thread(fresh_service: Fresh) -> None:
    seen: list[tuple[int, int]] = []
    fresh_service().think(PROMPT, steps=3, on_step=lambda step: seen.append((step, threading.get_ident())))
    assert seen == [(step, threading.get_ident()) for step in (1, 2, 3)]


def test_a_callback_that_raises_ends_its_own_request_alone(fresh_service: Fresh) -> None:
    service = fresh_service()

    def refuse(step: int) -> None:
        raise KeyError(step)

    with pytest.raises(KeyError):
        service.think(PROMPT, steps=1000, on_step=refuse)
    assert service.think(messages("Other."), steps=2)["steps"] == 2
    assert service.info()["rows"] == 0


@pytest.mark.parametrize("agent", ["planner", "Plänner 🌍", "a [b] c", "x" * 200])
def test_any_name_that_can_be_written_is_a_name(fresh_service: Fresh, tmp_path: Path, agent: str) -> None:
    ref = fresh_service(store=tmp_path).think(PROMPT, steps=1, agent=agent)
    assert fresh_service(store=tmp_path).memory(ref).segments[0].agent == agent


def test_a_reference_read_from_json_is_as_good_as_the_one_that_was_written(fresh_service: Fresh) -> None:
    service = fresh_service()
    ref = service.think(PROMPT, steps=2)
    copied = LatentRef(**{**ref, "parents": list(ref["parents"])})  # type: ignore[typeddict-item]
    assert kv_equal(service.memory(copied), service.memory(ref))


def test_calls_are_numbered_whatever_their_ids(fresh_service: Fresh) -> None:
    template = (
        "{% for m in messages %}{% for call in m.tool_calls or [] %}"
        "{% if call.id|length != 9 %}{{ raise_exception('nine') }}{% endif %}{{ call.id }} {% endfor %}"
        "{% if m.tool_call_id %}answer {{ m.tool_call_id }}{% endif %}{{ m.content }}{% endfor %}"
    )
    service = fresh_service(chat_template=template)

    def asked(*ids: str) -> list[BaseMessage]:
        calls = [{"name": "add", "args": {}, "id": id} for id in ids]
        answers = [ToolMessage(f"{i} ", tool_call_id=id) for i, id in reversed([*enumerate(ids)])]
        return [HumanMessage("Add. "), AIMessage("", tool_calls=calls), *answers]

    read = [service.token_ids(asked(*ids)) for ids in (("call_1", "call_2"), (str(uuid4()), "x"))]
    assert read[0] == read[1]
    text = service.model.tokenizer.decode(read[0])
    assert [text.count(f"00000000{i}") for i in range(3)] == [2, 2, 0]
    assert text.index("answer 000000001") < text.index("answer 000000000")
