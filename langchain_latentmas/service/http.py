"""The model service of another process: `LatentService` over HTTP, to what `latentmas serve` runs."""

import asyncio
import logging
import math
import os
import random
import secrets
import ssl
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import aclosing, closing, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import httpx
import tenacity
from langchain_core.language_models import LanguageModelInput
from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from tenacity.wait import wait_base

from ..engine.sampling import Sampling
from ..errors import (
    EngineFailed,
    InvalidRequest,
    LatentMASError,
    ServiceBusy,
    ServiceClosed,
    ServiceUnreachable,
    check_whole,
    first_fault,
)
from ..state import LatentRef
from .base import READING, Chunk, LatentService, LensRow, StoredReference
from .budget import Budget
from .connections import KEPT_SECONDS, Connections, in_time, is_address, reaching, warn_of_plain
from .events import Event, EventReader, problem_of
from .identity import WireRef, check_agent, checked_ref, listed
from .marker import take_markers
from .memory import Memory
from .messages import as_openai
from .patience import Patience
from .serving import Token
from .transfer import read_kv
from .wire import (
    CLIENT_HEADER,
    TENSORS,
    Done,
    ExportRequest,
    LensReply,
    LensRequest,
    MarkerReply,
    MarkersReply,
    Message,
    PinRequest,
    Problem,
    RefReply,
    RefRequest,
    SpeakRequest,
    SpokenChunk,
    Step,
    StoredReply,
    TextRequest,
    ThinkRequest,
    Thought,
)

logger = logging.getLogger(__name__)

MARKERS_KEPT = 65536
SLACK = 10.0  # seconds after the server's deadline in which its word of that comes
MOST_SILENT = 86400.0  # seconds; a socket takes no timeout of a month
A = TypeVar("A")
B = TypeVar("B", covariant=True)
Body = TypeVar("Body", bound=BaseModel)
Reply = TypeVar("Reply", bound=BaseModel)


class HTTPSettings(BaseSettings):
    """Settings of a client; each is also an environment variable, `LATENTMAS_TOKEN` and so on.

    Attributes:
        token: What the server wants to be shown.
        deadline: Seconds after which the server gives a think or a speak up; None leaves that to the server.
        patience: Seconds, from its first failure, for which a call that can be repeated is: the queue was full, the
            server is away or shutting down, the connection broke. As long, and once, a call waits for a free one.
        connect_timeout: Seconds for a connection to be made.
        read_timeout: Seconds without a sign of life after which a connection counts as broken; the server gives one
            every 5 s while it thinks or speaks, and twice its `keep_alive` is waited for at least. What else takes its
            turn has until the server's own deadline at least.
        max_connections: Most connections at a time, per event loop and for all threads together.
        ca: PEM file of the authority behind the server's certificate; None takes certifi's.
    """

    model_config = SettingsConfigDict(
        env_prefix="LATENTMAS_",
        env_ignore_empty=True,
        extra="ignore",
        hide_input_in_errors=True,  # a token
    )

    token: Token | None = None
    deadline: float | None = Field(None, gt=0)
    patience: float = Field(120, ge=0)
    connect_timeout: float = Field(5, gt=0)
    read_timeout: float = Field(60, gt=0)
    max_connections: int = Field(256, ge=1)
    ca: Path | None = None


