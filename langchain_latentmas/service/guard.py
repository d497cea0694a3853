"""What a request must pass before the server reads it: host, token, size, depth."""

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import AccessDenied, InvalidRequest, LatentMASError, RequestTooLarge, ServiceClosed
from .metrics import Metrics
from .serving import ServeSettings
from .wire import CLIENT_HEADER, PROBLEM, Problem

logger = logging.getLogger("langchain_latentmas.access")

OPEN = ("/health", "/ready")
STREAMED = ("/v1/memory/import",)  # counts its own bytes
# Arrays and objects of a request: as Python objects, one of a few bytes takes hundreds. 4,096 messages with tool calls,
# 1,024 references and 256 tools of ten arguments each have 26,000.
MAX_NESTED = 1 << 15
PIECE = 1 << 16  # bytes of a reply that are sent at a time
FROM_ELSEWHERE = ("cross-site", "same-site")  # a browser's word for a page of another address, or another port
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?')  # without a way back, which takes memory for each character
_ROUND = bytes.maketrans(b"[{]}", b"(())")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))


class Guard:
    """ASGI middleware in front of the whole application; also counts and logs every request.

    Attributes:
        draining: Set when the server ends: new work is refused, what has begun goes on.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics) -> None:
        """Wraps an application.

        Args:
            app: The application.
            settings: Limits and tokens.
            metrics: Where requests are counted.
        """
        self.app, self.settings, self.metrics, self.draining = app, settings, metrics, False
        self._tenants = [(_digest(token), tenant) for token, tenant in settings.by_token.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request in, or answers it with problem details."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        state = scope.setdefault("state", {})
        state["id"], state["begun"] = f"urn:uuid:{uuid.uuid4()}", time.monotonic()
        status, begun = 500, False

        async def noted_send(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                message = {**message, "headers": [*message["headers"], (b"x-request-id", state["id"].encode())]}
            for piece in _pieces(message):
                await send(piece)

        try:
            self._admit(scope, headers)
            if scope["path"] not in OPEN:
                streamed = scope["path"] in STREAMED
                most = self.settings.max_memory if streamed else self.settings.max_body
                check_size(int(headers.get("content-length", "0")), most)  # the parser refuses all but whole numbers
                receive = receive if streamed else await self._body(receive)
            await self.app(scope, receive, noted_send)
        except _HungUpError:
            status = 499
        except LatentMASError as error:
            if begun:
                raise
            await _send_problem(noted_send, Problem.of(error, state["id"]))
        finally:
            self._note(scope, state.get("status", status))

    def _admit(self, scope: Scope, headers: Mapping[str, str]) -> None:
        # The parser checks this only for headers that do not come at once.
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self.settings.max_headers:
            raise RequestTooLarge(f"The headers are larger than {self.settings.max_headers} bytes.")
        if scope["path"] in OPEN:
            return
        if self.draining and scope["method"] != "GET":
            raise ServiceClosed("The server is shutting down and takes no new work; it, or another one, may be back.")
        state = scope["state"]
        state["tenant"] = self._tenant(headers) if self._tenants else self._local(headers)
        peer = (scope.get("client") or ("",))[0]
        state["client"] = headers.get(CLIENT_HEADER.lower(), peer)[:64]
        if scope["path"] == "/metrics" and state["tenant"]:
            raise AccessDenied("The metrics are about all tenants; take the server's own token (LATENTMAS_TOKEN).")

    def _tenant(self, headers: Mapping[str, str]) -> str:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = _digest(token.strip()) if scheme.lower() == "bearer" else b""
        # Compares with all of them, so that the time it takes says nothing.
        found = [tenant for digest, tenant in self._tenants if hmac.compare_digest(given, digest)]
        if not found:
            raise AccessDenied("This server wants a token it knows: pass token=..., or set LATENTMAS_TOKEN.")
        return found[0]

    def _local(self, headers: Mapping[str, str]) -> str:
        # A page in a browser on this machine may reach the port under a name of its own (DNS rebinding).
        host, at = None, headers.get("host", "")
        with suppress(ValueError):
            host = urlsplit(f"//{at}").hostname
        if host not in ("localhost", "127.0.0.1", "::1", self.settings.host):
            raise AccessDenied(f"This server has no token, so it answers under a loopback address only, not {host!r}.")
        # Or ask under the server's name without being able to read the answer.
        origin = headers.get("origin")
        if headers.get("sec-fetch-site") in FROM_ELSEWHERE or (origin and origin.partition("://")[2] != at):
            raise AccessDenied("This server has no token, so it answers no pages of other addresses.")
        return ""

    async def _body(self, receive: Receive) -> Receive:
        """Reads the body, within its bounds, and returns what hands it on."""
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _HungUpError
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    check_size(len(body), self.settings.max_body)
        except TimeoutError:
            raise InvalidRequest(f"The body did not come within {self.settings.body_seconds} s.") from None
        whole = bytes(body)
        if _nests_deeper(whole, self.settings.max_depth):
            raise RequestTooLarge(f"The request nests deeper than {self.settings.max_depth} arrays and objects.")
        if _nests_more(whole, MAX_NESTED):
            raise RequestTooLarge(
                f"The request has more than {MAX_NESTED} arrays and objects; send fewer messages, references or tools."
            )
        handed = False

        async def replay() -> Message:
            nonlocal handed
            if handed:
                return await receive()
            handed = True
            return {"type": "http.request", "body": whole, "more_body": False}

        return replay

    def _note(self, scope: Scope, status: int) -> None:
        state = scope["state"]
        route = getattr(scope.get("route"), "path", "none")
        seconds = time.monotonic() - state["begun"]
        self.metrics.requests.labels(route, status).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        level = logging.DEBUG if scope["path"] in (*OPEN, "/metrics") else logging.INFO
        known = {name: state[name] for name in ("tenant", "client", "queued", "agent", "reference") if state.get(name)}
        fields = {"id": state["id"], "route": route, "status": status, "seconds": round(seconds, 4), **known}
        logger.log(level, "%s %s", scope["method"], route, extra={"fields": fields})


def check_size(size: int, limit: int) -> None:
    """Checks the size of a body: what is announced of it, or what has come so far.

    Raises:
        RequestTooLarge: If it is not.
    """
    if size > limit:
        raise RequestTooLarge(f"The request is larger than {limit} bytes.")


class _HungUpError(Exception):
    """The client left before its request was whole."""


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _pieces(message: Message) -> Iterator[Message]:
    """A body in pieces: whether its client takes anything shows only where a piece has left and another one waits."""
    body = message.get("body", b"")
    if len(body) <= PIECE:
        yield message
        return
    for start in range(0, len(body), PIECE):
        more = message.get("more_body", False) or start + PIECE < len(body)
        yield {**message, "body": body[start : start + PIECE], "more_body": more}


def _nests_deeper(body: bytes, limit: int) -> bool:
    """Whether arrays and objects of a JSON text nest deeper than that; of a broken one, whether they might."""
    if body.count(b"[") + body.count(b"{") <= limit:
        return False
    brackets = _brackets(body)
    for _ in range(limit):  # takes the innermost ones away
        if (fewer := brackets.replace(b"()", b"")) == brackets:
            return brackets.count(b"(") > limit
        brackets = fewer
    return b"(" in brackets


def _nests_more(body: bytes, limit: int) -> bool:
    """Whether a JSON text has more arrays and objects than that, at whatever depth."""
    return body.count(b"[") + body.count(b"{") > limit and _brackets(body).count(b"(") > limit


def _brackets(body: bytes) -> bytes:
    """Those of a JSON text that stand in no string, all of them round."""
    return _STRING.sub(b"", body).translate(_ROUND, _NO_BRACKETS)


async def _send_problem(send: Send, problem: Problem) -> None:
    body = problem.model_dump_json(exclude_none=True).encode()
    headers = [(b"content-type", PROBLEM.encode()), (b"content-length", str(len(body)).encode())]
    if problem.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    headers.append((b"connection", b"close"))  # what is left of a body is not read
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
