"""The scheduler: one thread that ticks, and a queue in front of it."""

import logging
import threading
from collections import deque

import torch

from ..errors import EngineFailed, ServiceClosed
from .tick import Row, Ticker

logger = logging.getLogger(__name__)


class Scheduler:
    """Lets rows join between ticks, first come, first served, as long as slots and memory allow.

    All calls of rows' callbacks come from its thread, which is started with the first row and sleeps while there is
    none.
    """

    def __init__(self, ticker: Ticker) -> None:
        """Takes the ticker over; nobody else may call it from then on."""
        self.ticker = ticker
        self._waiting: deque[Row] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._joining: Row | None = None  # the last one taken from the queue
        self._closed = False

    @property
    def waiting(self) -> int:
        """Rows that have not joined yet."""
        return len(self._waiting)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def submit(self, row: Row) -> None:
        """Queues a row.

        Raises:
            ServiceClosed: If the scheduler was closed.
        """
        with self._changed:
            if self._closed:
                raise ServiceClosed("The service is closed; load another one.")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="latentmas-tick", daemon=True)
                self._thread.start()
            self._waiting.append(row)
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
                        self.ticker.join(row)
                    self.ticker.step()
                except Exception as error:
                    # Whatever raised may have left any row half-written, so none of them goes on.
                    logger.exception("the tick failed; %d rows are lost", len(self.ticker.rows))
                    self._fail(error)

    def _wait(self) -> bool:
        """Sleeps until there is work; False once closed."""
        with self._changed:
            while not (self._closed or self._waiting or self.ticker.rows):
                self._changed.wait()
            if self._closed:
                for row in (*self.ticker.clear(), *self._waiting):
                    row.on_error(ServiceClosed("The service was closed while it worked on this request."))
                self._waiting.clear()
            return not self._closed

    def _next(self) -> Row | None:
        """The first waiting row, if it fits."""
        with self._changed:
            while self._waiting and self._waiting[0].cancelled:
                self._waiting.popleft()
            self._joining = self._waiting.popleft() if self._waiting and self.ticker.fits(self._waiting[0]) else None
            return self._joining

    def _fail(self, error: Exception) -> None:
        rows = self.ticker.clear()
        if self._joining is not None and self._joining not in rows:
            rows.append(self._joining)
        for row in rows:
            failed = EngineFailed(
                f"The engine failed ({type(error).__name__}: {error}); the same call may succeed later."
            )
            failed.__cause__ = error
            row.on_error(failed)