class HTTPService(LatentService):
    """`LatentService` whose model runs in another process.

    Signatures are the server's: a reference is looked at here for its form and verified there. What can be repeated is
    (`patience`): thinking always, since it gives the same reference; speaking until its first chunk, and afterwards if
    the same words are bound to come again, that is, greedily or with a seed. A server that is started again is thus
    waited for, and a graph that runs does not notice.

    `speak` checks at the call what can be checked here; what only the server knows is raised by the first `next`.
    """

    def __init__(self, url: str, settings: HTTPSettings) -> None:
        """Connects to a server; `load` is the way in.

        Args:
            url: Where it listens.
            settings: Token, timeouts, patience.

        Raises:
            InvalidRequest: If the address is none, or `ca` holds no certificate.
            AccessDenied: If the server wants another token.
            ServiceUnreachable: If nobody answers there.
        """
        if not is_address(url):
            raise InvalidRequest(f"{url!r} is no address of a server: give http://host:port, and a token as token=...")
        self.url, self.settings = url.rstrip("/"), settings
        headers = {CLIENT_HEADER: secrets.token_hex(8)}
        if settings.token is not None:
            warn_of_plain(self.url, "token")
            headers["Authorization"] = f"Bearer {settings.token.get_secret_value()}"
        self._verify = httpx.create_ssl_context(trust_env=False) if settings.ca is None else _trusting(settings.ca)
        limits = httpx.Limits(max_connections=settings.max_connections, keepalive_expiry=KEPT_SECONDS)
        self._client = httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(settings.read_timeout, connect=settings.connect_timeout, pool=settings.patience),
            follow_redirects=False,
            trust_env=False,  # no proxy, and no password from ~/.netrc
            verify=self._verify,
            limits=limits,
        )
        # What is the same in all requests for events is put together once.
        self._event_urls = {path: httpx.URL(self.url + path) for path in ("/v1/think", "/v1/speak")}
        self._event_headers = httpx.Headers([*self._client.headers.raw, (b"Content-Type", b"application/json")])
        self._async_clients: dict[asyncio.AbstractEventLoop, tuple[Connections, AsyncGenerator[None]]] = {}
        self._lock = threading.Lock()
        self._closed, self._announced = False, -math.inf
        self._markers: Budget[str] = Budget(MARKERS_KEPT, lambda _: 1)  # by signature of the reference
        self._marked: Budget[LatentRef] = Budget(MARKERS_KEPT, lambda _: 1)  # by marker
        try:
            info = self.info()
            self.name, self.chat_template = str(info["name"]), str(info["chat_template"])
            self.max_positions, self._fingerprint = info.get("max_positions"), info.get("fingerprint")
            self._turn_timeout = self._silent_for(info["limits"]["deadline"] + SLACK)
            self._event_timeout = self._silent_for(2 * info["limits"]["keep_alive"])
            self._event_extensions = {"timeout": self._event_timeout.as_dict()}
            self._silent = (
                f"{self.url} sent nothing for longer than its deadline; ask for less at once, or see whether it still "
                "works."
            )
        except BaseException as error:
            self._client.close()
            if isinstance(error, (KeyError, TypeError)):
                raise ServiceUnreachable(f"What answers at {self.url} is no latentmas serve.") from None
            raise

    @classmethod
    def load(cls, model: str = "http://127.0.0.1:8765", **settings: Any) -> Self:
        """Connects to a server.

        Args:
            model: Its address.
            **settings: Fields of `HTTPSettings`.

        Raises:
            InvalidRequest: If a setting is unknown or out of range.
        """
        if unknown := [name for name in settings if name not in HTTPSettings.model_fields]:
            raise InvalidRequest(
                f"{unknown[0]} is no setting of a client ({', '.join(HTTPSettings.model_fields)}); what concerns the "
                "model is said to latentmas serve."
            )
        try:
            return cls(model, HTTPSettings(**settings))
        except ValidationError as error:
            raise InvalidRequest(f"Setting {first_fault(error)}.") from error

    def think(
        self,
        messages: LanguageModelInput,
        latents: Sequence[LatentRef] = (),
        *,
        steps: int = 20,
        agent: str = "agent",
        on_step: Callable[[int], None] | None = None,
    ) -> LatentRef:
        """See `LatentService.think`."""
        body = self._think_request(messages, latents, steps, agent, on_step is not None)
        return self._answered("/v1/think", body, _Told(self, on_step, steps))

    async def athink(
        self,
        messages: LanguageModelInput,
        latents: Sequence[LatentRef] = (),
        *,
        steps: int = 20,
        agent: str = "agent",
        on_step: Callable[[int], None] | None = None,
    ) -> LatentRef:
        """See `LatentService.athink`."""
        body = self._think_request(messages, latents, steps, agent, on_step is not None)
        return await self._aanswered("/v1/think", body, _Told(self, on_step, steps))

    def speak(
        self,
        messages: LanguageModelInput,
        latents: Sequence[LatentRef] = (),
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        prefix: str = "",
        agent: str = "agent",
        **sampling: Any,
    ) -> Iterator[Chunk]:
        """See `LatentService.speak`."""
        body = self._speak_request(messages, latents, True, tools=tools, prefix=prefix, agent=agent, **sampling)
        spoken = _Spoken(self, body)

        def opened() -> tuple[Event, Generator[Event]]:
            stream = self._events("/v1/speak", body)
            try:
                return next(stream), stream  # until the first event has come, the request can be repeated
            except StopIteration:
                raise _broken() from None

        def chunks() -> Iterator[Chunk]:
            while not spoken.over:
                event, stream = self._retried(opened)
                try:
                    while True:
                        if (chunk := spoken.take(event)) is not None:
                            yield chunk
                        event = next(stream)
                except StopIteration:
                    spoken.ended()
                except (ServiceUnreachable, ServiceClosed) as error:
                    spoken.broke(error)
                finally:
                    stream.close()

        return chunks()

    def aspeak(
        self,
        messages: LanguageModelInput,
        latents: Sequence[LatentRef] = (),
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        prefix: str = "",
        agent: str = "agent",
        **sampling: Any,
    ) -> AsyncIterator[Chunk]:
        """See `LatentService.aspeak`."""
        body = self._speak_request(messages, latents, True, tools=tools, prefix=prefix, agent=agent, **sampling)
        spoken = _Spoken(self, body)

        async def opened() -> tuple[Event, AsyncGenerator[Event]]:
            stream = self._aevents("/v1/speak", body)
            try:
                return await anext(stream), stream
            except StopAsyncIteration:
                raise _broken() from None

        async def chunks() -> AsyncIterator[Chunk]:
            while not spoken.over:
                event, stream = await self._aretried(opened)
                try:
                    while True:
                        if (chunk := spoken.take(event)) is not None:
                            yield chunk
                        event = await anext(stream)
                except StopAsyncIteration:
                    spoken.ended()
                except (ServiceUnreachable, ServiceClosed) as error:
                    spoken.broke(error)
                finally:
                    await stream.aclose()

        return chunks()

    def say(self, messages: LanguageModelInput, latents: Sequence[LatentRef] = (), **options: Any) -> Chunk:
        """See `LatentService.say`."""
        return self._answered("/v1/speak", self._speak_request(messages, latents, False, **options), _Said(self))

    async def asay(self, messages: LanguageModelInput, latents: Sequence[LatentRef] = (), **options: Any) -> Chunk:
        """See `LatentService.asay`."""
        body = self._speak_request(messages, latents, False, **options)
        return await self._aanswered("/v1/speak", body, _Said(self))

    def memory(self, ref: LatentRef) -> Memory:
        """See `LatentService.memory`; the tensors are on the CPU."""
        with tempfile.TemporaryDirectory(prefix="latentmas-") as folder:
            path = Path(folder) / "memory.safetensors"

            def fetch() -> None:
                with path.open("wb") as file:
                    file.writelines(self._exported(ref, True))

            self._retried(fetch)
            return read_kv(path)

    def export_memory(self, ref: LatentRef, kv: bool = False) -> Iterator[bytes]:
        """See `LatentService.export_memory`; what the server refuses is raised by the first `next`."""
        return self._exported(checked_ref(ref), kv)

    def import_memory(self, file: str | Path) -> LatentRef:
        """See `LatentService.import_memory`."""

        def send() -> LatentRef:
            with Path(file).open("rb") as content:
                headers = {"Content-Type": TENSORS, "Content-Length": str(os.fstat(content.fileno()).st_size)}
                with _unreachable(self.url), in_time(self._silent):
                    reply = self._client.post(
                        "/v1/memory/import", content=content, headers=headers, timeout=self._turn_timeout
                    )
                return _read(reply, RefReply).ref.ref

        return self._retried(send)

    def lens(self, ref: LatentRef, top_k: int = 5) -> list[LensRow]:
        """See `LatentService.lens`."""
        body = _request(LensRequest, ref=_wire_ref(ref), top_k=top_k)
        return self._in_turn("POST", "/v1/lens", LensReply, **_json(body)).lens_rows

    def marker(self, ref: LatentRef) -> str:
        """See `LatentService.marker`; of what was thought through this client it is known without asking the server."""
        wire = _wire_ref(ref)
        if (marker := self._markers.get(wire.mac)) is None or self._marked.get(marker) != wire.ref:
            marker = self._in_turn("POST", "/v1/markers", MarkerReply, **_json(RefRequest(ref=wire))).marker
            self._remember(wire.ref, marker)
        return marker

    def take_markers(self, text: str, left: str = "") -> tuple[str, list[LatentRef]]:
        """See `LatentService.take_markers`; asks the server about markers that this client has not seen before."""
        without, markers = take_markers(text, left)
        known = [self._marked.get(str(marker)) for marker in markers]
        if refs := [ref for ref in known if ref is not None]:
            if len(refs) == len(markers):
                return without, refs
        elif not markers:
            return without, []
        # As one text: where a marker is refused, its error is that of the whole.
        asked = TextRequest(text=" ".join(map(str, markers)))
        reply = self._in_turn("POST", "/v1/markers/take", MarkersReply, **_json(asked))
        found = [ref.ref for ref in reply.refs]
        if len(found) != len(markers):
            raise _foreign(f"{len(found)} references of {len(markers)} markers")
        for marker, ref in zip(markers, found, strict=True):
            self._remember(ref, str(marker))
        return without, found

    def references(self) -> list[StoredReference]:
        """See `LatentService.references`."""
        listed: list[StoredReference] = []
        after: str | None = ""
        while after is not None:
            page = self._in_turn("GET", "/v1/references", StoredReply, params={"after": after})
            listed += [each.stored for each in page.references]
            after = page.next
        return listed

    def pin(self, ref: LatentRef, pinned: bool = True) -> None:
        """See `LatentService.pin`."""
        self._in_turn("POST", "/v1/references/pin", Done, **_json(PinRequest(ref=_wire_ref(ref), pinned=pinned)))

    def drop(self, ref: LatentRef) -> None:
        """See `LatentService.drop`."""
        self._in_turn("POST", "/v1/references/drop", Done, **_json(RefRequest(ref=_wire_ref(ref))))

    def info(self) -> dict[str, Any]:
        """See `LatentService.info`; also `url`, and `queue` and `limits` of the server."""

        def ask() -> dict[str, Any]:
            with _unreachable(self.url):
                reply = self._checked_client().get("/v1/info")
            _check(reply)
            try:
                return {**reply.json(), "url": self.url}
            except (ValueError, TypeError):
                raise ServiceUnreachable(f"What answers at {self.url} is no latentmas serve.") from None

        return self._retried(ask)

    @property
    def address(self) -> str:
        """See `LatentService.address`."""
        return self.url

    @property
    def identity(self) -> str:
        """See `LatentService.identity`; clients of one server with one token read each other's memories."""
        token = self.settings.token
        return sha256(repr((self.url, self._fingerprint, token and token.get_secret_value())).encode()).hexdigest()

    @property
    def closed(self) -> bool:
        """See `LatentService.closed`."""
        return self._closed

    def close(self) -> None:
        """See `LatentService.close`; ends this client, not the server."""
        with self._lock:
            self._closed = True
            clients = dict(self._async_clients)
        self._client.close()
        for loop, (_, life) in clients.items():
            if loop.is_running():
                asyncio.run_coroutine_threadsafe(life.aclose(), loop)

    def _think_request(
        self, messages: LanguageModelInput, latents: Any, steps: int, agent: str, progress: bool
    ) -> ThinkRequest:
        check_whole("steps", steps)
        common = self._common(messages, latents, agent)
        return _request(ThinkRequest, steps=steps, progress=progress, **common)

    def _speak_request(
        self,
        messages: LanguageModelInput,
        latents: Any,
        progress: bool,
        /,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        prefix: str = "",
        agent: str = "agent",
        **values: Any,
    ) -> SpeakRequest:
        sampling = Sampling.of(**values)
        common = self._common(messages, latents, agent)
        return _request(
            SpeakRequest,
            tools=list(tools) if tools else None,
            prefix=prefix,
            progress=progress,
            **vars(sampling) | {"stop": list(sampling.stop) or None},
            **common,
        )

    def _common(self, messages: LanguageModelInput, latents: Any, agent: str) -> dict[str, Any]:
        if self._closed:
            raise _closed()
        if READING.get() is not None:
            raise InvalidRequest(
                "An audit decides what agents read, which works with a model service in this process only; load the "
                "model here instead of http://..."
            )
        check_agent(agent)
        return {
            "messages": [_request(Message, **message) for message in as_openai(messages)],
            "latents": [_wire_ref(ref) for ref in listed(latents)],
            "agent": agent,
            "stream": True,
            "deadline": self.settings.deadline,
        }

    def _remember(self, ref: LatentRef, marker: str) -> None:
        self._markers.put(ref["mac"], marker)
        self._marked.put(marker, ref)

    def _exported(self, ref: LatentRef, kv: bool) -> Iterator[bytes]:
        body = ExportRequest(ref=_wire_ref(ref), kv=kv)
        with (
            _unreachable(self.url),
            in_time(self._silent),
            self._checked_client().stream(
                "POST", "/v1/memory/export", timeout=self._turn_timeout, **_json(body)
            ) as reply,
        ):
            if reply.status_code != 200:
                reply.read()
                _check(reply)
            yield from reply.iter_bytes()

    def _answered(self, path: str, body: BaseModel, answer: "_Answer[A]") -> A:
        """Asks for events until the last one has come; asks again where that may help."""

        def once() -> A:
            try:
                with closing(self._events(path, body)) as events:
                    for event in events:
                        answer.take(event)
            except ServiceUnreachable as error:
                return answer.whole(error)
            return answer.whole(_broken())

        return self._retried(once)

    async def _aanswered(self, path: str, body: BaseModel, answer: "_Answer[A]") -> A:
        async def once() -> A:
            try:
                async with aclosing(self._aevents(path, body)) as events:
                    async for event in events:
                        answer.take(event)
            except ServiceUnreachable as error:
                return answer.whole(error)
            return answer.whole(_broken())

        return await self._aretried(once)

    def _events(self, path: str, body: BaseModel) -> Generator[Event]:
        reader = EventReader()
        with (
            _unreachable(self.url),
            self._checked_client().stream("POST", path, timeout=self._event_timeout, **_json(body)) as reply,
        ):
            if reply.status_code != 200:
                reply.read()
                _check(reply)
            for data in reply.iter_bytes():
                for event in reader.feed(data):
                    yield _no_error(event)

    async def _aevents(self, path: str, body: BaseModel) -> AsyncGenerator[Event]:
        reader = EventReader()
        with _unreachable(self.url):
            connections = await self._connections()
            # Past `httpx.AsyncClient`: what it does for cookies, redirects and addresses takes as long as the rest.
            request = httpx.Request(
                "POST",
                self._event_urls[path],
                headers=self._event_headers,
                content=body.model_dump_json(exclude_none=True),
                extensions=self._event_extensions,
            )
            reply = await connections.handle_async_request(request)
            try:
                if reply.status_code != 200:
                    await reply.aread()
                    _check(reply)
                async for data in reply.aiter_bytes():
                    for event in reader.feed(data):
                        yield _no_error(event)
            finally:
                await reply.aclose()

    def _in_turn(self, method: str, path: str, kind: type[Reply], **sent: Any) -> Reply:
        """What comes of a request that takes its turn, and gives no sign of life until it is done."""

        def send() -> Reply:
            with _unreachable(self.url), in_time(self._silent):
                reply = self._checked_client().request(method, path, timeout=self._turn_timeout, **sent)
            return _read(reply, kind)

        return self._retried(send)

    def _silent_for(self, seconds: float) -> httpx.Timeout:
        """The client's own timeouts, but for a server that may be silent for so long."""
        most, own = max(self.settings.read_timeout, min(seconds, MOST_SILENT)), self._client.timeout
        return httpx.Timeout(most, connect=own.connect, pool=own.pool)

    def _checked_client(self) -> httpx.Client:
        if self._closed:
            raise _closed()
        return self._client

    async def _connections(self) -> Connections:
        loop = asyncio.get_running_loop()  # connections belong to the loop they were made in
        with self._lock:
            if self._closed:
                raise _closed()
            if loop in self._async_clients:
                return self._async_clients[loop][0]
            for ended in [each for each in self._async_clients if each.is_closed()]:
                del self._async_clients[ended]  # one that ended without `asyncio.run`
            connections = Connections(self.settings.max_connections, self._verify)
            life = self._life(loop, connections)
            self._async_clients[loop] = connections, life
        await anext(life)
        return connections

    async def _life(self, loop: asyncio.AbstractEventLoop, connections: Connections) -> AsyncGenerator[None]:
        """Begun and left waiting: what `asyncio.run` closes at its end, and with it the connections of its loop."""
        try:
            yield
        finally:
            self._async_clients.pop(loop, None)
            await connections.aclose()

    def _retrying(self) -> tenacity.Retrying:
        return tenacity.Retrying(**self._policy())

    def _retried(self, call: Callable[[], A]) -> A:
        return self._retrying()(call)

    async def _aretried(self, call: Callable[[], Awaitable[A]]) -> A:
        return await tenacity.AsyncRetrying(**self._policy())(call)

    def _policy(self) -> dict[str, Any]:
        return {
            "retry": tenacity.retry_if_exception(self._may_be_mended),
            "wait": _Wait(self.settings.patience),
            "stop": Patience(self.settings.patience),
            "before_sleep": self._announce,
            "reraise": True,
        }

    def _announce(self, retry_state: tenacity.RetryCallState) -> None:
        """Says once why nothing happens while a server is away; that a queue is full is nothing to be told of."""
        error, now = retry_state.outcome and retry_state.outcome.exception(), time.monotonic()
        if not isinstance(error, ServiceBusy) and now >= self._announced + self.settings.patience:
            self._announced = now
            logger.warning("%s Trying again for up to %g s.", error, self.settings.patience)

    def _may_be_mended(self, error: BaseException) -> bool:
        if self._closed or isinstance(error.__cause__, httpx.PoolTimeout):  # it has waited for as long as it may
            return False
        return isinstance(error, (ServiceBusy, ServiceUnreachable, ServiceClosed))


