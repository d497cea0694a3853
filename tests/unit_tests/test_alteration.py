"""What the audit does to memories: altered ones beside their originals, and readers that are handed others."""

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from langchain_latentmas import LatentRef, LatentService
from langchain_latentmas.errors import InvalidRequest, TamperedReference
from langchain_latentmas.service.alteration import alter
from langchain_latentmas.service.base import READING
from langchain_latentmas.service.local import LocalService

from ..conftest import Fresh
from ..support import at_once, kv_copy, kv_difference, kv_equal, messages, say

Way = Literal["zeroed", "random"]
WAYS: tuple[Way, ...] = ("zeroed", "random")
PROMPT = messages("What is 12 plus 30?", "You are a judger.")
ASKED = messages("What is 1 plus 2?")


class Reads:
    """A reading that notes who reads what, and hands over what a function makes of it."""

    name = "test"

    def __init__(self, change: Callable[[LatentRef], list[LatentRef]] = lambda ref: [ref]) -> None:
        self.change = change
        self.seen: list[tuple[str, str, int]] = []
        self.made_refs: list[LatentRef] = []

    def read(
        self, service: LatentService, agent: str, refs: Sequence[LatentRef], steps: int
    ) -> tuple[Sequence[LatentRef], list[LatentRef]]:
        self.seen += [(ref["agent"], agent, steps) for ref in refs]
        return refs, [new for ref in refs for new in self.change(ref)]

    def made(self, ref: LatentRef) -> None:
        self.made_refs.append(ref)


@contextmanager
def reading(reads: Reads) -> Iterator[Reads]:
    token = READING.set(reads)
    try:
        yield reads
    finally:
        READING.reset(token)


def chain(service: LatentService, words: str = "What is 1 plus 2?") -> LatentRef:
    plan = service.think(messages(words), steps=3, agent="planner")
    return service.think(messages("Check it."), [plan], steps=2, agent="critic")


def test_a_zeroed_memory_has_the_same_keys_and_no_values(service: LatentService) -> None:
    ref = chain(service)
    whole, zeroed = service.memory(ref), service.memory(service.altered(ref, "zeroed"))
    assert all(map(torch.equal, whole.keys, zeroed.keys))
    assert not any(values.any() for values in zeroed.values)
    assert all(values.any() for values in whole.values)
    assert zeroed.segments == whole.segments


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_noise_matches_the_norms_per_layer_head_and_position(fresh_service: Fresh, dtype: str) -> None:
    service = fresh_service(dtype=dtype)
    ref = chain(service)
    whole, noise = service.memory(ref), service.memory(service.altered(ref, "random"))
    assert all(map(torch.equal, whole.keys, noise.keys))
    for before, after in zip(whole.values, noise.values, strict=True):
        torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        assert cosine.abs().mean() < 0.5  # independent of what was there
        assert after.dtype == before.dtype


def test_noise_depends_on_seed_and_memory_alone(fresh_service: Fresh) -> None:
    one, other = fresh_service(), fresh_service(kv_budget=0)
    first = one.memory(one.altered(chain(one), "random", seed=5))
    again = other.memory(other.altered(chain(other), "random", seed=5))
    third = one.memory(one.altered(chain(one), "random", seed=6))
    fourth = one.memory(one.altered(chain(one, "What is 2 plus 2?"), "random", seed=5))
    assert kv_difference(first, again) < 1e-8
    assert kv_difference(first, third) > 0.1
    assert not torch.equal(first.values[0][:, :8], fourth.values[0][:, :8])


@pytest.mark.parametrize("way", WAYS)
def test_an_altered_memory_has_an_identity_of_its_own(service: LatentService, way: Way) -> None:
    ref = chain(service)
    before = kv_copy(service.memory(ref))
    altered = service.altered(ref, way)
    assert altered["id"] != ref["id"]
    assert {name: altered[name] for name in ("agent", "positions", "steps", "model")} == {  # type: ignore[literal-required]
        name: ref[name]
        for name in ("agent", "positions", "steps", "model")  # type: ignore[literal-required]
    }
    json.dumps(altered)
    on_altered = service.think(PROMPT, [altered], steps=2, agent="judger")
    on_whole = service.think(PROMPT, [ref], steps=2, agent="judger")
    assert on_altered["id"] != on_whole["id"]
    assert on_altered["parents"] == [altered["id"]]
    assert kv_difference(service.memory(on_altered), service.memory(on_whole)) > 0
    assert kv_equal(service.memory(ref), before)
    for kept_nowhere in (altered, on_altered):
        with pytest.raises(InvalidRequest, match="export the one it was made of"):
            service.export_memory(kept_nowhere)
    assert service.take_markers(service.marker(altered)) == ("", [altered])
    with pytest.raises(TamperedReference):
        service.memory({**ref, "id": altered["id"]})


