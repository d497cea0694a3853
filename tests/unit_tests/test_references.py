"""References in a store that stays: listed, pinned, dropped, grown old, and refused where there is no room."""

import asyncio
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.stores import InMemoryByteStore

from langchain_latentmas import LatentRef
from langchain_latentmas.errors import DroppedReference, InvalidRequest, StoreFull, TamperedReference, UnknownReference
from langchain_latentmas.service.local import LocalService
from langchain_latentmas.service.store import FolderStore
from langchain_latentmas.service.transfer import write_memory

from ..conftest import Fresh
from ..support import at_once, kv_copy, kv_difference, messages, say, wait_for

PLAN = messages("Plan it.")
CHECK = messages("Check it.")


def two(service: LocalService) -> tuple[LatentRef, LatentRef]:
    plan = service.think(PLAN, steps=3, agent="planner")
    return plan, service.think(CHECK, [plan], steps=2, agent="critic")


def uses(service: LocalService, ref: LatentRef) -> list[Callable[[], Any]]:
    marker = str(service.marker(ref))
    return [
        lambda: service.think("Read.", [ref], steps=1),
        lambda: service.speak("Read.", [ref]),
        lambda: service.memory(ref),
        lambda: service.lens(ref),
        lambda: service.marker(ref),
        lambda: service.pin(ref),
        lambda: service.altered(ref, "zeroed"),
        lambda: service.take_markers(marker),
    ]


@pytest.mark.parametrize("store", ["folder", "memory", "own"])
def test_references_are_listed_with_the_latest_first(fresh_service: Fresh, tmp_path: Path, store: str) -> None:
    shelf = {"folder": tmp_path, "memory": None, "own": InMemoryByteStore()}[store]
    service = fresh_service(store=shelf, key=b"k" * 32)
    assert service.references() == []
    plan, critique = two(service)
    said = say(service, "Speak.", [critique])
    listed = service.references()
    assert [each.ref["id"] for each in listed] == [said.ref["id"], critique["id"], plan["id"]]
    assert [each.ref for each in listed[1:]] == [critique, plan]
    assert not any(each.pinned for each in listed)
    assert all(each.nbytes > 0 for each in listed)
    assert all(0 <= time.time() - each.made.timestamp() < 60 for each in listed)
    assert all(each.used >= each.made for each in listed) or store == "folder"  # clocks of files may be coarse
    assert all(service.memory(each.ref).positions == each.ref["positions"] for each in listed)


def test_a_dropped_reference_is_a_typed_error_wherever_it_is_used(fresh_service: Fresh, tmp_path: Path) -> None:
    service = fresh_service(store=tmp_path)
    plan, critique = two(service)
    calls, ticks = uses(service, plan), service.info()["ticks"]
    service.drop(plan)
    for use in calls:
        with pytest.raises(DroppedReference, match="dropped"):
            use()
    assert service.info()["ticks"] == ticks
    assert [each.ref for each in service.references()] == [critique]


@pytest.mark.parametrize("restart", [True, False])
def test_whoever_descends_from_a_dropped_reference_keeps_its_segments(
    fresh_service: Fresh, tmp_path: Path, restart: bool
) -> None:
    service = fresh_service(store=tmp_path)
    plan, critique = two(service)
    before, words = kv_copy(service.memory(critique)), say(service, "So?", [critique]).token_ids
    service.drop(plan)
    if restart:
        service = fresh_service(store=tmp_path)
    service._pool.kept.clear()
    assert [segment.agent for segment in service.memory(critique).segments] == ["planner", "critic"]
    assert kv_difference(service.memory(critique), before) < 1e-8
    assert say(service, "So?", [critique]).token_ids == words


def test_what_nobody_descends_from_is_gone_and_so_is_its_kv(fresh_service: Fresh, tmp_path: Path) -> None:
    service = fresh_service(store=tmp_path)
    plan, critique = two(service)
    service.drop(critique)
    assert service.info()["kv_segments"] == 1
    service.drop(plan)
    assert service.info()["kv_segments"] == service.info()["store_bytes"] == 0
    with pytest.raises(UnknownReference):
        service.memory(critique)
    service.drop(critique)  # gone already
    with pytest.raises(TamperedReference):
        service.drop({**critique, "steps": 9})