class _Wait(wait_base):
    """As long as the server advises, else a little longer each time; jitter spreads those who were refused at once.

    All waits of a call together take no longer than its patience, whatever the server, or a proxy, advises.
    """

    def __init__(self, patience: float) -> None:
        self.patience, self.backoff = patience, tenacity.wait_random_exponential(multiplier=0.2, max=5)

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        error = retry_state.outcome.exception() if retry_state.outcome else None
        advised = getattr(error, "retry_after", None)
        wait = self.backoff(retry_state) if advised is None else float(advised) * random.uniform(1, 1.5)
        return min(wait, max(0.0, self.patience - retry_state.idle_for))


class _Answer(Protocol[B]):
    """What comes of events; the same one takes them again when the request is repeated."""

    def take(self, event: Event) -> None:
        """Takes an event."""

    def whole(self, error: LatentMASError) -> B:
        """The answer; raises the error that ended the events if the last one had not come."""


class _Told:
    """What a think said of itself; a repeated request does not report the same steps again."""

    def __init__(self, service: HTTPService, on_step: Callable[[int], None] | None, most: int) -> None:
        self.service, self.on_step, self.most, self.steps = service, on_step, most, 0
        self.ref: LatentRef | None = None

    def take(self, event: Event) -> None:
        if event.name == "step":
            self._tell(_parsed(event.data, Step).step)
            return
        thought = _parsed(event.data, Thought)
        self._tell(thought.taken)
        self.ref = thought.ref.ref
        self.service._remember(self.ref, thought.marker)

    def whole(self, error: LatentMASError) -> LatentRef:
        if self.ref is None:
            raise error
        return self.ref

    def _tell(self, step: int) -> None:
        if step > self.most:
            raise _foreign(f"step {step} of {self.most}")
        if self.on_step is not None and step > self.steps:
            for each in range(self.steps + 1, step + 1):  # the server tells of several at a time
                self.on_step(each)
            self.steps = step


