"""The client of `latentmas serve`: where it goes, what it believes, and how it goes on when a stream has broken off."""

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from langchain_core.messages import HumanMessage

from langchain_latentmas import LatentRef, LatentService, audit, teams
from langchain_latentmas.errors import (
    EngineFailed,
    InvalidRequest,
    LatentMASError,
    ModelNotFound,
    ServiceBusy,
    ServiceClosed,
    ServiceUnreachable,
)
from langchain_latentmas.service import Chunk
from langchain_latentmas.service.connections import Connections
from langchain_latentmas.service.events import Event, EventReader
from langchain_latentmas.service.identity import WireRef
from langchain_latentmas.service.server import Server
from langchain_latentmas.service.wire import EVENTS, SpeakRequest, SpokenChunk

from ..conftest import Fresh
from ..served import TOKEN, certificate, client, serving
from ..support import Gate, messages

PROMPT = messages("What is 12 plus 30?")
TOKENS = 6
REF = LatentRef(id=f"lat_{'0' * 32}", agent="planner", model="0" * 32, parents=[], positions=9, steps=1, mac="0" * 64)
MARKER = f"[latent planner 1 steps {REF['id']}.{'0' * 8}.{'0' * 32}]"
OTHERWISE: dict[str, dict[str, Any]] = {
    "another token": {"token_ids": [-1]},
    "the last one": {"ref": WireRef(**REF)},
}
INFO: dict[str, Any] = {"name": "a model", "chat_template": "", "limits": {"deadline": 60, "keep_alive": 5}}
ASKS: dict[str, Callable[[LatentService], Any]] = {
    "think": lambda remote: remote.think(PROMPT),
    "athink": lambda remote: asyncio.run(remote.athink(PROMPT)),
    "say": lambda remote: remote.say(PROMPT),
    "asay": lambda remote: asyncio.run(remote.asay(PROMPT)),
    "speak": lambda remote: speak(remote, []),
    "aspeak": lambda remote: aspeak(remote, []),
}

Hear = Callable[..., None]
Plan = Callable[..., list[SpeakRequest]]


def speak(service: LatentService, heard: list[Chunk], **sampling: Any) -> None:
    """Speaks to the end; what came before an error has been heard too."""
    for chunk in service.speak(PROMPT, max_tokens=TOKENS, **sampling):
        heard.append(chunk)


def aspeak(service: LatentService, heard: list[Chunk], **sampling: Any) -> None:
    async def hear() -> None:
        async for chunk in service.aspeak(PROMPT, max_tokens=TOKENS, **sampling):
            heard.append(chunk)

    asyncio.run(hear())


halves = pytest.mark.parametrize("hear", [speak, aspeak])
asks = pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
faults = pytest.mark.parametrize(
    ("fault", "error"),
    [("breaks", ServiceUnreachable), ("ends", ServiceUnreachable), ("closes", ServiceClosed)],
    ids=["breaks", "ends", "closes"],
)


@pytest.fixture
def plan(server: Server, monkeypatch: pytest.MonkeyPatch) -> Plan:
    spoken = server._speak

    def planned(*faults: tuple[int, str]) -> list[SpeakRequest]:
        """What befalls the next streams, each after so many chunks; returns the requests that come."""
        left, asked = list(faults), list[SpeakRequest]()

        async def faulty(request: Any, body: SpeakRequest) -> AsyncGenerator[tuple[str, SpokenChunk], None]:
            asked.append(body)
            after, what = left.pop(0) if left else (math.inf, "")
            sent = 0
            async with aclosing(spoken(request, body)) as pieces:
                async for name, chunk in pieces:
                    assert isinstance(chunk, SpokenChunk)
                    if sent == after:
                        if what == "breaks":
                            hang_up(server)
                            await asyncio.Event().wait()
                        if what == "ends":
                            return
                        if what == "closes":
                            raise ServiceClosed("The server is shutting down.")
                        chunk = chunk.model_copy(update=OTHERWISE[what])
                    yield name, chunk
                    sent += 1

        monkeypatch.setattr(server, "_speak", faulty)
        return asked

    return planned


def hang_up(server: Server) -> None:
    assert server._uvicorn is not None
    for each in list(server._uvicorn.server_state.connections):
        assert each.transport is not None
        each.transport.abort()


