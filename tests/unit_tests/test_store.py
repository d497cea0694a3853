import errno
import multiprocessing
import os
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.stores import InMemoryByteStore

from langchain_latentmas.errors import DroppedReference, InvalidRequest, StoreBusy, StoreCorrupted, StoreFull
from langchain_latentmas.errors import UnknownReference as Unknown
from langchain_latentmas.service import store as module
from langchain_latentmas.service.identity import Signer, memory_id
from langchain_latentmas.service.memory import Recipe, Segment
from langchain_latentmas.service.store import DROPPED, PINNED, RECIPE, FolderStore, RecipeStore

from ..support import Gate, at_once, wait_for
from .test_envelope import parts

HIDDEN = 4


def recipe(
    steps: int = 3, spoken: tuple[int, ...] = (), parents: tuple[str, ...] = (), agent: str = "planner", add: float = 0
) -> Recipe:
    key = memory_id(
        model="0" * 32, alignment="realign", parents=parents, prompt_ids=[5, 6, 7], steps=steps, spoken_ids=spoken
    )
    thoughts = torch.arange(steps * HIDDEN, dtype=torch.float32).reshape(steps, HIDDEN) + add
    return Recipe(key, "0" * 32, "realign", parents, Segment(agent, (5, 6, 7), thoughts, spoken))


def recipe_store(store: Any = None, **options: Any) -> RecipeStore:
    shelf = InMemoryByteStore() if store is None else FolderStore(store) if isinstance(store, Path) else store
    return RecipeStore(shelf, Signer(b"k" * 32), HIDDEN, torch.float32, **options)


def shelve(store: RecipeStore, put: Recipe) -> Recipe:
    """Puts a recipe; what the store has under its id then."""
    return store.put_all([put], lambda there, _: there)[0]


def refuse(patch: pytest.MonkeyPatch, path: Path, code: int) -> None:
    """Lets nobody open a file of a store, not even root."""

    def opened(name: str, *how: Any, **more: Any) -> Any:
        if name == str(path):
            raise OSError(code, os.strerror(code))
        return open(name, *how, **more)

    patch.setattr(module, "open", opened, raising=False)


@given(st.integers(0, 6), st.lists(st.integers(0, 2**31 - 1), max_size=5))
def test_a_recipe_comes_back_as_it_was(steps: int, spoken: list[int]) -> None:
    store, put = recipe_store(), recipe(steps, tuple(spoken))
    assert shelve(store, put) is put
    got = store.get(put.id)
    assert (got.id, got.model, got.alignment, got.parents) == (put.id, put.model, put.alignment, put.parents)
    assert (got.segment.agent, got.segment.prompt_ids, got.segment.spoken_ids) == ("planner", (5, 6, 7), tuple(spoken))
    assert torch.equal(got.segment.thoughts, put.segment.thoughts)


