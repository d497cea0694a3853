import asyncio
import errno
import gc
import json
import resource
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from langchain_latentmas import LatentService
from langchain_latentmas.errors import (
    AccessDenied,
    ContextTooLong,
    DeadlineExceeded,
    DroppedReference,
    EngineFailed,
    InvalidRequest,
    RequestTooLarge,
    ServiceBusy,
    ServiceClosed,
    ServiceUnreachable,
    StoreFull,
    TamperedReference,
    UnknownReference,
    WrongModel,
)
from langchain_latentmas.service import Chunk, connections, patience
from langchain_latentmas.service.events import Event
from langchain_latentmas.service.http import _Said, _Told
from langchain_latentmas.service.identity import MAX_PARENTS
from langchain_latentmas.service.local import LocalService
from langchain_latentmas.service.logs import JSONLines
from langchain_latentmas.service.server import KV_EXPORTS, Server
from langchain_latentmas.service.serving import connections_that_fit
from langchain_latentmas.service.wire import MAX_PAIRS, PROBLEM, TENSORS
from langchain_latentmas.state import LatentRef
from tests.served import TOKEN, certificate, client, serving
from tests.support import FIELDS, Gate, kv_difference, messages, say, wait_for

PROMPT = messages("What is 12 plus 30?")
BODY = {"messages": [{"role": "user", "content": "hi"}]}


def upload(host: str, headers: str = "") -> bytes:
    """The first byte of a memory of fifty."""
    head = f"POST /v1/memory/import HTTP/1.1\r\nHost: {host}\r\nContent-Type: {TENSORS}\r\n{headers}"
    return f"{head}Content-Length: 50\r\n\r\nx".encode()


@contextmanager
def asking(server: Server, path: str, body: dict[str, Any], method: str = "POST") -> Iterator[None]:
    """A request whose client reads nothing, and hangs up at the end."""
    host, port = server.address.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), 5) as raw:
        raw.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        yield


def call_of(arguments: str) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[LocalService], Gate]]:
    gates: list[Gate] = []

    def close(service: LocalService) -> Gate:
        """Holds every tick of a service until the gate is opened."""
        gates.append(Gate())
        step = service._ticker.step
        monkeypatch.setattr(service._ticker, "step", lambda: (gates[-1].wait(), step()))
        return gates[-1]

    yield close
    for each in gates:
        each.open()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Callable[[LocalService], None]:
    """Makes every tick of a service take so long that hundreds of them outlast a busy machine's pauses."""

    def slow(service: LocalService) -> None:
        step = service._ticker.step
        monkeypatch.setattr(service._ticker, "step", lambda: (time.sleep(0.03), step()))

    return slow


# The same interface.


def test_results_are_those_of_the_service_itself(fresh_service: Any) -> None:
    # Each on a service of its own: what others had asked might be copied for one of the two, and not for the other.
    service = fresh_service()
    with serving(fresh_service()) as server, client(server) as remote:
        here, there = (each.think(PROMPT, steps=5, agent="planner") for each in (service, remote))
        assert {**here, "mac": ""} == {**there, "mac": ""}
        assert set(there) == set(FIELDS)
        again = say(remote, "And then?", [there], temperature=1.0, seed=7)
        expected = say(service, "And then?", [here], temperature=1.0, seed=7)
        assert again.token_ids == expected.token_ids
        assert again.text == expected.text
        assert again.usage == expected.usage
        assert again.finish == expected.finish
        assert again.ref["id"] == expected.ref["id"]
        assert remote.lens(there, 3) == service.lens(here, 3)
        memory = remote.memory(again.ref)
        assert kv_difference(memory, service.memory(expected.ref)) == 0
        assert [each.agent for each in memory.segments] == ["planner", "agent"]
        assert memory.segments[0].thoughts.shape == (5, memory.segments[0].thoughts.shape[1])
        assert remote.name == service.name
        assert remote.chat_template == service.chat_template


async def test_the_asynchronous_half_gives_the_same(remote: LatentService) -> None:
    ref = await remote.athink(PROMPT, steps=3)
    assert ref == remote.think(PROMPT, steps=3)
    chunks = [chunk async for chunk in remote.aspeak("And?", [ref], max_tokens=4)]
    assert chunks == list(remote.speak("And?", [ref], max_tokens=4))
    assert isinstance(chunks[0], Chunk)