def test_a_drop_that_was_stopped_is_finished_when_it_is_repeated(
    fresh_service: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = fresh_service(store=tmp_path)
    plan, critique = two(service)
    with monkeypatch.context() as stopped:
        stopped.setattr(service._retention, "_remove", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            service.drop(critique)
    again = fresh_service(store=tmp_path)
    again.drop(critique)
    assert not list((tmp_path / "recipes").glob(f"{critique['id']}*"))
    assert again.memory(plan).positions == plan["positions"]


def test_of_a_drop_that_fails_halfway_no_kv_of_what_was_removed_stays(
    fresh_service: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = fresh_service(store=tmp_path)
    plan, critique = two(service)
    service.drop(plan)
    before, store = service.info()["kv_segments"], service._store.store
    remove = store.mdelete

    def remove_once(names: list[str]) -> None:
        monkeypatch.setattr(store, "mdelete", refuse)
        remove(names)

    def refuse(names: list[str]) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(store, "mdelete", remove_once)
    with pytest.raises(OSError, match="the disk is gone"):
        service.drop(critique)
    assert service.info()["kv_segments"] == before - 1
    monkeypatch.setattr(store, "mdelete", remove)
    with pytest.raises(UnknownReference):
        service.memory(critique)
    assert list((tmp_path / "recipes").glob(f"{plan['id']}*"))  # it was not its turn yet


@pytest.mark.parametrize("descendant", [True, False])
def test_to_think_the_same_again_makes_a_dropped_reference_anew(
    fresh_service: Fresh, tmp_path: Path, descendant: bool
) -> None:
    service = fresh_service(store=tmp_path)
    plan = service.think(PLAN, steps=3, agent="planner")
    if descendant:
        service.think(CHECK, [plan], steps=2)
    service.drop(plan)
    assert service.think(PLAN, steps=3, agent="planner") == plan
    assert service.memory(plan).positions == plan["positions"]


def test_what_one_process_drops_is_dropped_in_all_that_share_the_folder(fresh_service: Fresh, tmp_path: Path) -> None:
    one, other = fresh_service(store=tmp_path), fresh_service(store=tmp_path)
    plan, critique = two(one)
    assert other.memory(critique).positions == critique["positions"]  # it has the recipes in its cache now
    one.drop(plan)
    with pytest.raises(DroppedReference):
        other.memory(plan)
    one.drop(critique)
    for ref in (plan, critique):
        with pytest.raises(UnknownReference):
            other.think("Read.", [ref])
    assert other.references() == []
    assert other.think(PLAN, steps=3, agent="planner") == plan  # and is made anew, not taken from the cache
    assert one.memory(plan).positions == plan["positions"]


def test_a_memory_dropped_while_it_is_read_leaves_no_orphan(fresh_service: Fresh, tmp_path: Path) -> None:
    service = fresh_service(store=tmp_path)
    plan = service.think(PLAN, steps=3)
    stream = service.speak("Read.", [plan], max_tokens=6)
    next(stream)
    service.drop(plan)
    with pytest.raises(UnknownReference):
        list(stream)
    assert list((tmp_path / "recipes").glob("lat_*")) == []


def test_pins_spare_from_age_and_from_being_dropped(fresh_service: Fresh, tmp_path: Path) -> None:
    service = fresh_service(store=tmp_path, keep_for=3600)
    plan, critique = two(service)
    loner = service.think("Alone.", steps=1)
    service.pin(critique)
    assert {each.ref["id"] for each in service.references() if each.pinned} == {critique["id"]}
    with pytest.raises(InvalidRequest, match="pinned"):
        service.drop(critique)
    for path in (tmp_path / "recipes").glob("lat_*"):
        os.utime(path, (0, 0))
    assert service.collect() == 1
    with pytest.raises(UnknownReference):
        service.memory(loner)
    assert service.memory(plan).positions == plan["positions"]
    service.pin(critique, False)
    service.drop(critique)
    assert [each.ref for each in service.references()] == [plan]


def test_age_is_looked_after_by_itself(fresh_service: Fresh, tmp_path: Path) -> None:
    ref = fresh_service(store=tmp_path).think(PLAN, steps=1)
    (path,) = (tmp_path / "recipes").glob("lat_*")
    os.utime(path, (0, 0))
    service = fresh_service(store=tmp_path, keep_for="P30D")
    wait_for(lambda: not path.exists())
    with pytest.raises(UnknownReference):
        service.memory(ref)


def test_a_reference_that_is_handed_out_again_is_young_again(fresh_service: Fresh, tmp_path: Path) -> None:
    service = fresh_service(store=tmp_path, keep_for=3600)
    service.think(PLAN, steps=1)
    (path,) = (tmp_path / "recipes").glob("lat_*")
    os.utime(path, (0, 0))
    ref = service.think(PLAN, steps=1)
    assert service.collect() == 0
    assert service.memory(ref).positions == ref["positions"]


def test_altered_memories_are_neither_pinned_nor_dropped(fresh_service: Fresh, tmp_path: Path) -> None:
    service = fresh_service(store=tmp_path)
    ref = service.altered(service.think(PLAN, steps=1), "zeroed")
    for call in (service.pin, service.drop):
        with pytest.raises(InvalidRequest, match="never stored"):
            call(ref)


def test_what_reads_an_altered_memory_keeps_the_one_it_was_made_of(fresh_service: Fresh, tmp_path: Path) -> None:
    service = fresh_service(store=tmp_path)
    plan = service.think(PLAN, steps=2)
    reader = service.think(CHECK, [service.altered(plan, "random", 7)], steps=1)
    before = kv_copy(service.memory(reader))
    service.drop(plan)
    service = fresh_service(store=tmp_path)
    assert kv_difference(service.memory(reader), before) < 1e-8
    assert [each.ref["id"] for each in service.references()] == [reader["id"]]


def test_a_full_store_refuses_before_the_work_and_loses_nothing(fresh_service: Fresh, tmp_path: Path) -> None:
    plan, critique = two(fresh_service(store=tmp_path))
    service = fresh_service(store=tmp_path, store_budget=fresh_service(store=tmp_path).info()["store_bytes"] + 100)
    with pytest.raises(StoreFull, match="store_budget"):
        service.think("Something new.", steps=3)
    with pytest.raises(StoreFull, match="store_budget"):
        service.speak("Something new.")  # at the call
    assert service.info()["ticks"] == service.info()["rows"] == 0
    assert service.think(PLAN, steps=3, agent="planner") == plan  # takes no room
    assert service.memory(critique).positions == critique["positions"]
    service.drop(critique)
    assert service.think("Something new.", steps=0)


async def test_a_full_store_refuses_in_an_event_loop(fresh_service: Fresh, tmp_path: Path) -> None:
    service = fresh_service(store=tmp_path, store_budget=100)
    with pytest.raises(StoreFull):
        await service.athink(PLAN)
    with pytest.raises(StoreFull):
        service.aspeak(PLAN)
    assert service.info()["ticks"] == 0


async def test_an_event_loop_counts_no_files(
    fresh_service: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, counted = fresh_service(store=tmp_path, store_budget="1GiB"), list[threading.Thread]()

    def nbytes(store: FolderStore) -> int:
        counted.append(threading.current_thread())
        os.utime(store.folder, ns=(len(counted), len(counted)))  # others write all the time
        return 0

    monkeypatch.setattr(FolderStore, "nbytes", property(nbytes))
    ref = await service.athink(PLAN, steps=1)
    await service.asay(CHECK, [ref], max_tokens=2)
    async for _ in await asyncio.to_thread(service.aspeak, CHECK, [ref], max_tokens=2):
        pass
    assert counted
    assert threading.current_thread() not in counted


def test_an_imported_memory_is_read_and_not_what_was_dropped_before_it(fresh_service: Fresh, tmp_path: Path) -> None:
    one, other = fresh_service(store=tmp_path / "store"), fresh_service(store=tmp_path / "store")
    ref = one.think(PLAN, steps=3)
    before, recipe = kv_copy(other.memory(ref)), one._recipe(ref["id"])
    one.drop(ref)
    thoughts = recipe.segment.thoughts.flip(0)
    file = write_memory([replace(recipe, segment=replace(recipe.segment, thoughts=thoughts))], None)
    (tmp_path / "memory").write_bytes(b"".join(file))
    memory = other.memory(other.import_memory(tmp_path / "memory"))
    assert torch.equal(memory.segments[0].thoughts, thoughts)
    assert kv_difference(memory, before) > 1e-3


def test_an_imported_memory_is_written_together(
    fresh_service: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, refs = fresh_service(), list[LatentRef]()
    for i in range(9):
        refs.append(one.think(messages(f"Step {i}."), refs[-1:], steps=1))
    (tmp_path / "memory").write_bytes(b"".join(one.export_memory(refs[-1])))
    other, written = fresh_service(store=tmp_path / "store"), list[int]()
    store, mset = other._store, other._store.store.mset

    def slow(pairs: Any) -> None:
        written.append(len(pairs))
        if len(written) == 1:
            wait_for(lambda: written[0] + len(store._waiting) == 9, seconds=10)
        mset(pairs)

    monkeypatch.setattr(store.store, "mset", slow)
    assert other.import_memory(tmp_path / "memory")["id"] == refs[-1]["id"]
    assert sum(written) == 9
    assert len(written) <= 2
    assert other.memory(other.import_memory(tmp_path / "memory")).positions == refs[-1]["positions"]


def test_requests_at_once_never_exceed_the_budget(fresh_service: Fresh, tmp_path: Path) -> None:
    service = fresh_service(store=tmp_path, store_budget=20_000)

    def think(i: int) -> LatentRef | None:
        try:
            return service.think(f"Question {i}.", steps=4)
        except StoreFull:
            return None

    refs = [ref for ref in at_once([lambda i=i: think(i) for i in range(24)]) if ref]  # type: ignore[misc]
    assert 0 < len(refs) < 24
    assert service.info()["store_bytes"] <= 20_000
    assert all(service.memory(ref).positions == ref["positions"] for ref in refs)


def test_room_that_was_held_is_given_back(fresh_service: Fresh, tmp_path: Path) -> None:
    service = fresh_service(store=tmp_path, store_budget=20_000)
    for i in range(20):
        stream = service.speak(f"Question {i}.", max_tokens=500)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    assert service._store._reserved == 0
    assert service.think(PLAN, steps=3)


def test_tenants_see_their_own_references_only(fresh_service: Fresh, tmp_path: Path) -> None:
    made = fresh_service(store=tmp_path).tenants(["a", "b"])
    ref = made["a"].think(PLAN, steps=1)
    assert [each.ref for each in made["a"].references()] == [ref]
    assert made["b"].references() == []
    for call in (made["b"].pin, made["b"].drop):
        with pytest.raises(TamperedReference):
            call(ref)
    same = made["b"].think(PLAN, steps=1)
    made["b"].drop(same)
    assert made["a"].memory(ref).positions == ref["positions"]


def test_a_store_of_two_models_lists_and_drops_each_its_own(fresh_service: Fresh, tmp_path: Path) -> None:
    one, other = fresh_service(store=tmp_path), fresh_service("llama-untied", store=tmp_path)
    ours, theirs = one.think(PLAN, steps=1), other.think(PLAN, steps=1)
    assert [each.ref for each in one.references()] == [ours]
    assert [each.ref for each in other.references()] == [theirs]
    one.drop(ours)
    assert other.memory(theirs).positions == theirs["positions"]