@contextmanager
def stranger(replies: dict[str, tuple[int, dict[str, str], str]]) -> Iterator[tuple[str, list[str]]]:
    """Another server, with these replies by path; yields its address, and the paths that were asked for.

    Behind each of them is the password that came with it.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(path + self.headers.get("Authorization", ""))
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, body = replies.get(path, (404, {}, ""))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_POST = answer

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{http.server_port}", asked
        finally:
            http.shutdown()


def told(**replies: tuple[int, dict[str, str], str]) -> dict[str, tuple[int, dict[str, str], str]]:
    """The replies of one that says of itself what `latentmas serve` does."""
    paths = {f"/v1/{path.replace('__', '/')}": reply for path, reply in replies.items()}
    return {"/v1/info": (200, {}, json.dumps(INFO)), **paths}


# A stream that breaks off.


@halves
@faults
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 7}], ids=["greedy", "seeded"])
def test_a_text_goes_on_where_it_broke_off(
    remote: LatentService,
    plan: Plan,
    hear: Hear,
    fault: str,
    error: type[LatentMASError],
    sampling: dict[str, Any],
) -> None:
    whole = list(remote.speak(PROMPT, max_tokens=TOKENS, **sampling))
    asked, heard = plan((2, fault)), list[Chunk]()
    hear(remote, heard, **sampling)
    assert heard == whole
    assert len(asked) == 2
    assert asked[0] == asked[1]


@halves
def test_a_text_may_break_off_again_once_it_went_on(remote: LatentService, plan: Plan, hear: Hear) -> None:
    whole = list(remote.speak(PROMPT, max_tokens=TOKENS))
    asked, heard = plan((1, "breaks"), (2, "ends"), (4, "closes")), list[Chunk]()
    hear(remote, heard)
    assert heard == whole
    assert len(asked) == 4


@halves
@faults
def test_a_text_that_would_be_another_one_is_not_asked_for_again(
    remote: LatentService, plan: Plan, hear: Hear, fault: str, error: type[LatentMASError]
) -> None:
    asked, heard = plan((2, fault)), list[Chunk]()
    with pytest.raises(error):
        hear(remote, heard, temperature=1.0)
    assert len(heard) == 2
    assert len(asked) == 1


@halves
@pytest.mark.parametrize("otherwise", OTHERWISE)
@pytest.mark.parametrize("at", [0, 1])
def test_two_texts_are_not_made_one(remote: LatentService, plan: Plan, hear: Hear, otherwise: str, at: int) -> None:
    asked, heard = plan((2, "breaks"), (at, otherwise)), list[Chunk]()
    with pytest.raises(EngineFailed, match="did not say the same"):
        hear(remote, heard)
    assert len(heard) == 2
    assert len(asked) == 2


@halves
@faults
@pytest.mark.parametrize("again", [1, 2])
def test_a_text_that_breaks_off_twice_without_anything_new_is_given_up(
    remote: LatentService, plan: Plan, hear: Hear, fault: str, error: type[LatentMASError], again: int
) -> None:
    asked, heard = plan((2, fault), (again, fault)), list[Chunk]()
    with pytest.raises(error):
        hear(remote, heard)
    assert len(heard) == 2
    assert len(asked) == 2


@halves
def test_after_the_last_chunk_nothing_is_missing(hear: Hear) -> None:
    chunks = SpokenChunk(text="a", token_ids=[1]), SpokenChunk(text="b", token_ids=[2], ref=WireRef(**REF))
    body = "".join(f"event: chunk\ndata: {chunk.model_dump_json(exclude_none=True)}\n\n" for chunk in chunks)
    broken = {"Content-Type": EVENTS, "Content-Length": str(len(body) + 1)}
    heard: list[Chunk] = []
    with stranger(told(speak=(200, broken, body))) as (url, asked), LatentService.load(url, patience=0) as remote:
        hear(remote, heard, temperature=1.0)
    assert [chunk.text for chunk in heard] == ["a", "b"]
    assert asked == ["/v1/info", "/v1/speak"]


# Where it goes.


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that is not there, and a password for all servers of these tests."""
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(netrc))


@pytest.mark.usefixtures("environment")
async def test_a_proxy_of_the_environment_is_not_heeded(server: Server) -> None:
    with client(server, patience=0) as remote:
        assert remote.think(PROMPT, steps=1) == await remote.athink(PROMPT, steps=1)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(("kind", "path"), [("", "/v1/info"), ("vllm+", "/v1/models")])
def test_neither_is_a_password_of_netrc_nor_are_they_by_the_client_of_vllm(kind: str, path: str) -> None:
    with stranger({}) as (url, asked), pytest.raises(LatentMASError):
        LatentService.load(kind + url, patience=0)
    assert asked == [path]