async def test_the_whole_is_one_event(remote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = remote.think(PROMPT, steps=3)
    chunks = list(remote.speak("And?", [ref], max_tokens=6))
    ids = tuple(token for chunk in chunks for token in chunk.token_ids)
    taken, take = [], _Said.take
    monkeypatch.setattr(_Said, "take", lambda said, event: (taken.append(event), take(said, event))[1])
    for said in (remote.say("And?", [ref], max_tokens=6), await remote.asay("And?", [ref], max_tokens=6)):
        assert (said.text, said.token_ids) == ("".join(chunk.text for chunk in chunks), ids)
        assert (said.ref, said.usage, said.finish_reason) == (
            chunks[-1].ref,
            chunks[-1].usage,
            chunks[-1].finish_reason,
        )
        assert remote.marker(said.ref) == remote.marker(chunks[-1].ref)
    assert [event.name for event in taken] == ["chunk", "chunk"]
    assert len(ids) == 6


def test_a_whole_that_broke_off_is_asked_for_again(fresh_service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(fresh_service()) as server, client(server) as remote:
        whole, speak, asked = remote.say(PROMPT, max_tokens=3), server._speak, []

        async def breaks_once(request: Any, body: Any) -> Any:
            asked.append(body.progress)
            if len(asked) == 1:
                return  # the stream ends without a chunk
            async for piece in speak(request, body):
                yield piece

        monkeypatch.setattr(server, "_speak", breaks_once)
        assert remote.say(PROMPT, max_tokens=3) == whole
        assert asked == [False, False]


def test_a_part_is_not_taken_for_the_whole(remote: Any) -> None:
    with pytest.raises(EngineFailed, match="a part"):
        _Said(remote).take(Event("chunk", '{"text": "half"}'))


def test_steps_are_reported_in_the_callers_thread(remote: LatentService) -> None:
    seen: list[Any] = []
    remote.think(messages("a question of its own"), steps=4, on_step=lambda n: seen.append((n, threading.get_ident())))
    assert seen == [(n, threading.get_ident()) for n in (1, 2, 3, 4)]


def test_markers_go_through_and_are_known_again(remote: LatentService, server: Server) -> None:
    ref = remote.think(PROMPT, steps=2)
    text = f"a {remote.marker(ref)} b"
    assert remote.take_markers(text, "-") == ("a - b", [ref])
    with client(server) as other:  # never saw it
        assert other.take_markers(text, "-") == ("a - b", [ref])
        assert other.marker(ref) == remote.marker(ref)
        assert other.take_markers("none here") == ("none here", [])


def test_forged_markers_make_no_text_of_any_size(server: Server) -> None:
    forged = f"[latent a 1 steps lat_{'0' * 32}.{'0' * 8}.{'0' * 32}]"
    for text, left, what in ((forged * 5000, "", "1024 markers"), (forged, "x" * 500_000, "1000 characters")):
        reply = httpx.post(f"{server.address}/v1/markers/take", json={"text": text, "left": left})
        assert reply.status_code == 422
        assert what in reply.json()["detail"]


def test_a_lens_reads_out_no_more_than_is_stated(server: Server, remote: LatentService) -> None:
    ref = remote.think(PROMPT, steps=200)
    with pytest.raises(RequestTooLarge, match=f"{MAX_PAIRS} at most; take a smaller top_k"):
        remote.lens(ref, 384)
    assert len(remote.lens(ref, MAX_PAIRS // 200)) == 200
    assert httpx.post(f"{server.address}/v1/lens", json={"ref": ref, "top_k": MAX_PAIRS + 1}).status_code == 422


def test_references_are_listed_pinned_and_dropped(fresh_service: Any) -> None:
    with serving(fresh_service()) as server, client(server) as remote:
        kept, dropped = (remote.think(PROMPT, steps=steps) for steps in (1, 2))
        assert {each.ref["id"] for each in remote.references()} == {kept["id"], dropped["id"]}
        remote.pin(kept)
        remote.drop(dropped)
        (left,) = remote.references()
        assert left.ref["id"] == kept["id"]
        assert left.pinned
        assert left.made.tzinfo is not None
        with pytest.raises((DroppedReference, UnknownReference)):
            remote.memory(dropped)
        with pytest.raises(InvalidRequest):
            remote.drop(kept)


def test_a_list_of_references_comes_in_pages_that_nothing_moves(
    fresh_service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langchain_latentmas.service.server.PAGE", 3)
    with serving(fresh_service()) as server, client(server) as remote:
        made = [remote.think(messages(f"question {n}"), steps=1)["id"] for n in range(8)]
        assert [each.ref["id"] for each in remote.references()] == made[::-1]
        first = httpx.get(f"{server.address}/v1/references").json()
        assert [each["ref"]["id"] for each in first["references"]] == made[:4:-1]
        remote.think(messages("a later one"), steps=1)
        remote.drop(remote.references()[1].ref)  # one of the first page
        second = httpx.get(f"{server.address}/v1/references", params={"after": first["next"]}).json()
        assert [each["ref"]["id"] for each in second["references"]] == made[4:1:-1]
        last = httpx.get(f"{server.address}/v1/references", params={"after": second["next"]}).json()
        assert [each["ref"]["id"] for each in last["references"]] == made[1::-1]
        assert "next" not in last or last["next"] is None


def test_a_memory_moves_to_another_server(remote: LatentService, fresh_service: Any, tmp_path: Path) -> None:
    first = remote.think(PROMPT, steps=3, agent="planner")
    last = say(remote, "And?", [first], max_tokens=3).ref
    file = tmp_path / "memory.safetensors"
    file.write_bytes(b"".join(remote.export_memory(last)))
    with serving(fresh_service()) as server, client(server) as other:
        with pytest.raises(TamperedReference):
            other.memory(last)
        moved = other.import_memory(file)
        assert moved["id"] == last["id"]
        assert moved["mac"] != last["mac"]
        assert kv_difference(other.memory(moved), remote.memory(last)) < 1e-8
        assert say(other, "So?", [moved]).token_ids == say(remote, "So?", [last]).token_ids


# Errors.


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda s, ref: s.think(PROMPT, steps=-1), InvalidRequest),
        (lambda s, ref: s.think(PROMPT, steps=10**6), ContextTooLong),
        (lambda s, ref: s.think([]), InvalidRequest),
        (lambda s, ref: s.think(PROMPT, agent=""), InvalidRequest),
        (lambda s, ref: s.think(PROMPT, [{**ref, "agent": "other"}]), TamperedReference),
        (lambda s, ref: s.think(PROMPT, [{**ref, "model": "0" * 32}]), WrongModel),
        (lambda s, ref: s.think(PROMPT, ["lat_"]), TamperedReference),
        (lambda s, ref: s.speak(PROMPT, temperature=-1), InvalidRequest),
        (lambda s, ref: s.speak(PROMPT, nonsense=1), InvalidRequest),
        (lambda s, ref: s.speak(PROMPT, stop=[""]), InvalidRequest),
        (lambda s, ref: list(s.speak("word " * 10**4)), ContextTooLong),
        (lambda s, ref: list(s.speak(PROMPT, [{**ref, "steps": 9}])), TamperedReference),
        (lambda s, ref: s.lens(ref, top_k=0), InvalidRequest),
        (lambda s, ref: s.lens(ref, top_k=10**6), InvalidRequest),
        (lambda s, ref: s.memory({**ref, "positions": 1}), TamperedReference),
        (lambda s, ref: s.marker({**ref, "steps": 7}), TamperedReference),
        (lambda s, ref: s.take_markers(s.marker(ref).replace(" 2 ", " 3 ")), TamperedReference),
        (lambda s, ref: s.take_markers(s.marker(ref)[:-9] + "]"), TamperedReference),
        (lambda s, ref: s.pin({**ref, "mac": "0" * 64}), TamperedReference),
        (lambda s, ref: s.drop({**ref, "mac": "0" * 64}), TamperedReference),
        (lambda s, ref: list(s.export_memory({**ref, "mac": "0" * 64})), TamperedReference),
    ],
)
def test_errors_are_those_of_the_service_itself(
    remote: LatentService, service: LatentService, call: Callable[..., Any], kind: type[Exception]
) -> None:
    for each in (service, remote):
        ref = each.think(PROMPT, steps=2)
        with pytest.raises(kind) as raised:
            call(each, ref)
        assert type(raised.value) is kind


def test_on_the_wire_they_are_problem_details(server: Server) -> None:
    reply = httpx.post(f"{server.address}/v1/think", json={**BODY, "steps": 10**6})
    assert reply.status_code == 422
    assert reply.headers["content-type"] == PROBLEM
    problem = reply.json()
    assert problem["type"] == "urn:latentmas:error:ContextTooLong"
    assert problem["status"] == 422
    assert "positions" in problem["detail"]
    assert problem["instance"] == reply.headers["x-request-id"]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (("GET", "/nothing", {}), 404),
        (("GET", "/v1/think", {}), 405),
        (("POST", "/v1/think", {"content": b"{", "headers": {"content-type": "application/json"}}), 422),
        (("POST", "/v1/think", {"content": b"{}", "headers": {"content-type": "text/plain"}}), 422),
        (("POST", "/v1/think", {"json": []}), 422),
        (("POST", "/v1/think", {"json": {**BODY, "model": "/etc/passwd"}}), 422),
        (("POST", "/v1/think", {"json": {**BODY, "latents": [{}]}}), 403),
        (("GET", "/v1/references?after=-1", {}), 422),
        (("GET", "/v1/references?after=x", {}), 422),
        (("POST", "/v1/memory/import", {"content": b""}), 422),
        (("POST", "/v1/memory/import", {"content": b"", "headers": {"content-type": TENSORS}}), 422),
        (("POST", "/v1/memory/import", {"content": b"\xff" * 100, "headers": {"content-type": TENSORS}}), 422),
        (("POST", "/v1/think", {"json": BODY, "headers": {"host": "evil.example"}}), 401),
        (("POST", "/v1/think", {"json": BODY, "headers": {"host": "["}}), 401),
        (("POST", "/v1/think", {"json": {"messages": [{"role": "tool"}]}}), 422),
        (("POST", "/v1/think", {"json": {"messages": [call_of("[" * 10**5)]}}), 422),
        (("POST", "/v1/think", {"json": {"messages": [call_of("nonsense")]}}), 422),
        (("POST", "/v1/think", {"json": {**BODY, "latents": {}}}), 422),
        (("POST", "/v1/think", {"json": {**BODY, "ref": {}}}), 422),
        (("POST", "/v1/speak", {"json": {"messages": [{"role": "user", "content": "hi", "ref": 1}]}}), 422),
        (("POST", "/v1/markers", {"json": {"ref": {}}}), 403),
        (("POST", "/v1/markers", {"json": {"ref": "lat_"}}), 403),
    ],
)
def test_whatever_is_asked_there_is_a_problem_document(server: Server, request_: Any, status: int) -> None:
    method, path, options = request_
    reply = httpx.request(method, server.address + path, **options)
    assert reply.status_code == status
    assert reply.headers["content-type"] == PROBLEM
    assert reply.json()["status"] == status


