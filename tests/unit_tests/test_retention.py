"""What stays in a store, and that whatever stays can be read."""

import errno
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.stores import InMemoryByteStore

from langchain_latentmas.errors import DroppedReference, InvalidRequest, UnknownReference
from langchain_latentmas.service import retention as module
from langchain_latentmas.service import store as stores
from langchain_latentmas.service.identity import Signer
from langchain_latentmas.service.retention import Retention
from langchain_latentmas.service.store import DROPPED, PINNED, RECIPE, FolderStore, Header, RecipeStore

from ..support import at_once
from .test_store import HIDDEN, recipe, recipe_store, refuse, shelve

DAY = 86400.0

Meanwhile = Callable[[Callable[[], object]], None]


def family(store: RecipeStore) -> dict[str, str]:
    """plan <- critique <- answer, plan <- aside, and a loner; ids by name."""
    made: dict[str, str] = {}
    for steps, (name, parents) in enumerate(
        {"plan": [], "critique": ["plan"], "answer": ["critique"], "aside": ["plan"], "loner": []}.items()
    ):
        made[name] = shelve(store, recipe(steps, parents=tuple(made[parent] for parent in parents))).id
    return made


def ids(retention: Retention) -> set[str]:
    return {header.id for header in retention.headers()}


def left(store: RecipeStore, made: dict[str, str]) -> set[str]:
    return {name for name, key in made.items() if store.store.mget([key + RECIPE])[0] is not None}


@pytest.mark.parametrize("folder", [True, False])
def test_what_others_descend_from_outlives_its_drop_and_goes_with_the_last_of_them(
    tmp_path: Path, folder: bool
) -> None:
    store = recipe_store(tmp_path if folder else None)
    made, retention = family(store), Retention(store)
    assert retention.drop(made["plan"]) == []
    assert retention.drop(made["critique"]) == []
    assert left(store, made) == set(made)
    assert set(retention.drop(made["answer"])) == {made["answer"], made["critique"]}
    assert left(store, made) == {"plan", "aside", "loner"}
    assert set(retention.drop(made["aside"])) == {made["aside"], made["plan"]}
    assert left(store, made) == {"loner"}
    assert list(store.store.yield_keys()) == [made["loner"] + RECIPE]  # no mark stays behind
    assert retention.drop(made["plan"]) == []


def test_what_is_read_as_altered_is_an_ancestor_too(tmp_path: Path) -> None:
    store = recipe_store(tmp_path)
    plan = shelve(store, recipe())
    reader = shelve(store, recipe(1, parents=(plan.id + ".zeroed",)))
    retention = Retention(store)
    assert retention.drop(plan.id) == []
    assert retention.drop(reader.id) == [plan.id, reader.id]


def test_age_counts_from_the_last_use_and_spares_pins_and_ancestors(tmp_path: Path) -> None:
    store = recipe_store(tmp_path)
    made, retention = family(store), Retention(store, timedelta(days=30))
    for key in made.values():
        os.utime(tmp_path / (key + RECIPE), (0, time.time() - 31 * DAY))
    store.check([made["critique"]])  # used
    retention.pin(made["loner"], True)
    assert set(retention.collect()) == {made["answer"], made["aside"]}
    assert left(store, made) == {"plan", "critique", "loner"}
    retention.pin(made["loner"], False)
    assert retention.collect() == [made["loner"]]
    store.check([made["plan"]])  # kept for its descendant, it is as good as ever


