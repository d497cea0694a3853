"""Where a server listens: sockets that are bound early, and let no more connections in than there are files for."""

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from ..errors import InvalidRequest
from .serving import ServeSettings, connections_that_fit

logger = logging.getLogger(__name__)

BACKLOG = 2048  # connections that the system keeps until they are let in


class Port:
    """The host and port of a server: its own from the start, while whoever connects before `open` is refused."""

    def __init__(self, settings: ServeSettings) -> None:
        """Takes the port, on all addresses of the host.

        Args:
            settings: Host, port, and how many connections there may be at a time.

        Raises:
            InvalidRequest: If the host is not this machine's, or the port is in use or not for this user.
        """
        self.host, self.port = settings.host, settings.port
        self._sockets: list[socket.socket] = []
        most = connections_that_fit(settings.max_connections)
        let_in: WeakSet[socket.socket] = WeakSet()
        with self._usable():
            found = socket.getaddrinfo(self.host or None, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, _, _, _, address in dict.fromkeys(found):
                try:
                    self._bind(_Listener(family, most, let_in), address)
                except OSError as error:
                    # A name may have an address of a family that is switched off.
                    if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                        raise
                    absent = error
            if not self._sockets:
                raise absent

    def open(self) -> list[socket.socket]:
        """Listens from now on.

        Returns:
            A socket for each address.

        Raises:
            InvalidRequest: If another process, which had taken the port as well, was faster.
        """
        with self._usable():
            for each in self._sockets:
                each.listen(BACKLOG)
        return self._sockets

    def close(self) -> None:
        """Gives the port back; idempotent."""
        for each in self._sockets:
            each.close()

    def _bind(self, listener: socket.socket, address: Any) -> None:
        self._sockets.append(listener)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name == "posix")
            if listener.family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, True)
            listener.bind(address)
        except OSError:
            self._sockets.remove(listener)
            listener.close()
            raise

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, UnicodeError) as error:  # the latter of a name that is none
            self.close()
            raise InvalidRequest(
                f"Port {self.port} of {self.host} cannot be listened on ({error}); choose another port or host, or end "
                "what listens there."
            ) from error


class _Listener(socket.socket):
    """Hangs up on who is one too many, and at once: a connection has a file before its TLS handshake, or any head."""

    def __init__(self, family: int, most: int, let_in: WeakSet[socket.socket]) -> None:
        # Named, since asyncio sends small replies without delay only on sockets that say they are TCP.
        super().__init__(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self.most, self.let_in, self.told = most, let_in, False

    def accept(self) -> tuple[socket.socket, Any]:
        """See `socket.socket.accept`; as if who is one too many had gone by itself."""
        connection, address = super().accept()
        if len(self.let_in) < self.most or sum(each.fileno() >= 0 for each in self.let_in) < self.most:
            self.told = False
            self.let_in.add(connection)
            return connection, address
        connection.close()
        if not self.told:
            self.told = True
            logger.warning("%d connections are open, the most there may be; more are closed at once", self.most)
        raise ConnectionAbortedError