def test_one_reference_too_many_is_no_forged_one(server: Server, remote: LatentService) -> None:
    genuine = [remote.think(PROMPT, steps=1)] * (MAX_PARENTS + 1)
    reply = httpx.post(f"{server.address}/v1/think", json={**BODY, "latents": genuine})
    assert reply.status_code == 422
    assert reply.json()["type"].endswith(":InvalidRequest")
    extended = httpx.post(f"{server.address}/v1/think", json={**BODY, "latents": [{**genuine[0], "path": ""}]})
    assert extended.status_code == 403


def test_what_the_server_did_not_expect_says_nothing_of_its_inside(
    server: Server, remote: LatentService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(server.service, "pin", broken)
    monkeypatch.setattr(server.service, "athink", broken)
    with pytest.raises(EngineFailed, match="its log"):
        remote.think(PROMPT)
    ref = {"ref": remote.references()[0].ref}
    reply = httpx.post(f"{server.address}/v1/references/pin", json=ref)
    assert reply.status_code == 500
    assert "secret" not in reply.text


@pytest.mark.parametrize("stream", [True, False])
def test_a_disk_that_fails_is_no_hang_up(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(server.service, "athink", broken)
    reply = httpx.post(f"{server.address}/v1/think", json={**BODY, "stream": stream})
    assert reply.status_code == 500
    assert reply.headers["content-type"] == PROBLEM
    assert "read-only file system" in caplog.text


def test_what_takes_its_turn_may_be_silent_until_the_servers_deadline(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, lens = [], server.service.lens

    def slow(ref: LatentRef, top_k: int) -> Any:
        asked.append(ref)
        time.sleep(0.6)
        return lens(ref, top_k)

    with client(server, read_timeout=0.2) as remote:
        ref = remote.think(PROMPT, steps=1)
        monkeypatch.setattr(server.service, "lens", slow)
        assert len(remote.lens(ref)) == 1
        remote._turn_timeout = httpx.Timeout(0.2)  # type: ignore[attr-defined]
        with pytest.raises(DeadlineExceeded, match="sent nothing"):
            remote.lens(ref)
    assert len(asked) == 2  # what still works is not asked for again


def test_the_connections_of_an_event_loop_end_with_it(server: Server, remote: LatentService) -> None:
    ended = []
    for question in "ab":
        asyncio.run(remote.athink(messages(question), steps=1))
        ended.append(len(remote._async_clients))
    assert ended == [0, 0]
    loop = asyncio.new_event_loop()
    loop.run_until_complete(remote.athink(messages("a"), steps=1))
    loop.close()
    asyncio.run(remote.athink(messages("b"), steps=1))
    assert not remote._async_clients
    assert asyncio.run(remote.athink(messages("a"), steps=1)) == remote.think(messages("a"), steps=1)


def test_a_connection_serves_one_request_after_the_other(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    ports, admit = [], server.guard._admit
    monkeypatch.setattr(
        server.guard, "_admit", lambda scope, headers: (ports.append(scope["client"]), admit(scope, headers))
    )

    async def asked(remote: LatentService) -> None:
        for question in "ab":
            await remote.athink(messages(question), steps=2, on_step=lambda step: None)
            async for _ in remote.aspeak(messages(question), max_tokens=2):
                pass
        await asyncio.gather(*(remote.athink(messages(question), steps=1) for question in "cde"))

    with client(server) as remote:
        for question in "fg":
            remote.think(messages(question), steps=1)
            assert list(remote.speak(messages(question), max_tokens=2))
        assert len(set(ports)) == 1  # with `load`
        asyncio.run(asked(remote))
    assert len(set(ports)) <= 1 + 3


async def test_connections_of_a_burst_are_closed_when_it_is_over(
    server: Server, remote: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    thoughts = (remote.athink(messages(question), steps=1) for question in "abcdefgh")
    await asyncio.gather(*thoughts)
    ((pool, _),) = remote._async_clients.values()
    assert len(pool._all) == len(pool._idle) == 8
    burst = list(pool._all)
    monkeypatch.setattr(connections, "KEPT_SECONDS", 0.1)
    await asyncio.sleep(0.2)
    for question in "ab":
        await remote.athink(messages(question), steps=1)
    assert len(pool._all) == len(pool._idle) == 1
    assert not any(each._pool.connections for each in burst if each not in pool._all)


def test_a_client_has_no_more_connections_than_it_may(fresh_service: Any, gate: Any) -> None:
    service = fresh_service()

    async def asked(remote: LatentService, questions: str) -> list[Any]:
        thoughts = (remote.athink(messages(question), steps=1) for question in questions)
        return await asyncio.gather(*thoughts, return_exceptions=True)

    with serving(service) as server, client(server, max_connections=1) as remote:
        assert len({ref["id"] for ref in asyncio.run(asked(remote, "abc"))}) == 3  # one after the other
        held = gate(service)
        for seconds in (0.5, 0):
            with client(server, max_connections=1, patience=seconds, deadline=3) as hasty:
                results = sorted(asyncio.run(asked(hasty, "de")), key=lambda each: type(each).__name__)
            assert [type(each) for each in results] == [DeadlineExceeded, ServiceBusy]
            assert "max_connections" in str(results[1])
        held.open()


def test_nor_do_its_threads_wait_for_one_without_patience(fresh_service: Any, gate: Any) -> None:
    service = fresh_service()
    held = gate(service)
    with (
        serving(service) as server,
        client(server, max_connections=1, patience=0) as remote,
        ThreadPoolExecutor(1) as threads,
    ):
        first = threads.submit(remote.think, messages("a"), steps=1)
        wait_for(lambda: server.turns.running == 1)
        with pytest.raises(ServiceBusy, match="max_connections"):
            remote.think(messages("b"), steps=1)
        held.open()
        assert first.result(60)["steps"] == 1


def test_a_client_that_was_closed_opens_no_more_connections(fresh_service: Any, gate: Any) -> None:
    service = fresh_service()

    async def closed_meanwhile(remote: LatentService) -> list[Any]:
        thoughts = [asyncio.create_task(remote.athink(messages(question), steps=1)) for question in "ab"]
        await asyncio.to_thread(held.entered.wait, 60)
        remote.close()
        return await asyncio.gather(*thoughts, return_exceptions=True)

    with serving(service) as server, client(server, max_connections=1) as remote:
        held = gate(service)
        results = asyncio.run(asyncio.wait_for(closed_meanwhile(remote), 60))
        held.open()
    assert isinstance(results[1], ServiceClosed)
    assert isinstance(results[0], ServiceClosed | ServiceUnreachable)


def test_more_steps_than_were_asked_for_are_not_believed(remote: Any) -> None:
    told: list[int] = []
    with pytest.raises(EngineFailed, match="step 4 of 3"):
        _Told(remote, told.append, 3).take(Event("step", '{"step": 4}'))
    assert told == []


def test_nobody_there_is_said_so(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ServiceUnreachable, match="latentmas serve"):
        LatentService.load(f"http://127.0.0.1:{port}", patience=0)
    with pytest.raises(ServiceUnreachable):
        LatentService.load(f"http://127.0.0.1:{port}", patience=1)
    (told,) = caplog.messages  # however often it tries
    assert "Is latentmas serve running there? Trying again for up to 1 s." in told


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://user:secret@127.0.0.1:1",
        "http://127.0.0.1:1/?a=b",
        "http://127.0.0.1:1/#a",
        "http://[::1",
        "http://127.0.0.1:70000",
        "http://127.0.0.999:1",
        "http://there\n:1",
        "http://there..now:1",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest):
        LatentService.load(url, patience=0)


@pytest.mark.parametrize("token", ["two\nlines of a secret", "a sëcret", " \n"])
@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "vllm+http://127.0.0.1:1"])
def test_a_token_that_no_header_carries_is_refused_and_not_told(url: str, token: str) -> None:
    with pytest.raises(InvalidRequest, match="printable ASCII") as raised:
        LatentService.load(url, token=token, patience=0)
    assert not token.strip() or "cret" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_an_authority_that_cannot_be_read_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidRequest, match="ca: "):
        LatentService.load("https://127.0.0.1:1", ca=path, patience=0)


@pytest.mark.parametrize("settings", [{"device": "cpu"}, {"patience": -1}, {"deadline": 0}])
def test_settings_that_are_none_of_a_client_are_refused(server: Server, settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        LatentService.load(server.address, **settings)


def test_a_closed_client_is_closed(server: Server) -> None:
    remote = client(server)
    spoken = remote.speak(PROMPT)
    remote.close()
    remote.close()
    for call in (lambda: remote.think(PROMPT), lambda: next(spoken), remote.info):
        with pytest.raises(ServiceClosed):
            call()


# Load.


def test_a_client_that_hangs_up_frees_its_slot(fresh_service: Any, slow: Any) -> None:
    service = fresh_service()
    slow(service)
    with serving(service) as server, client(server) as remote:
        spoken = remote.speak(PROMPT, max_tokens=400)
        next(spoken)
        assert service.info()["rows"] == 1
        spoken.close()
        wait_for(lambda: service.info()["rows"] == 0 and server.turns.running == 0)
        assert service.info()["tokens"] < 400


@pytest.mark.parametrize("stream", [True, False])
def test_also_one_that_hangs_up_before_it_heard_anything(fresh_service: Any, gate: Any, stream: bool) -> None:
    service = fresh_service()
    held = gate(service)
    with serving(service) as server:
        with asking(server, "/v1/think", {**BODY, "steps": 300, "stream": stream}):
            wait_for(lambda: server.turns.running == 1)
        wait_for(lambda: server.turns.running == 0)
        held.open()
        wait_for(lambda: service.info()["rows"] == 0 and service.info()["waiting"] == 0)
        assert service.info()["thoughts"] < 300


def test_also_one_that_hangs_up_while_it_sends_a_memory(fresh_service: Any, caplog: pytest.LogCaptureFixture) -> None:
    with serving(fresh_service(), max_running=1) as server:
        host, port = server.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 5) as raw:
            raw.sendall(upload(host))
            wait_for(lambda: server.uploads[""].running == 1, 10)
        wait_for(lambda: server.uploads[""].running == 0, 10)
        counted = server.metrics.requests.labels("/v1/memory/import", 499)._value
        wait_for(lambda: counted.get() == 1, 10)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_also_one_that_hangs_up_when_its_memory_is_there(fresh_service: Any, gate: Any) -> None:
    service = fresh_service()
    with serving(service, max_running=1) as server, client(server) as remote, ThreadPoolExecutor(1) as threads:
        held = gate(service)
        first = threads.submit(remote.think, PROMPT, steps=2)
        wait_for(lambda: server.turns.running == 1)
        host, port = server.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 5) as raw:
            raw.sendall(upload(host) + b"x" * 49)
            wait_for(lambda: server.turns.waiting == 1)
        try:
            wait_for(lambda: server.turns.waiting == server.uploads[""].running == 0, 30)
            counted = server.metrics.requests.labels("/v1/memory/import", 499)._value
            wait_for(lambda: counted.get() == 1)
        finally:
            held.open()
        assert first.result(60)["steps"] == 2


