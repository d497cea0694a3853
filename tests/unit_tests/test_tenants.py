import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from langchain_core.stores import InMemoryByteStore

from langchain_latentmas.errors import InvalidRequest, ServiceClosed, TamperedReference, UnknownReference
from langchain_latentmas.service import identity
from langchain_latentmas.service.identity import Signer, key_file, key_ring, rotate_key
from langchain_latentmas.service.local import LocalService
from tests.support import Gate, messages, say

PROMPT = messages("What is 12 plus 30?")


def test_tenants_share_the_ticks_and_nothing_else(fresh_service: Any) -> None:
    service: LocalService = fresh_service()
    made = service.tenants(["a", "b"])
    ref = made["a"].think(PROMPT, steps=3)
    assert ref["id"] == service.think(PROMPT, steps=3)["id"]  # what it is made from says what it is, whoever asks
    thoughts = service.info()["thoughts"]
    assert thoughts == 6  # the second one learnt nothing from the first
    for other in (service, made["b"]):
        for reads in (other.memory, other.lens, other.marker, lambda r, o=other: o.think(PROMPT, [r])):
            with pytest.raises(TamperedReference):
                reads(ref)
        with pytest.raises(TamperedReference):
            other.take_markers(made["a"].marker(ref))
    assert made["a"].take_markers(made["a"].marker(ref))[1] == [ref]
    assert say(made["a"], PROMPT, [ref]).text == say(service, PROMPT, [service.think(PROMPT, steps=3)]).text


def test_a_tenant_does_not_end_the_others(fresh_service: Any) -> None:
    service = fresh_service()
    made = service.tenants(["a", "b"])
    made["a"].close()
    with pytest.raises(ServiceClosed):
        made["a"].think(PROMPT, steps=1)
    assert made["b"].think(PROMPT, steps=1)
    assert service.think(PROMPT, steps=1)


def test_tenants_end_with_their_service_and_leave_their_folders_to_the_next(fresh_service: Any, tmp_path: Path) -> None:
    service = fresh_service(store=tmp_path, kv_disk_budget=10**6)
    made = service.tenants(["a"])
    service.close()
    with pytest.raises(ServiceClosed):
        made["a"].think(PROMPT, steps=1)
    again = fresh_service(store=tmp_path, kv_disk_budget=10**6).tenants(["a"])
    assert again["a"].info()["kv_disk_budget"] == 10**6 // 2


def test_the_budget_is_shared_out(fresh_service: Any) -> None:
    service = fresh_service(kv_budget=3000)
    made = service.tenants(["a", "b"])
    assert [each.info()["kv_budget"] for each in (service, *made.values())] == [1000, 1000, 1000]


def test_tenants_find_their_memories_again_in_a_folder(fresh_service: Any, tmp_path: Path) -> None:
    ref = fresh_service(store=tmp_path).tenants(["a", "b"])["a"].think(PROMPT, steps=2)
    again = fresh_service(store=tmp_path).tenants(["b", "a"])
    assert again["a"].memory(ref).positions == ref["positions"]
    with pytest.raises(TamperedReference):
        again["b"].memory(ref)


def test_names_are_no_paths(fresh_service: Any, tmp_path: Path) -> None:
    fresh_service(store=tmp_path / "in").tenants(["../../out", "/etc/x"])["../../out"].think(PROMPT, steps=0)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_tenants_of_a_store_of_ones_own_are_refused(fresh_service: Any) -> None:
    with pytest.raises(InvalidRequest, match="folder"):
        fresh_service(store=InMemoryByteStore(), key=b"k" * 32).tenants(["a"])