class _Said:
    """What was spoken, all at once."""

    def __init__(self, service: HTTPService) -> None:
        self.service = service
        self.chunk: Chunk | None = None

    def take(self, event: Event) -> None:
        wire = _parsed(event.data, SpokenChunk)
        if wire.ref is None:
            raise _foreign("a part where everything was asked for")
        if wire.marker is not None:
            self.service._remember(wire.ref.ref, wire.marker)
        self.chunk = wire.chunk

    def whole(self, error: LatentMASError) -> Chunk:
        if self.chunk is None:
            raise error
        return self.chunk


class _Spoken:
    """Chunks that were handed out; after the connection broke, the same ones are skipped when they come again."""

    def __init__(self, service: HTTPService, body: SpeakRequest) -> None:
        self.service, self.over = service, False
        self.repeats = body.temperature == 0 or body.seed is not None
        self.tokens: list[list[int]] = []
        self.again = self.at_break = 0

    def take(self, event: Event) -> Chunk | None:
        wire = _parsed(event.data, SpokenChunk)
        self.over = wire.ref is not None
        if wire.ref is not None and wire.marker is not None:
            self.service._remember(wire.ref.ref, wire.marker)
        if self.again < len(self.tokens):
            if self.over or wire.token_ids != self.tokens[self.again]:
                raise EngineFailed("The connection broke, and the server did not say the same again; call again.")
            self.again += 1
            return None
        self.tokens.append(wire.token_ids)
        self.again += 1
        return wire.chunk

    def broke(self, error: LatentMASError) -> None:
        if self.over:  # nothing is missing
            return
        # Without anything new since the last time, the request itself may be what breaks the server.
        if not self.repeats or (self.at_break and self.at_break == len(self.tokens)):
            raise error
        self.at_break, self.again = len(self.tokens), 0

    def ended(self) -> None:
        if not self.over:
            self.broke(_broken())


