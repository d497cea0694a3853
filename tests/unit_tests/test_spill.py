"""KV that left the device: it comes back bit by bit, or is rebuilt."""

import multiprocessing
import os
import stat
import time
from collections.abc import Container
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from langchain_latentmas.engine.kv import KV, AnyKV
from langchain_latentmas.errors import InvalidRequest, ServiceClosed, StoreCorrupted, UnknownReference
from langchain_latentmas.service import spill as module
from langchain_latentmas.service.identity import Signer
from langchain_latentmas.service.local import LocalService
from langchain_latentmas.service.spill import Spill

from ..conftest import Fresh
from ..support import at_once, kv_copy, kv_equal, messages, say
from .test_envelope import parts

SIGNER = Signer(b"k" * 32)
MADE_FOR = {"model": "0" * 32, "dtype": "float32", "merge": "rotate"}
LAYERS, HEADS, WIDTH = 2, 2, 4
POSITION = 2 * LAYERS * HEADS * WIDTH * 4
QUESTION = messages("What is 12 plus 30 minus 5?", "You are a judger.")


def kv(positions: int = 3, dtype: torch.dtype = torch.float32) -> KV:
    def layer() -> torch.Tensor:
        return torch.randn(HEADS, positions, WIDTH).to(dtype)

    return KV([layer() for _ in range(LAYERS)], [layer() for _ in range(LAYERS)])