@pytest.mark.parametrize(
    "path",
    [
        "/v1/memory/export",
        "/v1/lens",
        "/v1/markers",
        "/v1/markers/take",
        "/v1/references",
        "/v1/references/pin",
        "/v1/references/drop",
    ],
)
def test_also_one_that_hangs_up_while_it_waits_for_what_a_memory_holds(
    fresh_service: Any, gate: Any, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    service = fresh_service()
    with serving(service, max_running=1) as server, client(server) as remote, ThreadPoolExecutor(1) as threads:
        body: dict[str, Any] = {"ref": remote.think(PROMPT, steps=1)}
        if path == "/v1/markers/take":
            body = {"text": "none"}
        held = gate(service)
        first = threads.submit(remote.think, PROMPT, steps=2)
        wait_for(lambda: server.turns.running == 1)
        with asking(server, path, body, "GET" if path == "/v1/references" else "POST"):
            wait_for(lambda: server.turns.waiting == 1)
        try:
            wait_for(lambda: server.turns.waiting == 0, 30)
            counted = server.metrics.requests.labels(path, 499)._value
            wait_for(lambda: counted.get() == 1)
        finally:
            held.open()
        assert first.result(60)["steps"] == 2
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_one_that_hangs_up_keeps_its_turn_as_long_as_its_thread_works(fresh_service: Any, gate: Any) -> None:
    """Else its thread would be one more beside those that have a turn, and there are not many."""
    service = fresh_service()
    with serving(service, max_running=1) as server, client(server) as remote:
        body = {"ref": remote.think(PROMPT, steps=1)}
        held = gate(service)
        with asking(server, "/v1/lens", body):
            wait_for(lambda: server.turns.running == 1)
        counted = server.metrics.requests.labels("/v1/lens", 499)._value
        wait_for(lambda: counted.get() == 1)  # the client is let go
        assert server.turns.running == 1
        held.open()
        wait_for(lambda: server.turns.running == 0)
        assert remote.lens(body["ref"])


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/think", BODY), ("/v1/speak", {**BODY, "stream": True}), ("/v1/speak", BODY)],
    ids=["think", "speak", "say"],
)
def test_so_does_one_whose_prompt_is_still_read(
    fresh_service: Any, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    service, held = fresh_service(), Gate()
    encode = service.encode
    monkeypatch.setattr(service, "encode", lambda *args: (held.wait(), encode(*args))[1])
    with serving(service, max_running=1) as server:
        try:
            with asking(server, path, body):
                assert held.entered.wait(60)
            counted = server.metrics.requests.labels(path, 499)._value
            wait_for(lambda: counted.get() == 1)
            assert server.turns.running == 1
        finally:
            held.open()
        wait_for(lambda: server.turns.running == 0)


def test_the_deadline_is_told_while_a_thread_works_and_what_it_needs_is_kept(
    fresh_service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, leave, there = fresh_service(), threading.Event(), []

    def slow(path: Path | LatentRef | str, *_: object) -> Any:
        assert leave.wait(60)
        if isinstance(path, Path):
            there.append(path.exists())
        raise InvalidRequest("too late")

    for name in ("lens", "marker", "take_markers", "page", "pin", "drop", "export_memory", "import_memory"):
        monkeypatch.setattr(service, name, slow)
    with serving(service) as server, client(server) as remote:
        ref = {"ref": remote.think(PROMPT, steps=1)}
        requests: list[tuple[str, str, dict[str, Any]]] = [
            ("POST", "/v1/lens", {"json": ref}),
            ("POST", "/v1/markers", {"json": ref}),
            ("POST", "/v1/markers/take", {"json": {"text": "none"}}),
            ("GET", "/v1/references", {}),
            ("POST", "/v1/references/pin", {"json": ref}),
            ("POST", "/v1/references/drop", {"json": ref}),
            ("POST", "/v1/memory/export", {"json": {**ref, "kv": True}}),
            ("POST", "/v1/memory/import", {"content": b"x", "headers": {"content-type": TENSORS}}),
        ]
        with httpx.Client(base_url=server.address, timeout=120) as http:
            for at_work, (method, path, sent) in enumerate(requests, 1):
                deadline = 0.1
                while server.turns.running < at_work:  # on a busy machine, a thread is at work later
                    deadline *= 3
                    monkeypatch.setattr(server.settings, "deadline", deadline)
                    assert http.request(method, path, **sent).status_code == 504
        assert (server.turns.running, server.exports[""].running, server.uploads[""].running) == (len(requests), 1, 1)
        leave.set()
        wait_for(lambda: server.turns.running == server.exports[""].running == server.uploads[""].running == 0)
    assert there == [True]


def test_few_memories_leave_with_their_kv_at_a_time(fresh_service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    service, leave = fresh_service(), threading.Event()

    def slow(ref: LatentRef, kv: bool) -> Iterator[bytes]:
        leave.wait(30)
        yield b"x"

    monkeypatch.setattr(service, "export_memory", slow)
    with serving(service) as server, client(server) as remote, ThreadPoolExecutor(3) as threads:
        ref = remote.think(PROMPT, steps=1)
        exported = [threads.submit(lambda: b"".join(remote.export_memory(ref, kv=True))) for _ in range(KV_EXPORTS + 1)]
        wait_for(lambda: server.exports[""].waiting == 1)
        assert server.exports[""].running == KV_EXPORTS
        leave.set()
        assert [each.result(30) for each in exported] == [b"x"] * (KV_EXPORTS + 1)


def test_no_advice_is_followed_for_longer_than_the_patience(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> None:
        error = ServiceBusy("full")
        error.retry_after = 3600
        raise error

    with client(server, patience=0.5) as remote:
        monkeypatch.setattr(server.guard, "_admit", busy)
        asked = time.monotonic()
        with pytest.raises(ServiceBusy):
            remote.think(PROMPT)
        assert time.monotonic() - asked < 30


def test_patience_begins_with_the_first_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.0, 5.0, 5.0, 10.0, 10.0, 15.0, 15.0]).__next__
    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=now))
    patient = patience.Patience(10)
    assert [patient(None) for _ in range(4)] == [False, False, True, True]  # type: ignore[arg-type]
    monkeypatch.undo()
    assert patience.Patience(0)(None)  # type: ignore[arg-type]


