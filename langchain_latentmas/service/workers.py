"""The threads of a server, which know for whom they work."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

A = TypeVar("A")
Work = Future[Any]

_OWN: ContextVar[set[Work] | None] = ContextVar("own", default=None)


class Workers(ThreadPoolExecutor):
    """Threads of an event loop. Cancelling a task that waits for one does not end it: see `at_work`."""

    def submit(self, fn: Callable[..., A], /, *args: Any, **kwargs: Any) -> "Future[A]":
        """See `concurrent.futures.Executor.submit`."""
        work = super().submit(fn, *args, **kwargs)
        if (own := _OWN.get()) is not None:
            own.add(work)
            work.add_done_callback(own.discard)
        return work


@contextmanager
def at_work() -> Iterator[set[Work]]:
    """What threads are at work on, of all that this task, and those it begins, have them do in here."""
    own: set[Work] = set()
    _OWN.set(own)
    try:
        yield own
    finally:
        _OWN.set(None)