@pytest.mark.parametrize("status", [302, 307])
def test_who_loads_is_not_sent_elsewhere(status: int) -> None:
    with stranger({"/v1/info": (status, {"Location": "/elsewhere"}, "")}) as (url, asked):
        with pytest.raises(InvalidRequest, match=f"status {status}"):
            LatentService.load(url, patience=0)
        assert asked == ["/v1/info"]


@asks
@pytest.mark.parametrize("status", [302, 307])
def test_nor_is_who_asks(ask: Callable[[LatentService], Any], status: int) -> None:
    away = status, {"Location": "/elsewhere"}, ""
    with stranger(told(think=away, speak=away)) as (url, asked), LatentService.load(url, patience=0) as remote:
        with pytest.raises(InvalidRequest, match=f"status {status}"):
            ask(remote)
        assert len(asked) == 2
        assert "/elsewhere" not in asked


# What it believes.


@pytest.mark.parametrize(
    "said",
    [
        "<html>Welcome</html>",
        "{}",
        "[]",
        '"ok"',
        "3",
        *(json.dumps({**INFO, "limits": said}) for said in ({}, [], None, {"deadline": None}, {"deadline": "soon"})),
    ],
)
def test_who_is_no_latentmas_serve_is_not_taken_for_one(said: str) -> None:
    unlike = pytest.raises(ServiceUnreachable, match=r"http://127\.0\.0\.1:\d+ is no latentmas serve")
    with stranger({"/v1/info": (200, {}, said)}) as (url, _), unlike:
        LatentService.load(url, patience=0)


@asks
@pytest.mark.parametrize("event", ["nonsense\ndata: {}", "error\ndata: {}", "done\ndata: no JSON", "chunk\ndata: [1]"])
def test_events_that_cannot_be_read_are_said_so(ask: Callable[[LatentService], Any], event: str) -> None:
    reply = 200, {"Content-Type": EVENTS}, f"event: {event}\n\n"
    with stranger(told(think=reply, speak=reply)) as (url, asked), LatentService.load(url, patience=0) as remote:
        with pytest.raises(EngineFailed, match="cannot be read"):
            ask(remote)
        assert len(asked) == 2


@pytest.mark.parametrize(
    "ask",
    [
        lambda remote: remote.marker(REF),
        lambda remote: remote.take_markers(MARKER),
        lambda remote: remote.lens(REF),
        lambda remote: remote.references(),
        lambda remote: remote.pin(REF),
        lambda remote: remote.drop(REF),
    ],
)
@pytest.mark.parametrize("said", ['{"other": 1}', "[]", "<html>Welcome</html>"])
def test_replies_that_cannot_be_read_are_said_so(ask: Callable[[LatentService], Any], said: str) -> None:
    paths = ("markers", "markers__take", "lens", "references", "references__pin", "references__drop")
    replies = told(**dict.fromkeys(paths, (200, {}, said)))
    with stranger(replies) as (url, asked), LatentService.load(url, patience=0) as remote:
        with pytest.raises(EngineFailed, match="cannot be read"):
            ask(remote)
        assert len(asked) == 2


def test_markers_that_stand_for_nothing_are_said_so() -> None:
    replies = told(markers__take=(200, {}, '{"text": "", "refs": []}'))
    unread = pytest.raises(EngineFailed, match="0 references of 1 markers")
    with stranger(replies) as (url, _), LatentService.load(url, patience=0) as remote, unread:
        remote.take_markers(MARKER)


def test_an_audit_is_refused_with_what_to_do_instead(remote: LatentService) -> None:
    examples = [({"messages": [HumanMessage(f"Question {n}?")]}, None) for n in range(20)]
    with pytest.raises(InvalidRequest, match="in this process only; load the model here"):
        audit(teams.sequential(remote, steps=1, max_tokens=1), examples, lambda state, _: True)


# How long it waits for a connection.


def test_who_has_waited_for_a_free_connection_does_not_wait_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    with client(server, max_connections=1, patience=0.1) as remote:
        http: httpx.Client = remote._client  # type: ignore[attr-defined]
        stream = http.stream
        monkeypatch.setattr(http, "stream", lambda *to, **more: (asked.append(to[1]), stream(*to, **more))[1])
        speaking = remote.speak(PROMPT, max_tokens=TOKENS)
        next(speaking)
        with pytest.raises(ServiceBusy, match="max_connections or patience"):
            remote.think(PROMPT)
        assert asked == ["/v1/speak", "/v1/think"]
        assert len(list(speaking)) > 1


