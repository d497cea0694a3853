"""Events reach the queues of an event loop in their order, and few wake-ups carry many."""

import asyncio
import threading
from concurrent.futures import Future
from typing import Any

from langchain_latentmas.service.mailbox import Mailbox


async def test_every_queue_gets_its_events_in_order_from_many_threads() -> None:
    loop, n = asyncio.get_running_loop(), 200
    inboxes: list[asyncio.Queue[Any]] = [asyncio.Queue() for _ in range(8)]

    def tick(first: int) -> None:  # two threads put into each queue
        for i in range(n):
            for inbox in inboxes:
                Mailbox.of(loop).put(loop, inbox, (first, i))

    threads = [threading.Thread(target=tick, args=(first,)) for first in range(2)]
    for thread in threads:
        thread.start()
    for inbox in inboxes:
        got = [await asyncio.wait_for(inbox.get(), 30) for _ in range(2 * n)]
        for first in range(2):
            assert [i for of, i in got if of == first] == list(range(n))
    for thread in threads:
        thread.join()
    assert all(inbox.empty() for inbox in inboxes)


async def test_what_comes_at_once_wakes_the_loop_once(monkeypatch: Any) -> None:
    loop, inbox, woken = asyncio.get_running_loop(), asyncio.Queue[int](), []
    wake = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *call: (woken.append(call), wake(*call)))
    for i in range(100):
        Mailbox.of(loop).put(loop, inbox, i)
    assert [await inbox.get() for _ in range(100)] == list(range(100))
    assert len(woken) == 1
    Mailbox.of(loop).put(loop, inbox, 100)
    assert await inbox.get() == 100
    assert len(woken) == 2


def test_a_closed_loop_is_no_error() -> None:
    loop = asyncio.new_event_loop()
    mailbox = Mailbox.of(loop)
    loop.close()
    for i in range(3):
        mailbox.put(loop, asyncio.Queue(), i)
    assert not mailbox._events


async def test_what_comes_of_other_threads_futures_arrives_in_one_wake_up(monkeypatch: Any) -> None:
    loop, woken = asyncio.get_running_loop(), []
    wake = loop.call_soon_threadsafe
    futures = [Future[int]() for _ in range(20)]
    waiting = asyncio.gather(*map(Mailbox.of(loop).arrival, futures), return_exceptions=True)
    await asyncio.sleep(0)
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *call: (woken.append(call), wake(*call)))
    for i, future in enumerate(futures[:-1]):
        future.set_result(i)
    futures[-1].set_exception(error := ValueError("no"))
    assert await waiting == [*range(19), error]
    assert len(woken) == 1