@pytest.mark.parametrize("merge", ["rotate", "rebuild"])
@pytest.mark.parametrize("way", WAYS)
def test_who_reads_an_altered_memory_attends_to_it(fresh_service: Fresh, merge: str, way: Way) -> None:
    """A think on an altered memory, against plain transformers on the KV that `memory` shows."""
    service = fresh_service(merge=merge)
    plan = service.think(messages("Plan."), steps=3, agent="planner")
    other = service.think(messages("Other plan, rather longer."), steps=2, agent="other")
    on_plan = service.think(messages("Check."), [plan], steps=2, agent="critic")
    altered = service.altered(on_plan, way, seed=3)
    judged = service.think(PROMPT, [other, altered], steps=1, agent="judger")  # moves the altered one
    memory = service.memory(judged)
    past = service.memory(other).positions + altered["positions"]
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(memory.keys, memory.values, strict=True)):
        cache.update(keys[None, :, :past].clone(), values[None, :, :past].clone(), layer)
    ids = memory.segments[-1].prompt_ids
    with torch.inference_mode():
        service.model.model(
            input_ids=torch.tensor([ids]),
            past_key_values=cache,
            position_ids=torch.arange(past, past + len(ids))[None],
        )
    for layer, (keys, values) in enumerate(zip(memory.keys, memory.values, strict=True)):
        torch.testing.assert_close(cache.layers[layer].keys[0], keys[:, : past + len(ids)], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(cache.layers[layer].values[0], values[:, : past + len(ids)], rtol=1e-6, atol=1e-9)
    # Keys are those of the unaltered merge, values are not.
    plain = service.memory(service.think(PROMPT, [other, on_plan], steps=1, agent="judger"))
    start = service.memory(other).positions
    for a, b in zip(memory.keys, plain.keys, strict=True):
        torch.testing.assert_close(a[:, :past], b[:, :past], rtol=1e-6, atol=1e-9)
    for a, b in zip(memory.values, plain.values, strict=True):
        torch.testing.assert_close(a[:, :start], b[:, :start], rtol=1e-6, atol=1e-9)
        if way == "zeroed":
            assert not a[:, start:past].any()
        else:
            torch.testing.assert_close(a[:, start:past].norm(dim=-1), b[:, start:past].norm(dim=-1))
            cosine = torch.nn.functional.cosine_similarity(a[:, start:past], b[:, start:past], dim=-1)
            assert cosine.abs().mean() < 0.5


@pytest.mark.parametrize("merge", ["rotate", "rebuild"])
def test_altered_branches_share_their_altered_ancestry(fresh_service: Fresh, merge: str) -> None:
    service = fresh_service(merge=merge)
    plan = service.think(messages("Plan."), steps=3, agent="planner")
    a, b = (service.think(messages(f"Expert {i}."), [plan], steps=2, agent=f"e{i}") for i in range(2))
    both = service.memory(service.think(PROMPT, [service.altered(r, "zeroed") for r in (a, b)], steps=0))
    assert [segment.agent for segment in both.segments] == ["planner", "e0", "e1", "agent"]
    one = service.memory(service.think(PROMPT, [service.altered(a, "zeroed"), b], steps=0))
    assert [segment.agent for segment in one.segments] == ["planner", "e0", "planner", "e1", "agent"]


CHOICES = st.lists(st.tuples(st.integers(0, 20), st.sampled_from(["", "zeroed", "random"])), max_size=3)


@settings(max_examples=25)
@given(st.lists(CHOICES, min_size=2, max_size=6), st.sampled_from(["rotate", "rebuild"]))
def test_any_history_comes_back_after_eviction(histories: Any, history: list[Any], merge: str) -> None:
    """Whatever was altered, read, merged and altered again: rebuilt, it is what it was before."""
    service: LocalService = histories[merge]
    made: list[LatentRef] = []
    for i, reads in enumerate(history):
        latents = []
        for index, way in reads[: len(made)]:
            ref = made[index % len(made)]
            latents.append(service.altered(ref, way, seed=index) if way else ref)
        made.append(service.think(messages(f"Agent {i}."), latents, steps=1 + i % 2, agent=f"a{i}"))
    before = [kv_copy(service.memory(ref)) for ref in made]
    service._pool.kept.clear()
    for ref, kv in zip(reversed(made), reversed(before), strict=True):
        assert kv_difference(service.memory(ref), kv) < 1e-5  # re-rotated keys carry float32 angles of transformers


@pytest.fixture(scope="module")
def histories() -> Iterator[dict[str, LocalService]]:
    from ..conftest import load_parts

    services = {
        m: LocalService.from_model(*load_parts("qwen3-tied", "float64"), merge=m) for m in ("rotate", "rebuild")
    }
    yield services
    for service in services.values():
        service.close()


def test_an_altered_memory_outlives_the_process_in_a_durable_store(fresh_service: Fresh, tmp_path: Any) -> None:
    first = fresh_service(store=tmp_path)
    judged = first.think(PROMPT, [first.altered(chain(first), "random", seed=9)], steps=2, agent="judger")
    before = kv_copy(first.memory(judged))
    second = fresh_service(store=tmp_path)
    assert kv_difference(second.memory(judged), before) < 1e-8


@pytest.mark.parametrize(("how", "seed"), [("cut", 0), ("zeroed", -1), ("random", 10**9), ("random", True)])
def test_an_unknown_way_is_refused(service: LatentService, how: Any, seed: Any) -> None:
    with pytest.raises(InvalidRequest):
        service.altered(chain(service), how, seed)


def test_a_service_that_cannot_alter_says_so(service: LatentService) -> None:
    with pytest.raises(InvalidRequest, match="alters no memories"):
        LatentService.altered(service, chain(service), "zeroed")


def test_a_reading_that_changes_nothing_changes_nothing(fresh_service: Fresh) -> None:
    plain, watched = fresh_service(), fresh_service()
    expected = say(plain, PROMPT, [chain(plain)], agent="judger")
    with reading(Reads()) as reads:
        said = say(watched, PROMPT, [chain(watched)], agent="judger")
    assert [ref["agent"] for ref in reads.made_refs] == ["planner", "critic", "judger"]
    assert reads.made_refs[-1] == said.ref
    assert said.token_ids == expected.token_ids
    assert said.ref["id"] == expected.ref["id"]
    assert kv_equal(watched.memory(said.ref), plain.memory(expected.ref))
    assert reads.seen == [("planner", "critic", 2), ("critic", "judger", 0)]


def test_a_reading_sees_tips_only_in_their_order(service: LatentService) -> None:
    critic = chain(service)
    plan = service.think(ASKED, steps=3, agent="planner")
    lone = service.think(messages("Alone."), steps=1, agent="lone")
    with reading(Reads()) as reads:
        service.think(PROMPT, [lone, plan, critic, lone], agent="judger", steps=1)
    assert reads.seen == [("lone", "judger", 1), ("critic", "judger", 1)]


def test_a_cut_edge_is_reading_nobody(service: LatentService) -> None:
    ref = chain(service)
    expected = say(service, PROMPT, [], agent="judger")
    with reading(Reads(lambda ref: [])):
        said = say(service, PROMPT, [ref], agent="judger")
    assert said.ref["id"] == expected.ref["id"]
    assert said.token_ids == expected.token_ids


def test_a_swapped_edge_is_reading_the_other(service: LatentService) -> None:
    mine, other = chain(service), chain(service, "What is 50 plus 5?")
    expected = say(service, PROMPT, [other], agent="judger")
    with reading(Reads(lambda ref: [other])):
        said = say(service, PROMPT, [mine], agent="judger")
    assert said.ref["parents"] == [mine["id"]]  # the graph goes on as if nothing had been changed
    assert said.ref["id"] == expected.ref["id"]
    assert said.token_ids == expected.token_ids


async def test_a_reading_holds_for_its_own_task_only(fresh_service: Fresh) -> None:
    service = fresh_service()
    ref = chain(service)
    zeroed = service.altered(ref, "zeroed")

    async def run(altered: bool, i: int) -> LatentRef:
        if altered:
            READING.set(Reads(lambda ref: [zeroed]))
        await asyncio.sleep(0)
        return await service.athink(messages(f"Answer {i}."), [ref], steps=2, agent="judger")

    refs = await asyncio.gather(*(run(i % 2 == 1, i // 2) for i in range(12)))
    for i, judged in enumerate(refs):
        assert service._recipe(judged["id"]).parents == (zeroed["id"] if i % 2 else ref["id"],)  # type: ignore[attr-defined]
        assert judged["parents"] == [ref["id"]]
        expected = fresh_service() if i < 2 else service
        if i < 2:
            mine = chain(expected)
            alone = expected.think(
                messages(f"Answer {i // 2}."),
                [expected.altered(mine, "zeroed") if i else mine],
                steps=2,
                agent="judger",
            )
            assert kv_difference(service.memory(judged), expected.memory(alone)) < 1e-8


def test_readings_in_threads_do_not_meet(fresh_service: Fresh) -> None:
    service = fresh_service(kv_budget=20_000)  # evictions and rebuilds in between
    ref = chain(service)

    def run(way: str, i: int) -> tuple[str, Any]:
        with reading(Reads(lambda ref: [service.altered(ref, way)] if way else [ref])):  # type: ignore[arg-type]
            said = say(service, messages("x" * i), [ref], max_tokens=4, agent="judger")
        return way, said

    ways = ["", "zeroed", "random"] * 4
    said = at_once([lambda way=way, i=i: run(way, i // 3) for i, way in enumerate(ways)])  # type: ignore[misc]
    roomy = fresh_service()
    whole = chain(roomy)
    for i, (way, words) in enumerate(said):
        expected = say(
            roomy, messages("x" * (i // 3)), [roomy.altered(whole, way) if way else whole], max_tokens=4, agent="judger"
        )
        assert words.token_ids == expected.token_ids
        assert words.ref["id"] == expected.ref["id"]
    assert service.info()["rebuilds"] > 0


def test_alter_shares_the_keys() -> None:
    from langchain_latentmas.engine.kv import KV

    kv = KV([torch.ones(2, 3, 4)], [torch.ones(2, 3, 4)])
    assert alter(kv, "lat_0.zeroed").keys[0] is kv.keys[0]
