"""Server-sent events: a reply that comes in pieces, ends when its client does, and the reading of it."""

import asyncio
import json
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from ..errors import DeadlineExceeded, EngineFailed, LatentMASError, ServiceUnreachable
from .wire import EVENTS, PROBLEM, TENSORS, Problem

logger = logging.getLogger(__name__)

MAX_EVENT = 1 << 24  # characters of an event that a client reads
A = TypeVar("A")


class Event(NamedTuple):
    """One server-sent event."""

    name: str
    """"step", "chunk", "done" or "error"."""
    data: str
    """JSON."""


class Reply(Response):
    """What a generator yields, as server-sent events or, of its last piece, as one JSON document.

    An error before the first event becomes a reply of its own status, a later one an event "error". When the client
    hangs up, the generator is cancelled at once.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[tuple[str, BaseModel], None],
        *,
        stream: bool,
        deadline: float,
        keep_alive: float,
        instance: str,
        ended: Callable[[int], None],
    ) -> None:
        """Describes the reply; the generator is started when it is sent.

        Args:
            pieces: Yields names and data of events.
            stream: Whether every piece is sent as it comes.
            deadline: Seconds after which the generator is cancelled, even if it is the client that does not read on.
            keep_alive: Seconds after which a comment shows that the server is still there.
            instance: Names the request in problem details.
            ended: Called once with the status: that of the first error, else 200, or 499 if the client hung up.
        """
        super().__init__(media_type=EVENTS if stream else "application/json")
        self.pieces, self.stream = pieces, stream
        self.deadline, self.keep_alive = deadline, keep_alive
        self.instance, self.ended = instance, ended
        self._begun = self._over = False
        self._sending = asyncio.Lock()  # two write: the answer, and the sign of life

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the reply."""
        answer = asyncio.ensure_future(self._answer(send))
        beats: list[asyncio.Task[None]] = []  # few requests take so long that there is one
        due = asyncio.get_running_loop().call_later(
            self.keep_alive, lambda: beats.append(asyncio.ensure_future(self._beat(send)))
        )
        status = 499
        try:
            if await _came_to_its_end(answer, hung_up(receive)):
                status = answer.result()
        finally:
            due.cancel()
            await _cancelled(*beats)
            self.ended(status)

    async def _answer(self, send: Send) -> int:
        last: BaseModel | None = None
        try:
            async with within(self.deadline), aclosing(self.pieces) as pieces:
                async for name, data in pieces:
                    last = data
                    if self.stream:
                        # Whatever has a reference is the last one.
                        more = getattr(data, "ref", None) is None
                        await self._send(send, name, data.model_dump_json(exclude_none=True), more)
                if self.stream:
                    await self._send_raw(send, b"", more=False)
                else:
                    assert last is not None
                    await self._send_document(send, 200, "application/json", last)
        except Exception as error:
            return await self._fail(send, error)
        return 200

    async def _fail(self, send: Send, error: Exception) -> int:
        if isinstance(error, LatentMASError):
            problem = Problem.of(error, self.instance)
        else:
            logger.exception("a request failed", exc_info=error)
            why = f"The server met an error that it did not expect; its log names it ({self.instance})."
            problem = Problem.of(EngineFailed(why), self.instance).model_copy(update={"status": 500})
        with suppress(TimeoutError):  # who does not read on will not read this either
            async with asyncio.timeout(self.keep_alive):
                if not self._begun:
                    await self._send_document(send, problem.status, PROBLEM, problem)
                else:
                    await self._send(send, "error", problem.model_dump_json(exclude_none=True), more=False)
        return problem.status

    async def _beat(self, send: Send) -> None:
        while self.stream:
            await self._send_raw(send, b": working\n\n")
            await asyncio.sleep(self.keep_alive)

    async def _send(self, send: Send, name: str, data: str, more: bool = True) -> None:
        await self._send_raw(send, f"event: {name}\ndata: {data}\n\n".encode(), more)

    async def _send_raw(self, send: Send, body: bytes, more: bool = True) -> None:
        async with self._sending:
            if self._over:
                return
            if not self._begun:
                self._begun = True
                await send(_start(200, EVENTS, [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]))
            self._over = not more
            await send({"type": "http.response.body", "body": body, "more_body": more})

    async def _send_document(self, send: Send, status: int, media_type: str, document: BaseModel) -> None:
        body = document.model_dump_json(exclude_none=True).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        if (seconds := getattr(document, "retry_after", None)) is not None:
            headers.append((b"retry-after", str(math.ceil(seconds)).encode()))
        async with self._sending:
            self._begun = self._over = True
            await send(_start(status, media_type, headers))
            await send({"type": "http.response.body", "body": body, "more_body": False})


