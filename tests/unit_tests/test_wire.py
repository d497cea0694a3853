import asyncio
import inspect
import json
import tracemalloc
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from langchain_latentmas import errors
from langchain_latentmas.errors import DeadlineExceeded, LatentMASError, ServiceBusy
from langchain_latentmas.service import Chunk, LensRow
from langchain_latentmas.service.events import Event, EventReader, Reply, Tensors, problem_of
from langchain_latentmas.service.guard import _nests_deeper
from langchain_latentmas.service.identity import WireRef
from langchain_latentmas.service.messages import as_openai
from langchain_latentmas.service.wire import (
    PROBLEM,
    Done,
    LensReply,
    Message,
    Problem,
    SpeakRequest,
    SpokenChunk,
    Step,
    ThinkRequest,
)

ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
names = st.text("abcdefghij_", min_size=1, max_size=10)
digits = st.text("0123456789abcdef", min_size=32, max_size=32)
ids = digits.map("lat_{}".format)
refs = st.builds(
    WireRef,
    id=ids,
    agent=text,
    model=digits,
    parents=st.lists(ids, max_size=4),
    positions=st.integers(0, 2**40 - 1),
    steps=st.integers(0, 2**40 - 1),
    mac=st.tuples(digits, digits).map("".join),
)
scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(scalars | text, lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3))
calls = st.fixed_dictionaries({"name": names, "args": st.dictionaries(names, values, max_size=3), "id": names})
messages = st.lists(
    st.builds(SystemMessage, content=text)
    | st.builds(HumanMessage, content=text, name=st.none() | names)
    | st.builds(AIMessage, content=text, tool_calls=st.lists(calls, max_size=2))
    | st.builds(ToolMessage, content=text, tool_call_id=names),
    min_size=1,
    max_size=5,
)


def over_the_wire(body: Any) -> Any:
    return type(body).model_validate(json.loads(body.model_dump_json(exclude_none=True)))


@settings(max_examples=40)
@given(messages)
def test_messages_mean_the_same_on_the_other_side(listed: list[BaseMessage]) -> None:
    here = as_openai(listed)
    body = over_the_wire(ThinkRequest(messages=[Message(**message) for message in here]))
    assert as_openai(body.plain_messages) == here


@settings(max_examples=40)
@given(messages)
def test_the_wire_form_of_messages_is_its_own_wire_form(listed: list[BaseMessage]) -> None:
    once = as_openai(listed)
    assert as_openai(once) == once


@given(
    st.builds(
        SpeakRequest,
        messages=st.just([Message(role="user", content="x")]),
        latents=st.lists(refs, max_size=3),
        agent=text.filter(bool),
        max_tokens=st.integers(1, 2**40 - 1),
        temperature=st.floats(0, 1e9),
        top_p=st.floats(0, 1, exclude_min=True),
        top_k=st.none() | st.integers(1, 1000),
        stop=st.none() | st.lists(text.filter(bool), max_size=3),
        seed=st.none() | st.integers(0, 2**63 - 1),
        tools=st.none() | st.lists(st.dictionaries(text, values, max_size=3), max_size=2),
        prefix=text,
        deadline=st.none() | st.floats(1e-3, 1e6),
    )
)
def test_requests_come_through_unchanged(body: SpeakRequest) -> None:
    assert over_the_wire(body) == body


usages = st.fixed_dictionaries(
    {name: st.integers(0, 2**40) for name in ("input_tokens", "output_tokens", "latent_steps", "positions_read")}
    | {"merge": st.sampled_from(["none", "rotated", "rebuilt"])}
)


@given(
    st.builds(
        Chunk,
        text=text,
        token_ids=st.lists(st.integers(0, 10**6), max_size=3).map(tuple),
        ref=st.none() | refs.map(lambda ref: ref.ref),
        usage=st.none() | usages,
        finish_reason=st.none() | st.sampled_from(["stop", "length"]),
    )
)
def test_chunks_come_through_unchanged(chunk: Chunk) -> None:
    assert over_the_wire(SpokenChunk.of(chunk)).chunk == chunk


