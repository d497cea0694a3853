"""Rules 7 and 8: merged and rebuilt memories, against plain transformers and against what never was lost."""

import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Thread, current_thread
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from langchain_latentmas import LatentRef
from langchain_latentmas.engine.kv import KV
from langchain_latentmas.engine.scheduler import PASSING
from langchain_latentmas.errors import EngineFailed, StoreCorrupted, UnknownReference
from langchain_latentmas.service.budget import Budget
from langchain_latentmas.service.local import LocalService
from langchain_latentmas.service.memory import Memory, Recipe

from ..conftest import Fresh, load_parts
from ..support import Gate, at_once, kv_copy, kv_difference, messages, say, wait_for

EXACT = 1e-8  # relative, in float64
TURNED = 1e-3  # the same, where transformers' float32 angles come in
QUESTION = messages("What is 12 plus 30 minus 5?", "You are a judger.")


@pytest.fixture(scope="module")
def rebuilding() -> Iterator[LocalService]:
    with LocalService.from_model(*load_parts("qwen3-tied", "float64"), merge="rebuild") as service:
        yield service


def experts(service: LocalService, n: int, on: list[LatentRef] | None = None) -> list[LatentRef]:
    """Thinkers that are blind to each other, with prompts and steps of different lengths."""
    return [
        service.think(
            messages(f"What is {'1 plus ' * i}2?", f"You are expert {i}."), on or [], steps=3 + i, agent=f"e{i}"
        )
        for i in range(n)
    ]


def inputs_of(service: LocalService, memory: Memory) -> list[Tensor]:
    """What each segment of a memory was fed, [positions, hidden]."""
    embed = service.model.model.get_input_embeddings()
    return [
        torch.cat([embed(torch.tensor(s.prompt_ids)), s.thoughts, embed(torch.tensor(s.spoken_ids, dtype=torch.long))])
        for s in memory.segments
    ]


def plain_kv(service: LocalService, memory: Memory, sees: list[set[int]]) -> KV:
    """One pass of plain transformers over a whole memory, with a 4-d mask: segment i sees itself and `sees[i]`."""
    segments = inputs_of(service, memory)
    owner = torch.cat([torch.full((len(part),), i) for i, part in enumerate(segments)])
    allowed = torch.tensor([[j == i or j in sees[i] for j in range(len(sees))] for i in range(len(sees))])
    mask = allowed[owner][:, owner] & torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    cache = DynamicCache()
    with torch.inference_mode():
        service.model.model(
            inputs_embeds=torch.cat(segments)[None],
            attention_mask=mask[None, None],
            position_ids=torch.arange(len(owner))[None],
            past_key_values=cache,
        )
    return KV([layer.keys[0] for layer in cache.layers], [layer.values[0] for layer in cache.layers])


@pytest.mark.parametrize("model", ["qwen3-tied", "llama-untied"])
@pytest.mark.parametrize("merge", ["rotate", "rebuild"])
def test_merged_experts_equal_block_diagonal_attention_from_scratch(
    fresh_service: Fresh, model: str, merge: str
) -> None:
    service = fresh_service(model, merge=merge)
    judged = service.think(QUESTION, experts(service, 3), steps=4, agent="judger")
    memory = service.memory(judged)
    theirs = plain_kv(service, memory, [set(), set(), set(), {0, 1, 2}])
    assert [segment.agent for segment in memory.segments] == ["e0", "e1", "e2", "judger"]
    assert memory.merge == {"rotate": "rotated", "rebuild": "rebuilt"}[merge]
    assert kv_difference(memory, theirs) < TURNED


def test_branches_are_rebuilt_on_their_common_ancestry_and_blind_to_each_other(fresh_service: Fresh) -> None:
    service = fresh_service(merge="rebuild")
    plan = service.think(messages("Plan."), steps=4, agent="planner")
    judged = service.think(QUESTION, experts(service, 3, on=[plan]), steps=2, agent="judger")
    memory = service.memory(judged)
    assert [segment.agent for segment in memory.segments] == ["planner", "e0", "e1", "e2", "judger"]
    theirs = plain_kv(service, memory, [set(), {0}, {0}, {0}, {0, 1, 2, 3}])
    assert kv_difference(memory, theirs) < EXACT


