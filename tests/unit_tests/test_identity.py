import hashlib
import hmac
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_latentmas import LatentRef
from langchain_latentmas.errors import InvalidRequest, TamperedReference
from langchain_latentmas.service import identity
from langchain_latentmas.service.identity import Signer, checked_ref, key_file, key_ring, memory_id, rotate_key

from ..support import FIELDS

MADE_FROM: dict[str, Any] = {
    "model": "0" * 32,
    "alignment": "realign",
    "parents": ["lat_" + "1" * 32],
    "prompt_ids": [5, 6],
    "steps": 4,
    "spoken_ids": [7],
}


def ref(signer: Signer) -> LatentRef:
    made = LatentRef(id="lat_" + "a" * 32, agent="a", model="b" * 32, parents=[], positions=9, steps=3, mac="")
    made["mac"] = signer.sign(made)
    return made


def test_an_id_is_the_digest_of_its_ingredients_in_canonical_json() -> None:
    """Whoever changes this gives other names to all memories that there are."""
    written = (
        '["latentmas-1","00000000000000000000000000000000","realign",'
        '["lat_11111111111111111111111111111111"],[5,6],4,[7]]'
    )
    assert memory_id(**MADE_FROM) == "lat_" + hashlib.sha256(written.encode()).hexdigest()[:32]


def test_a_signature_is_the_hmac_of_the_fields_in_canonical_json() -> None:
    """Whoever changes this refuses all references that there are."""
    signer = Signer(b"k" * 32)
    fields = {**ref(signer), "agent": "é"}
    written = (
        b'{"agent":"\\u00e9","id":"lat_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","model":"bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",'
        b'"parents":[],"positions":9,"steps":3}'
    )
    assert signer.sign(fields) == hmac.digest(b"k" * 32, written, "sha256").hex()
    of_a_tenant = hmac.digest(b"k" * 32, "tenant\0Zoë".encode(), "sha256")
    assert signer.derived("Zoë").sign(fields) == hmac.digest(of_a_tenant, written, "sha256").hex()


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("model", "2" * 32),
        ("alignment", "rescale"),
        ("parents", []),
        ("prompt_ids", [56]),
        ("steps", 5),
        ("spoken_ids", []),
    ],
)
def test_every_ingredient_changes_the_id(name: str, other: Any) -> None:
    assert memory_id(**{**MADE_FROM, name: other}) != memory_id(**MADE_FROM)


@given(st.sampled_from([f for f in FIELDS if f != "mac"]), st.data())
def test_no_changed_field_keeps_its_signature(field: str, data: st.DataObject) -> None:
    signer = Signer(b"k" * 32)
    genuine: dict[str, Any] = {**ref(signer)}
    assert signer.matches(genuine)
    other = data.draw(st.one_of(st.text(), st.integers(), st.lists(st.text()), st.none()))
    assert signer.matches({**genuine, field: other}) == (other == genuine[field])


@given(st.text(max_size=80))
def test_no_other_mac_matches(mac: str) -> None:
    signer = Signer(b"k" * 32)
    genuine: dict[str, Any] = {**ref(signer)}
    assert signer.matches({**genuine, "mac": mac}) == (mac == genuine["mac"])


@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary()),
        lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.sampled_from(FIELDS), inner)),
    )
)
def test_what_is_no_reference_raises_nothing_but_tampered(value: Any) -> None:
    with pytest.raises(TamperedReference):
        checked_ref(value)


def test_a_key_file_is_made_once_for_this_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "store" / "key"
    key = key_file(path)
    assert len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert key_file(path) == key
    assert [p.name for p in path.parent.iterdir()] == ["key"]


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key_file(path)
    path.chmod(0o644)
    with pytest.raises(InvalidRequest, match="chmod 600"):
        key_file(path)


def test_a_key_file_of_somebody_else_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> str:
        raise PermissionError("not for you")

    path = tmp_path / "key"
    key_file(path)
    monkeypatch.setattr(Path, "read_text", refused)
    for call in (lambda: key_file(path), lambda: rotate_key(path, keep=0)):
        with pytest.raises(InvalidRequest, match="its owner"):
            call()


def test_a_fresh_key_belongs_to_whom_the_old_one_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, given, replace = tmp_path / "key", [], Path.replace
    key_file(path)
    owner = path.stat()
    monkeypatch.setattr(os, "chown", lambda file, *to: given.append((file, to)))
    monkeypatch.setattr(Path, "replace", lambda file, to: (given.append(file), replace(file, to))[1])
    rotate_key(path, keep=0)
    (fresh, to), replaced = given  # before the server can see it
    assert to == (owner.st_uid, owner.st_gid)
    assert fresh == replaced != path


def test_a_key_file_is_that_of_the_page_on_the_format(tmp_path: Path) -> None:
    path, fields = tmp_path / "key", {"a": 1}
    path.touch(mode=0o600)
    lines = ["0a" * 32, "0b" * 32 + " 4102444800", "0c" * 32 + " 0"]  # the one in use, until 2100, and no more
    path.write_text("\n".join(lines))
    ring = key_ring(path)
    signed = [{**fields, "mac": Signer(bytes([n]) * 32).sign(fields)} for n in (10, 11, 12)]
    assert ring.sign(fields) == signed[0]["mac"]
    assert [ring.matches(each) for each in signed] == [True, True, False]
    assert [ring.timeless().matches(each) for each in signed] == [True, True, True]
    rotate_key(path, keep=0)
    fresh, *old = path.read_text().split("\n")
    assert bytes.fromhex(fresh) == key_file(path)
    assert old == ["0a" * 32 + " 0", *lines[1:]]


def test_a_short_key_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="16 bytes"):
        Signer(b"short")


def test_a_fresh_key_that_cannot_be_read_yet_is_taken_once_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, fields = tmp_path / "key", {"a": 1}
    key_file(path)
    signer = key_ring(path)
    monkeypatch.setattr(identity, "LOOK_SECONDS", 0)
    rotate_key(path, keep=0)
    fresh = key_ring(path).sign(fields)
    path.chmod(0o640)  # stands for whatever refuses it, and leaves the file as old as it is
    assert [signer.sign(fields) == fresh for _ in range(3)] == [False] * 3
    path.chmod(0o600)
    assert signer.sign(fields) == fresh
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_a_key_that_is_refused_at_once_is_refused_by_a_clock_that_is_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, now = tmp_path / "key", time.time()
    key_file(path)
    signed = {"a": 1, "mac": key_ring(path).sign({"a": 1})}
    rotate_key(path, keep=0)
    monkeypatch.setattr(time, "time", lambda: now - 3600)
    assert not key_ring(path).matches(signed)
    assert key_ring(path).timeless().matches(signed)