async def test_nor_does_who_waits_in_an_event_loop(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    handle = Connections.handle_async_request

    async def noted(self: Connections, request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        return await handle(self, request)

    monkeypatch.setattr(Connections, "handle_async_request", noted)
    with client(server, max_connections=1, patience=0.1) as remote:
        speaking = remote.aspeak(PROMPT, max_tokens=TOKENS)
        await anext(speaking)
        with pytest.raises(ServiceBusy, match="max_connections or patience"):
            await remote.athink(PROMPT)
        assert asked == ["/v1/speak", "/v1/think"]
        assert len([chunk async for chunk in speaking]) > 1


# Settings.


def test_an_empty_variable_sets_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOKEN", "DEADLINE", "PATIENCE", "CA"):
        monkeypatch.setenv(f"LATENTMAS_{name}", "")
    with LatentService.load(server.address) as remote:
        assert remote.think(PROMPT, steps=1)


def test_the_token_of_the_environment_is_shown(fresh_service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(fresh_service(), token=TOKEN) as server:
        monkeypatch.setenv("LATENTMAS_TOKEN", TOKEN)
        with client(server) as remote:
            assert remote.think(PROMPT, steps=1)


NUMBERS = ("DEADLINE", "PATIENCE", "CONNECT_TIMEOUT", "READ_TIMEOUT", "MAX_CONNECTIONS")


@pytest.mark.parametrize("name", NUMBERS)
def test_the_environment_says_what_no_argument_does(server: Server, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    field = name.lower()
    for given, taken in ({}, 77), ({field: 55}, 55):
        monkeypatch.setenv(f"LATENTMAS_{name}", "77")
        with LatentService.load(server.address, **given) as remote:
            assert getattr(remote.settings, field) == taken  # type: ignore[attr-defined]
    monkeypatch.setenv(f"LATENTMAS_{name}", "-1")
    with pytest.raises(InvalidRequest, match=f"^Setting {field}: "):
        LatentService.load(server.address)


def test_the_authority_of_the_environment_is_trusted(
    fresh_service: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = certificate(tmp_path)
    with serving(fresh_service(), **files) as server:
        with pytest.raises(ServiceUnreachable, match="CERTIFICATE_VERIFY_FAILED"):
            LatentService.load(server.address, patience=0)
        monkeypatch.setenv("LATENTMAS_CA", str(files["certificate"]))
        with LatentService.load(server.address, patience=0) as remote:
            assert remote.think(PROMPT, steps=1)


def test_a_client_of_vllm_heeds_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NUMBERS, "CA"):
        monkeypatch.setenv(f"LATENTMAS_{name}", "-1")
    with stranger({}) as (url, asked), pytest.raises(ModelNotFound, match="no vLLM server"):
        LatentService.load(f"vllm+{url}", patience=0)
    assert asked == ["/v1/models"]


# How far a thought is.


def thinking(server: Server, question: str, **more: Any) -> Iterator[Event]:
    body = {"messages": [{"role": "user", "content": question}], "steps": 40, "stream": True, **more}
    reader = EventReader()
    with httpx.stream("POST", f"{server.address}/v1/think", json=body, timeout=60) as reply:
        for data in reply.iter_bytes():
            yield from reader.feed(data)


def test_nobody_is_told_of_steps_who_did_not_ask(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("langchain_latentmas.service.server.PROGRESS", 0)
    [done] = list(thinking(server, "What is 2 plus 40?"))
    assert (done.name, json.loads(done.data)["taken"]) == ("done", 0)


def test_steps_are_told_four_times_a_second_at_the_most(fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    service = fresh_service()
    gate, ticks, step = Gate(), count(), service._ticker.step

    def held() -> None:
        if next(ticks) == 20:
            gate.wait()
        step()

    monkeypatch.setattr(service._ticker, "step", held)
    told = []
    with serving(service) as server:
        begun = time.monotonic()
        for event in thinking(server, "What is 2 plus 40?", progress=True):
            gate.open()
            told.append((event.name, json.loads(event.data)))
        seconds = time.monotonic() - begun
    *steps, (name, done) = told
    assert {name for name, _ in steps} == {"step"}
    numbers = [data["step"] for _, data in steps]
    assert numbers == sorted(set(numbers))
    assert 0 < numbers[0] < 40
    assert len(numbers) <= 4 * seconds
    assert (name, done["taken"]) == ("done", 40)
