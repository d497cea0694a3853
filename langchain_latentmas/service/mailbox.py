"""The mailbox: events on their way from other threads to an event loop."""

import asyncio
import threading
from concurrent.futures import Future
from functools import partial
from typing import Any, ClassVar, TypeVar
from weakref import WeakKeyDictionary

A = TypeVar("A")


class Mailbox:
    """Delivers the events of all rows and recipes of an event loop, many in one wake-up.

    A tick that tells each of 64 rows of its token would otherwise wake the loop 64 times, and each time lose the
    interpreter to it.
    """

    _of: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, "Mailbox"]] = WeakKeyDictionary()
    _made: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self) -> None:
        """Starts empty; `of` is the way in."""
        self._events: list[tuple[asyncio.Queue[Any], Any]] = []
        self._lock = threading.Lock()

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> "Mailbox":
        """The one of a loop."""
        with cls._made:
            return cls._of.setdefault(loop, cls())

    def put(self, loop: asyncio.AbstractEventLoop, inbox: "asyncio.Queue[Any]", event: object) -> None:
        """Lets a queue of the loop have an event, in the order of the calls; from any thread, without waiting."""
        with self._lock:
            self._events.append((inbox, event))
            if len(self._events) > 1:
                return  # the loop has been woken up for those before
        try:
            loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # it was closed while rows were at work; nobody waits any more
            self._take()

    @classmethod
    async def arrival(cls, future: "Future[A]") -> A:
        """What comes of a future of another thread, by way of the mailbox of the running loop."""
        if future.done():
            return future.result()
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Future[A]] = asyncio.Queue()
        future.add_done_callback(partial(cls.of(loop).put, loop, inbox))
        return (await inbox.get()).result()

    def _deliver(self) -> None:
        for inbox, event in self._take():
            inbox.put_nowait(event)

    def _take(self) -> list[tuple["asyncio.Queue[Any]", Any]]:
        with self._lock:
            events, self._events = self._events, []
            return events