def _trusting(ca: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(ca))
    except OSError as error:  # an `ssl.SSLError` is one
        raise InvalidRequest(
            f"ca: {ca} cannot be read as certificates ({error}); give the PEM file of the server's authority."
        ) from error


@contextmanager
def _unreachable(url: str) -> Iterator[None]:
    try:
        with reaching(url, "latentmas serve"):
            yield
    except RuntimeError as error:
        if "closed" not in str(error):
            raise
        raise _closed() from error


def _json(body: BaseModel) -> dict[str, Any]:
    return {"content": body.model_dump_json(exclude_none=True), "headers": {"Content-Type": "application/json"}}


def _request(kind: type[Body], **values: Any) -> Body:
    try:
        return kind(**values)
    except ValidationError as error:
        raise InvalidRequest(f"{first_fault(error)}.") from error


def _wire_ref(ref: object) -> WireRef:
    return WireRef(**checked_ref(ref))


def _check(reply: httpx.Response) -> None:
    if reply.status_code != 200:
        raise problem_of(
            reply.status_code,
            reply.headers.get("content-type", ""),
            reply.content,
            reply.headers.get("retry-after"),
        )


def _read(reply: httpx.Response, kind: type[Reply]) -> Reply:
    _check(reply)
    return _parsed(reply.text, kind)


def _parsed(text: str, kind: type[Reply]) -> Reply:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise _foreign(f"{kind.__name__}, {first_fault(error)}") from error


def _no_error(event: Event) -> Event:
    if event.name == "error":
        with suppress(ValidationError):
            raise Problem.model_validate_json(event.data).error
        raise _foreign(f"event {event.name[:40]!r}")
    return event


def _foreign(what: str) -> LatentMASError:
    return EngineFailed(f"The server's reply cannot be read ({what}); is it of another version?")


def _broken() -> ServiceUnreachable:
    return ServiceUnreachable("The connection ended before the server had answered.")


def _closed() -> ServiceClosed:
    return ServiceClosed("The service is closed; load another one.")
