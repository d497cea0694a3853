"""The thread that ticks: whatever happens to it, everybody who waits is told."""

import gc
import multiprocessing
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from langchain_latentmas.engine.kv import KV, Placed
from langchain_latentmas.engine.model import LanguageModel
from langchain_latentmas.engine.scheduler import PASSING, Scheduler
from langchain_latentmas.engine.tick import Row, Ticker
from langchain_latentmas.errors import EngineFailed, ServiceClosed
from langchain_latentmas.service.local import LocalService

from ..conftest import load_parts
from ..support import wait_for


def row(ends: list[Any], steps: int = 2) -> Row:
    return Row(past=(), start=0, inputs=[[5, 6, 7]], steps=steps, on_done=ends.append, on_error=ends.append)


class Keeper:
    """Who keeps something that the device has no room for."""

    full = True

    def give_up(self) -> None:
        self.full = False


class Stuck(Keeper):
    """Who cannot give it up."""

    def give_up(self) -> None:
        broken()


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    made = Scheduler(Ticker(LanguageModel(*load_parts("qwen3-tied", "float64")), max_rows=4, live_bytes=1 << 30))
    yield made
    made.close()


def broken(*_: object) -> None:
    raise RuntimeError("the device is gone")


def test_after_a_tick_that_failed_work_goes_on(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = list[Any](), list[Any]()
    with monkeypatch.context() as patch:
        patch.setattr(scheduler.ticker, "step", broken)
        scheduler.submit(row(first))
        wait_for(lambda: bool(first))
    scheduler.submit(row(second))
    wait_for(lambda: bool(second))
    assert isinstance(first[0], EngineFailed)
    assert len(second[0].thoughts) == 2
    assert scheduler.fault == ""


def test_a_row_that_cannot_join_ends_alone(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    ticker, ends = scheduler.ticker, [list[Any]() for _ in range(3)]
    kv = ticker.model.blank_kv(4)
    zeros = KV(*([torch.zeros_like(t, device="cpu") for t in side] for side in kv))
    assert ticker.model.rotary is not None
    monkeypatch.setattr(ticker.model.rotary, "turn", broken)
    reader = Row([Placed(zeros, 0, 7)], 4, [[5]], steps=2, on_done=ends[1].append, on_error=ends[1].append)
    with scheduler._changed:  # all of them join before the same tick
        for each in (row(ends[0], steps=9), reader, row(ends[2])):
            scheduler.submit(each)
    wait_for(lambda: all(ends))
    assert isinstance(ends[1][0], EngineFailed)
    assert "the device is gone" in str(ends[1][0])
    assert [len(ends[i][0].thoughts) for i in (0, 2)] == [9, 2]
    assert [len(each) for each in ends] == [1, 1, 1]


def test_a_thread_that_could_not_be_started_is_started_for_the_next_row(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = list[Any]()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", broken)
        with pytest.raises(RuntimeError, match="is gone"):
            scheduler.submit(row([]))
    scheduler.submit(row(ends))
    wait_for(lambda: bool(ends))
    assert len(ends[0].thoughts) == 2


def test_a_device_that_gives_no_slots_is_said_to_all(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[list[Any]] = [[], [], []]
    for name in ("step", "renew"):
        monkeypatch.setattr(scheduler.ticker, name, broken)
    monkeypatch.setattr(scheduler.ticker, "fits", lambda row: not scheduler.ticker.rows)  # the others wait
    with scheduler._changed:
        for each in ends:
            scheduler.submit(row(each))
    wait_for(lambda: all(ends))
    assert [type(each[0]) for each in ends] == [EngineFailed] * 3
    wait_for(lambda: bool(scheduler.fault))
    with pytest.raises(EngineFailed, match="the device is gone"):
        scheduler.submit(row([]))


def test_one_who_cannot_be_told_keeps_nobody_else_from_it(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, deaf = list[Any](), row([])
    deaf.on_error = broken
    monkeypatch.setattr(scheduler.ticker, "step", broken)
    with scheduler._changed:
        scheduler.submit(deaf)
        scheduler.submit(row(told))
    wait_for(lambda: bool(told))
    assert isinstance(told[0], EngineFailed)


def test_one_that_does_not_fit_is_passed_by_a_few(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    order, small = list[int](), scheduler.ticker.fits
    large = row([])
    large.steps = 3
    here = [row([]) for _ in range(PASSING + 3)]
    for i, each in enumerate(here):
        each.on_done = lambda _, i=i: order.append(i)
    large.on_done = lambda _: order.append(-1)
    # The large one wants the ticker to itself.
    monkeypatch.setattr(scheduler.ticker, "fits", lambda r: small(r) and (r is not large or not scheduler.ticker.rows))
    with scheduler._changed:
        for each in (here[0], large, *here[1:]):
            scheduler.submit(each)
    wait_for(lambda: len(order) == len(here) + 1)
    passed = order[: order.index(-1)]
    assert 1 < len(passed) <= 1 + PASSING
    assert set(passed) == set(range(len(passed)))  # first come, first served


def test_those_that_were_cancelled_take_nobody_s_turn(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    order, small = list[int](), scheduler.ticker.fits
    large, gone, last = row([]), [row([]) for _ in range(PASSING + 1)], row([])
    first = row([])
    first.steps = 3
    for i, each in enumerate((first, large, last)):
        each.on_done = lambda _, i=i: order.append(i)
    monkeypatch.setattr(scheduler.ticker, "fits", lambda r: small(r) and (r is not large or not scheduler.ticker.rows))
    with scheduler._changed:
        for each in (first, large, *gone, last):
            scheduler.submit(each)
        for each in gone:
            each.cancelled = True
    wait_for(lambda: len(order) == 3)
    assert order.index(2) < order.index(1)  # it fits beside the first one


def test_an_error_that_is_kept_keeps_no_slots(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    ends, slots = list[Any](), list[Any]()

    def fail(*_: object) -> None:
        held = scheduler.ticker.cache._tensors
        slots.extend(map(weakref.ref, held))
        raise RuntimeError("out of memory")

    gc.disable()  # a full collection may be far away
    try:
        with monkeypatch.context() as patch:
            patch.setattr(scheduler.ticker, "_decode", fail)
            scheduler.submit(row(ends))
            wait_for(lambda: bool(ends))
        assert isinstance(ends[0].__cause__, RuntimeError)
        assert slots
        wait_for(lambda: all(slot() is None for slot in slots))
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_where_memory_ran_out_what_is_kept_makes_room_before_the_next_try(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    keeper, stuck, ends, step = Keeper(), Stuck(), list[Any](), scheduler.ticker.step
    renew, renewed = scheduler.ticker.renew, list[bool]()
    for each in (stuck, keeper):
        scheduler.when_full(each.give_up)

    def full() -> None:
        if not ends:
            raise error("no memory is left")
        step()

    def noted() -> None:
        renewed.append(keeper.full)
        renew()

    monkeypatch.setattr(scheduler.ticker, "step", full)
    monkeypatch.setattr(scheduler.ticker, "renew", noted)
    for n in (1, 2):
        scheduler.submit(row(ends))
        wait_for(lambda n=n: len(ends) == n)  # type: ignore[misc]
    assert isinstance(ends[0], EngineFailed)
    assert len(ends[1].thoughts) == 2
    assert renewed == [error is RuntimeError]


def test_a_row_that_could_not_join_for_want_of_memory_has_room_made_too(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper, ends, enter = Keeper(), list[Any](), Row.enter
    scheduler.when_full(keeper.give_up)

    def full(row: Row, model: LanguageModel) -> None:
        if keeper.full:
            raise torch.OutOfMemoryError("no memory is left")
        enter(row, model)

    monkeypatch.setattr(Row, "enter", full)
    for n in (1, 2):
        scheduler.submit(row(ends))
        wait_for(lambda n=n: len(ends) == n)  # type: ignore[misc]
    assert isinstance(ends[0], EngineFailed)
    assert len(ends[1].thoughts) == 2


def test_what_is_kept_gives_way_to_what_a_row_leaves(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, gone, ends, cache = Keeper(), Keeper(), list[Any](), scheduler.ticker.cache
    for each in (gone, keeper):
        scheduler.when_full(each.give_up)
    del gone, each
    read = cache.read

    def full(*where: int) -> KV:
        if keeper.full:
            raise torch.OutOfMemoryError("no memory is left")
        return read(*where)

    monkeypatch.setattr(cache, "read", full)
    with scheduler._changed:
        for _ in range(3):
            scheduler.submit(row(ends))
    wait_for(lambda: len(ends) == 3)
    assert [end.kv.positions for end in ends] == [5] * 3


def test_only_those_near_their_turn_are_given_their_memories(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought, joined, ends, most = list[Row](), list[Row](), list[Any](), 0
    rows, join = [row(ends) for _ in range(40)], scheduler.ticker.join

    def bring(each: Row, done: Callable[[], None]) -> None:
        nonlocal most
        brought.append(each)
        most = max(most, len(brought) - len(joined))
        scheduler.submit(each)
        done()

    def noted(each: Row) -> None:
        joined.append(each)
        join(each)

    monkeypatch.setattr(scheduler.ticker, "join", noted)
    with scheduler._changed:
        for each in rows:
            scheduler.submit(each, partial(bring, each))
        for each in rows[1::2]:
            each.cancelled = True
        assert scheduler.waiting == 40
    wait_for(lambda: len(ends) == 20)
    assert brought == joined == rows[::2]  # first come, first served
    assert 4 < most <= 1 + PASSING
    assert scheduler.waiting == 0


def test_a_memory_that_takes_long_holds_up_nobody(scheduler: Scheduler) -> None:
    slow, others, coming = list[Any](), list[Any](), list[Callable[[], None]]()
    late = row(slow)
    scheduler.submit(late, coming.append)
    wait_for(lambda: bool(coming))
    ticks = scheduler.ticker.ticks
    for n in range(1, 2 * PASSING):
        scheduler.submit(row(others))
        wait_for(lambda n=n: len(others) == n)  # type: ignore[misc]
    assert not slow
    assert scheduler.waiting == 1
    assert scheduler.ticker.ticks - ticks == 2 * len(others)
    scheduler.submit(late)
    coming[0]()
    wait_for(lambda: bool(slow))
    assert scheduler.waiting == 0


@pytest.mark.parametrize(("max_rows", "slots", "near"), [(4, 20, 1 + PASSING), (16, 20, 16), (16, 12, 12)])
def test_closing_tells_those_without_their_memories_too(
    scheduler: Scheduler, max_rows: int, slots: int, near: int
) -> None:
    ticker, ends, coming = scheduler.ticker, list[Any](), list[Callable[[], None]]()
    ticker.max_rows, ticker.live_bytes = max_rows, slots * 128 * ticker.model.bytes_per_position
    rows = [row(ends) for _ in range(20)]
    with scheduler._changed:
        for each in rows:
            scheduler.submit(each, coming.append)
    wait_for(lambda: len(coming) == near)
    scheduler.close()
    assert len(coming) == near
    assert [type(end) for end in ends] == [ServiceClosed] * (20 - near)
    with pytest.raises(ServiceClosed):
        scheduler.submit(rows[0])


def test_closing_tells_without_the_lock(scheduler: Scheduler) -> None:
    """Who is told may hold a lock for which another thread waits that wants to submit."""
    stuck = list[bool]()

    def submits() -> None:
        with pytest.raises(ServiceClosed):
            scheduler.submit(row([]))

    def told(_: BaseException) -> None:
        other = threading.Thread(target=submits, daemon=True)
        other.start()
        other.join(20)
        stuck.append(other.is_alive())

    waiting = row([], steps=10**6)
    waiting.on_error = told
    scheduler.submit(waiting)
    wait_for(lambda: bool(scheduler.ticker.rows))
    scheduler.close()
    assert stuck == [False]


def test_after_a_fork_nothing_is_begun(bundled: LocalService) -> None:
    bundled.think("Hello!", steps=1)
    context = multiprocessing.get_context("fork")
    said: Any = context.SimpleQueue()

    def asks() -> None:
        try:
            bundled.think("Hello, child!", steps=1)
        except ServiceClosed as error:
            said.put(str(error))

    child = context.Process(target=asks)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert "forked" in said.get()