def spill(
    folder: Path,
    limit: int = 1 << 20,
    made_for: dict[str, str] = MADE_FOR,
    dtype: torch.dtype = torch.float32,
    packed: bool = False,
    known: Container[str] = ("lat_a", "lat_b", *"abcd"),
) -> Spill:
    def blank(positions: int) -> AnyKV:
        layers = [torch.empty(HEADS, positions, WIDTH, dtype=dtype, device="meta")] * LAYERS
        return KV(layers, layers).packed() if packed else KV(layers, layers)

    return Spill(folder, limit, SIGNER, made_for, blank, known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
def test_a_kv_comes_back_bit_by_bit_also_in_the_next_process(tmp_path: Path, dtype: torch.dtype, packed: bool) -> None:
    put: AnyKV = kv(dtype=dtype)
    put = put.packed() if packed else put
    disk = spill(tmp_path, dtype=dtype, packed=packed)
    disk.put("lat_a", put)
    disk.flush()
    assert kv_equal(disk.get("lat_a", 3).result(), put)
    disk.close()
    again = spill(tmp_path, dtype=dtype, packed=packed)
    assert "lat_a" in again
    back = again.get("lat_a", 3).result()
    assert type(back) is type(put)
    assert kv_equal(back, put)
    again.close()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("wrong", ["dtype", "shape"])
def test_a_kv_of_other_shapes_is_not_read_whatever_its_header_says(tmp_path: Path, packed: bool, wrong: str) -> None:
    disk = spill(tmp_path, dtype=torch.float16, packed=packed)
    other = kv(dtype=torch.bfloat16 if wrong == "dtype" else torch.float16)
    if wrong == "shape":
        other = KV(*([t.reshape(2 * HEADS, 3, WIDTH // 2) for t in side] for side in other))
    disk.put("lat_a", other.packed() if packed else other)
    disk.flush()
    with pytest.raises(StoreCorrupted, match="other shapes"):
        disk.get("lat_a", 3).result()
    disk.close()


def test_only_its_user_can_read_what_is_spilled(tmp_path: Path) -> None:
    disk = spill(tmp_path / "kv")
    disk.put("lat_a", kv())
    disk.flush()
    disk.close()
    assert stat.S_IMODE((tmp_path / "kv").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "kv").iterdir()} == {0o600}


def test_the_limit_holds_and_the_least_recently_read_goes_first(tmp_path: Path) -> None:
    disk = spill(tmp_path / "size")
    disk.put("lat_a", kv())
    disk.flush()
    size = disk.files.used
    disk.close()
    disk = spill(tmp_path / "kv", limit=3 * size)
    for key in "abc":
        disk.put(key, kv())
    disk.flush()
    disk.get("a", 3).result()
    disk.put("d", kv())
    disk.flush()
    assert [key in disk for key in "abcd"] == [True, False, True, True]
    assert sorted(path.name for path in (tmp_path / "kv").glob("*.kv")) == ["a.kv", "c.kv", "d.kv"]
    assert disk.files.evictions == 1
    disk.close()
    smaller = spill(tmp_path / "kv", limit=size)  # the next process reads the order of use off the files
    assert [path.name for path in (tmp_path / "kv").glob("*.kv")] == ["d.kv"]
    smaller.close()


@pytest.mark.parametrize("name", ["model", "dtype", "merge"])
def test_what_was_made_for_something_else_is_not_read(tmp_path: Path, name: str) -> None:
    disk = spill(tmp_path)
    disk.put("lat_a", kv())
    disk.flush()
    disk.close()
    other = spill(tmp_path, made_for={**MADE_FOR, name: "other"})
    with pytest.raises(StoreCorrupted, match="something else"):
        other.get("lat_a", 3).result()
    assert other.refused == 1
    assert "lat_a" not in other
    other.close()


@given(st.data())
def test_no_changed_byte_and_no_cut_is_read(tmp_path_factory: Any, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("kv")
    disk = spill(folder)
    disk.put("lat_a", kv())
    disk.flush()
    path = folder / "lat_a.kv"
    file = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(file) - 1))
    if data.draw(st.booleans()):
        file[at] ^= data.draw(st.integers(1, 255))
    else:
        del file[at:]
    path.write_bytes(file)
    with pytest.raises(StoreCorrupted, match="rebuilt"):
        disk.get("lat_a", 3).result()
    assert not path.exists()
    disk.close()


def test_a_file_of_the_wrong_size_is_not_even_read(tmp_path: Path) -> None:
    disk = spill(tmp_path)
    disk.put("lat_a", kv())
    disk.flush()
    os.truncate(tmp_path / "lat_a.kv", 1 << 40)  # a hole of a tebibyte
    with pytest.raises(StoreCorrupted, match="1099511627776 bytes"):
        disk.get("lat_a", 3).result()
    disk.close()


def test_only_one_process_spills_to_a_folder(tmp_path: Path) -> None:
    one, other = spill(tmp_path), spill(tmp_path)
    assert other.files.limit == 0
    other.put("lat_a", kv())
    one.put("lat_b", kv())
    one.flush()
    other.flush()
    assert [path.name for path in tmp_path.glob("*.kv")] == ["lat_b.kv"]
    one.close()
    third = spill(tmp_path)
    assert third.files.limit > 0
    third.close()
    other.close()


def _hold(folder: Path, held: Any) -> None:
    disk = spill(folder)
    held.set()
    time.sleep(60)
    disk.close()


def test_a_killed_process_leaves_the_folder_free(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, held))
    process.start()
    assert held.wait(30)
    process.kill()
    process.join(30)
    disk = spill(tmp_path)
    assert disk.files.limit > 0
    disk.close()


def test_strange_files_in_the_folder_stay_and_halves_go(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".0123.part").write_text("half")
    spill(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "notes.txt"]


def test_a_disk_that_is_nearly_full_is_left_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DISK_RESERVE", 1 << 62)
    disk = spill(tmp_path)
    disk.put("lat_a", kv())
    disk.flush()
    assert "lat_a" not in disk
    disk.close()


def test_what_waits_to_be_written_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 3 * POSITION)
    disk = spill(tmp_path)
    disk._thread.submit(lambda: disk._path("x")).result()
    go_on = Event()
    blocked = disk._thread.submit(go_on.wait, 60)
    disk.put("lat_a", kv())
    disk.put("lat_b", kv())
    assert "lat_a" in disk
    assert "lat_b" not in disk
    assert disk.get("lat_a", 3).done()  # not written yet, and readable
    go_on.set()
    blocked.result()
    disk.close()


def test_a_dropped_kv_is_gone_whether_it_was_written_or_waits(tmp_path: Path) -> None:
    disk = spill(tmp_path)
    disk.put("lat_a", kv())
    disk.drop("lat_a")
    disk.put("lat_b", kv())
    disk.flush()
    disk.drop("lat_b")
    disk.flush()
    assert not list(tmp_path.glob("*.kv"))
    assert disk.files.used == 0
    disk.close()


def test_a_kv_that_was_dropped_and_made_anew_while_it_was_written_is_the_new_one(tmp_path: Path) -> None:
    disk, old, new = spill(tmp_path), kv(), kv()
    count = disk._count

    def meanwhile(key: str, size: int) -> None:
        disk._count = count  # type: ignore[method-assign]
        disk.drop(key)
        disk.put(key, new)
        count(key, size)

    disk._count = meanwhile  # type: ignore[method-assign]
    disk.put("lat_a", old)
    disk.flush()
    disk.flush()
    assert not disk._waiting
    assert disk._waiting_bytes == 0
    assert kv_equal(disk.get("lat_a", 3).result(), new)
    assert not kv_equal(old, new)
    disk.close()


def test_files_of_memories_that_are_not_there_any_more_are_removed(tmp_path: Path) -> None:
    disk = spill(tmp_path)
    for key in ("lat_a", "lat_b"):
        disk.put(key, kv())
    disk.flush()
    disk.close()
    again = spill(tmp_path, known={"lat_b"})
    assert [path.name for path in tmp_path.glob("*.kv")] == ["lat_b.kv"]
    assert [key in again for key in ("lat_a", "lat_b")] == [False, True]
    again.close()


# The same in a service


def refs_of(service: LocalService) -> list[Any]:
    """A chain of two beside a loner."""
    plan = service.think(messages("Plan it."), steps=3, agent="planner")
    critique = service.think(messages("Check it."), [plan], steps=2, agent="critic")
    loner = service.think(messages("Think alone."), steps=4, agent="loner")
    return [plan, critique, loner]


def words(service: LocalService, refs: list[Any]) -> list[Any]:
    read: list[list[Any]] = [[refs[0]], [refs[1]], [refs[1], refs[2]]]
    return [say(service, QUESTION, each).token_ids for each in read]


SETTINGS: list[dict[str, Any]] = [
    {"kv_cpu_budget": "1GiB"},
    {"kv_disk_budget": "1 GiB"},
    {"kv_cpu_budget": 40_000, "kv_disk_budget": 10**9},
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_spilled_kv_gives_the_same_words_without_a_rebuild(
    fresh_service: Fresh, tmp_path: Path, dtype: str, settings: dict[str, Any]
) -> None:
    plain = fresh_service(dtype=dtype)
    theirs = words(plain, refs_of(plain))
    service = fresh_service(dtype=dtype, store=tmp_path, kv_budget=0, **settings)
    refs = refs_of(service)
    if service._pool.disk:
        service._pool.disk.flush()
    assert words(service, refs) == theirs
    info = service.info()
    assert info["rebuilds"] == info["kv_hits"] == 0
    assert info["kv_cpu_hits"] + info["kv_disk_hits"] > 0
    assert info["kv_cpu_bytes"] <= info["kv_cpu_budget"]


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_a_kv_is_written_as_the_page_on_the_format_says(fresh_service: Fresh, tmp_path: Path, kv_dtype: str) -> None:
    service = fresh_service(
        dtype="float32", store=tmp_path, kv_budget=0, kv_disk_budget="1GiB", kv_dtype=kv_dtype, merge="rotate"
    )
    plan, critique, _ = refs_of(service)
    assert service._pool.disk is not None
    service._pool.disk.flush()
    header, tensors = parts((tmp_path / "kv" / f"{critique['id']}.kv").read_bytes())
    own = critique["positions"] - plan["positions"]
    made_for = {"model": critique["model"], "dtype": "float32", "merge": "rotate"}
    if kv_dtype == "int8":
        made_for["kv_dtype"] = "int8"
    assert header == {"id": critique["id"], "positions": own, **made_for}
    config, whole = service.model.config, torch.float32
    heads, width = config.num_key_value_heads, config.head_dim
    named = {"keys": (whole, (heads, own, width)), "values": (whole, (heads, own, width))}
    if kv_dtype == "int8":
        codes = (torch.int8, (heads, own, width))
        scales = {"key_scales": (whole, (heads, 1, width)), "value_scales": (whole, (heads, own, 1))}
        named = {"key_codes": codes, "value_codes": codes, **scales}
    layers = range(config.num_hidden_layers)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        f"{name}.{i}": shape for name, shape in named.items() for i in layers
    }
    memory = service.memory(critique)
    for i in layers:
        for side, read in (("key", memory.keys[i]), ("value", memory.values[i])):
            if kv_dtype == "int8":
                tensors[f"{side}s.{i}"] = tensors[f"{side}_codes.{i}"] * tensors[f"{side}_scales.{i}"]
            assert torch.equal(tensors[f"{side}s.{i}"], read[:, -own:])


def test_a_spilled_memory_is_bit_by_bit_what_it_was(fresh_service: Fresh, tmp_path: Path) -> None:
    service = fresh_service(store=tmp_path, kv_disk_budget=10**9)
    refs = refs_of(service)
    before = [kv_copy(service.memory(ref)) for ref in refs]
    service._pool.kept.limit = 0
    for ref in refs:
        kv = service._pool.kept.pop(ref["id"])
        assert kv is not None
        service._pool.keep(ref["id"], kv)
    assert service._pool.disk is not None
    service._pool.disk.flush()
    assert service.info()["kv_bytes"] == 0
    assert all(kv_equal(service.memory(ref), kv) for ref, kv in zip(refs, before, strict=True))
    assert service.info()["rebuilds"] == 0


def test_a_kv_that_cannot_be_kept_is_read_all_the_same(
    fresh_service: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = fresh_service(store=tmp_path, kv_budget=0, kv_disk_budget="1GiB")
    ref = service.think("a", steps=2)
    assert service._pool.disk is not None
    service._pool.disk.flush()
    kv = kv_copy(service.memory(ref))

    def full(*_: object) -> None:
        raise OSError("too many open files")

    monkeypatch.setattr(service._pool, "keep", full)
    for _ in range(2):
        assert kv_equal(service.memory(ref), kv)
    assert not service._pool._coming


def test_after_a_restart_the_disk_is_warm(fresh_service: Fresh, tmp_path: Path) -> None:
    first = fresh_service(store=tmp_path, kv_budget=0, kv_disk_budget="1GiB")
    refs = refs_of(first)
    said = words(first, refs)
    assert first._pool.disk is not None
    first._pool.disk.flush()
    first.close()
    second = fresh_service(store=tmp_path, kv_disk_budget="1GiB")
    assert words(second, refs) == said
    assert second.info()["rebuilds"] == 0
    assert second.info()["kv_disk_hits"] == 3


def test_the_kv_of_what_was_dropped_meanwhile_is_not_taken_over(fresh_service: Fresh, tmp_path: Path) -> None:
    first = fresh_service(store=tmp_path, kv_budget=0, kv_disk_budget="1GiB")
    plan, critique, loner = refs_of(first)
    assert first._pool.disk is not None
    first._pool.disk.flush()
    first.close()
    fresh_service(store=tmp_path).drop(loner)
    fresh_service(store=tmp_path, kv_disk_budget="1GiB")
    assert {path.stem for path in (tmp_path / "kv").glob("*.kv")} == {plan["id"], critique["id"]}


@pytest.mark.parametrize("other", [{"dtype": "float32"}, {"merge": "rebuild"}])
def test_spilled_kv_of_another_dtype_or_merge_is_rebuilt(
    fresh_service: Fresh, tmp_path: Path, other: dict[str, Any]
) -> None:
    first = fresh_service(store=tmp_path, kv_budget=0, kv_disk_budget="1GiB")
    refs = refs_of(first)
    assert first._pool.disk is not None
    first._pool.disk.flush()
    first.close()
    second = fresh_service(store=tmp_path, kv_disk_budget="1GiB", **other)
    plain = fresh_service(store=tmp_path, **other)
    assert words(second, refs) == words(plain, refs)
    assert second.info()["kv_disk_refused"] >= 2  # a rebuilding merge computes the one that moves anew in any case
    assert second.info()["kv_disk_hits"] == 0
    assert second.info()["rebuilds"] > 0


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "other"])
def test_a_damaged_spill_file_is_rebuilt_and_the_count_says_so(
    fresh_service: Fresh, tmp_path: Path, damage: str
) -> None:
    service = fresh_service(store=tmp_path, kv_budget=0, kv_disk_budget="1GiB")
    refs = refs_of(service)
    said = words(fresh_service(store=tmp_path), refs)
    assert service._pool.disk is not None
    service._pool.disk.flush()
    path = tmp_path / "kv" / f"{refs[1]['id']}.kv"
    if damage == "gone":
        path.unlink()
    elif damage == "other":
        path.write_bytes((tmp_path / "kv" / f"{refs[2]['id']}.kv").read_bytes())
    else:
        file = bytearray(path.read_bytes())
        file[-100] ^= 1
        path.write_bytes(file if damage == "flip" else file[:-100])
    assert at_once([lambda: words(service, refs)] * 3) == [said] * 3
    assert service.info()["kv_disk_refused"] >= 1
    assert service.info()["rebuilds"] >= 1


