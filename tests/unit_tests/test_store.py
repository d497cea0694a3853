import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.stores import InMemoryByteStore

from langchain_latentmas.errors import InvalidRequest, StoreCorrupted, UnknownReference
from langchain_latentmas.service import store as module
from langchain_latentmas.service.identity import Signer, memory_id
from langchain_latentmas.service.memory import Recipe, Segment
from langchain_latentmas.service.store import FolderStore, RecipeStore

HIDDEN = 4


def recipe(steps: int = 3, spoken: tuple[int, ...] = ()) -> Recipe:
    key = memory_id(
        model="0" * 32, alignment="realign", parents=[], prompt_ids=[5, 6, 7], steps=steps, spoken_ids=spoken
    )
    thoughts = torch.arange(steps * HIDDEN, dtype=torch.float32).reshape(steps, HIDDEN)
    return Recipe(key, "0" * 32, "realign", (), Segment("planner", (5, 6, 7), thoughts, spoken))


def recipe_store(store: Any = None) -> RecipeStore:
    return RecipeStore(InMemoryByteStore() if store is None else store, Signer(b"k" * 32), HIDDEN, torch.float32)


@given(st.integers(0, 6), st.lists(st.integers(0, 2**31), max_size=5))
def test_a_recipe_comes_back_as_it_was(steps: int, spoken: list[int]) -> None:
    store, put = recipe_store(), recipe(steps, tuple(spoken))
    store.put(put)
    got = store.get(put.id)
    assert (got.id, got.model, got.alignment, got.parents) == (put.id, put.model, put.alignment, put.parents)
    assert (got.segment.agent, got.segment.prompt_ids, got.segment.spoken_ids) == ("planner", (5, 6, 7), tuple(spoken))
    assert torch.equal(got.segment.thoughts, put.segment.thoughts)


def test_a_recipe_that_is_not_there_is_unknown() -> None:
    with pytest.raises(UnknownReference, match="store="):
        recipe_store().get(recipe().id)


@given(st.sampled_from(["json", "safetensors"]), st.data())
def test_no_flipped_byte_and_no_cut_is_accepted(part: str, data: st.DataObject) -> None:
    bytes_store = InMemoryByteStore()
    store, put = recipe_store(bytes_store), recipe()
    store.put(put)
    key = f"{put.id}.{part}"
    value = bytearray(bytes_store.mget([key])[0] or b"")
    at = data.draw(st.integers(0, len(value) - 1))
    if data.draw(st.booleans()):
        value[at] ^= data.draw(st.integers(1, 255))
    else:
        del value[at:]
    bytes_store.mset([(key, bytes(value))])
    with pytest.raises(StoreCorrupted, match=put.id):
        store.get(put.id)


def test_a_manifest_that_another_key_signed_is_refused() -> None:
    bytes_store, put = InMemoryByteStore(), recipe()
    RecipeStore(bytes_store, Signer(b"x" * 32), HIDDEN, torch.float32).put(put)
    with pytest.raises(StoreCorrupted, match="signature"):
        recipe_store(bytes_store).get(put.id)


def test_a_declared_size_of_4_gib_allocates_nothing() -> None:
    bytes_store, put = InMemoryByteStore(), recipe()
    store = recipe_store(bytes_store)
    store.put(put)
    header = json.dumps({"thoughts": {"dtype": "F32", "shape": [2**28, HIDDEN], "data_offsets": [0, 2**32]}}).encode()
    bytes_store.mset([(f"{put.id}.safetensors", struct.pack("<Q", len(header)) + header)])
    with pytest.raises(StoreCorrupted):
        store.get(put.id)


def test_a_value_larger_than_any_recipe_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_VALUE", 100)
    (tmp_path / "large").write_bytes(b"0" * 101)
    with pytest.raises(StoreCorrupted, match="101 bytes"):
        FolderStore(tmp_path).mget(["large"])


def test_a_folder_keeps_values_and_lists_no_halves(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.mset([("a", b"1"), ("b", b"2"), ("a", b"3")])
    (tmp_path / ".0123456789abcdef").write_bytes(b"half")
    assert store.mget(["a", "b", "c"]) == [b"3", b"2", None]
    assert list(store.yield_keys()) == ["a", "b"]
    assert list(store.yield_keys(prefix="b")) == ["b"]
    store.mdelete(["a", "c"])
    assert list(store.yield_keys()) == ["b"]


@pytest.mark.parametrize("key", ["../x", "a/b", "", ".hidden", "a\0b", "/etc/passwd", "x" * 200])
def test_a_key_never_leaves_the_folder(tmp_path: Path, key: str) -> None:
    store = FolderStore(tmp_path / "store")
    with pytest.raises(InvalidRequest, match="cannot be a key"):
        store.mset([(key, b"1")])
    with pytest.raises(InvalidRequest, match="cannot be a key"):
        store.mget([key])
    assert list((tmp_path / "store").iterdir()) == []