class Tensors(Response):
    """What a generator yields, as safetensors; an error before the first piece is raised.

    When the client hangs up, the generator is cancelled at once.
    """

    media_type = TENSORS

    def __init__(self, pieces: AsyncGenerator[bytes, None], *, deadline: float, ended: Callable[[int], None]) -> None:
        """Describes the reply; the generator is started when it is sent.

        Args:
            pieces: Yields the bytes.
            deadline: Seconds after which the generator is cancelled, and the connection closed if it has begun.
            ended: Called with the status of what has begun: 200, that of the error that broke it off, or 499 if the
                client hung up.
        """
        super().__init__()
        self.pieces, self.deadline, self.ended = pieces, deadline, ended
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the reply.

        Raises:
            ClientDisconnect: If the client hung up before the first piece.
        """
        sending = asyncio.ensure_future(self._send(send))
        if await _came_to_its_end(sending, hung_up(receive)):
            self.ended(sending.result())
        elif self._begun:
            self.ended(499)
        else:
            raise ClientDisconnect

    async def _send(self, send: Send) -> int:
        try:
            async with within(self.deadline), aclosing(self.pieces) as pieces:
                async for piece in pieces:
                    if not self._begun:
                        self._begun = True
                        await send(_start(200, TENSORS, []))
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except Exception as error:
            if not self._begun:
                raise
            if isinstance(error, LatentMASError):
                return Problem.of(error).status
            logger.exception("a memory broke off", exc_info=error)
            return 500
        return 200


class EventReader:
    """Takes server-sent events out of the bytes of a reply."""

    def __init__(self) -> None:
        self._name, self._data, self._rest = "message", "", b""

    def feed(self, data: bytes) -> Iterator[Event]:
        """Reads on; yields the events that are whole by now.

        Raises:
            ServiceUnreachable: If an event grows beyond all bounds.
        """
        # At newlines alone: `str.splitlines` knows more of them, and JSON leaves some in its strings.
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_EVENT:
            raise _endless()
        for line in lines:
            if event := self._push(line.removesuffix(b"\r").decode(errors="replace")):
                yield event

    def _push(self, line: str) -> Event | None:
        if not line:
            event, had_data = Event(self._name, self._data), bool(self._data)
            self._name, self._data = "message", ""
            return event if had_data else None
        field, _, value = line.partition(":")
        if field == "event":
            self._name = value.strip()
        elif field == "data":
            self._data += value.removeprefix(" ")
        if len(self._data) > MAX_EVENT:
            raise _endless()
        return None


@asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    """Cancels what is in it when the time is up.

    Raises:
        DeadlineExceeded: If it did.
    """
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineExceeded(
            f"The request was not done within {seconds:g} s, its wait in the queue included."
        ) from None


async def unless(end: Coroutine[Any, Any, Any], error: Exception, work: Coroutine[Any, Any, A]) -> A:
    """What comes of some work; it is cancelled when something else comes to its end first.

    Raises:
        Exception: `error`, if that did.
    """
    working = asyncio.ensure_future(work)
    if not await _came_to_its_end(working, end):
        raise error
    return working.result()


async def hung_up(receive: Receive) -> None:
    """Comes to its end when the client hangs up; for a request that was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def problem_of(status: int, content_type: str, body: bytes, retry_after: str | None) -> LatentMASError:
    """The error behind a reply that is no success; from a server or a proxy that knows no problem details, too."""
    if content_type.startswith(PROBLEM):
        with suppress(ValueError):
            return Problem.model_validate_json(body).error
    detail = f"The server, or what stands before it, answered with status {status} and no reason."
    with suppress(ValueError, TypeError, KeyError):  # no JSON, no object, or one without a detail
        detail = str(json.loads(body)["detail"])[:1000]
    seconds = float(retry_after) if retry_after and retry_after.isdigit() else None
    return Problem(type="", title="", status=status, detail=detail, retry_after=seconds).error


def _endless() -> ServiceUnreachable:
    return ServiceUnreachable(f"The server sent an event of more than {MAX_EVENT} characters.")


async def _came_to_its_end(work: "asyncio.Future[Any]", other: Coroutine[Any, Any, Any]) -> bool:
    """Whether it did before something else did; what did not is cancelled."""
    end = asyncio.ensure_future(other)
    try:
        await asyncio.wait((work, end), return_when=asyncio.FIRST_COMPLETED)
        return work.done()
    finally:
        await _cancelled(work, end)


async def _cancelled(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])  # and not the task: to be cancelled meanwhile is another thing
            if not task.cancelled():
                task.result()


def _start(status: int, media_type: str, headers: list[tuple[bytes, bytes]]) -> Message:
    headers = [(b"content-type", media_type.encode()), *headers]
    return {"type": "http.response.start", "status": status, "headers": headers}
