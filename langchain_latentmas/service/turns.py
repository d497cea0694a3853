"""Turns at the model: how many requests work at a time, who waits, and who is next."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ..errors import ServiceBusy

Waiter = asyncio.Future[None]
MIN_RETRY_AFTER, MAX_RETRY_AFTER = 0.1, 60.0


class Turns:
    """A bounded queue, fair between tenants, and between the clients of each. Belongs to one event loop.

    The next turn goes to the tenant that has fewest; those that have as many take turns, within a tenant its clients
    do, and within a client the first to come is the first to go.
    When the queue is full, whoever has most waiting has the least claim: its latest request makes room for one of
    somebody who has less, so that a flood keeps nobody else out.

    Attributes:
        running: Requests that have a turn.
        waiting: Requests that wait for one.
        refused: Requests that were sent away since the start.
    """

    def __init__(self, running: int, waiting: int) -> None:
        """Starts empty.

        Args:
            running: Most requests at work.
            waiting: Most requests in the queue.
        """
        self.most_running, self.most_waiting = running, waiting
        self.running = self.waiting = self.refused = 0
        self._lines: dict[str, dict[str, deque[Waiter]]] = {}  # whoever is next comes first
        self._held: Counter[str] = Counter()  # turns by tenant
        self._seconds = 1.0  # that a turn takes, on a moving average

    @property
    def retry_after(self) -> float:
        """Seconds in which the present queue is likely to be worked off."""
        return min(MAX_RETRY_AFTER, max(MIN_RETRY_AFTER, self._seconds * (1 + self.waiting) / self.most_running))

    @asynccontextmanager
    async def turn(self, tenant: str, client: str) -> AsyncIterator[None]:
        """Waits for a turn and holds it; cancelling the task gives it up, also while it waits.

        Raises:
            ServiceBusy: If the queue is full.
        """
        await self._wait(tenant, client)
        begun = time.monotonic()
        try:
            yield
        finally:
            self._seconds += (time.monotonic() - begun - self._seconds) / 32
            self._pass_on(tenant)

    async def _wait(self, tenant: str, client: str) -> None:
        if self.running < self.most_running and not self.waiting:
            self._give(tenant)
            return
        if self.waiting >= self.most_waiting:
            self._make_room(tenant, client)
        waiter: Waiter = asyncio.get_running_loop().create_future()
        self._lines.setdefault(tenant, {}).setdefault(client, deque()).append(waiter)
        self.waiting += 1
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._pass_on(tenant)  # the turn came at the moment of giving up
            elif waiter in self._lines.get(tenant, {}).get(client, ()):
                self._leave(tenant, client, waiter)
            raise

    def _give(self, tenant: str) -> None:
        self.running += 1
        self._held[tenant] += 1

    def _pass_on(self, tenant: str) -> None:
        self.running -= 1
        self._held[tenant] -= 1
        while self.waiting and self.running < self.most_running:
            tenant = min(self._lines, key=lambda name: self._held[name])  # the first of those
            clients = self._lines[tenant]
            client, line = next(iter(clients.items()))
            waiter = line[0]
            self._leave(tenant, client, waiter)
            if client in clients:  # to the end, both
                clients[client] = clients.pop(client)
            if tenant in self._lines:
                self._lines[tenant] = self._lines.pop(tenant)
            if not waiter.done():
                self._give(tenant)
                waiter.set_result(None)

    def _make_room(self, tenant: str, client: str) -> None:
        """Sends away the latest request of who has most waiting, or refuses this one if that is its own client."""
        self.refused += 1
        waiting = {name: sum(map(len, clients.values())) for name, clients in self._lines.items()}
        busiest = max(waiting, key=lambda name: waiting[name], default=tenant)
        if waiting.get(busiest, 0) <= waiting.get(tenant, 0) + 1:
            busiest = tenant
        lines = self._lines.get(busiest, {})
        longest = max(lines, key=lambda name: len(lines[name]), default=client)
        if busiest == tenant and len(lines.get(longest, ())) <= len(lines.get(client, ())) + 1:
            raise self._busy()
        latest = lines[longest][-1]
        self._leave(busiest, longest, latest)
        if not latest.done():
            latest.set_exception(self._busy())

    def _leave(self, tenant: str, client: str, waiter: Waiter) -> None:
        line = self._lines[tenant][client]
        line.remove(waiter)
        self.waiting -= 1
        if not line:
            del self._lines[tenant][client]
        if not self._lines[tenant]:
            del self._lines[tenant]

    def _busy(self) -> ServiceBusy:
        error = ServiceBusy(
            f"The server's queue is full ({self.waiting} requests wait); call again in {self.retry_after:.2f} s."
        )
        error.retry_after = self.retry_after
        return error
