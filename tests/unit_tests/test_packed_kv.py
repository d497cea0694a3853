"""Memories kept in 8 bits: how far off they are, what they take, and that all readers get the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from langchain_latentmas import LatentRef, LatentService
from langchain_latentmas.engine import kv as kv_module
from langchain_latentmas.engine.kv import KV, AnyKV
from langchain_latentmas.engine.rotary import Rotary, _halves
from langchain_latentmas.errors import InvalidRequest, ModelNotSupported
from langchain_latentmas.service.local import LocalService

from ..conftest import Fresh
from ..support import at_once, kv_copy, kv_difference, kv_equal, messages, say
from .test_kv_pool import EXACT, QUESTION, experts

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CPU, META = torch.device("cpu"), torch.device("meta")
ONE_CODE = 0.5 / 127  # of the largest number under a scale
AT_REST: list[dict[str, Any]] = [
    {"kv_budget": "1GiB"},
    {"kv_budget": 0, "kv_cpu_budget": "1GiB"},
    {"kv_budget": 0, "kv_disk_budget": "1GiB"},
    {"kv_budget": 0},
]


def some(positions: int, dtype: torch.dtype, seed: int = 0) -> KV:
    """Channels and positions that differ in size by a factor of up to 100."""
    generator = torch.Generator().manual_seed(seed)

    def layer() -> torch.Tensor:
        sizes = (
            10 ** (2 * torch.rand(2, 1, 8, generator=generator)),
            10 ** torch.rand(2, positions, 1, generator=generator),
        )
        return (torch.randn(2, positions, 8, generator=generator) * sizes[0] * sizes[1]).to(dtype)

    return KV([layer() for _ in range(3)], [layer() for _ in range(3)])


@given(st.integers(1, 40), st.sampled_from(DTYPES), st.integers(0, 10**6))
@example(1, torch.float16, 425)
def test_no_number_is_further_off_than_half_a_code(positions: int, dtype: torch.dtype, seed: int) -> None:
    kv = some(positions, dtype, seed)
    packed = kv.packed()
    info = torch.finfo(dtype)
    rounding = info.eps  # of the scales, and of what is read
    least = info.tiny / 2  # half a code of the smallest scale, which small numbers in float16 get
    for ours, theirs, dim in [
        *((a, b, 1) for a, b in zip(packed.keys, kv.keys, strict=True)),
        *((a, b, 2) for a, b in zip(packed.values, kv.values, strict=True)),
    ]:
        assert ours.dtype == dtype
        largest = theirs.double().abs().amax(dim, keepdim=True)
        assert ((ours.double() - theirs.double()).abs() <= (ONE_CODE + rounding) * largest + least).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros(dtype: torch.dtype) -> None:
    zeros = KV([torch.zeros(2, 3, 4, dtype=dtype)], [torch.zeros(2, 3, 4, dtype=dtype)])
    assert kv_equal(zeros.packed(), zeros)


def test_a_packed_kv_takes_a_byte_a_number_and_its_scales() -> None:
    kv = some(10, torch.bfloat16)
    assert kv.packed().nbytes == 3 * 2 * (2 * 10 * 8 + 2 * 8 + 2 * 10)
    assert kv.packed().packed().nbytes == kv.packed().nbytes
    assert kv.packed().positions == kv.positions


def test_joined_with_others_it_is_what_it_says() -> None:
    first, second = some(3, torch.float32), some(4, torch.float32, seed=1).packed()
    joined = KV.join([first, second])
    assert torch.equal(joined.keys[2][:, 3:], second.keys[2])
    assert torch.equal(joined.values[0][:, :3], first.values[0])


# The same in a service


def chain(service: LocalService) -> list[LatentRef]:
    refs: list[LatentRef] = []
    for i in range(4):
        refs.append(service.think(messages(f"Step {i}."), refs[-1:], steps=3, agent=f"a{i}"))
    return refs


def flushed(service: LocalService) -> None:
    if service._pool.disk:
        service._pool.disk.flush()


@pytest.mark.parametrize("settings", AT_REST, ids=["device", "cpu", "disk", "rebuilt"])
def test_wherever_it_was_kept_a_memory_is_the_same(fresh_service: Fresh, tmp_path: Path, settings: Any) -> None:
    """Also rebuilt, to the accuracy of float64: on what is kept of the segments before, as it was made at first."""
    told = fresh_service(kv_dtype="int8")
    service = fresh_service(kv_dtype="int8", store=tmp_path, **settings)
    refs, theirs = chain(service), chain(told)
    flushed(service)
    assert kv_difference(service.memory(refs[-1]), told.memory(theirs[-1])) < EXACT
    assert say(service, QUESTION, [refs[-1]]).token_ids == say(told, QUESTION, [theirs[-1]]).token_ids
    assert (service.info()["rebuilds"] > 0) == (settings == {"kv_budget": 0})


@pytest.mark.parametrize("merge", ["rotate", "rebuild"])
def test_a_merged_memory_is_the_same_after_it_was_evicted(fresh_service: Fresh, merge: str) -> None:
    service = fresh_service(kv_dtype="int8", merge=merge)
    judged = service.think(QUESTION, experts(service, 3), steps=4)
    before, words = kv_copy(service.memory(judged)), say(service, messages("So?"), [judged])
    service._pool.kept.clear()
    again = at_once([lambda: say(service, messages("So?"), [judged])] * 3)
    assert [each.token_ids for each in again] == [words.token_ids] * 3
    assert kv_difference(service.memory(judged), before) < EXACT


def test_after_a_restart_the_disk_is_read_in_8_bits_and_only_in_8_bits(fresh_service: Fresh, tmp_path: Path) -> None:
    first = fresh_service(store=tmp_path, kv_dtype="int8", kv_budget=0, kv_disk_budget="1GiB")
    refs = chain(first)
    before = kv_copy(first.memory(refs[-1]))
    flushed(first)
    first.close()
    again = fresh_service(store=tmp_path, kv_dtype="int8", kv_disk_budget="1GiB")
    assert kv_equal(again.memory(refs[-1]), before)
    assert again.info()["rebuilds"] == 0
    again.close()
    plain = fresh_service(store=tmp_path, kv_disk_budget="1GiB")
    plain.memory(refs[-1])
    assert plain.info()["kv_disk_refused"] > 0
    assert plain.info()["kv_disk_hits"] == 0


def test_the_budget_counts_what_8_bits_take_and_info_says_so(fresh_service: Fresh) -> None:
    plain, service = fresh_service(dtype="float32"), fresh_service(dtype="float32", kv_dtype="int8")
    refs = chain(service)
    assert [ref["id"] for ref in chain(plain)] == [ref["id"] for ref in refs]
    assert (plain.info()["kv_dtype"], service.info()["kv_dtype"]) == ("float32", "int8")
    assert service.info()["kv_bytes"] == sum(kv.nbytes for kv in service._pool.kept._values.values())
    assert service.info()["kv_bytes"] < 0.4 * plain.info()["kv_bytes"]  # heads of 16 have many scales
    assert service.info()["kv_bytes_per_position"] == plain.info()["kv_bytes_per_position"]  # live


def test_what_is_not_kept_is_not_rounded(fresh_service: Fresh) -> None:
    """A single agent reads nobody, so it says what it would have said."""
    exact, packed = (fresh_service(kv_dtype=how) for how in ("auto", "int8"))
    assert say(packed, QUESTION).token_ids == say(exact, QUESTION).token_ids
    one, other = (service.think(QUESTION, steps=3) for service in (exact, packed))
    assert torch.allclose(*(s.memory(r).segments[0].thoughts for s, r in ((exact, one), (packed, other))), rtol=EXACT)
    assert 0 < kv_difference(packed.memory(other), exact.memory(one)) < 2 * ONE_CODE


def test_altered_memories_have_the_keys_that_readers_get(fresh_service: Fresh) -> None:
    service = fresh_service(kv_dtype="int8")
    ref = chain(service)[-1]
    zeroed = service.memory(service.altered(ref, "zeroed"))
    assert all(torch.equal(a, b) for a, b in zip(zeroed.keys, service.memory(ref).keys, strict=True))
    assert not any(values.any() for values in zeroed.values)


def test_tenants_keep_8_bits_too(fresh_service: Fresh) -> None:
    made = fresh_service(kv_dtype="int8").tenants(["a"])
    assert made["a"].info()["kv_dtype"] == "int8"


def test_float16_is_refused_since_its_scales_lose_small_numbers() -> None:
    with pytest.raises(ModelNotSupported, match="take dtype='bfloat16' or 'float32', or kv_dtype='auto'"):
        LatentService.load("bundled", dtype="float16", kv_dtype="int8")


@pytest.mark.parametrize("bad", ["int4", "float16", None, 8])
def test_other_dtypes_are_refused(fresh_service: Fresh, bad: Any) -> None:
    with pytest.raises(InvalidRequest, match="kv_dtype"):
        fresh_service(kv_dtype=bad)


def test_greedy_answers_of_the_bundled_model_stay(bundled: LatentService) -> None:
    with LatentService.load("bundled", device="cpu", kv_dtype="int8") as packed:
        said = []
        for service in (bundled, packed):
            plan = service.think(
                messages("Tom has 12 apples and buys 30 more. How many apples does he have?"), steps=10
            )
            said.append(say(service, messages("Give the answer.", "You are a judger."), [plan]).token_ids)
    assert said[0] == said[1]


@pytest.mark.parametrize(
    "what",
    [
        lambda kv: kv.first(3),
        lambda kv: kv.split([2, 4])[1],
        lambda kv: Rotary(torch.tensor([1.0, 0.1]), _halves).turn(kv, 5),
        lambda kv: KV.join([kv, kv.first(2)]),
        lambda kv: KV.join([kv.packed(), kv]),
        lambda kv: kv.packed(),
        lambda kv: kv.packed().to([CPU] * 3),
        lambda kv: kv.to([CPU] * 3),
        lambda kv: kv.to([CPU, META, META]).first(2).to([META] * 3),
    ],
)
@pytest.mark.parametrize("at_once", [0, 1 << 22])
def test_stacked_layers_are_the_same_as_layers_apart(
    monkeypatch: pytest.MonkeyPatch, what: Callable[[KV], AnyKV], at_once: int
) -> None:
    monkeypatch.setattr(kv_module, "AT_ONCE", at_once)
    apart = some(6, torch.float32)
    ours, theirs = what(apart.stacked()), what(apart)
    assert ours.positions == theirs.positions
    assert ours.nbytes == theirs.nbytes
    for a, b in [*zip(ours.keys, theirs.keys, strict=True), *zip(ours.values, theirs.values, strict=True)]:
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert a.is_meta or torch.equal(a, b)
