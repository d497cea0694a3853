"""The scheduler: one thread that ticks, and a queue in front of it."""

import logging
import os
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import cast

import torch

from ..errors import EngineFailed, ServiceClosed
from .tick import NotJoined, Row, Ticker

logger = logging.getLogger(__name__)

PASSING = 8
"""Rows that may go before one that waits for more room than there is."""

Bring = Callable[[Callable[[], None]], None]
"""What `Scheduler.submit` takes."""


class Scheduler:
    """Lets rows join between ticks, first come, first served, as long as slots and memory allow.

    Rows behind one that does not fit may go before it, but only `PASSING` of them. So no more than these and the first
    one are given the memories that they read, or as many as there are slots for: however many wait, the others hold no
    room on the device.

    All calls of rows' callbacks come from its thread, which is started with the first row and sleeps while there is
    none.

    Attributes:
        ticker: Whose rows they are.
        fault: Why no row is worked on any more; "" while they are.
    """

    def __init__(self, ticker: Ticker) -> None:
        """Takes the ticker over; nobody else may call it from then on."""
        self.ticker, self.fault = ticker, ""
        ticker.make_room = self._make_room
        self._waiting: deque[Row] = deque()
        self._far: deque[tuple[Row, Bring]] = deque()  # behind those, without their memories
        self._bringing = 0  # rows between the two
        self._keepers: list[weakref.WeakMethod[Callable[[], object]]] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._joining: Row | None = None  # the last one taken from the queue
        self._passed = 0  # rows that went before the first in the queue, since it is the first
        self._closed, self._process = False, os.getpid()

    @property
    def waiting(self) -> int:
        """Rows that have not joined yet."""
        return len(self._waiting) + self._bringing + len(self._far)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def when_full(self, give_up: Callable[[], object]) -> None:
        """Has a method called where the device has no memory left, before it is tried again.

        Args:
            give_up: Frees a part of what its object keeps; forgotten with that.
        """
        self._keepers.append(weakref.WeakMethod(give_up))

    def submit(self, row: Row, bring: Bring | None = None) -> None:
        """Queues a row.

        Args:
            row: The row.
            bring: Has the memory brought that the row reads; called in the scheduler's thread, which must not wait for
                it, once the row's turn is near. It submits the row again, without this, or tells it an error, and then
                calls what it was given. None for a row that has its memory.

        Raises:
            ServiceClosed: If the scheduler was closed, or made before this process was forked.
            EngineFailed: If the device no longer works.
        """
        if os.getpid() != self._process:  # its thread is not there
            raise ServiceClosed("The service was loaded before the process was forked; load it in the new one.")
        with self._changed:
            if self._closed:
                raise ServiceClosed("The service is closed; load another one.")
            if self.fault:
                raise EngineFailed(
                    f"The engine does not work any more ({self.fault}); load the service in a new process."
                )
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="latentmas-tick", daemon=True)
                thread.start()  # may fail; then the next row tries again
                self._thread = thread
            if bring is None:
                self._waiting.append(row)
            else:
                self._far.append((row, bring))
            self._changed.notify()

    def close(self) -> None:
        """Stops after the running tick; rows that are not finished get `ServiceClosed`. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        with torch.inference_mode():
            while self._wait():
                try:
                    while row := self._next():
                        self._join(row)
                    if self.ticker.rows:
                        self.ticker.step()
                except Exception as error:
                    # Whatever raised may have left any row half-written, so none of them goes on.
                    logger.exception("the tick failed; %d rows are lost", len(self.ticker.rows))
                    traceback.clear_frames(error.__traceback__)  # or whoever keeps the error keeps the slots too
                    rows = self.ticker.clear()
                    if self._joining is not None and self._joining not in rows:
                        rows.append(self._joining)
                    _tell(rows, error)
                    if isinstance(error, torch.OutOfMemoryError):
                        self._make_room()  # or whoever tries again meets the same
                    self._renew()
            _tell((*self.ticker.clear(), *self._left()))
            with suppress(Exception):  # whoever keeps the service keeps neither slots nor recorded steps
                self.ticker.renew()

    def _join(self, row: Row) -> None:
        try:
            self.ticker.join(row)
        except NotJoined as error:  # there is no room to turn the keys of its memory, say
            logger.exception("a row is lost")
            cause = cast(Exception, error.__cause__)
            traceback.clear_frames(cause.__traceback__)  # they hold parts of its memory
            _tell([row], cause)
            if isinstance(cause, torch.OutOfMemoryError):
                self._make_room()

    def _make_room(self) -> None:
        for keeper in self._keepers:
            if (give_up := keeper()) is not None:
                try:
                    give_up()
                except Exception:  # rows are still to be told, and slots to be renewed
                    logger.exception("what is kept could not make room")

    def _renew(self) -> None:
        """Gets new slots; where the device has none any more, nothing is worked on from then on."""
        try:
            self.ticker.renew()
        except Exception as error:
            logger.exception("the device does not work any more; no request can be worked on")
            with self._changed:
                self.fault = f"{type(error).__name__}: {error}"
            _tell(self._left(), error)

    def _wait(self) -> bool:
        """Sleeps until there is work; False once there will be none."""
        with self._changed:
            while not (self._closed or self.fault or self._waiting or self.ticker.rows or self._is_one_near):
                self._changed.wait()
            return not (self._closed or self.fault)

    @property
    def _is_one_near(self) -> bool:
        """Whether the next one without its memory is so near its turn that it is brought. Asked under the lock."""
        near, ticker = len(self._waiting) + self._bringing, self.ticker
        if not self._far or near <= PASSING:
            return bool(self._far)
        rows, cells = len(ticker.rows) + near + 1, max(ticker.cache.capacity, self._far[0][0].end)
        return rows <= ticker.max_rows and rows * cells * ticker.model.bytes_per_position <= ticker.live_bytes

    def _bring(self) -> None:
        """Has the memories brought of those whose turn is near; not under the lock, since `bring` may want others."""
        while True:
            with self._changed:
                if not self._is_one_near:
                    return
                row, bring = self._far.popleft()
                if row.cancelled:
                    continue
                self._bringing += 1
            bring(self._brought)

    def _brought(self) -> None:
        with self._changed:
            self._bringing -= 1
            self._changed.notify()

    def _next(self) -> Row | None:
        """The first waiting row that fits."""
        self._joining = None
        self._bring()
        with self._changed:
            at = 0
            while at < min(len(self._waiting), 1 + PASSING - self._passed):
                row = self._waiting[at]
                if not row.cancelled and not self.ticker.fits(row):
                    at += 1
                    continue
                del self._waiting[at]
                if not at:
                    self._passed = 0
                if not row.cancelled:
                    self._passed += bool(at)
                    self._joining = row
                    break
            return self._joining

    def _left(self) -> list[Row]:
        """Takes all waiting rows out of the queue. Whoever is told of them must not be told under the lock."""
        with self._changed:
            left = [*self._waiting, *(row for row, _ in self._far)]
            self._waiting.clear()
            self._far.clear()
            self._passed = 0
            return left


def _tell(rows: Iterable[Row], cause: Exception | None = None) -> None:
    """Ends rows: because of an error, or because the service was closed."""
    for row in rows:
        error: Exception = ServiceClosed("The service was closed while it worked on this request.")
        if cause is not None:
            error = EngineFailed(
                f"The engine failed ({type(cause).__name__}: {cause}); the same call may succeed later."
            )
            error.__cause__ = cause
        try:
            row.on_error(error)
        except Exception:  # the others are still to be told
            logger.exception("who waited for a row could not be told that it ended")
