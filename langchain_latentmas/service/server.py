"""`latentmas serve`: a model service behind HTTP."""

import asyncio
import errno
import logging
import math
import socket
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, closing, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, TypeVar

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import (
    EngineFailed,
    InvalidRequest,
    LatentMASError,
    RequestTooLarge,
    ServiceClosed,
    StoreFull,
    TamperedReference,
)
from .base import Chunk
from .events import Reply, Tensors, hung_up, unless, within
from .guard import Guard, check_size
from .identity import WireRef
from .local import LocalService
from .metrics import Metrics
from .port import Port
from .serving import ServeSettings
from .turns import Turns
from .wire import (
    EVENTS,
    MAX_PAIRS,
    PROBLEM,
    TENSORS,
    Done,
    ExportRequest,
    LensReply,
    LensRequest,
    MarkerReply,
    MarkersReply,
    PinRequest,
    Problem,
    RefReply,
    RefRequest,
    SpeakRequest,
    SpokenChunk,
    Status,
    Step,
    Stored,
    StoredReply,
    TextRequest,
    ThinkRequest,
    Thought,
)
from .workers import Work, Workers, at_work

logger = logging.getLogger(__name__)

PAGE = 1000  # references at a time
PROGRESS = 0.25  # seconds between two events that say how far a think is
GRACE = 5.0  # seconds after the drain in which replies of what was ended reach their clients
SENT_BYTES = 1 << 18  # that the system keeps of a reply until its client takes them
A = TypeVar("A")
KV_EXPORTS = 2  # memories that a tenant exports with their KV at a time
UPLOADS = 4  # memories that a tenant sends at a time; each is a file of up to `max_memory`
WORK, EXPORT, IMPORT = "work", "export", "import"  # queues: for a turn, and for room before it

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"description": what, "content": {PROBLEM: {"schema": Problem.model_json_schema()}}}
    for status, what in {
        "4XX": "The request is at fault, or comes too early (429, with Retry-After).",
        "5XX": "The server is at fault, or is shutting down (503).",
    }.items()
}
_UNWELL: dict[int | str, dict[str, Any]] = {503: {"model": Status}}  # for who watches, it is no problem document
_STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {EVENTS: {"schema": {"type": "string"}}}}}