@pytest.mark.parametrize("merge", ["rotate", "rebuild"])
def test_merges_of_merges_keep_who_saw_whom(fresh_service: Fresh, merge: str) -> None:
    service = fresh_service(merge=merge)
    a, b, c = experts(service, 3)
    both = service.think(messages("Compare."), [a, b], steps=2, agent="both")
    last = service.think(QUESTION, [c, both], steps=2, agent="last")
    memory = service.memory(last)
    assert [segment.agent for segment in memory.segments] == ["e2", "e0", "e1", "both", "last"]
    theirs = plain_kv(service, memory, [set(), set(), set(), {1, 2}, {0, 1, 2, 3}])
    assert kv_difference(memory, theirs) < TURNED


def test_a_segment_that_stays_where_it_was_is_rebuilt_when_what_it_saw_has_moved(fresh_service: Fresh) -> None:
    service = fresh_service(merge="rebuild")
    a, b = experts(service, 2)
    both = service.think(messages("Compare."), [a, b], steps=2, agent="both")
    after_b = service.think(messages("Go on."), [b], steps=2, agent="after")
    memory = service.memory(service.think(QUESTION, [both, after_b], steps=2, agent="last"))
    assert [segment.agent for segment in memory.segments] == ["e1", "e0", "both", "after", "last"]
    theirs = plain_kv(service, memory, [set(), set(), {0, 1}, {0}, {0, 1, 2, 3}])
    assert kv_difference(memory, theirs) < EXACT


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 20), max_size=3), min_size=2, max_size=7), st.booleans())
def test_any_history_is_rebuilt_as_if_all_had_been_computed_in_place(
    rebuilding: LocalService, history: list[list[int]], evicted: bool
) -> None:
    refs: list[LatentRef] = []
    for i, reads in enumerate(history):
        read = [refs[n % len(refs)] for n in reads] if refs else []
        refs.append(rebuilding.think("x" * (i % 3), read, steps=i % 2, agent=str(i)))
    if evicted:
        rebuilding._pool.kept.clear()
    last = rebuilding.think("Together.", refs, steps=1, agent="last")
    memory, layout = rebuilding.memory(last), rebuilding._lineage.layout([last["id"]])
    order = [piece.id for piece in layout]
    sees = [{order.index(piece.id) for piece in rebuilding._lineage.line(key)} for key in order]
    assert kv_difference(memory, plain_kv(rebuilding, memory, sees)) < EXACT


def test_a_segment_made_on_a_moved_one_is_made_anew_when_that_one_moves_back(rebuilding: LocalService) -> None:
    """Its own place may stay the same, and so may the place where the other one was first made."""
    a, b = experts(rebuilding, 2)
    swapped = rebuilding.think("Compare.", [b, a], steps=1, agent="swapped")
    straight = rebuilding.think("Compare too.", [a, b], steps=1, agent="straight")
    for reads in ([straight, swapped], [swapped, straight]):
        memory = rebuilding.memory(rebuilding.think(QUESTION, reads, steps=1, agent="last"))
        first, second = memory.segments[2:4]
        assert {first.agent, second.agent} == {"swapped", "straight"}
        sees = [set(), set(), {0, 1}, {0, 1}, {0, 1, 2, 3}]
        assert kv_difference(memory, plain_kv(rebuilding, memory, sees)) < EXACT


def test_a_chain_is_not_a_merge_and_moves_nothing(fresh_service: Fresh) -> None:
    service = fresh_service()
    first = service.think(messages("Plan."), steps=3)
    second = service.think(messages("Check."), [first], steps=3)
    memory = service.memory(second)
    assert memory.merge == "none"
    assert kv_difference(memory, plain_kv(service, memory, [set(), {0}])) < EXACT
    assert say(service, QUESTION, [first, second]).usage["merge"] == "none"