def test_a_recipe_is_written_as_the_page_on_the_format_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever changes one of these names cannot read the stores that there are."""
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.5)
    store, parent = recipe_store(tmp_path), recipe()
    put = recipe(steps=2, spoken=(8, 9), parents=(parent.id,))
    for each in (parent, put):
        shelve(store, each)
    header, tensors = parts((tmp_path / f"{put.id}.recipe").read_bytes())
    assert header == {
        "id": put.id,
        "agent": "planner",
        "model": "00000000000000000000000000000000",
        "alignment": "realign",
        "parents": [parent.id],
        "prompt": 3,
        "steps": 2,
        "spoken": 2,
        "made": 1_800_000_000.5,
    }
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in tensors.items()} == {
        "prompt_ids": (torch.int32, [5, 6, 7]),
        "thoughts": (torch.float32, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        "spoken_ids": (torch.int32, [8, 9]),
    }
    assert parts((tmp_path / f"{parent.id}.recipe").read_bytes())[1].keys() == {"prompt_ids", "thoughts"}
    for mark in ("pinned", "dropped"):
        (tmp_path / f"{put.id}.{mark}").touch()
    assert [store.marked(put.id, mark) for mark in (PINNED, DROPPED)] == [True, True]


def test_a_recipe_too_large_to_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, small = recipe_store(tmp_path), recipe()
    shelve(store, small)
    monkeypatch.setattr(module, "MAX_VALUE", store.size_of(small.id))
    with pytest.raises(InvalidRequest, match="take fewer latent steps"):
        shelve(store, recipe(steps=9))
    assert store.ids() == {small.id}
    assert store.get(small.id).id == small.id


def test_a_recipe_that_is_not_there_is_unknown() -> None:
    with pytest.raises(Unknown, match="store="):
        recipe_store().get(recipe().id)


def test_what_has_a_reference_stays_as_it_was(tmp_path: Path) -> None:
    first, second = recipe(), recipe(add=1e-7)
    assert shelve(recipe_store(tmp_path), first) is first
    there = shelve(recipe_store(tmp_path), second)
    assert torch.equal(there.segment.thoughts, first.segment.thoughts)


@given(st.data())
def test_no_flipped_byte_and_no_cut_is_accepted(data: st.DataObject) -> None:
    bytes_store = InMemoryByteStore()
    store, put = recipe_store(bytes_store), recipe()
    shelve(store, put)
    value = bytearray(bytes_store.mget([put.id + RECIPE])[0] or b"")
    at = data.draw(st.integers(0, 2**16)) % len(value)  # the time in it makes it longer or shorter
    if data.draw(st.booleans()):
        value[at] ^= data.draw(st.integers(1, 255))
    else:
        del value[at:]
    bytes_store.mset([(put.id + RECIPE, bytes(value))])
    with pytest.raises(StoreCorrupted, match=put.id):
        store.get(put.id)


def test_a_recipe_is_not_stored_as_one_of_another_alignment() -> None:
    with pytest.raises(ValueError, match="alignment"):
        shelve(recipe_store(), replace(recipe(), alignment="rotated"))  # type: ignore[arg-type]


def test_a_recipe_that_another_key_signed_is_refused(tmp_path: Path) -> None:
    put = recipe()
    shelve(RecipeStore(FolderStore(tmp_path), Signer(b"x" * 32), HIDDEN, torch.float32), put)
    with pytest.raises(StoreCorrupted, match="another key"):
        recipe_store(tmp_path).get(put.id)


def test_a_recipe_under_the_name_of_another_is_refused(tmp_path: Path) -> None:
    store, one, other = recipe_store(tmp_path), recipe(), recipe(steps=2)
    shelve(store, one)
    (tmp_path / (one.id + RECIPE)).rename(tmp_path / (other.id + RECIPE))
    with pytest.raises(StoreCorrupted, match="that of"):
        store.get(other.id)


CHANGES: dict[str, dict[str, Any]] = {
    "another model": {"model": "1" * 32},
    "another alignment": {"alignment": "rescale"},
    "other parents": {"parents": (recipe(steps=2).id,)},
    "another prompt": {"segment": replace(recipe().segment, prompt_ids=(5, 6, 8))},
    "other words": {"segment": replace(recipe().segment, spoken_ids=(5,))},
    "fewer thoughts": {"segment": recipe(steps=2).segment},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_recipe_that_is_not_what_its_id_says_is_refused(change: dict[str, Any]) -> None:
    store, put = recipe_store(), replace(recipe(), **change)
    shelve(store, recipe(steps=2))
    shelve(store, put)
    with pytest.raises(StoreCorrupted, match=f"{put.id} cannot be read: its content does not match its id"):
        store.get(put.id)


def test_a_recipe_of_thoughts_of_another_width_is_refused() -> None:
    shelf, put = InMemoryByteStore(), recipe()
    shelve(recipe_store(shelf), put)
    with pytest.raises(StoreCorrupted, match="other shapes than it says"):
        RecipeStore(shelf, Signer(b"k" * 32), 2 * HIDDEN, torch.float32).get(put.id)


def test_what_cannot_be_read_is_set_aside_and_the_rest_is_read(tmp_path: Path) -> None:
    store, good, bad = recipe_store(tmp_path / "recipes"), recipe(), recipe(steps=2)
    path = tmp_path / "recipes" / (bad.id + RECIPE)
    for n in range(3):
        shelve(store, good)
        shelve(store, bad)
        path.write_bytes(path.read_bytes()[: 40 + n])
        with pytest.raises(StoreCorrupted, match="moved to"):
            store.get(bad.id)
        with pytest.raises(Unknown):
            store.get(bad.id)
        assert store.get(good.id).id == good.id
    aside = sorted((tmp_path / "recipes.aside").iterdir())
    assert sorted(path.stat().st_size for path in aside) == [40, 41, 42]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EISDIR])
def test_what_cannot_be_opened_is_set_aside_and_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    store, put = recipe_store(tmp_path / "recipes"), recipe()
    shelve(store, put)
    with monkeypatch.context() as closed:
        refuse(closed, tmp_path / "recipes" / (put.id + RECIPE), code)
        with pytest.raises(StoreCorrupted, match=r"cannot be opened.*moved to"):
            store.get(put.id)
    assert shelve(store, put) is put
    assert store.get(put.id).id == put.id


def test_who_can_open_no_more_files_sets_none_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, put = recipe_store(tmp_path / "recipes"), recipe()
    shelve(store, put)
    with monkeypatch.context() as full:
        refuse(full, tmp_path / "recipes" / (put.id + RECIPE), errno.EMFILE)
        with pytest.raises(OSError, match="Too many open files"):
            store.get(put.id)
    assert store.get(put.id).id == put.id


def test_a_value_larger_than_any_recipe_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_VALUE", 100)
    (tmp_path / "large").write_bytes(b"0" * 101)
    with pytest.raises(StoreCorrupted, match="101 bytes"):
        FolderStore(tmp_path).mget(["large"])


def test_a_folder_keeps_values_and_lists_no_halves(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.mset([("a", b"1"), ("b", b"2"), ("a", b"3")])
    (tmp_path / ".0123456789abcdef.part").write_bytes(b"half")
    assert store.mget(["a", "b", "c"]) == [b"3", b"2", None]
    assert list(store.yield_keys()) == ["a", "b"]
    assert list(store.yield_keys(prefix="b")) == ["b"]
    store.mdelete(["a", "c"])
    assert list(store.yield_keys()) == ["b"]
    assert list(FolderStore(tmp_path).yield_keys()) == ["b"]
    assert not list(tmp_path.glob("*.part"))  # whoever opens the folder next clears the halves away


def test_only_its_user_can_read_a_folder_and_what_is_in_it(tmp_path: Path) -> None:
    folder, there = tmp_path / "recipes", tmp_path / "there before"
    there.mkdir(0o755)
    for path in (folder, there):
        store = FolderStore(path)
        store.mset([("a", b"1"), ("b", b"2")])
        assert stat.S_IMODE((path / "a").stat().st_mode) == 0o600
        assert stat.S_IMODE(store.set_aside("b").parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(there.stat().st_mode) == 0o755
    (there / "a").chmod(0o644)  # as an earlier version left it
    assert FolderStore(there).mget(["a"]) == [b"1"]


@pytest.mark.parametrize("key", ["../x", "a/b", "", ".hidden", "a\0b", "/etc/passwd", "x" * 200])
def test_a_key_never_leaves_the_folder(tmp_path: Path, key: str) -> None:
    store = FolderStore(tmp_path / "store")
    with pytest.raises(InvalidRequest, match="cannot be a key"):
        store.mset([(key, b"1")])
    with pytest.raises(InvalidRequest, match="cannot be a key"):
        store.mget([key])
    assert [path.name for path in (tmp_path / "store").iterdir()] == [".lock"]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_disk_that_is_full_loses_nothing_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, old = recipe_store(tmp_path), recipe()
    shelve(store, old)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StoreFull, match="full"):
            shelve(store, recipe(steps=2))
    assert sorted(store.store.yield_keys()) == [old.id + RECIPE]
    assert store.get(old.id).id == old.id
    assert not list(tmp_path.glob("*.part"))


def test_a_disk_that_is_nearly_full_refuses_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FolderStore, "free", module.DISK_RESERVE + 1000)
    store = recipe_store(tmp_path)
    with store.room(1000), pytest.raises(StoreFull, match="disk"), store.room(1):
        pass


@given(
    st.text(max_size=200).filter(lambda s: s.encode(errors="replace").decode() == s),
    st.integers(0, 40),
    st.integers(0, 90),
    st.integers(0, 300),
)
def test_no_recipe_is_larger_than_the_room_held_for_it(agent: str, parents: int, steps: int, spoken: int) -> None:
    names = tuple(f"lat_{i:032x}" + ".random999999999" * (i % 10) for i in range(parents))
    made = recipe(steps, tuple(range(spoken)), names, agent)
    store = recipe_store()
    for name in names:
        store.store.mset([(name.partition(".")[0] + RECIPE, b"")])
    shelve(store, made)
    assert store.size_of(made.id) <= store.most_bytes(agent, names, 3, steps, spoken)


def test_a_budget_counts_what_is_there_and_what_is_being_made(tmp_path: Path) -> None:
    shelve(recipe_store(tmp_path), recipe())
    store = recipe_store(tmp_path, budget=5000)
    there = store.nbytes
    assert there == (tmp_path / (recipe().id + RECIPE)).stat().st_size
    with store.room(2000):
        with pytest.raises(StoreFull, match="store_budget"), store.room(3001 - there):
            pass
        with store.room(3000 - there):
            pass
    with store.room(5000 - there):
        pass


def test_the_budget_sees_what_others_put_into_the_folder_and_take_out(tmp_path: Path) -> None:
    ours, theirs = recipe_store(tmp_path, budget=3000), recipe_store(tmp_path)
    assert ours.nbytes == 0
    shelve(theirs, recipe())
    assert ours.nbytes == theirs.nbytes == theirs.size_of(recipe().id)
    theirs.store.mdelete([recipe().id + RECIPE])
    assert ours.nbytes == 0


def test_a_budget_needs_a_folder() -> None:
    with pytest.raises(InvalidRequest, match="store_budget"):
        recipe_store(budget=1)


def test_a_child_of_what_was_removed_meanwhile_is_not_stored(tmp_path: Path) -> None:
    store, parent = recipe_store(tmp_path), recipe()
    child = recipe(parents=(parent.id,))
    with pytest.raises(DroppedReference, match="while agent"):
        shelve(store, child)
    shelve(store, parent)
    assert shelve(store, child) is child


@pytest.mark.parametrize("folder", [True, False])
def test_a_dropped_recipe_is_refused_until_it_is_made_again(tmp_path: Path, folder: bool) -> None:
    store, put = recipe_store(tmp_path if folder else None), recipe()
    shelve(store, put)
    store.store.mset([(put.id + DROPPED, b"")])
    with pytest.raises(DroppedReference):
        store.check([put.id])
    shelve(store, recipe())
    store.check([put.id])


def _put_many(folder: Path, seed: int, together: Any) -> None:
    store = recipe_store(folder)
    together.wait()
    for i in range(30):
        shelve(store, recipe(steps=i % 10, add=seed))


def test_processes_that_share_a_folder_agree_on_every_recipe(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    together = context.Barrier(3)
    workers = [context.Process(target=_put_many, args=(tmp_path, seed, together)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    store = recipe_store(tmp_path)
    for steps in range(10):
        thoughts = store.get(recipe(steps).id).segment.thoughts
        assert any(torch.equal(thoughts, recipe(steps, add=seed).segment.thoughts) for seed in range(3))
    assert len(list(store.store.yield_keys())) == 10


def test_threads_that_put_the_same_recipe_get_the_same_one(tmp_path: Path) -> None:
    store = recipe_store(tmp_path)
    got = at_once([lambda i=i: shelve(store, recipe(add=i)) for i in range(8)])
    assert all(torch.equal(each.segment.thoughts, got[0].segment.thoughts) for each in got)


def test_a_lock_that_another_process_holds_ends_in_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.05)
    store, other = FolderStore(tmp_path), FolderStore(tmp_path)
    with store.locked(), store.locked(), pytest.raises(StoreBusy, match="by another process"):
        other.mset([("a", b"1")])
    other.mset([("a", b"1")])


def test_many_threads_hear_of_a_lock_that_is_held_as_soon_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, gate = FolderStore(tmp_path), Gate()
    acquire = store._acquire
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.1)
    monkeypatch.setattr(store, "_acquire", lambda seconds: (gate.wait(), acquire(seconds)))

    def refused() -> None:
        with pytest.raises(StoreBusy):
            store.mset([("a", b"1")])

    with ThreadPoolExecutor(8) as threads:
        first = threads.submit(store.mset, [("a", b"1")])
        assert gate.entered.wait(60)
        others = [threads.submit(refused) for _ in range(7)]
        told = wait(others, timeout=30).done  # while the first one still waits for another process
        gate.open()
        assert told == set(others)
        for each in (first, *others):
            each.result(60)


def test_who_has_waited_for_a_thread_waits_less_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, gate, now, looked, asked = FolderStore(tmp_path), Gate(), [0.0], list[float](), list[float]()
    acquire = store._acquire

    def clock() -> float:
        at = now[0]
        looked.append(at)
        return at

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(store, "_acquire", lambda seconds: (asked.append(seconds), gate.wait(), acquire(seconds)))
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(store.mset, [("a", b"1")])
        assert gate.entered.wait(60)
        second = threads.submit(store.mset, [("a", b"1")])
        wait_for(lambda: len(looked) == 3)
        now[0] = module.LOCK_SECONDS - 15
        gate.open()
        for each in (first, second):
            each.result(60)
    assert asked == [module.LOCK_SECONDS, 15]


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")

    def hold() -> None:
        with FolderStore(tmp_path).locked():
            held.set()
            time.sleep(60)

    held = context.Event()
    holder = context.Process(target=hold)
    holder.start()
    assert held.wait(30)
    holder.kill()
    holder.join(30)
    FolderStore(tmp_path).mset([("a", b"1")])


def test_what_one_puts_oneself_is_counted_on_and_not_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = recipe_store(tmp_path, budget=10**6)
    assert store.nbytes == 0
    with monkeypatch.context() as patched:
        patched.setattr(FolderStore, "nbytes", property(lambda _: pytest.fail("counted anew")))
        for steps in range(5):
            with store.room(2000):
                shelve(store, recipe(steps))
    assert store.nbytes == sum(store.size_of(recipe(steps).id) for steps in range(5)) == store.store.nbytes  # type: ignore[attr-defined]


def test_room_is_asked_for_while_a_disk_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, entered, opened = recipe_store(tmp_path, budget=10**6), threading.Event(), threading.Event()

    def slow(_: int) -> None:
        entered.set()
        assert opened.wait(60)

    monkeypatch.setattr(os, "fsync", slow)
    writer = threading.Thread(target=shelve, args=(store, recipe()))
    writer.start()
    assert entered.wait(60)
    with store.room(1000):  # an event loop asks like this
        assert writer.is_alive()
    opened.set()
    writer.join()


def test_what_one_writes_is_not_counted_by_those_who_ask_for_room_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = recipe_store(tmp_path, budget=10**6)
    assert store.nbytes == 0
    disk = _SlowDisk(monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(FolderStore, "nbytes", property(lambda _: pytest.fail("counted anew")))
        writer = threading.Thread(target=shelve, args=(store, recipe()))
        writer.start()
        assert disk.asked.wait(60)
        with store.room(1000):
            assert store.nbytes == 0
        disk.go_on.set()
        writer.join()
        assert store.nbytes == store.size_of(recipe().id)
    assert store.nbytes == FolderStore(tmp_path).nbytes


def test_after_a_write_that_failed_all_is_counted_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = recipe_store(tmp_path, budget=10**6)
    shelve(store, recipe())
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            shelve(store, recipe(1))
    shelve(store, recipe(2))
    assert store.nbytes == FolderStore(tmp_path).nbytes


def test_room_is_given_back_while_files_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, gate, held = recipe_store(tmp_path, budget=10**6), Gate(), ExitStack()
    held.enter_context(store.room(1000))
    shelve(recipe_store(tmp_path), recipe())

    def slow(_: FolderStore) -> int:
        gate.wait()
        return 500

    monkeypatch.setattr(FolderStore, "nbytes", property(slow))
    counting = threading.Thread(target=lambda: store.nbytes)
    counting.start()
    assert gate.entered.wait(60)
    giving_back = threading.Thread(target=held.close)  # an event loop gives back like this
    giving_back.start()
    giving_back.join(10)
    given_back = not giving_back.is_alive()
    gate.open()
    counting.join()
    assert given_back
    assert store.nbytes == 500


class _SlowDisk:
    """Flushes wait until it is let go on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked, self.go_on, self.flushed = threading.Event(), threading.Event(), list[str]()
        flush = os.fsync

        def slow(file: int) -> None:
            self.asked.set()
            assert self.go_on.wait(60)
            self.flushed.append("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file")
            flush(file)

        patch.setattr(os, "fsync", slow)