class Server:
    """A model service, its queue, and the application that lets others at it.

    Attributes:
        app: The ASGI application.
        address: Where it listens; "" before it does.
        service: The model service of `token`; those of other tenants share its ticks.
        settings: Limits and tokens.
    """

    def __init__(self, service: LocalService, settings: ServeSettings) -> None:
        """Builds the application; `run` serves it.

        Args:
            service: A running service.
            settings: Limits and tokens.

        Raises:
            InvalidRequest: If there are several tenants and the service's store cannot be shared out.
        """
        self.service, self.settings = service, settings
        self._services: Mapping[str, LocalService] = {"": service}
        if settings.tokens:
            self._services = {"": service, **service.tenants(sorted(settings.tokens))}
        self.turns = Turns(settings.max_running, settings.max_waiting)
        self.over = asyncio.Event()  # set when the drain is
        self._abandoned: set[asyncio.Task[None]] = set()  # threads that nobody waits for any more
        # As slow as those who take them, so that no tenant waits for those of another.
        self.exports = {tenant: Turns(KV_EXPORTS, settings.max_waiting) for tenant in self._services}
        # Memories that come in: as slow as their senders, so that no tenant waits for those of another.
        self.uploads = {tenant: Turns(UPLOADS, settings.max_waiting) for tenant in self._services}
        self._queues = {WORK: dict.fromkeys(self._services, self.turns), EXPORT: self.exports, IMPORT: self.uploads}
        self.metrics = Metrics(self._queues, lambda: [each.info() for each in self._services.values()])
        self.guard = Guard(self._routes(), settings, self.metrics)
        self.app = self.guard
        self.address = ""
        self._uvicorn: _Uvicorn | None = None

    def run(self, port: Port | None = None) -> None:
        """Serves until SIGTERM or SIGINT, then drains, and closes the service and the port.

        Args:
            port: Where; None takes that of the settings now.

        Raises:
            InvalidRequest: If nobody can listen there.
        """
        settings = self.settings
        if not settings.loopback and settings.certificate is None:
            logger.warning("tokens travel unencrypted: set certificate and certificate_key, or put a TLS proxy before")
        config = uvicorn.Config(
            self.app,
            loop="asyncio",  # another one takes connections from the system itself, and not from the sockets of `Port`
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            http=_Protocol,
            h11_max_incomplete_event_size=settings.max_headers,
            ws="none",
            lifespan="off",  # there is nothing to begin or end, and to break it off logs a traceback
            timeout_graceful_shutdown=int(settings.drain + GRACE),
            ssl_certfile=settings.certificate,
            ssl_keyfile=settings.certificate_key,
        )
        try:
            with closing(port or Port(settings)) as port:
                self._uvicorn = _Uvicorn(config, self)
                self._uvicorn.run(port.open())
        finally:
            self.service.close()

    def drain(self) -> None:
        """Refuses new work from now on, and ends `run` when what has begun is done, or after `drain` seconds."""
        self.guard.draining = True
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True

    def _routes(self) -> FastAPI:
        app = FastAPI(
            title="latentmas serve",
            version=version("langchain-latentmas"),
            description="Thinks, speaks, and owns the memories; references stand for them.",
            responses=_PROBLEMS,
        )
        app.add_exception_handler(LatentMASError, _problem)
        app.add_exception_handler(RequestValidationError, _invalid)
        app.add_exception_handler(HTTPException, _http_problem)
        app.add_exception_handler(ClientDisconnect, _hung_up)
        app.add_exception_handler(Exception, _unexpected)
        routed: list[tuple[str, str, Callable[..., Any], dict[str, Any]]] = [
            ("GET", "/health", self.health, {"responses": _UNWELL}),
            ("GET", "/ready", self.ready, {"responses": _UNWELL}),
            ("GET", "/metrics", self.show_metrics, {"response_class": Response}),
            ("GET", "/v1/info", self.info, {}),
            ("POST", "/v1/think", self.think, {"response_model": Thought, "responses": _STREAMED}),
            ("POST", "/v1/speak", self.speak, {"response_model": SpokenChunk, "responses": _STREAMED}),
            ("POST", "/v1/lens", self.lens, {"response_model": LensReply}),
            ("POST", "/v1/markers", self.marker, {"response_model": MarkerReply}),
            ("POST", "/v1/markers/take", self.take_markers, {"response_model": MarkersReply}),
            ("GET", "/v1/references", self.references, {"response_model": StoredReply}),
            ("POST", "/v1/references/pin", self.pin, {"response_model": Done}),
            ("POST", "/v1/references/drop", self.drop, {"response_model": Done}),
            ("POST", "/v1/memory/export", self.export_memory, {"response_class": Tensors, "status_code": 200}),
            ("POST", "/v1/memory/import", self.import_memory, {"openapi_extra": _TENSOR_BODY}),
        ]
        bearer = HTTPBearer(auto_error=False, description="The token, where the server wants one.")
        for method, path, endpoint, options in routed:
            open_to_all = path in ("/health", "/ready")
            app.add_api_route(
                path,
                endpoint,
                methods=[method],
                operation_id=endpoint.__name__,
                dependencies=[] if open_to_all else [Depends(bearer)],
                **options,
            )
        return app

    # What is under a route reads like the interface that it serves: see `LatentService`.

    async def health(self, response: Response) -> Status:
        """Whether the process is alive; 503 if its device no longer works, which only another process can mend."""
        if self.service.fault:
            response.status_code = 503
            return Status(status="failed")
        return Status(status="ok")

    async def ready(self, response: Response) -> Status:
        """Whether new work is taken; 503 while the server drains, or if it is not healthy."""
        if self.guard.draining:
            response.status_code = 503
            return Status(status="draining")
        healthy = await self.health(response)
        return Status(status="ready") if healthy.status == "ok" else healthy

    async def show_metrics(self) -> Response:
        """Counters in Prometheus' text format."""
        text = await asyncio.to_thread(generate_latest, self.metrics.registry)  # asks the store for its size
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def info(self, request: Request) -> dict[str, Any]:
        """The model, and how the service fares."""
        service = self._service(request)
        return {
            **await self._at_once(request, lambda service: service.info()),
            "name": service.name,
            "chat_template": service.chat_template,
            "queue": {"running": self.turns.running, "waiting": self.turns.waiting},
            "limits": {
                "deadline": self.settings.deadline,
                "keep_alive": self.settings.keep_alive,
                "max_body": self.settings.max_body,
                "max_memory": self.settings.max_memory,
            },
        }

    async def think(self, request: Request, body: ThinkRequest) -> Reply:
        """Prefills the messages on top of a memory and takes latent steps; decodes nothing.

        With `stream`, events "step" (with `progress`) and "done".
        """
        return self._reply(request, self._think(request, body), body)

    async def speak(self, request: Request, body: SpeakRequest) -> Reply:
        """Prefills the messages on top of a memory and decodes text.

        With `stream`, events "chunk" (without `progress`, a single one); the last one has `ref`, `usage` and
        `finish_reason`.
        """
        return self._reply(request, self._speak(request, body), body)

    async def lens(self, request: Request, body: LensRequest) -> Reply:
        """Reads the thoughts of a reference's own segment out in the vocabulary."""
        if (pairs := body.ref.steps * body.top_k) > MAX_PAIRS:
            raise RequestTooLarge(
                f"{body.ref.steps} thoughts with {body.top_k} tokens each are {pairs} pairs, this server reads out "
                f"{MAX_PAIRS} at most; take a smaller top_k."
            )
        return self._once(request, lambda service: LensReply.of(service.lens(body.ref.ref, body.top_k)))

    async def marker(self, request: Request, body: RefRequest) -> Reply:
        """Writes a reference as a short signed string."""
        return self._once(request, lambda service: MarkerReply(marker=service.marker(body.ref.ref)))

    async def take_markers(self, request: Request, body: TextRequest) -> Reply:
        """Takes the markers out of a text."""

        def taken(service: LocalService) -> MarkersReply:
            text, refs = service.take_markers(body.text, body.left)
            return MarkersReply(text=text, refs=[WireRef(**ref) for ref in refs])

        return self._once(request, taken)

    async def references(self, request: Request, after: str = "") -> Reply:
        """Everything of this tenant that can be read, the latest made first; `after` is the `next` of a page."""

        def page(service: LocalService) -> StoredReply:
            listed, more = service.page(after, PAGE)
            return StoredReply(references=[Stored.of(each) for each in listed], next=more or None)

        return self._once(request, page)

    async def pin(self, request: Request, body: PinRequest) -> Reply:
        """Keeps a reference, and all that it descends from, whatever its age; or no longer."""

        def pinned(service: LocalService) -> Done:
            service.pin(body.ref.ref, body.pinned)
            return Done()

        return self._once(request, pinned)

    async def drop(self, request: Request, body: RefRequest) -> Reply:
        """Forgets a reference."""

        def dropped(service: LocalService) -> Done:
            service.drop(body.ref.ref)
            return Done()

        return self._once(request, dropped)

    async def export_memory(self, request: Request, body: ExportRequest) -> Response:
        """A memory as one safetensors file."""

        def begun(service: LocalService) -> Iterator[bytes]:
            service.verify([body.ref.ref])
            nbytes = body.ref.positions * service.model.bytes_per_position
            if body.kv and nbytes > self.settings.max_memory:
                raise RequestTooLarge(
                    f"The memory's KV has {nbytes} bytes, this server exports {self.settings.max_memory} at most."
                )
            return service.export_memory(body.ref.ref, body.kv)

        async def pieces() -> AsyncGenerator[bytes, None]:
            # The turn is held to the last byte: until then, all of it is in memory.
            async with self._held() as held:
                if body.kv:  # few at a time, since each has a copy of a whole memory
                    await self._enter(EXPORT, request, held)
                file = await self._in_turn(request, held, begun)
                while piece := await asyncio.to_thread(next, file, b""):
                    yield piece

        return Tensors(pieces(), deadline=self.settings.deadline, ended=self._ended(request))

    async def import_memory(self, request: Request) -> RefReply:
        """Takes in a memory that a service of the same model exported."""
        if request.headers.get("content-type") != TENSORS:
            raise InvalidRequest(f"A memory comes with the header Content-Type: {TENSORS}.")
        async with within(self.settings.deadline), self._held() as held:
            await self._enter(IMPORT, request, held)
            held.enter_context(_enough_room())
            temporary = tempfile.TemporaryFile()  # noqa: SIM115  # has no name, so that a kill leaves nothing behind
            file = held.enter_context(temporary)
            ending = ServiceClosed("The server shut down before the memory was here; it, or another one, may be back.")
            await unless(self.over.wait(), ending, self._receive(request, file))
            path = Path(f"/dev/fd/{file.fileno()}")
            turn = self._in_turn(request, held, lambda service: service.import_memory(path))
            ref = await unless(hung_up(request.receive), ClientDisconnect(), turn)
        return RefReply(ref=WireRef(**ref))

    async def _receive(self, request: Request, file: BinaryIO) -> None:
        taken = 0
        async for chunk in self._in_time(request.stream()):
            taken += len(chunk)
            check_size(taken, self.settings.max_memory)
            await asyncio.to_thread(file.write, chunk)
        await asyncio.to_thread(file.seek, 0)  # some systems let who opens it by its number read on from here

    async def _in_time(self, body: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
        """A body too long to be waited for as a whole: each part of it has to come in time."""
        seconds = self.settings.body_seconds
        while True:
            try:
                yield await asyncio.wait_for(anext(body), seconds)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise InvalidRequest(f"Nothing more of the body came within {seconds} s.") from None

    async def _think(self, request: Request, body: ThinkRequest) -> AsyncGenerator[tuple[str, BaseModel], None]:
        service, loop = self._service(request), asyncio.get_running_loop()
        taken = told = 0
        due: asyncio.TimerHandle | None = None
        news = asyncio.Event()

        def took(step: int) -> None:
            nonlocal taken, due
            taken = step
            self._first(request)
            if due is None or due.when() <= loop.time():
                due = loop.call_later(PROGRESS, news.set)

        async def work() -> Thought:
            async with self._held() as held:
                await self._enter(WORK, request, held)
                ref = await service.athink(
                    body.plain_messages,
                    body.refs,
                    steps=body.steps,
                    agent=body.agent,
                    on_step=took if body.stream and body.progress else None,
                )
            request.state.reference = ref["id"]
            return Thought(ref=WireRef(**ref), marker=service.signed_marker(ref), taken=taken)

        task = asyncio.ensure_future(work())
        task.add_done_callback(lambda _: news.set())
        try:
            while await news.wait() and not task.done():
                news.clear()
                if told < taken:
                    told = taken
                    yield "step", Step(step=told)
            thought = await task
            self._first(request)
            yield "done", thought
        finally:
            if due is not None:
                due.cancel()
            task.cancel()
            with suppress(asyncio.CancelledError, LatentMASError):
                await task

    async def _speak(self, request: Request, body: SpeakRequest) -> AsyncGenerator[tuple[str, BaseModel], None]:
        service = self._service(request)
        said: dict[str, Any] = {
            "max_tokens": body.max_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "stop": body.stop,
            "seed": body.seed,
            "tools": body.tools,
            "prefix": body.prefix,
            "agent": body.agent,
        }

        def piece(chunk: Chunk) -> SpokenChunk:
            self._first(request)
            if chunk.ref is None:
                return SpokenChunk.of(chunk)
            request.state.reference = chunk.ref["id"]
            return SpokenChunk.of(chunk, service.signed_marker(chunk.ref))

        def begun(service: LocalService) -> AsyncIterator[Chunk]:
            return service.aspeak(body.plain_messages, body.refs, **said)

        async with self._held() as held:
            await self._enter(WORK, request, held)
            if not (body.stream and body.progress):  # nobody has to be woken up for every token
                yield "chunk", piece(await service.asay(body.plain_messages, body.refs, **said))
                return
            chunks = await self._at_once(request, begun)  # reads recipes, and makes tokens of the messages
            assert isinstance(chunks, AsyncGenerator)
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield "chunk", piece(chunk)

    def _reply(
        self,
        request: Request,
        pieces: AsyncGenerator[tuple[str, BaseModel], None],
        body: ThinkRequest | SpeakRequest | None = None,
    ) -> Reply:
        seconds, stream = self.settings.deadline, False
        if body is not None:
            request.state.agent, stream = body.agent, body.stream
            seconds = min(body.deadline or seconds, seconds)
        return Reply(
            pieces,
            stream=stream,
            deadline=seconds,
            keep_alive=self.settings.keep_alive,
            instance=request.state.id,
            ended=self._ended(request),
        )

    def _once(self, request: Request, call: Callable[[LocalService], BaseModel]) -> Reply:
        """The reply to what a thread does in a turn, since it takes long, and there are not many threads."""

        async def done() -> AsyncGenerator[tuple[str, BaseModel], None]:
            async with self._held() as held:
                document = await self._in_turn(request, held, call)
            yield "done", document

        return self._reply(request, done())

    @staticmethod
    def _ended(request: Request) -> Callable[[int], None]:
        """What a reply tells how it ended, for the log and the metrics."""
        return lambda status: setattr(request.state, "status", status)

    def _service(self, request: Request) -> LocalService:
        return self._services[request.state.tenant]

    @asynccontextmanager
    async def _held(self) -> AsyncIterator[AsyncExitStack]:
        """A stack for what a request holds, its turn above all.

        It is kept until the last thread that works for the request ends, though nobody may wait for that any more: else
        that thread would be one more beside those that have a turn, and there are not many.
        """
        async with AsyncExitStack() as held:
            with at_work() as working:
                try:
                    yield held
                finally:
                    if working:
                        abandoned = asyncio.ensure_future(_ends(list(working), held.pop_all()))
                        self._abandoned.add(abandoned)
                        abandoned.add_done_callback(self._abandoned.discard)

    async def _enter(self, queue: str, request: Request, held: AsyncExitStack) -> None:
        """Waits in a queue; what it waited for is in `held` from then on."""
        state, asked = request.state, time.monotonic()
        await held.enter_async_context(self._queues[queue][state.tenant].turn(state.tenant, state.client))
        seconds = time.monotonic() - asked
        self.metrics.queued.labels(queue).observe(seconds)
        state.queued = round(getattr(state, "queued", 0.0) + seconds, 4)

    async def _in_turn(self, request: Request, held: AsyncExitStack, call: Callable[[LocalService], A]) -> A:
        """What a thread does in a turn, which is in `held` from then on."""
        await self._enter(WORK, request, held)
        return await self._at_once(request, call)

    async def _at_once(self, request: Request, call: Callable[[LocalService], A]) -> A:
        return await asyncio.to_thread(call, self._service(request))

    def _first(self, request: Request) -> None:
        if not hasattr(request.state, "first"):
            request.state.first = time.monotonic() - request.state.begun
            self.metrics.first.labels(request.scope["route"].path).observe(request.state.first)


_TENSOR_BODY = {
    "requestBody": {"required": True, "content": {TENSORS: {"schema": {"type": "string", "format": "binary"}}}}
}


class _Protocol(H11Protocol):  # and not httptools', whose headers have no bound
    """Ends a connection whose client sends no whole request, or takes nothing of what is sent to it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._due: dict[str, asyncio.TimerHandle] = {}
        super().connection_made(transport)
        self._watch_head()
        # Writing pauses when the system has no room for more, and goes on when a third of it is free: of the megabytes
        # that it would have by itself, that can take a slow client long. With 0, TLS would pause while nothing waits.
        transport.set_write_buffer_limits(high=1)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SENT_BYTES)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect("reading", self._drop)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget("reading")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget("reading", "head")

    def _watch_head(self) -> None:
        """Bounds the time to the next head, which shows a token; uvicorn does so only while nothing at all comes."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget("head")
        elif "head" not in self._due:
            self._expect("head", self.timeout_keep_alive_handler)

    def _expect(self, what: str, otherwise: Callable[[], None]) -> None:
        """What the client has to do within `body_seconds`, until `_forget`."""
        assert isinstance(self.config.app, Guard)
        self._due[what] = self.loop.call_later(self.config.app.settings.body_seconds, otherwise)

    def _forget(self, *expected: str) -> None:
        for what in expected:
            if due := self._due.pop(what, None):
                due.cancel()

    def _drop(self) -> None:
        logger.warning("a client reads nothing; its connection is closed", extra={"fields": {"client": self.client}})
        self.transport.abort()


class _Uvicorn(uvicorn.Server):
    """Tells the server when to drain, and ends what is not done when that is over."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self.server = server

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)  # a second Ctrl-C, that is one while it drains, ends it at once
        self.server.drain()

    async def startup(self, sockets: Any = None) -> None:
        # Whoever is at work may have to wait for a disk; by itself, asyncio has few more threads than there are cores.
        threads = Workers(self.server.settings.max_running + 4, "latentmas-serve")
        asyncio.get_running_loop().set_default_executor(threads)
        await super().startup(sockets)
        for listening in (each for server in self.servers for each in server.sockets):
            host, port = listening.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            self.server.address = f"{'https' if self.config.is_ssl else 'http'}://{host}:{port}"
            logger.info("listening", extra={"fields": {"address": self.server.address}})

    async def shutdown(self, sockets: Any = None) -> None:
        turns = self.server.turns
        logger.info("draining", extra={"fields": {"running": turns.running, "waiting": turns.waiting}})
        ending = asyncio.create_task(self._end())
        await super().shutdown(sockets)
        ending.cancel()
        # Threads that nobody waits for any more may wait for a tick, and the event loop's end waits for them.
        self.server.service.close()
        self._captured_signals.clear()  # it has done what they asked for: uvicorn need not raise them again
        logger.info("ended")

    async def _end(self) -> None:
        await asyncio.sleep(self.server.settings.drain)
        logger.warning("the drain is over", extra={"fields": {"running": self.server.turns.running}})
        # Whatever is left gets ServiceClosed, which clients may retry elsewhere.
        self.server.over.set()
        await asyncio.to_thread(self.server.service.close)


async def _ends(working: Iterable[Work], held: AsyncExitStack) -> None:
    async with held:
        await asyncio.gather(*map(asyncio.wrap_future, working), return_exceptions=True)  # nobody is there to be told


@contextmanager
def _enough_room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoreFull(
            f"The disk of {tempfile.gettempdir()} is full, where the server puts a memory that comes in; make room, or "
            "name another folder in TMPDIR."
        ) from error


def _document(request: Request, error: LatentMASError) -> JSONResponse:
    problem = Problem.of(error, request.state.id)
    headers = {} if problem.retry_after is None else {"Retry-After": str(math.ceil(problem.retry_after))}
    return JSONResponse(problem.model_dump(exclude_none=True), problem.status, headers, PROBLEM)


async def _problem(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, LatentMASError)
    return _document(request, error)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    # How many there are, and a field that the request does not have, are no fault of a reference.
    its_own = len(where) == 1 and (where == ["latents"] or first["type"] == "extra_forbidden")
    kind = TamperedReference if where[:1] in (["ref"], ["latents"]) and not its_own else InvalidRequest
    return _document(request, kind(f"{'.'.join(where) or 'The request'}: {first['msg']}."))


async def _http_problem(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    problem = Problem(
        type="about:blank",
        title=str(error.detail),
        status=error.status_code,
        detail=f"{request.method} {request.url.path}: {error.detail}",
        instance=request.state.id,
    )
    return JSONResponse(problem.model_dump(exclude_none=True), problem.status, error.headers, PROBLEM)


async def _hung_up(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # for the log


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    logger.exception("a request failed", exc_info=error, extra={"fields": {"id": request.state.id}})
    problem = Problem.of(EngineFailed("The server met an error that it did not expect; its log names it."))
    return JSONResponse(
        problem.model_copy(update={"status": 500, "instance": request.state.id}).model_dump(exclude_none=True),
        500,
        media_type=PROBLEM,
    )
