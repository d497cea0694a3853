import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from langchain_latentmas.engine.kv import KV
from langchain_latentmas.engine.ragged import Ragged
from langchain_latentmas.engine.slots import SlotCache, Window

from ..support import kv_equal


def kv(positions: int, seed: int = 0) -> KV:
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.randn(2, positions, 4, generator=generator) for _ in range(4)]
    return KV(layers[:2], layers[2:])


@pytest.fixture(params=["each layer its own", "stacked"])
def cache(request: pytest.FixtureRequest) -> SlotCache:
    return SlotCache(2, kv(1).stacked() if request.param == "stacked" else None)


def test_what_is_written_is_read(cache: SlotCache) -> None:
    cache.write(0, 3, kv(5))
    assert kv_equal(cache.read(0, 3, 8), kv(5))


def test_what_is_read_is_a_copy(cache: SlotCache) -> None:
    cache.write(0, 0, kv(5))
    read = cache.read(0, 0, 5)
    cache.write(0, 0, kv(5, seed=1))
    assert kv_equal(read, kv(5))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 700)), max_size=5))
def test_reserving_keeps_what_is_there_and_never_shrinks(sizes: list[tuple[int, int]]) -> None:
    cache = SlotCache(layers=2)
    cache.write(0, 0, kv(100))
    before = (1, 128)
    for slots, capacity in sizes:
        cache.reserve(slots, capacity)
        assert cache.slots >= max(slots, before[0])
        assert cache.capacity >= max(capacity, before[1])
        assert cache.slots.bit_count() == cache.capacity.bit_count() == 1
        assert cache.layers[0].keys.shape == (cache.slots, 2, cache.capacity, 4)
        before = cache.slots, cache.capacity
    assert kv_equal(cache.read(0, 0, 100), kv(100))


@given(st.lists(st.tuples(st.sampled_from([2, 4, 8]), st.sampled_from([128, 256, 1024])), max_size=5), st.booleans())
def test_any_size_keeps_what_has_room(sizes: list[tuple[int, int]], stacked: bool) -> None:
    cache = SlotCache(2, kv(1).stacked() if stacked else None)
    cache.reserve(2, 128)
    cache.write(1, 0, kv(100))
    for slots, capacity in sizes:
        cache.resize(slots, capacity)
        assert cache.layers[1].values.shape == (slots, 2, capacity, 4)
        assert kv_equal(cache.read(1, 0, 100), kv(100))


def test_moving_a_slot_leaves_its_source(cache: SlotCache) -> None:
    cache.reserve(2, 128)
    cache.write(0, 0, kv(6))
    cache.write(1, 0, kv(6, seed=1))
    cache.move(0, 1, 4)
    assert kv_equal(cache.read(0, 0, 6), kv(6))
    assert kv_equal(cache.read(1, 0, 4), kv(6).split([4, 2])[0])
    assert kv_equal(cache.read(1, 4, 6), kv(6, seed=1).split([4, 2])[1])


def test_an_update_writes_each_row_at_its_own_cells(cache: SlotCache) -> None:
    cache.reserve(3, 128)
    cache.window = Window(slice(1, 3), cache.capacity, Ragged([2, 2], [0, 7], torch.device("cpu")))
    new = torch.randn(2, 2, 2, 4)
    keys, values = cache.layers[0].update(new, -new)
    assert keys.shape == values.shape == (2, 2, 9, 4)
    assert torch.equal(keys[0, :, :2], new[0])
    assert torch.equal(values[1, :, 7:9], -new[1])
    assert keys[0, :, 2:].count_nonzero() == keys[1, :, :7].count_nonzero() == 0


def test_the_bytes_of_a_position_are_those_of_all_layers(cache: SlotCache) -> None:
    assert cache.bytes_per_position == 0
    cache.write(0, 0, kv(5))
    assert cache.bytes_per_position == kv(1).nbytes


def test_padding_is_not_written(cache: SlotCache) -> None:
    cache.reserve(2, 128)
    cache.window = Window(slice(0, 2), cache.capacity, Ragged([3, 1], [0, 7], torch.device("cpu")))
    new = torch.randn(4, 2, 4)
    keys, values = cache.layers[0].put(new, -new)
    padded = cache.window.padded(new).transpose(1, 2)
    assert padded.shape == (2, 2, 3, 4)
    for found in ((keys, values), cache.layers[1].update(padded, -padded)):
        assert found[0].shape == found[1].shape == (2, 2, 8, 4)
        assert torch.equal(found[0][0, :, :3], new[:3].transpose(0, 1))
        assert torch.equal(found[1][1, :, 7], -new[3])
        assert found[0].count_nonzero() == 4 * 2 * 4
    assert cache.layers[0].keys.count_nonzero() == cache.layers[1].keys.count_nonzero() == 4 * 2 * 4


def test_what_is_blank_holds_nothing_and_the_others_all(cache: SlotCache) -> None:
    cache.reserve(2, 128)
    cache.write(0, 0, kv(6))
    cache.write(1, 0, kv(6, seed=1))
    cache.blank(0)
    assert all(side.count_nonzero() == 0 for layers in cache.read(0, 0, 128) for side in layers)
    assert kv_equal(cache.read(1, 0, 6), kv(6, seed=1))


def test_what_is_cleared_is_as_new_and_its_slots_are_gone_at_once(cache: SlotCache) -> None:
    cache.reserve(4, 256)
    cache.write(1, 0, kv(200))
    slots = [weakref.ref(t) for t in cache._tensors]
    gc.disable()
    try:
        cache.clear()
        assert [slot() for slot in slots] == [None] * len(slots)
    finally:
        gc.enable()
    assert (cache.slots, cache.capacity, cache.bytes_per_position) == (1, 128, 0)
    cache.write(0, 3, kv(5))
    assert kv_equal(cache.read(0, 3, 8), kv(5))


def test_layers_that_differ_are_not_stacked() -> None:
    layers = [torch.randn(2, 5, 4), torch.randn(1, 5, 4)]
    unlike = KV(layers, layers).stacked()
    assert isinstance(unlike.keys, list)
    cache = SlotCache(2, unlike.first(1))
    cache.write(0, 3, unlike)
    assert kv_equal(cache.read(0, 3, 8), unlike)