def test_recipes_that_come_while_the_disk_is_busy_are_written_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, disk, locked = recipe_store(tmp_path), _SlowDisk(monkeypatch), list[bool]()
    assert store.folder is not None
    acquire = store.folder._acquire
    monkeypatch.setattr(store.folder, "_acquire", lambda seconds: (locked.append(True), acquire(seconds)))
    made = [recipe(steps) for steps in range(20)]
    waiting = [store.put_soon(lambda: made[0], lambda there, fresh: (there, fresh))]
    assert disk.asked.wait(60)
    again = recipe(steps=1, add=1)
    for each in [*made[1:], again]:
        waiting.append(store.put_soon(lambda each=each: each, lambda there, fresh: (there, fresh)))  # type: ignore[misc]
    time.sleep(0.05)
    assert not any(each.done() for each in waiting)  # no reference before the disk has the recipe
    disk.go_on.set()
    assert [each.result(60) for each in waiting] == [*((each, True) for each in made), (made[1], False)]
    shelve(store, made[0])  # after all that was asked for before
    assert len(locked) == 3
    assert disk.flushed.count("folder") == 2
    assert disk.flushed.count("file") == len(made)
    assert all(recipe_store(tmp_path).get(each.id).id == each.id for each in made)


def test_one_that_cannot_be_stored_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, disk = recipe_store(tmp_path), _SlowDisk(monkeypatch)
    child = recipe(parents=("lat_" + "0" * 32,))
    puts = [recipe(), recipe(steps=1), child, recipe(steps=2)]
    waiting = [store.put_soon(lambda each=each: each, lambda there, _: there) for each in puts]  # type: ignore[misc]
    assert disk.asked.wait(60)
    disk.go_on.set()
    with pytest.raises(DroppedReference):
        waiting.pop(2).result(60)
    assert [each.result(60).id for each in waiting] == [puts[i].id for i in (0, 1, 3)]