def test_many_go_with_few_calls_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = recipe_store(tmp_path)
    made = family(store)
    for key in made.values():
        os.utime(tmp_path / f"{key}{RECIPE}", (time.time() - 9 * DAY,) * 2)
    removed: list[list[str]] = []
    delete = store.store.mdelete
    monkeypatch.setattr(store.store, "mdelete", lambda keys: (removed.append(list(keys)), delete(keys)))
    assert set(Retention(store, timedelta(days=1)).collect()) == set(made.values())
    assert [len(keys) // 3 for keys in removed] == [1, 2, 2]  # each waits for the disk; children before their parents


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Meanwhile:
    """Has recipes removed one by one, and something done after the first of them."""
    monkeypatch.setattr(module, "PORTION", 1)
    monkeypatch.setattr(stores, "LOCK_SECONDS", 0.05)

    def at_the_first_pause(call: Callable[[], object]) -> None:
        calls = [call]
        pause = SimpleNamespace(time=time.time, sleep=lambda _: calls.pop()() if calls else None)
        monkeypatch.setattr(module, "time", pause)

    return at_the_first_pause


def test_while_many_go_others_write_and_what_they_need_stays(tmp_path: Path, meanwhile: Meanwhile) -> None:
    store, other = recipe_store(tmp_path), recipe_store(tmp_path)  # as of two processes
    made, retention = family(store), Retention(store, timedelta(days=30))
    for key in made.values():
        os.utime(tmp_path / (key + RECIPE), (0, 0))

    def think_and_read() -> None:
        shelve(other, recipe(9, parents=(made["aside"],)))
        other.check([made["loner"]])

    meanwhile(think_and_read)
    assert set(retention.collect()) == {made["answer"], made["critique"]}
    assert left(store, made) == {"plan", "aside", "loner"}


def test_what_is_thought_again_while_others_go_stays(tmp_path: Path, meanwhile: Meanwhile) -> None:
    store, other = recipe_store(tmp_path), recipe_store(tmp_path)
    made, retention = family(store), Retention(store)
    assert retention.drop(made["critique"]) == []
    meanwhile(lambda: shelve(other, store.get(made["critique"])))
    assert retention.drop(made["answer"]) == [made["answer"]]
    store.check([made["critique"]])


def test_what_stays_is_looked_at_while_others_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = recipe_store(tmp_path)
    made, retention = family(store), Retention(store, timedelta(days=30))
    assert store.folder is not None
    os.utime(tmp_path / (made["loner"] + RECIPE), (0, 0))
    touched, alone = store.folder.touched, list[str]()

    def look(name: str) -> float:
        if store.folder is not None and store.folder._depth:
            alone.append(name)
        return touched(name)

    monkeypatch.setattr(store.folder, "touched", look)
    assert retention.collect() == [made["loner"]]
    assert alone == [made["loner"] + RECIPE]  # whether it is still as old


def test_what_is_used_while_old_ones_are_looked_for_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = recipe_store(tmp_path)
    made, retention = family(store), Retention(store, timedelta(days=30))
    for key in made.values():
        os.utime(tmp_path / (key + RECIPE), (0, 0))
    used = retention.used

    def use(header: Header) -> float:
        at = used(header)
        if header.id == made["critique"]:
            store.check([header.id])
        return at

    monkeypatch.setattr(retention, "used", use)
    assert made["critique"] not in retention.collect()
    assert {"plan", "critique"} <= left(store, made)


def test_without_an_age_nothing_grows_old(tmp_path: Path) -> None:
    store = recipe_store(tmp_path)
    os.utime(tmp_path / (shelve(store, recipe()).id + RECIPE), (0, 0))
    assert Retention(store).collect() == []


def test_what_is_pinned_is_not_dropped(tmp_path: Path) -> None:
    store = recipe_store(tmp_path)
    retention, key = Retention(store), shelve(store, recipe()).id
    retention.pin(key, True)
    with pytest.raises(InvalidRequest, match="pinned"):
        retention.drop(key)
    assert not store.marked(key, DROPPED)


@pytest.mark.parametrize("folder", [True, False])
def test_what_another_has_dropped_meanwhile_is_not_pinned(tmp_path: Path, folder: bool) -> None:
    store = recipe_store(tmp_path if folder else None)
    made, retention = family(store), Retention(store)
    for name in ("plan", "loner"):
        Retention(store).drop(made[name])
    with pytest.raises(DroppedReference, match="dropped"):
        retention.pin(made["plan"], True)
    with pytest.raises(UnknownReference, match="store="):
        retention.pin(made["loner"], True)
    retention.pin(made["loner"], False)
    assert not any(name.endswith(PINNED) for name in store.store.yield_keys())


def test_what_another_process_makes_and_removes_is_seen(tmp_path: Path) -> None:
    store = recipe_store(tmp_path)
    retention = Retention(store)
    made = family(recipe_store(tmp_path))
    assert ids(retention) == set(made.values())
    Retention(recipe_store(tmp_path)).drop(made["loner"])
    assert ids(retention) == set(made.values()) - {made["loner"]}


def test_a_memory_that_is_made_while_others_are_read_keeps_its_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = recipe_store(tmp_path)
    made, retention, header, later = family(store), Retention(store), store.header, list[str]()

    def slow(key: str) -> Header:
        if not later:
            later.append(shelve(store, recipe(9, parents=(made["loner"],))).id)
            assert later[0] in ids(retention)  # somebody else reads, and is faster
        return header(key)

    monkeypatch.setattr(store, "header", slow)
    assert ids(retention) == {*made.values(), *later}
    assert retention.drop(made["loner"]) == []
    store.get(made["loner"])
    assert set(retention.drop(later[0])) == {made["loner"], *later}


def test_those_who_list_at_once_read_everything_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = recipe_store(tmp_path)
    made, retention, header, read = family(store), Retention(store), store.header, list[str]()

    def slow(key: str) -> Header:
        read.append(key)
        time.sleep(0.02)
        return header(key)

    monkeypatch.setattr(store, "header", slow)
    assert at_once([lambda: ids(retention)] * 4) == [set(made.values())] * 4
    assert sorted(read) == sorted(made.values())


def test_what_was_read_before_a_fault_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = recipe_store(tmp_path)
    made, retention, header, read = family(store), Retention(store), store.header, list[str]()

    def faulty(key: str) -> Header:
        read.append(key)
        if len(read) == 3:
            raise OSError("the disk does not answer")
        return header(key)

    monkeypatch.setattr(store, "header", faulty)
    with pytest.raises(OSError, match="does not answer"):
        retention.headers()
    assert ids(retention) == set(made.values())
    assert len(read) == len(made) + 1


def test_listing_dropping_and_making_at_once_lose_nothing(tmp_path: Path) -> None:
    store = recipe_store(tmp_path)
    retention, kept, errors = Retention(store), list[str](), list[BaseException]()
    done = threading.Event()

    def lists() -> None:
        try:
            while not done.is_set():
                for header in retention.headers():
                    with suppress(UnknownReference):
                        retention.used(header)
        except BaseException as error:
            errors.append(error)

    listing = [threading.Thread(target=lists, daemon=True) for _ in range(2)]
    for thread in listing:
        thread.start()
    try:
        for n in range(40):
            parent = shelve(store, recipe(spoken=(n,))).id
            kept.append(shelve(store, recipe(2, parents=(parent,))).id)
            retention.drop(parent)
            if n % 2:
                retention.drop(kept.pop(0))
    finally:
        done.set()
    for thread in listing:
        thread.join(60)
    assert not errors
    assert ids(retention) == set(kept)
    for child in kept:
        assert all(store.get(parent) for parent in store.get(child).parents)


def test_what_cannot_be_read_is_passed_over_and_left_where_it_is(tmp_path: Path) -> None:
    """The key may be the wrong one: then nothing here can be read, and all of it is still wanted."""
    store = recipe_store(tmp_path)
    made = family(store)
    path = tmp_path / (made["loner"] + RECIPE)
    path.write_bytes(path.read_bytes()[:-1])
    assert ids(Retention(store)) == set(made.values()) - {made["loner"]}
    assert path.exists()


@pytest.mark.parametrize("why", ["another key", "a later version", "cut"])
def test_what_cannot_be_verified_keeps_what_it_descends_from(tmp_path: Path, why: str) -> None:
    store, theirs = recipe_store(tmp_path), RecipeStore(FolderStore(tmp_path), Signer(b"x" * 32), HIDDEN, torch.float32)
    made, retention = family(store), Retention(store, timedelta(days=1))
    child = shelve(theirs if why == "another key" else store, recipe(9, parents=(made["critique"] + ".zeroed",)))
    path = tmp_path / (child.id + RECIPE)
    file = path.read_bytes()
    path.write_bytes({"a later version": file[:8] + b"\2\0" + file[10:], "cut": file[:-1]}.get(why, file))
    for key in made.values():
        os.utime(tmp_path / (key + RECIPE), (0, 0))
    assert retention.drop(made["answer"]) == [made["answer"]]
    assert retention.drop(made["critique"]) == []
    assert set(retention.collect()) == {made["aside"], made["loner"]}
    assert left(store, made) == {"plan", "critique"}
    path.unlink()
    assert set(retention.collect()) == {made["plan"], made["critique"]}


def test_while_one_cannot_be_opened_the_others_are_listed_and_none_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = recipe_store(tmp_path)
    made, retention = family(store), Retention(store, timedelta(days=1))
    for key in made.values():
        os.utime(tmp_path / (key + RECIPE), (0, 0))
    with monkeypatch.context() as closed:
        refuse(closed, tmp_path / (made["answer"] + RECIPE), errno.EACCES)
        assert ids(retention) == {made[name] for name in ("plan", "critique", "aside", "loner")}
        assert retention.drop(made["loner"]) == []
        assert ids(retention) == {made[name] for name in ("plan", "critique", "aside")}
        assert retention.collect() == []
    assert left(store, made) == set(made)
    assert set(retention.collect()) == set(made.values())


def test_age_needs_a_folder() -> None:
    with pytest.raises(InvalidRequest, match="keep_for"):
        Retention(recipe_store(), timedelta(days=1))


class Crash(Exception):
    pass


@given(st.data())
def test_whenever_it_is_stopped_every_recipe_that_is_left_has_its_parents(
    monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    monkeypatch.setattr(module, "PORTION", data.draw(st.sampled_from([1, 3, 100])))
    monkeypatch.setattr(module, "PAUSE", 0)
    store = recipe_store()
    ids: list[str] = []
    for steps in range(data.draw(st.integers(1, 8))):
        parents = data.draw(st.lists(st.sampled_from(ids), max_size=3, unique=True)) if ids else []
        ids.append(shelve(store, recipe(steps, parents=tuple(parents))).id)
    retention = Retention(store)
    live = set(ids)
    removals = data.draw(st.integers(0, 6))

    class Crashing(InMemoryByteStore):
        def mdelete(self, keys: object) -> None:
            nonlocal removals
            removals -= 1
            if removals < 0:
                raise Crash
            super().mdelete(keys)  # type: ignore[arg-type]

    store.store.__class__ = Crashing
    for key in data.draw(st.lists(st.sampled_from(ids), unique=True)):
        live.discard(key)
        try:
            retention.drop(key)
        except Crash:
            break
    there = {key.removesuffix(RECIPE) for key in store.store.yield_keys() if key.endswith(RECIPE)}
    assert live <= there
    for key in there:
        assert set(store.get(key).parents) <= there


def test_a_folder_opened_again_knows_pins_and_drops(tmp_path: Path) -> None:
    store = recipe_store(tmp_path)
    made = family(store)
    Retention(store).pin(made["answer"], True)
    Retention(store).drop(made["plan"])
    again = RecipeStore(FolderStore(tmp_path), store.signer, store.hidden_size, store.dtype)
    assert again.marked(made["plan"], DROPPED)
    with pytest.raises(InvalidRequest, match="pinned"):
        Retention(again).drop(made["answer"])
