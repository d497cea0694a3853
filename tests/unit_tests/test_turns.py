import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_latentmas.errors import ServiceBusy
from langchain_latentmas.service.turns import MAX_RETRY_AFTER, Turns


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Asked:
    """Requests that note the order in which they get their turns, and hold them until told."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.order, self.tasks = turns, [], []
        self.go = asyncio.Event()

    async def ask(self, *requests: tuple[str, str]) -> None:
        for tenant, client in requests:
            self.tasks.append(asyncio.create_task(self._hold(tenant, client)))
            await settle()

    async def _hold(self, tenant: str, client: str) -> None:
        async with self.turns.turn(tenant, client):
            self.order.append((tenant, client))
            await self.go.wait()

    async def finish(self) -> list[BaseException | None]:
        self.go.set()
        return await asyncio.gather(*self.tasks, return_exceptions=True)


async def order_of(requests: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    asked = Asked(Turns(1, 100))
    await asked.ask(("first", "first"), *requests)
    assert await asked.finish() == [None] * (1 + len(requests))
    return asked.order[1:]


async def test_who_comes_first_goes_first() -> None:
    turns = Turns(1, 10)
    order = []

    async def work(i: int) -> None:
        async with turns.turn("", "a"):
            order.append(i)
            await asyncio.sleep(0)

    await asyncio.gather(*(work(i) for i in range(8)))
    assert order == list(range(8))


async def test_clients_take_turns() -> None:
    asked = [("", "a")] * 4 + [("", "b")] * 2 + [("", "c")]
    assert [client for _, client in await order_of(asked)] == ["a", "b", "c", "a", "b", "a", "a"]


async def test_tenants_take_turns_however_many_clients_they_name() -> None:
    asked = [("greedy", f"{i}") for i in range(4)] + [("modest", "x")] * 2
    assert [tenant for tenant, _ in await order_of(asked)] == ["greedy", "modest", "greedy", "modest"] + ["greedy"] * 2


async def test_who_holds_many_turns_gets_no_more_while_others_have_fewer() -> None:
    turns = Turns(4, 10)
    long, short = Asked(turns), Asked(turns)
    await long.ask(*[("greedy", "a")] * 4)
    await short.ask(*[("modest", "b")] * 3)
    await long.ask(*[("greedy", "a")] * 4)
    for task in long.tasks[:2]:
        task.cancel()
        await settle()
    assert short.order == [("modest", "b")] * 2
    assert long.order == [("greedy", "a")] * 4
    assert await short.finish() == [None] * 3
    await long.finish()
    assert turns.running == turns.waiting == 0


async def test_no_more_than_allowed_work_at_a_time() -> None:
    asked = Asked(Turns(3, 10))
    await asked.ask(*[("", "a")] * 5)
    assert len(asked.order) == asked.turns.running == 3
    assert asked.turns.waiting == 2
    await asked.finish()
    assert asked.turns.running == asked.turns.waiting == 0


async def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    asked = Asked(Turns(1, 2))
    await asked.ask(*[("", "a")] * 3)
    with pytest.raises(ServiceBusy, match="2 requests wait") as refused:
        async with asked.turns.turn("", "a"):
            pass
    assert 0 < (refused.value.retry_after or 0) <= MAX_RETRY_AFTER
    assert asked.turns.refused == 1
    assert await asked.finish() == [None] * 3


@pytest.mark.parametrize("late", [("", "b"), ("other", "a")])
async def test_a_flood_keeps_nobody_else_out(late: tuple[str, str]) -> None:
    asked = Asked(Turns(1, 3))
    await asked.ask(*[("", "a")] * 4, late)
    done = await asked.finish()
    assert [type(each) for each in done] == [type(None)] * 3 + [ServiceBusy, type(None)]  # the flood's latest goes
    assert asked.order[2] == late


async def test_nobody_is_sent_away_for_somebody_who_has_as_much_waiting() -> None:
    asked = Asked(Turns(1, 2))
    await asked.ask(("", "a"), ("", "a"), ("", "b"), ("", "c"))
    done = await asked.finish()
    assert [type(each) for each in done] == [type(None)] * 3 + [ServiceBusy]


async def test_without_a_queue_only_free_turns_are_given() -> None:
    asked = Asked(Turns(1, 0))
    await asked.ask(("", "a"), ("", "b"))
    assert [type(each) for each in await asked.finish()] == [type(None), ServiceBusy]


async def test_giving_up_while_waiting_leaves_the_queue() -> None:
    asked = Asked(Turns(1, 5))
    await asked.ask(("", "a"), ("", "b"), ("", "c"))
    asked.tasks[1].cancel()
    await settle()
    assert asked.turns.waiting == 1
    await asked.finish()
    assert asked.order == [("", "a"), ("", "c")]


async def test_giving_up_at_the_moment_of_ones_turn_passes_it_on() -> None:
    turns = Turns(1, 5)
    stack = AsyncExitStack()
    await stack.enter_async_context(turns.turn("", "a"))
    waiting = asyncio.create_task(turns._wait("", "b"))
    await settle()
    await stack.aclose()  # the turn is b's now, but b has not run yet
    waiting.cancel()
    await settle()
    assert turns.running == 0
    async with turns.turn("", "c"):
        assert turns.running == 1


async def test_who_fails_gives_the_turn_back() -> None:
    turns = Turns(1, 0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            async with turns.turn("", "a"):
                raise ZeroDivisionError
    assert turns.running == 0


@given(
    st.integers(1, 4),
    st.integers(0, 6),
    st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("ab"), st.integers(0, 9)), max_size=40),
)
async def test_turns_are_neither_lost_nor_given_twice(
    running: int, waiting: int, events: list[tuple[str, str, int]]
) -> None:
    turns = Turns(running, waiting)
    go, at_work, most = asyncio.Event(), 0, 0

    async def hold(tenant: str, client: str) -> None:
        nonlocal at_work, most
        async with turns.turn(tenant, client):
            at_work += 1
            most = max(most, at_work)
            try:
                await go.wait()
            finally:
                at_work -= 1

    tasks = []
    for tenant, client, what in events:
        if what < 7 or not tasks:
            tasks.append(asyncio.create_task(hold(tenant, client)))
        else:
            tasks[what % len(tasks)].cancel()
        if what % 2:
            await settle()
        assert turns.waiting <= waiting
    go.set()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(each) for each in done} <= {type(None), ServiceBusy, asyncio.CancelledError}
    assert most <= running
    assert turns.running == turns.waiting == 0
    assert turns._lines == {}
    assert not any(turns._held.values())