def test_a_flush_that_fails_lets_the_others_end_before_files_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, ended = FolderStore(tmp_path), list[bool]()

    def full(file: int) -> None:
        if os.fstat(file).st_size == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        time.sleep(0.05)
        ended.append(os.fstat(file).st_size == 2)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreFull):
        store.mset([("a", b"1"), *((f"b{i}", b"22") for i in range(6))])
    assert ended == [True] * 6
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_who_holds_the_lock_does_not_ask_for_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, asked = FolderStore(tmp_path), list[bool]()
    acquire = store._acquire
    monkeypatch.setattr(store, "_acquire", lambda seconds: (asked.append(True), acquire(seconds)))
    with store.locked():
        store.mset([("a", b"1")])
        store.mdelete(["a"])
    assert len(asked) == 1
    FolderStore(tmp_path).mset([("a", b"1")])  # it is free again


def test_a_store_that_threads_can_no_longer_be_begun_for_still_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = recipe_store(tmp_path)
    assert store.folder is not None

    def refuse(*_: Any) -> Any:  # as an interpreter does that ends
        raise RuntimeError("cannot schedule new futures after shutdown")

    monkeypatch.setattr(store._writer, "submit", refuse)
    monkeypatch.setattr(store.folder._flushers, "submit", refuse)
    store.folder.mset([(f"key{i}", b"value") for i in range(9)])
    made = shelve(store, recipe())
    assert recipe_store(tmp_path).get(made.id).id == made.id


def test_a_store_refuses_to_write_after_a_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = recipe_store(tmp_path)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(StoreBusy, match="before the process was forked"):
        shelve(store, recipe())


def test_a_folder_is_not_locked_after_a_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderStore(tmp_path)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(StoreBusy, match="before the process was forked"):
        store.mdelete(["a"])


def test_those_who_wait_are_told_when_the_writing_thread_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    store, others = recipe_store(InMemoryByteStore()), []

    def interrupted(made: Any) -> Any:
        others.extend(made)
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_stored", interrupted)
    waiting = module._Put(lambda: recipe(steps=1), lambda there, _: there, module.Future())
    store._waiting.append(waiting)
    with pytest.raises(KeyboardInterrupt):
        shelve(store, recipe())
    assert len(others) == 2
    assert isinstance(waiting.done.exception(1), KeyboardInterrupt)