def test_rotated_and_rebuilt_merges_speak_alike_and_usage_names_them(fresh_service: Fresh) -> None:
    said = []
    for merge in ("rotate", "rebuild"):
        service = fresh_service(merge=merge)
        said.append(say(service, QUESTION, experts(service, 3)))
    assert said[0].token_ids == said[1].token_ids
    assert [each.usage["merge"] for each in said] == ["rotated", "rebuilt"]
    assert said[0].ref["id"] == said[1].ref["id"]


def test_the_order_of_reading_is_the_order_of_the_merge(fresh_service: Fresh) -> None:
    service = fresh_service()
    one, two = experts(service, 2)
    forwards, backwards = (service.think(QUESTION, refs, steps=1) for refs in ([one, two], [two, one]))
    assert forwards["id"] != backwards["id"]
    assert [s.agent for s in service.memory(backwards).segments[:2]] == ["e1", "e0"]


def test_reading_somebody_twice_or_with_his_ancestor_is_reading_him_once(fresh_service: Fresh) -> None:
    service = fresh_service()
    first = service.think(messages("Plan."), steps=2)
    second = service.think(messages("Check."), [first], steps=2)
    ids = {
        service.think(QUESTION, refs, steps=1)["id"] for refs in ([second], [first, second], [second, second, first])
    }
    assert len(ids) == 1


@pytest.mark.parametrize("merge", ["rotate", "rebuild"])
def test_a_merged_memory_that_was_evicted_comes_back(fresh_service: Fresh, merge: str) -> None:
    service = fresh_service(merge=merge)
    judged = service.think(QUESTION, experts(service, 3), steps=4)
    before, words = kv_copy(service.memory(judged)), say(service, messages("So?"), [judged])
    service._pool.kept.clear()
    again = say(service, messages("So?"), [judged])
    assert again.token_ids == words.token_ids
    service._pool.kept.clear()
    assert kv_difference(service.memory(judged), before) < EXACT


def test_what_was_spoken_is_rebuilt_as_well(fresh_service: Fresh) -> None:
    service = fresh_service()
    said = say(service, QUESTION, [service.think(messages("Plan."), steps=3)])
    before = kv_copy(service.memory(said.ref))
    service._pool.kept.clear()
    assert kv_difference(service.memory(said.ref), before) < EXACT
    assert service.info()["rebuilds"] == 1


def test_a_chain_is_rebuilt_from_where_it_is_still_there(fresh_service: Fresh) -> None:
    service = fresh_service()
    refs: list[LatentRef] = []
    for i in range(6):
        refs.append(service.think(messages(f"Step {i}."), refs[-1:], steps=2))
    before = kv_copy(service.memory(refs[-1]))
    kept, prefilled = service._pool.kept.get(refs[2]["id"]), service.info()["prefilled"]
    assert kept is not None
    service._pool.kept.clear()
    service._pool.kept.put(refs[2]["id"], kept)
    assert kv_difference(service.memory(refs[-1]), before) < EXACT
    assert service.info()["rebuilds"] == 2  # what lies below is needed too, and is a run of its own
    lost = refs[-1]["positions"] - kept.positions
    assert service.info()["prefilled"] - prefilled == lost


def test_readers_that_come_at_once_share_one_rebuild(fresh_service: Fresh) -> None:
    service = fresh_service()
    ref = service.think(messages("Plan."), steps=4)
    alone = say(service, QUESTION, [ref])
    service._pool.kept.clear()
    said = at_once([lambda: say(service, QUESTION, [ref])] * 6)
    assert [each.token_ids for each in said] == [alone.token_ids] * 6
    assert service.info()["rebuilds"] == 1


def chain(service: LocalService, n: int) -> list[LatentRef]:
    refs: list[LatentRef] = []
    for i in range(n):
        refs.append(service.think(messages(f"Step {i}."), refs[-1:], steps=2))
    return refs