@given(
    st.lists(
        st.builds(
            LensRow, text, st.integers(1, 99), st.lists(st.tuples(text, st.floats(0, 1)), min_size=1, max_size=3)
        ),
        max_size=3,
    )
)
def test_lens_rows_come_through_unchanged(rows: list[LensRow]) -> None:
    assert LensReply.model_validate_json(LensReply.of(rows).model_dump_json()).lens_rows == rows


@given(st.lists(st.tuples(names, text), max_size=5), st.booleans(), st.integers(1, 40))
@example([("chunk", "\u2028 \x85 \x0c\r\n")], True, 1)
def test_events_are_read_as_they_were_written(events: list[tuple[str, str]], beats: bool, size: int) -> None:
    written = "".join(
        f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n" + ": working\n\n" * beats
        for name, data in events
    ).encode()
    reader = EventReader()
    read = [event for at in range(0, len(written), size) for event in reader.feed(written[at : at + size])]
    assert read == [Event(name, json.dumps(data, ensure_ascii=False)) for name, data in events]


async def sent_to_one_who_does_not_read(response: Response) -> list[str]:
    """Types of the messages that were sent; the first body is never taken."""
    types = []

    async def send(message: Any) -> None:
        types.append(message["type"])
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def receive() -> Any:
        await asyncio.Event().wait()

    await asyncio.wait_for(response({"type": "http"}, receive, send), 10)
    return types


@pytest.mark.parametrize("stream", [True, False])
async def test_the_deadline_counts_for_a_client_that_does_not_read_on(stream: bool) -> None:
    statuses: list[int] = []
    over = asyncio.Event()

    async def pieces() -> AsyncGenerator[tuple[str, BaseModel], None]:
        try:
            while stream:
                yield "step", Step(step=1)
            yield "done", Done()
        finally:
            over.set()

    options = {"stream": stream, "keep_alive": 0.05, "instance": "", "ended": statuses.append}
    sent = await sent_to_one_who_does_not_read(Reply(pieces(), deadline=0.1, **options))
    assert sent[0] == "http.response.start"
    assert over.is_set()
    assert statuses == [504]


async def test_the_deadline_counts_for_a_memory_that_nobody_takes() -> None:
    statuses: list[int] = []
    over = asyncio.Event()

    async def pieces() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"x"
        finally:
            over.set()

    assert await sent_to_one_who_does_not_read(Tensors(pieces(), deadline=0.1, ended=statuses.append)) == [
        "http.response.start",
        "http.response.body",
    ]
    assert over.is_set()
    assert statuses == [504]


@pytest.mark.parametrize(
    ("error", "status"), [(None, 200), (OSError("a secret"), 500), (errors.StoreCorrupted("torn"), 410)]
)
async def test_a_memory_that_breaks_off_is_not_counted_as_whole(error: Exception | None, status: int) -> None:
    statuses: list[int] = []
    sent: list[Any] = []

    async def pieces() -> AsyncGenerator[bytes, None]:
        yield b"x"
        if error is not None:
            raise error

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        await asyncio.Event().wait()

    await Tensors(pieces(), deadline=10, ended=statuses.append)({"type": "http"}, receive, send)
    assert statuses == [status]
    assert sent[-1].get("more_body", False) == (error is not None)  # the server closes the connection


async def test_nor_one_whose_client_hangs_up() -> None:
    statuses: list[int] = []

    async def pieces() -> AsyncGenerator[bytes, None]:
        while True:
            yield b"x"

    async def send(message: Any) -> None:
        await asyncio.sleep(0)

    async def receive() -> Any:
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    await Tensors(pieces(), deadline=10, ended=statuses.append)({"type": "http"}, receive, send)
    assert statuses == [499]


async def test_an_error_before_the_first_byte_of_a_memory_is_raised() -> None:
    async def pieces() -> AsyncGenerator[bytes, None]:
        await asyncio.Event().wait()
        yield b""

    statuses: list[int] = []
    with pytest.raises(DeadlineExceeded):
        await sent_to_one_who_does_not_read(Tensors(pieces(), deadline=0.1, ended=statuses.append))
    assert statuses == []  # whoever answers it counts it


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_errors_keep_their_kind_and_their_words(kind: type[LatentMASError]) -> None:
    problem = Problem.of(kind("what was wrong, and how to mend it"), "urn:uuid:1")
    again = Problem.model_validate_json(problem.model_dump_json()).error
    assert type(again) is kind
    assert str(again) == "what was wrong, and how to mend it"
    assert 400 <= problem.status < 600
    assert problem.title