def test_memories_that_come_slowly_hold_up_nobody_but_their_tenant(
    fresh_service: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langchain_latentmas.service.server.UPLOADS", 1)
    tokens = {name: f"{name} {TOKEN}" for name in ("anne", "bert")}
    with serving(fresh_service(), tokens=tokens, max_running=1, max_waiting=0) as server:
        host, port = server.address.removeprefix("http://").split(":")
        anne, bert = (client(server, token=token, patience=0) for token in tokens.values())
        file = tmp_path / "memory"
        file.write_bytes(b"".join(bert.export_memory(bert.think(PROMPT, steps=1))))
        with socket.create_connection((host, int(port)), 5) as raw:
            raw.sendall(upload(host, f"Authorization: Bearer {tokens['anne']}\r\n"))
            wait_for(lambda: server.uploads["anne"].running == 1, 10)
            assert bert.import_memory(file)["steps"] == 1
            assert anne.think(PROMPT, steps=2)["steps"] == 2
            with pytest.raises(ServiceBusy):
                anne.import_memory(file)
            assert server.metrics.registry.get_sample_value("latentmas_refused_total", {"queue": "import"}) == 1
        anne.close()
        bert.close()


def test_a_folder_for_memories_that_come_in_may_be_full(
    server: Server, remote: LatentService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(SimpleNamespace):
        def write(self, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "no space left on device")

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self.write(b"")  # what is left in the buffer

    (tmp_path / "memory").write_bytes(b"x")
    monkeypatch.setattr("langchain_latentmas.service.server.tempfile.TemporaryFile", Full)
    with pytest.raises(StoreFull, match="TMPDIR"):
        remote.import_memory(tmp_path / "memory")


@pytest.mark.parametrize(("limit", "status"), [({"deadline": 0.2}, b" 504 "), ({"body_seconds": 0.2}, b" 422 ")])
def test_a_memory_that_comes_too_slowly_is_given_up(fresh_service: Any, limit: dict[str, float], status: bytes) -> None:
    with serving(fresh_service(), **limit) as server:
        host, port = server.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 5) as raw:
            raw.sendall(upload(host))
            assert status in raw.recv(4096)


def test_connections_without_a_whole_head_are_closed(fresh_service: Any) -> None:
    def hung_up(raw: socket.socket, begun: bytes) -> bool:
        try:
            with suppress(TimeoutError):
                if not raw.recv(4096):
                    return True
            if begun:  # to send on does not help
                raw.sendall(b"x")
        except ConnectionError:
            return True
        return False

    with serving(fresh_service(), body_seconds=0.5) as server:
        host, port = server.address.removeprefix("http://").split(":")
        ready = f"GET /ready HTTP/1.1\r\nHost: {host}\r\n".encode()
        for begun in (b"", b"GET /re", ready, ready + b"\r\nGET", ready + b"\r\n" + ready):
            with socket.create_connection((host, int(port)), 5) as raw:
                raw.sendall(begun)
                raw.settimeout(0.1)
                wait_for(partial(hung_up, raw, begun), 30)


@pytest.mark.parametrize("secured", [False, True], ids=["http", "https"])
def test_a_connection_too_many_is_closed_at_once(
    fresh_service: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, secured: bool
) -> None:
    files = certificate(tmp_path) if secured else {}
    verify = ssl.create_default_context(cafile=files["certificate"]) if secured else True
    with serving(fresh_service(), max_connections=2, **files) as server, ExitStack() as connected:
        host, port = server.address.partition("://")[2].split(":")

        def connect() -> socket.socket:
            return connected.enter_context(socket.create_connection((host, int(port)), 10))

        def answered() -> bool:
            with suppress(httpx.TransportError):
                return httpx.get(f"{server.address}/ready", verify=verify).status_code == 200
            return False

        first, _ = connect(), connect()  # which say nothing, and take their time for a handshake
        for _ in range(3):
            assert connect().recv(1) == b""
        assert sum("the most there may be" in message for message in caplog.messages) == 1
        first.close()
        wait_for(answered)


def test_who_waits_for_a_reply_is_not_cut_off(fresh_service: Any, gate: Any) -> None:
    service = fresh_service()
    held = gate(service)
    with (
        serving(service, body_seconds=2) as server,
        client(server, patience=0) as remote,
        ThreadPoolExecutor(1) as threads,
    ):
        thought = threads.submit(remote.think, PROMPT, steps=2)
        wait_for(lambda: server.turns.running == 1)
        time.sleep(2.5)  # whatever was expected of the client within `body_seconds` is due
        held.open()
        assert thought.result(30)["steps"] == 2


def test_a_client_that_never_reads_is_cut_off(fresh_service: Any, caplog: pytest.LogCaptureFixture) -> None:
    with serving(fresh_service(), body_seconds=0.5) as server, socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = server.address.removeprefix("http://").split(":")
        raw.connect((host, int(port)))
        asked = f"GET /openapi.json HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        raw.settimeout(30)
        raw.sendall(asked * 400)  # what comes of it is more than the system keeps for those who do not read
        assert server._uvicorn is not None
        connections = server._uvicorn.server_state.connections
        wait_for(lambda: "reads nothing" in caplog.text)
        wait_for(lambda: not connections)


def test_one_that_reads_slowly_gets_everything(fresh_service: Any) -> None:
    with serving(fresh_service(), body_seconds=1) as server, socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        host, port = server.address.removeprefix("http://").split(":")
        raw.connect((host, int(port)))
        raw.settimeout(30)
        asked = f"GET /openapi.json HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        raw.sendall(asked * 400)
        begun, left, status = time.monotonic(), 400, b"HTTP/1.1 200 OK"
        last = b""
        while left:
            more = raw.recv(1 << 20)
            assert more, "the server has hung up"
            left -= (last + more).count(status)
            last = more[1 - len(status) :]
            if time.monotonic() - begun < 2:
                time.sleep(0.1)


@pytest.mark.parametrize("secured", [False, True], ids=["http", "https"])
def test_one_that_reads_a_large_reply_slowly_gets_everything(
    fresh_service: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, secured: bool
) -> None:
    service, size = fresh_service(), 1 << 22
    monkeypatch.setattr(service, "export_memory", lambda ref, kv: iter([bytes(size)]))
    body = json.dumps({"ref": service.think(PROMPT, steps=1)}).encode()
    files = certificate(tmp_path) if secured else {}
    with serving(service, body_seconds=1, **files) as server, closing(socket.socket()) as plain:
        host, port = server.address.partition("://")[2].split(":")
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        plain.settimeout(30)
        plain.connect((host, int(port)))
        raw = plain
        if secured:
            raw = ssl.create_default_context(cafile=files["certificate"]).wrap_socket(plain, server_hostname=host)
        head = f"POST /v1/memory/export HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        raw.sendall(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        taken = 0
        while more := raw.recv(1 << 16):
            taken += len(more)
            time.sleep(len(more) / size * 4)  # four seconds for all of it
        raw.close()
    assert taken > size


def test_a_long_prompt_stalls_nobody_else(fresh_service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    service, held, begun = fresh_service(), Gate(), threading.Semaphore(0)
    encode = service.encode
    monkeypatch.setattr(service, "encode", lambda *args: (begun.release(), held.wait(), encode(*args))[2])
    with serving(service) as server, client(server) as remote, ThreadPoolExecutor(2) as threads:
        work = [threads.submit(remote.think, PROMPT, steps=1), threads.submit(say, remote, PROMPT, max_tokens=1)]
        try:
            for _ in work:
                assert begun.acquire(timeout=30)
            assert httpx.get(f"{server.address}/ready", timeout=20).status_code == 200
        finally:
            held.open()
        for each in work:
            each.result(60)


async def test_cancelling_the_task_ends_the_work(fresh_service: Any, gate: Any) -> None:
    service = fresh_service()
    held = gate(service)
    with serving(service) as server, client(server) as remote:
        task = asyncio.create_task(remote.athink(PROMPT, steps=300))
        await asyncio.to_thread(wait_for, lambda: server.turns.running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(wait_for, lambda: server.turns.running == 0)
        held.open()


def test_a_full_queue_says_when_to_come_again_and_the_client_does(fresh_service: Any, gate: Any) -> None:
    service = fresh_service()
    held = gate(service)
    with (
        serving(service, max_running=1, max_waiting=1) as server,
        client(server) as remote,
        client(server, patience=0) as hasty,
        ThreadPoolExecutor(8) as threads,
    ):
        same = [messages(f"question {i}") for i in range(6)]
        running = [threads.submit(remote.think, prompt, steps=2) for prompt in same[:2]]
        wait_for(lambda: server.turns.waiting == 1)
        reply = httpx.post(f"{server.address}/v1/think", json=BODY, headers={"latentmas-client": "third"})
        assert reply.status_code == 429
        assert 1 <= int(reply.headers["retry-after"]) <= 60
        with pytest.raises(ServiceBusy) as busy:
            hasty.think(PROMPT)
        assert busy.value.retry_after is not None
        running += [threads.submit(remote.think, prompt, steps=2) for prompt in same[2:]]
        wait_for(lambda: server.turns.refused >= 6)
        held.open()
        assert len({future.result(60)["id"] for future in running}) == 6


def test_a_deadline_includes_the_wait(fresh_service: Any, gate: Any) -> None:
    service = fresh_service()
    held = gate(service)
    with (
        serving(service, max_running=1, deadline=30, keep_alive=0.1) as server,
        client(server, deadline=0.3) as hasty,
        client(server) as remote,
        ThreadPoolExecutor(1) as threads,
    ):
        with pytest.raises(DeadlineExceeded, match=r"0\.3 s"):
            hasty.think(PROMPT, steps=5)
        first = threads.submit(remote.think, PROMPT, steps=1)
        wait_for(lambda: server.turns.running == 1)
        with pytest.raises(DeadlineExceeded):
            list(hasty.speak(PROMPT, max_tokens=5))
        assert server.turns.waiting == 0
        reply = httpx.post(f"{server.address}/v1/think", json={**BODY, "deadline": 0.2})
        assert reply.status_code == 504
        held.open()
        assert first.result(30)["steps"] == 1


def test_the_server_s_deadline_is_the_longest(fresh_service: Any, gate: Any) -> None:
    service = fresh_service()
    held = gate(service)
    with serving(service, deadline=0.2) as server:
        assert httpx.post(f"{server.address}/v1/think", json={**BODY, "deadline": 1000}).status_code == 504
        held.open()


def test_a_stream_shows_that_it_lives(fresh_service: Any, gate: Any) -> None:
    service = fresh_service()
    held = gate(service)
    with (
        serving(service, keep_alive=0.05) as server,
        httpx.stream("POST", f"{server.address}/v1/think", json={**BODY, "stream": True}) as reply,
    ):
        lines = reply.iter_lines()
        assert [next(lines) for _ in range(4)] == [": working", ""] * 2
        held.open()
        assert [line for line in lines if line.startswith("event")] == ["event: done"]


@pytest.mark.parametrize("call", ["think", "athink"])
def test_a_client_bears_signs_of_life_that_are_rarer_than_its_read_timeout(
    call: str, fresh_service: Any, gate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = fresh_service()
    held, asked, think = gate(service), [], service.athink
    monkeypatch.setattr(service, "athink", lambda *args, **rest: (asked.append(args), think(*args, **rest))[1])
    with (
        serving(service, keep_alive=1) as server,
        client(server, read_timeout=0.3) as remote,
        ThreadPoolExecutor(1) as threads,
    ):
        ask = remote.think if call == "think" else lambda *args, **rest: asyncio.run(remote.athink(*args, **rest))
        thought = threads.submit(ask, PROMPT, steps=2)
        wait_for(lambda: server.turns.running == 1)
        with pytest.raises(TimeoutError):
            thought.result(0.7)
        held.open()
        assert thought.result(60)["steps"] == 2
    assert len(asked) == 1  # it was not taken for one that is gone


def test_signs_of_life_end_with_the_reply(fresh_service: Any, caplog: pytest.LogCaptureFixture) -> None:
    with serving(fresh_service(), keep_alive=1e-4) as server, httpx.Client(base_url=server.address) as http:
        for steps in range(20):
            text = http.post("/v1/think", json={**BODY, "stream": True, "steps": steps % 4}).text
            assert text.count("event: done") == 1
            assert text.endswith("\n\n")
            assert (
                http.post("/v1/think", json={**BODY, "stream": True, "steps": 10**6}).text.count("ContextTooLong") == 1
            )
    gc.collect()  # tasks that failed unheard speak up when they go
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_draining_lets_what_has_begun_end_and_takes_nothing_new(fresh_service: Any, gate: Any) -> None:
    service = fresh_service()
    held = gate(service)
    with serving(service) as server, client(server) as remote, ThreadPoolExecutor(1) as threads:
        with httpx.Client(base_url=server.address) as other:
            assert other.get("/ready").json() == {"status": "ready"}
            first = threads.submit(remote.think, PROMPT, steps=2)
            wait_for(lambda: server.turns.running == 1)
            server.guard.draining = True
            assert other.get("/ready").status_code == 503
            assert other.get("/health").status_code == 200
            refused = other.post("/v1/think", json=BODY)
            assert refused.status_code == 503
            assert refused.json()["type"].endswith("ServiceClosed")
        server.drain()
        time.sleep(0.3)
        held.open()
        assert first.result(30)["steps"] == 2


def test_a_device_that_no_longer_works_is_told_to_who_watches(
    fresh_service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("the device is gone")

    service = fresh_service()
    with serving(service) as server, client(server) as remote:
        assert [httpx.get(server.address + path).status_code for path in ("/health", "/ready")] == [200, 200]
        for name in ("step", "renew"):
            monkeypatch.setattr(service._ticker, name, broken)
        for _ in range(2):
            with pytest.raises(EngineFailed, match="the device is gone"):
                remote.think(PROMPT, steps=1)
            wait_for(lambda: bool(service.fault))
        for path in ("/health", "/ready"):
            reply = httpx.get(server.address + path)
            assert (reply.status_code, reply.json()) == (503, {"status": "failed"})


def test_a_thread_that_nobody_waits_for_holds_up_no_end(fresh_service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    service = fresh_service()
    monkeypatch.setattr(service, "lens", lambda *_: service._ended.wait(30))  # as one that waits for a tick
    with serving(service, drain=60) as server, client(server) as remote:
        with asking(server, "/v1/lens", {"ref": remote.think(PROMPT, steps=1)}):
            wait_for(lambda: server.turns.running == 1)
        ending = time.monotonic()
    assert time.monotonic() - ending < 20


def test_when_the_drain_is_over_the_rest_is_told(fresh_service: Any, slow: Any) -> None:
    service = fresh_service()
    slow(service)
    with serving(service, drain=0.1) as server, client(server, patience=0) as remote:
        spoken = remote.speak(PROMPT, max_tokens=490, temperature=1, seed=2)  # this one does not end by itself
        next(spoken)
        server.drain()
        with pytest.raises((ServiceClosed, ServiceUnreachable)):
            list(spoken)


def test_a_memory_that_still_comes_in_then_may_be_sent_elsewhere(fresh_service: Any) -> None:
    with serving(fresh_service(), drain=0.1) as server:
        host, port = server.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 60) as raw:
            raw.sendall(upload(host))
            wait_for(lambda: server.uploads[""].running == 1)
            server.drain()
            reply = b"".join(iter(partial(raw.recv, 4096), b""))
    assert b" 503 " in reply
    assert b"ServiceClosed" in reply


# Security.


def test_tenants_see_nothing_of_each_other(fresh_service: Any) -> None:
    tokens = {name: f"{name} {TOKEN}" for name in ("anne", "bert")}
    with serving(fresh_service(), tokens=tokens, token=TOKEN) as server:
        anne, bert, owner = (client(server, token=token) for token in (*tokens.values(), TOKEN))
        ref = anne.think(PROMPT, steps=2)
        marker = anne.marker(ref)
        for other in (bert, owner):
            assert other.references() == []
            for call in (
                lambda o=other: o.think("And?", [ref]),
                lambda o=other: list(o.speak("And?", [ref])),
                lambda o=other: o.memory(ref),
                lambda o=other: o.lens(ref),
                lambda o=other: o.marker(ref),
                lambda o=other: o.take_markers(f"copied {marker}"),
                lambda o=other: o.pin(ref),
                lambda o=other: o.drop(ref),
                lambda o=other: list(o.export_memory(ref)),
            ):
                with pytest.raises(TamperedReference):
                    call()
            other.think(PROMPT, steps=2)  # of its own: what the other one thought is no news to it
        assert server.service.info()["thoughts"] == 6
        shared = {"waiting", "rows", "ticks", "thoughts", "tokens", "prefilled", "reused"}
        assert shared.isdisjoint(anne.info())  # nor how much of what another one asks
        assert shared <= set(owner.info())
        assert [each.ref for each in anne.references()] == [ref]
        assert anne.take_markers(marker)[1] == [ref]
        for each in (anne, bert, owner):
            each.close()


def test_without_the_token_nothing_is_told(fresh_service: Any) -> None:
    with serving(fresh_service(), token=f"{TOKEN}\n") as server:  # as it comes out of a file
        for settings in ({}, {"token": "x" * 20}, {"token": TOKEN + "x"}, {"token": TOKEN.upper()}):
            with pytest.raises(AccessDenied):
                client(server, **settings)
        for path in ("/v1/info", "/metrics", "/docs", "/openapi.json", "/nothing"):
            reply = httpx.get(server.address + path)
            assert reply.status_code == 401
            assert reply.headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"{server.address}/ready").status_code == 200
        for token in (TOKEN, f" {TOKEN}\n"):
            with client(server, token=token) as remote:
                assert remote.think(PROMPT, steps=0)


def test_metrics_are_for_who_runs_the_server(fresh_service: Any) -> None:
    with serving(fresh_service(), tokens={"anne": f"anne {TOKEN}"}, token=TOKEN) as server:
        with client(server, token=f"anne {TOKEN}") as remote:
            remote.think(PROMPT, steps=3)
        headers = {"authorization": f"Bearer {TOKEN}"}
        shown = httpx.get(f"{server.address}/metrics", headers=headers).text
        assert "latentmas_thoughts_total 3.0" in shown
        assert 'latentmas_requests_total{route="/v1/think",status="200"} 1.0' in shown
        for name in ("live_rows", "ticks_total", "tokens_total", "kv_bytes", "kv_hits_total"):
            assert f"latentmas_{name} " in shown
        assert 'latentmas_queue_seconds_count{queue="work"} 1.0' in shown
        for name in ("kv_rebuilds_total", "kv_evictions_total", "request_seconds_bucket", "first_event_seconds_bucket"):
            assert f"latentmas_{name}" in shown
        other = httpx.get(f"{server.address}/metrics", headers={"authorization": f"Bearer anne {TOKEN}"})
        assert other.status_code == 401


def test_sizes_are_checked_before_anything_is_kept(fresh_service: Any) -> None:
    with serving(fresh_service(), max_body=2048, max_depth=8, max_memory=2048, max_headers=2048) as server:
        with client(server) as remote:
            with pytest.raises(RequestTooLarge, match="2048 bytes"):
                remote.think("x" * 3000)
            with pytest.raises(RequestTooLarge, match="2048 bytes"):
                list(remote.speak("x" * 3000))
            ref = remote.think(PROMPT, steps=8)
            with pytest.raises(RequestTooLarge, match="KV"):
                remote.memory(ref)
        http = httpx.Client(base_url=server.address)
        chunked = http.post("/v1/think", content=iter([b"x" * 1500] * 2), headers={"content-type": "application/json"})
        assert chunked.status_code == 413
        deep = json.dumps(BODY)[:-1] + ', "tools": ' + "[" * 20 + "]" * 20 + "}"
        nested = http.post("/v1/speak", content=deep, headers={"content-type": "application/json"})
        assert nested.status_code == 413
        assert "deeper" in nested.json()["detail"]
        tensors = {"content-type": TENSORS}
        assert http.post("/v1/memory/import", content=b"x" * 3000, headers=tensors).status_code == 413
        assert http.get("/ready", headers={"x": "y" * 5000}).status_code == 413
        assert http.get("/ready").status_code == 200


def test_a_body_that_announces_too_much_is_not_waited_for(fresh_service: Any) -> None:
    with serving(fresh_service(), body_seconds=0.3) as server:
        host, port = server.address.removeprefix("http://").split(":")
        for path, (length, expected) in product(
            ("/v1/think", "/v1/memory/import"), ((10**12, b" 413 "), (50, b" 422 "))
        ):
            head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {TENSORS}\r\nContent-Length: {length}"
            with socket.create_connection((host, int(port)), 5) as raw:
                raw.sendall(f"{head}\r\n\r\nx".encode())
                assert expected in raw.recv(4096)


@pytest.mark.parametrize("length", ["x", "-1", "1.5", "1, 2", "9" * 30])
def test_a_length_that_is_no_whole_number_is_refused(server: Server, length: str) -> None:
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 5) as raw:
        raw.sendall(f"POST /v1/think HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n\r\nx".encode())
        assert b" 400 " in raw.recv(4096)


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_of_who_shows_no_token_no_body_is_read(fresh_service: Any, path: str) -> None:
    with serving(fresh_service(), token=TOKEN) as server:
        host, port = server.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 5) as raw:
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000\r\n\r\n{{".encode())
            assert b" 200 " in raw.recv(4096)


def test_pages_of_other_addresses_are_not_answered(server: Server) -> None:
    foreign = [{"sec-fetch-site": site} for site in ("cross-site", "same-site")]
    foreign += [{"origin": origin} for origin in ("http://evil.example", "null", "http://127.0.0.1:1")]
    own = [{"sec-fetch-site": "none"}, {"sec-fetch-site": "same-origin", "origin": server.address}]
    for headers, status in [*((each, 401) for each in foreign), *((each, 200) for each in own)]:
        assert httpx.post(f"{server.address}/v1/think", json=BODY, headers=headers).status_code == status


@pytest.mark.parametrize(
    ("before", "after", "fit"),
    [
        ((1024, 1 << 19), (4096, 1 << 19), 2048),
        ((1024, resource.RLIM_INFINITY), (4096, resource.RLIM_INFINITY), 2048),
        ((8192, 8192), None, 2048),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None, 2048),
        ((256, 1024), (1024, 1024), 512),
    ],
)
def test_connections_leave_files_to_the_store(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, before: Any, after: Any, fit: int
) -> None:
    raised: list[Any] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: before)
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    assert connections_that_fit(2048) == fit
    assert raised == ([] if after is None else [after])
    assert [message.split(":")[0] for message in caplog.messages] == (
        [] if fit == 2048 else ["at most 512 connections, not 2048"]
    )


def test_requests_are_logged_as_data(fresh_service: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "langchain_latentmas.access")
    with serving(fresh_service()) as server, client(server) as remote:
        ref = remote.think(messages("a secret question"), steps=1, agent="planner")
        wait_for(lambda: any("/v1/think" in record.getMessage() for record in caplog.records))
    lines = [json.loads(JSONLines().format(record)) for record in caplog.records]
    (line,) = [line for line in lines if line.get("route") == "/v1/think"]
    assert line["status"] == 200
    assert line["agent"] == "planner"
    assert line["reference"] == ref["id"]
    assert line["seconds"] > 0
    assert "secret" not in json.dumps(lines)