def test_a_lost_recipe_behind_a_damaged_spill_file_fails_its_reader(fresh_service: Fresh, tmp_path: Path) -> None:
    service = fresh_service(store=tmp_path, kv_budget=0, kv_disk_budget="1GiB")
    refs = refs_of(service)
    assert service._pool.disk is not None
    service._pool.disk.flush()
    (tmp_path / "kv" / f"{refs[0]['id']}.kv").write_bytes(b"")
    recipe = service._pool._recipe

    def gone(key: str) -> Any:  # by the time it is to be rebuilt
        if key == refs[0]["id"]:
            raise UnknownReference("gone")
        return recipe(key)

    service._pool._recipe = gone
    with pytest.raises(UnknownReference, match="gone"):
        service.memory(refs[0])
    service._pool._recipe = recipe
    assert service.memory(refs[0]).positions == refs[0]["positions"]


def test_altered_memories_are_made_of_spilled_ones_and_never_spilled(fresh_service: Fresh, tmp_path: Path) -> None:
    def zeroed(service: LocalService) -> Any:
        ref = service.altered(refs_of(service)[1], "zeroed")
        if service._pool.disk:
            service._pool.disk.flush()
        return say(service, QUESTION, [ref]).token_ids

    service = fresh_service(store=tmp_path, kv_budget=0, kv_disk_budget="1GiB")
    assert zeroed(service) == zeroed(fresh_service())
    assert service.info()["kv_disk_hits"] > 0
    assert not [path for path in (tmp_path / "kv").glob("*.kv") if "zeroed" in path.name]