def test_who_is_to_come_again_is_told_when() -> None:
    error = ServiceBusy("full")
    error.retry_after = 7
    again = Problem.of(error).error
    assert isinstance(again, ServiceBusy)
    assert again.retry_after == 7


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (418, b'{"type": "urn:latentmas:error:FromTheFuture", "title": "", "detail": "why"}', errors.InvalidRequest),
        (599, b'{"type": "urn:latentmas:error:FromTheFuture", "title": "", "detail": "why"}', errors.EngineFailed),
        (404, b'{"detail": "Not Found"}', errors.InvalidRequest),
        (502, b"<html>Bad Gateway</html>", errors.ServiceUnreachable),
        (503, b"Service Unavailable", errors.ServiceClosed),
        (504, b"", errors.DeadlineExceeded),
        (429, b"slow down", errors.ServiceBusy),
        (429, b'{"detail": "slow down"}', errors.ServiceBusy),
        (401, b'{"detail": "who are you"}', errors.AccessDenied),
        (413, b"<html>Too Large</html>", errors.RequestTooLarge),
        (502, b'{"detail": "nobody there"}', errors.ServiceUnreachable),
        (503, b'{"error": "starting"}', errors.ServiceClosed),
        (504, b'{"detail": "too late"}', errors.DeadlineExceeded),
        (500, b'{"error": {}}', errors.EngineFailed),
        (401, b'{"type": "urn:latentmas:error:FromTheFuture", "title": "", "detail": "why"}', errors.AccessDenied),
    ],
)
def test_other_replies_become_the_nearest_error(status: int, body: bytes, kind: type[Exception]) -> None:
    if body.startswith(b'{"type"'):
        body = body.replace(b'"title"', b'"status": %d, "title"' % status)
    content_type = PROBLEM if b"type" in body else "text/html"
    error = problem_of(status, content_type, body, "3" if status == 429 else None)
    assert type(error) is kind
    assert getattr(error, "retry_after", 3) == 3
    with suppress(ValueError, KeyError, TypeError):
        assert str(error) == json.loads(body)["detail"]


@pytest.mark.parametrize(
    "change",
    [
        {"steps": -1},
        {"steps": 1.5},
        {"steps": "1"},
        {"steps": True},
        {"steps": 2**63},
        {"agent": ""},
        {"agent": "x" * 201},
        {"agent": "\ud800"},
        {"model": "/etc/passwd"},
        {"messages": []},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}
            ]
        },
        {"messages": [{"role": "nobody", "content": ""}]},
        {"latents": [{}]},
        {"deadline": 0},
        {"deadline": float("nan")},
    ],
    ids=str,
)
def test_what_is_not_in_the_description_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ThinkRequest.model_validate({"messages": [{"role": "user", "content": "x"}], **change})


@given(values, st.integers(0, 4))
def test_the_depth_of_a_body_is_that_of_its_json(value: Any, limit: int) -> None:
    def depth(value: Any) -> int:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return 0 if parts is None else 1 + max(map(depth, parts), default=0)

    assert _nests_deeper(json.dumps(value).encode(), limit) == (depth(value) > limit)


@pytest.mark.parametrize(
    ("body", "deeper"),
    [
        (b"[" * 10**6, True),
        (b'{"a":' * 10**5, True),
        (b"[" * 9 + b"]" * 9, True),
        (b"[" * 8 + b"]" * 8, False),
        (b"[]," * 10**5, False),
        (b'"' + b"[" * 100, False),
        (b'"\\"[[[[[[[[[[', False),
        (b'["\\\\", [[[[[[[[[[', True),
        (b"]" * 100, False),
    ],
    ids=lambda value: str(value)[:20],
)
def test_depth_of_broken_json_is_known_too(body: bytes, deeper: bool) -> None:
    assert _nests_deeper(body, 8) == deeper


@pytest.mark.parametrize("piece", [b"x", b"\\n"])
def test_the_depth_of_a_long_string_takes_no_memory(piece: bytes) -> None:
    body = b"[" * 9 + b'"' + piece * (1 << 19) + b'"' + b"]" * 9
    tracemalloc.start()
    try:
        assert _nests_deeper(body, 8)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
