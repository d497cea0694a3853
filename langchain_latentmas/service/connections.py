"""Connections of a client to a server, `latentmas serve` above all."""

import asyncio
import logging
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager

import httpx

from ..errors import DeadlineExceeded, InvalidRequest, ServiceBusy, ServiceUnreachable
from .serving import is_loopback

logger = logging.getLogger(__name__)

KEPT_SECONDS = 3.0  # that an idle connection is used again within; the server closes it after 5


def is_address(url: str) -> bool:
    """Whether it is that of a server: `http` or `https`, a host, maybe a port and a path, and nothing else."""
    try:
        parts = httpx.URL(url)
        parts.raw_host.decode("ascii").encode("idna")  # as the socket will, and fail on labels without or too long
    except (httpx.InvalidURL, UnicodeError):
        return False
    known = parts.scheme in ("http", "https") and parts.host and (parts.port or 0) < 1 << 16
    return bool(known) and not (parts.userinfo or parts.query or parts.fragment)


def warn_of_plain(url: str, secret: str) -> None:
    """Says that others on the way can read a secret, unless the server is this machine, or the address is `https`."""
    address = httpx.URL(url)
    if address.scheme == "http" and not is_loopback(address.host):
        logger.warning("the %s for %s travels unencrypted; use https://", secret, url)


@contextmanager
def reaching(url: str, server: str) -> Iterator[None]:
    """Turns errors of the connection into ours.

    Args:
        url: Where the server should be.
        server: What should run there.

    Raises:
        ServiceUnreachable: If it cannot be reached, or the connection broke.
        ServiceBusy: If all connections are in use for as long as the request may wait for one.
        InvalidRequest: If the request cannot be sent as it is.
    """
    try:
        yield
    except httpx.PoolTimeout as error:
        raise ServiceBusy(
            f"All connections to {url} are in use; raise max_connections or patience, or ask for less at once."
        ) from error
    except httpx.LocalProtocolError:
        # Its words quote what is wrong, and a header may hold a token.
        raise InvalidRequest(
            f"The request to {url} is no valid HTTP: a header holds what none may, or a file changed while it was sent."
        ) from None
    except httpx.TransportError as error:
        raise ServiceUnreachable(
            f"{url} cannot be reached, or the connection broke ({type(error).__name__}: {error}). Is {server} running "
            "there?"
        ) from error


@contextmanager
def in_time(said: str) -> Iterator[None]:
    """A server that took a request and says nothing is there, and may still be at work: to ask again would add to that.

    Args:
        said: What the error says.

    Raises:
        DeadlineExceeded: If nothing is read for as long as the request's timeout says.
    """
    try:
        yield
    except httpx.ReadTimeout as error:
        raise DeadlineExceeded(said) from error


class Connections(httpx.AsyncBaseTransport):
    """The connections of one event loop, each in a pool of its own.

    httpcore's pool looks at all its connections several times for every request: with hundreds of them, that takes more
    of the processor than the requests themselves.
    """

    def __init__(self, most: int, verify: ssl.SSLContext) -> None:
        """Opens none.

        Args:
            most: Most connections at a time.
            verify: Checks the server's certificate.
        """
        self._verify = verify
        self._free = asyncio.Semaphore(most)
        # With the time of their last use; the last one used is the first to be used again.
        self._idle: deque[tuple[float, httpx.AsyncHTTPTransport]] = deque()
        self._all: set[httpx.AsyncHTTPTransport] = set()
        self._closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends a request; its connection is free again when the reply is closed.

        Raises:
            httpx.PoolTimeout: If none becomes free in time.
            RuntimeError: If they were closed.
        """
        try:
            async with asyncio.timeout(request.extensions["timeout"]["pool"] if self._free.locked() else None):
                await self._free.acquire()
        except TimeoutError:
            raise httpx.PoolTimeout("all connections are in use", request=request) from None
        if self._closed:
            self._free.release()
            raise RuntimeError("The connections are closed.")
        one = self._idle.pop()[1] if self._idle else self._opened()

        async def give_back() -> None:
            self._idle.append((time.monotonic(), one))
            self._free.release()
            await self._close_old()

        try:
            reply = await one.handle_async_request(request)
        except BaseException:
            await give_back()
            raise
        assert isinstance(reply.stream, httpx.AsyncByteStream)
        reply.stream = _Body(reply.stream, give_back)
        return reply

    async def aclose(self) -> None:
        """Closes all connections; no other is opened from then on."""
        self._closed = True
        for one in list(self._all):
            await one.aclose()

    async def _close_old(self) -> None:
        """Closes those that will not be used again: the server has closed its ends, and nobody else looks at them."""
        while self._idle and self._idle[0][0] < time.monotonic() - KEPT_SECONDS:
            _, one = self._idle.popleft()
            self._all.remove(one)
            await one.aclose()

    def _opened(self) -> httpx.AsyncHTTPTransport:
        limits = httpx.Limits(max_connections=1, keepalive_expiry=KEPT_SECONDS)
        one = httpx.AsyncHTTPTransport(verify=self._verify, trust_env=False, limits=limits)
        self._all.add(one)
        return one


class _Body(httpx.AsyncByteStream):
    """The body of a reply, that says when it is closed."""

    def __init__(self, stream: httpx.AsyncByteStream, closed: Callable[[], Awaitable[None]]) -> None:
        self.stream, self.closed = stream, closed
        self._open = True

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self.stream.__aiter__()

    async def aclose(self) -> None:
        try:
            await self.stream.aclose()
        finally:
            if self._open:
                self._open = False
                await self.closed()