def test_a_closed_service_reads_no_disk(fresh_service: Fresh, tmp_path: Path) -> None:
    service = fresh_service(store=tmp_path, kv_budget=0, kv_disk_budget="1GiB")
    ref = refs_of(service)[0]
    assert service._pool.disk is not None
    service._pool.disk.flush()
    service.close()
    with pytest.raises(ServiceClosed):
        service.memory(ref)


def test_after_a_fork_no_reader_waits_for_a_thread_that_is_not_there(fresh_service: Fresh, tmp_path: Path) -> None:
    service = fresh_service(store=tmp_path, kv_budget=0, kv_disk_budget="1GiB")
    ref = refs_of(service)[0]
    assert service._pool.disk is not None
    service._pool.disk.flush()
    context = multiprocessing.get_context("fork")
    said: Any = context.SimpleQueue()

    def reads() -> None:
        try:
            service.memory(ref)
        except ServiceClosed as error:
            said.put(str(error))

    child = context.Process(target=reads, daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert "forked" in said.get()


def test_tenants_share_the_budgets_out_and_no_files(fresh_service: Fresh, tmp_path: Path) -> None:
    service = fresh_service(
        store=tmp_path, kv_budget=0, kv_cpu_budget=3000, kv_disk_budget=3 * 10**9, store_budget=3 * 10**6
    )
    made = service.tenants(["a", "b"])
    for each in (service, *made.values()):
        info = each.info()
        assert info["kv_cpu_budget"] == 1000
        assert (info["kv_disk_budget"], info["store_budget"]) == (10**9, 10**6)
    refs_of(made["a"])
    assert made["a"]._pool.disk is not None
    made["a"]._pool.disk.flush()
    assert not list((tmp_path / "kv").glob("*.kv"))
    assert len(list(tmp_path.glob("tenants/*/kv/*.kv"))) == 3


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"kv_disk_budget": "1GiB"}, "kv_folder"),
        ({"kv_budget": "much"}, "kv_budget"),
        ({"kv_cpu_budget": -1}, "kv_cpu_budget"),
        ({"kv_disk_budget": "-1GiB"}, "kv_disk_budget"),
        ({"store_budget": "1GiB"}, "folder"),
        ({"keep_for": "P1D"}, "folder"),
        ({"keep_for": "soon"}, "keep_for"),
    ],
)
def test_budgets_that_cannot_be_held_are_refused(fresh_service: Fresh, bad: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        fresh_service(**bad)


def test_a_budget_may_have_a_unit(fresh_service: Fresh, tmp_path: Path) -> None:
    service = fresh_service(store=tmp_path, kv_budget="2GiB", kv_cpu_budget="500 MB", store_budget="1.5KiB")
    info = service.info()
    assert (info["kv_budget"], info["kv_cpu_budget"], info["store_budget"]) == (2**31, 5 * 10**8, 1536)