def test_after_a_rotation_old_references_are_read_for_a_stated_time(
    fresh_service: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fresh_service(store=tmp_path)
    old, marker = before.think(PROMPT, steps=2), before.marker(before.think(PROMPT, steps=2))
    rotate_key(tmp_path / "key", keep=3600)
    after = fresh_service(store=tmp_path)
    assert after.memory(old).positions == old["positions"]
    renewed = after.take_markers(marker)[1][0]
    assert renewed["id"] == old["id"]
    assert renewed["mac"] != old["mac"]
    child = after.think(messages("and then?"), [old], steps=1)
    assert before.memory(renewed).positions == old["positions"]  # the old process has looked for the new key

    now = time.time()
    monkeypatch.setattr("langchain_latentmas.service.identity.time.time", lambda: now + 3700)
    for late in (old, marker):
        with pytest.raises(TamperedReference):
            after.take_markers(late) if isinstance(late, str) else after.memory(late)
    assert len(fresh_service(store=tmp_path).memory(child).segments) == 2  # what it was made on is still read


def test_a_rotation_reaches_services_that_run(
    fresh_service: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = fresh_service(store=tmp_path)
    tenant = service.tenants(["a"])["a"]
    old = [each.think(PROMPT, steps=1) for each in (service, tenant)]
    rotate_key(tmp_path / "key", keep=3600)
    monkeypatch.setattr(identity, "LOOK_SECONDS", 0)
    new = [each.think(PROMPT, steps=1) for each in (service, tenant)]
    assert [ref["id"] for ref in new] == [ref["id"] for ref in old]
    assert not {ref["mac"] for ref in new} & {ref["mac"] for ref in old}
    for each, refs in zip((service, tenant), zip(old, new, strict=True), strict=True):
        assert {each.memory(ref).positions for ref in refs} == {refs[0]["positions"]}
    rotate_key(tmp_path / "key", keep=0)
    for each, ref in zip((service, tenant), new, strict=True):
        with pytest.raises(TamperedReference):
            each.memory(ref)
    good = service.think(PROMPT, steps=1)
    rotated = tmp_path / "other"
    rotated.write_text("no key")
    rotated.replace(tmp_path / "key")
    with caplog.at_level("ERROR"):
        assert service.think(PROMPT, steps=1) == good
        assert service.memory(good).positions == good["positions"]
    assert [record.getMessage() for record in caplog.records if "signing key" in record.getMessage()] == [
        caplog.records[0].getMessage()
    ]


def test_who_comes_while_a_fresh_key_is_read_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key_file(tmp_path / "key")
    signer, gate, read = key_ring(tmp_path / "key"), Gate(), identity._keys
    rotate_key(tmp_path / "key", keep=0)
    fields = {"a": 1}
    signed = {**fields, "mac": key_ring(tmp_path / "key").sign(fields)}

    def slow(path: Path) -> Any:
        gate.wait()
        return read(path)

    monkeypatch.setattr(identity, "_keys", slow)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(signer.matches, signed)
        assert gate.entered.wait(60)
        second = threads.submit(signer.matches, signed)
        wait([second], timeout=0.2)  # it ends right away if it does not wait
        gate.open()
        assert (first.result(60), second.result(60)) == (True, True)


def test_a_key_is_on_the_disk_before_it_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, flushed = tmp_path / "key", list[tuple[bool, bytes]]()
    flush = os.fsync

    def note(file: int) -> None:
        flushed.append((stat.S_ISDIR(os.fstat(file).st_mode), path.read_bytes() if path.exists() else b""))
        flush(file)

    monkeypatch.setattr(os, "fsync", note)
    key_file(path)
    made = path.read_bytes()
    rotate_key(path, keep=10)
    assert flushed == [(False, b""), (True, made), (False, made), (True, path.read_bytes())]


def test_rotation_keeps_the_file_private_and_all_keys(tmp_path: Path) -> None:
    first = key_file(tmp_path / "key")
    rotate_key(tmp_path / "key", keep=10)
    second = key_file(tmp_path / "key")
    rotate_key(tmp_path / "key", keep=10)
    assert len({first, second, key_file(tmp_path / "key")}) == 3
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    fields = {"a": 1}
    assert all(key_ring(tmp_path / "key").matches({**fields, "mac": Signer(k).sign(fields)}) for k in (first, second))
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize("text", ["", "zz", "abcd", f"{'0' * 64}\n{'1' * 64} soon", f"{'0' * 64}\nab 12"])
def test_a_key_file_with_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_text(text)
    for use in (key_file, key_ring, lambda p: rotate_key(p, 1)):
        with pytest.raises(InvalidRequest, match="no signing key"):
            use(path)


def test_nothing_is_rotated_where_there_is_no_key(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no signing key at"):
        rotate_key(tmp_path / "key", keep=1)
    key_file(tmp_path / "key")
    with pytest.raises(InvalidRequest, match="0 or more"):
        rotate_key(tmp_path / "key", keep=-1)


def test_a_lost_recipe_of_a_tenant_is_unknown(fresh_service: Any) -> None:
    made = fresh_service().tenants(["a"])["a"]
    ref = made.think(PROMPT, steps=0)
    made._recipes.clear()
    made._store.store.mdelete(list(made._store.store.yield_keys()))
    with pytest.raises(UnknownReference):
        made.memory(ref)