def test_others_are_served_while_recipes_are_read(fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    service, gate, found = fresh_service(), Gate(), list[Memory]()
    refs, other = chain(service, 3), service.think(messages("Else."), steps=1)
    before, here, recipe = kv_copy(service.memory(refs[-1])), service._pool.kept.get(other["id"]), service._pool._recipe

    def slow(key: str) -> Recipe:
        if key == refs[0]["id"]:
            gate.wait()
        return recipe(key)

    def in_time(ref: LatentRef) -> bool:
        reader = Thread(target=service.memory, args=(ref,), daemon=True)
        reader.start()
        reader.join(10)
        return not reader.is_alive()

    assert here is not None
    service._pool.kept.clear()
    service._pool.kept.put(other["id"], here)
    monkeypatch.setattr(service._pool, "_recipe", slow)
    reader = Thread(target=lambda: found.append(service.memory(refs[-1])))
    reader.start()
    assert gate.entered.wait(60)
    served = in_time(other)
    gate.open()
    reader.join(60)
    assert served
    assert kv_difference(found[0], before) < EXACT


@pytest.mark.parametrize("faster", [0, 1, 2])
def test_what_others_rebuild_while_recipes_are_read_is_not_rebuilt_again(
    fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch, faster: int
) -> None:
    service, gate, found = fresh_service(), Gate(), list[Memory]()
    refs = chain(service, 3)
    before, recipe = kv_copy(service.memory(refs[-1])), service._pool._recipe
    service._pool.kept.clear()
    prefilled = service.info()["prefilled"]

    def slow(key: str) -> Recipe:
        if current_thread() is reader and key == refs[0]["id"]:  # the last of its run
            gate.wait()
        return recipe(key)

    monkeypatch.setattr(service._pool, "_recipe", slow)
    reader = Thread(target=lambda: found.append(service.memory(refs[-1])))
    reader.start()
    assert gate.entered.wait(60)
    service.memory(refs[faster])
    gate.open()
    reader.join(60)
    assert kv_difference(found[0], before) < EXACT
    assert service.info()["prefilled"] - prefilled == refs[-1]["positions"]
    assert not service._pool._coming


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_what_is_dropped_while_it_is_rebuilt_is_not_kept(
    fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch, kv_dtype: str
) -> None:
    service, gate = fresh_service(kv_dtype=kv_dtype), Gate()
    ref, step = service.think(messages("Plan."), steps=2), service._ticker.step
    service._pool.kept.clear()

    def slow() -> None:
        gate.wait()
        step()

    monkeypatch.setattr(service._ticker, "step", slow)
    with ThreadPoolExecutor(1) as threads:
        read = threads.submit(service.memory, ref)
        assert gate.entered.wait(60)
        service.drop(ref)
        gate.open()
        with pytest.raises(UnknownReference):
            read.result(60)
    assert service.info()["kv_segments"] == 0


def test_shared_segments_are_kept_once(fresh_service: Fresh) -> None:
    service = fresh_service()
    plan = service.think(messages("Plan " * 40), steps=1)
    before = service.info()["kv_bytes"]
    branch = service.think(messages("Go."), [plan], steps=1)
    own = branch["positions"] - plan["positions"]
    assert service.info()["kv_bytes"] - before == own * service.info()["kv_bytes_per_position"]


def test_a_lost_recipe_fails_every_reader_and_hangs_none(fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gone after the layout was computed: the second reader must not wait for what the first one began."""
    service = fresh_service()
    judged = service.think(QUESTION, experts(service, 2), steps=1)
    lost = {judged["parents"][0]}
    service._pool.kept.clear()
    found = service._pool._recipe

    def recipe(key: str) -> Recipe:
        if key in lost:
            raise StoreCorrupted("gone")
        return found(key)

    monkeypatch.setattr(service._pool, "_recipe", recipe)
    for _ in range(2):
        with pytest.raises(StoreCorrupted, match="gone"):
            service.memory(judged)
    lost.clear()
    assert service.memory(judged).positions == judged["positions"]


def test_a_recipe_lost_while_a_merge_is_rebuilt_fails_its_reader(
    fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = fresh_service(merge="rebuild")
    refs = experts(service, 2)

    def recipe(key: str) -> Recipe:
        raise StoreCorrupted("gone")

    monkeypatch.setattr(service._pool, "_recipe", recipe)
    with pytest.raises(StoreCorrupted, match="gone"):
        say(service, QUESTION, refs)


@pytest.mark.parametrize("budget", [0, 1, 60_000])
def test_the_budget_holds_and_nothing_is_answered_otherwise(fresh_service: Fresh, budget: int) -> None:
    def run(service: LocalService) -> list[Any]:
        refs = experts(service, 3)
        said = [say(service, QUESTION, [ref]).token_ids for ref in refs]
        return [*said, say(service, QUESTION, refs).token_ids]

    small = fresh_service(kv_budget=budget)
    assert run(small) == run(fresh_service())
    assert small.info()["kv_bytes"] <= budget
    assert small.info()["evictions"] > 0


def test_rows_that_wait_hold_few_memories_however_many_they_are(
    fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = fresh_service(max_rows=1)
    refs = [service.think(messages(f"Number {i}."), steps=2) for i in range(40)]
    one = max(ref["positions"] for ref in refs) * service.info()["kv_bytes_per_position"]
    ids = {ref["id"] for ref in refs}
    service._pool.kept.limit = 2 * one
    service._pool.kept.clear()
    made, held = list[tuple[weakref.ref[Any], int]](), list[int]()
    keep, step = service._pool.keep, service._ticker.step

    def noted(key: str, kv: Any) -> Any:
        if key in ids:
            made.append((weakref.ref(kv.keys), kv.nbytes))
        return keep(key, kv)

    def watched() -> None:
        held.append(sum(nbytes for there, nbytes in made if there() is not None))
        step()

    monkeypatch.setattr(service._pool, "keep", noted)
    monkeypatch.setattr(service._ticker, "step", watched)
    said = at_once([lambda ref=ref: say(service, QUESTION, [ref], max_tokens=2) for ref in refs])  # type: ignore[misc]
    assert [each.usage["positions_read"] for each in said] == [ref["positions"] for ref in refs]
    assert len(made) == 40
    assert 0 < max(held) <= service._pool.kept.limit + (2 + PASSING) * one


@pytest.mark.parametrize("cpu", [0, "1GiB"])
def test_where_memory_ran_out_half_of_what_is_kept_leaves_the_device(
    fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch, cpu: Any
) -> None:
    service = fresh_service(kv_cpu_budget=cpu)
    refs = [service.think(messages(f"Number {i}."), steps=2) for i in range(8)]
    before = [kv_copy(service.memory(ref)) for ref in refs]
    kept = service.info()["kv_bytes"]

    def full(*_: object) -> Any:
        raise torch.OutOfMemoryError("no memory is left")

    with monkeypatch.context() as patch:
        patch.setattr(service.model, "hidden", full)
        with pytest.raises(EngineFailed, match="no memory is left"):
            say(service, QUESTION, refs)
    wait_for(lambda: service.info()["kv_bytes"] == kept // 2)
    wait_for(lambda: service.info()["kv_cpu_bytes"] == (kept // 2 if cpu else 0))
    assert all(kv_difference(service.memory(ref), kv) < EXACT for ref, kv in zip(refs, before, strict=True))
    assert service.info()["rebuilds"] == (0 if cpu else 4)


@pytest.mark.parametrize("short", [1, 99])
def test_for_a_memory_on_its_way_back_to_a_full_device_room_is_made(
    fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch, short: int
) -> None:
    service = fresh_service(kv_cpu_budget="1GiB")
    refs = [service.think(messages(f"Number {i}."), steps=2) for i in range(4)]
    service._pool.give_up()
    to, left = KV.to, short

    def full(kv: KV, devices: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            raise torch.OutOfMemoryError("no memory is left")
        return to(kv, devices)

    monkeypatch.setattr(KV, "to", full)
    if short == 99:
        with pytest.raises(EngineFailed, match=r"no room for the memory that is read \(no memory is left.?\)"):
            say(service, QUESTION, refs[:1])
        left = 0
    assert say(service, QUESTION, refs[:1]).usage["positions_read"] == refs[0]["positions"]
    assert (service.info()["kv_cpu_hits"], service.info()["rebuilds"]) == (1, 0)


def test_who_waits_is_told_what_keeps_the_memory_from_being_placed(
    fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = fresh_service()
    ref, start = service.think(messages("Plan."), steps=2), Thread.start
    service._pool.kept.clear()

    def gone(layout: object) -> Any:
        raise StoreCorrupted("gone")

    def none_left(thread: Thread) -> None:
        if thread.name == "latentmas-place":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(service._pool, "place", gone)
        with pytest.raises(StoreCorrupted, match="gone"):
            say(service, QUESTION, [ref])
    with monkeypatch.context() as patch:
        patch.setattr(Thread, "start", none_left)
        with pytest.raises(EngineFailed, match="can't start new thread"):
            say(service, QUESTION, [ref])
    wait_for(lambda: service.info()["waiting"] == 0)
    assert say(service, QUESTION, [ref]).usage["positions_read"] == ref["positions"]


def test_recipes_that_left_the_cache_are_read_from_the_store_again(fresh_service: Fresh) -> None:
    service = fresh_service()
    ref = service.think(messages("Plan."), steps=3)
    before = kv_copy(service.memory(ref))
    service._recipes = Budget(0, lambda recipe: 1)
    service._pool.kept.clear()
    assert kv_difference(service.memory(ref), before) < EXACT


def test_a_rebuild_that_runs_out_of_memory_fails_its_readers_and_may_be_tried_again(
    fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = fresh_service()
    first = service.think(messages("Plan."), steps=2)
    second = service.think(messages("Check."), [first], steps=2)
    service._pool.kept.clear()

    def split(kv: KV, lengths: list[int]) -> list[KV]:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as full:
        full.setattr(KV, "split", split)
        with pytest.raises(EngineFailed, match="out of memory"):
            service.memory(second)
    assert service.memory(second).positions == second["positions"]


def test_what_was_made_on_a_rebuilt_merge_stays_where_it_was_made(fresh_service: Fresh) -> None:
    service = fresh_service(merge="rebuild")
    refs = experts(service, 3)
    judged = service.think(QUESTION, refs, steps=2)
    prefilled = service.info()["prefilled"]
    service.memory(judged)
    assert service.info()["prefilled"] - prefilled == refs[1]["positions"] + refs[2]["positions"]


def test_merges_on_merges_are_rebuilt_or_fail_whatever_python_takes_of_nested_calls(
    fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = fresh_service()
    last = service.think([("human", "0")], steps=0)
    for i in range(60):
        note = service.think([("human", str(i))], steps=0, agent="note")
        last = service.think([("human", "+")], [last, note], steps=0)
    before = kv_copy(service.memory(last))
    found: list[Any] = []

    def read() -> None:
        try:
            found.append(service.memory(last))
        except Exception as error:
            found.append(error)

    def read_aside() -> Any:
        service._pool.kept.clear()
        reader = Thread(target=read, daemon=True)
        reader.start()
        reader.join(60)
        assert found, "whoever reads it waits for ever"
        return found.pop()

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(230)  # of each thread; 60 merges have less than four calls each
    try:
        rebuilt = read_aside()
        with monkeypatch.context() as broken:
            broken.setattr(service._ticker, "join", lambda row: 1 / 0)
            failed = read_aside()
    finally:
        sys.setrecursionlimit(limit)
    assert kv_difference(rebuilt, before) < EXACT
    assert isinstance(failed, EngineFailed)
    assert kv_difference(service.memory(last), before) < EXACT
