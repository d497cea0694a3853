import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch

from langchain_latentmas import LatentService
from langchain_latentmas.engine.lens import TOGETHER
from langchain_latentmas.errors import (
    ContextTooLong,
    EngineFailed,
    InvalidRequest,
    ModelNotFound,
    ServiceClosed,
    TamperedReference,
    UnknownReference,
    WrongModel,
)

from ..support import FIELDS, MODELS, PARITY, at_once, kv_copy, kv_difference, kv_equal, messages, say

RAGGED = [messages("What is " + "1 plus " * (i * 5 % 17) + "2?", f"You are agent {i}.") for i in range(24)]


@pytest.mark.parametrize("model", MODELS)
def test_24_ragged_requests_at_once_equal_each_alone(fresh_service: Any, model: str) -> None:
    together, alone = fresh_service(model), fresh_service(model)

    def request(service: LatentService, bases: list[Any], i: int) -> Any:
        ref = service.think(RAGGED[i], [bases[i % len(bases)]], steps=4 + i % 7, agent="thinker")
        said = say(service, RAGGED[-i], [ref], max_tokens=8)
        return said.token_ids, service.memory(said.ref)

    bases = [[s.think(RAGGED[i], steps=i, agent="base") for i in range(6)] for s in (together, alone)]
    ours = at_once([lambda i=i: request(together, bases[0], i) for i in range(24)])
    theirs = [request(alone, bases[1], i) for i in range(24)]
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
    assert max(kv_difference(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True)) < 1e-8


@pytest.mark.parametrize(
    ("tag", "closed"),
    [("<think>\n", False), ("<think>\n\n</think>\n\n", True), ("", True)],
)
def test_a_text_that_ends_while_the_model_still_thinks_aloud_is_warned_of(
    fresh_service: Any, caplog: pytest.LogCaptureFixture, tag: str, closed: bool
) -> None:
    service = fresh_service(speak_tag=tag)
    for _ in range(2):
        assert say(service, "What is 1 plus 2?", max_tokens=3).finish == "length"
    warned = [record for record in caplog.records if "thinking aloud" in record.message]
    assert len(warned) == (not closed)  # once


def test_reading_a_memory_does_not_change_it(fresh_service: Any) -> None:
    service = fresh_service()
    ref = service.think("Plan.", steps=4)
    before = kv_copy(service.memory(ref))
    service.think("Read.", [ref], steps=4)
    say(service, "Read.", [ref])
    assert kv_equal(service.memory(ref), before)


def test_the_same_think_gives_the_same_reference_without_work(fresh_service: Any) -> None:
    service = fresh_service()
    first = service.think("Plan.", steps=4, agent="planner")
    ticks = service.info()["ticks"]
    assert service.think("Plan.", steps=4, agent="planner") == first
    assert service.info()["ticks"] == ticks


def test_steps_prompt_parents_and_alignment_change_the_id(fresh_service: Any) -> None:
    service, other = fresh_service(), fresh_service(realign=False)
    ref = service.think("Plan.", steps=4)
    others = [
        service.think("Plan.", steps=5),
        service.think("Plan!", steps=4),
        service.think("Plan.", [ref], steps=4),
        other.think("Plan.", steps=4),
    ]
    assert len({ref["id"], *(r["id"] for r in others)}) == 5


def test_no_steps_hand_over_the_prompt_alone(fresh_service: Any) -> None:
    service = fresh_service()
    ref = service.think("Plan.", steps=0)
    memory = service.memory(ref)
    assert memory.positions == len(memory.segments[0].prompt_ids) == ref["positions"]
    assert memory.segments[0].thoughts.shape == (0, 128)
    assert service.lens(ref) == []


def test_a_spoken_text_is_part_of_the_memory(fresh_service: Any) -> None:
    service = fresh_service()
    said = say(service, "Speak.", max_tokens=5)
    memory = service.memory(said.ref)
    assert memory.segments[-1].spoken_ids == said.token_ids
    assert memory.positions == said.ref["positions"] == said.usage["input_tokens"] + said.usage["output_tokens"]
    assert [k.shape for k in memory.keys] == [(2, memory.positions, 32)] * 3


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_chain_that_was_evicted_comes_back_in_one_prefill(fresh_service: Any, lost: int) -> None:
    service = fresh_service()
    refs: list[Any] = []
    for i in range(lost):
        refs.append(service.think(RAGGED[i], refs[-1:], steps=3, agent=f"a{i}"))
    before = kv_copy(service.memory(refs[-1]))
    service._pool.kept.clear()
    assert kv_difference(service.memory(refs[-1]), before) < 1e-8
    assert service.info()["rebuilds"] == 1


def test_the_lens_reads_what_would_have_been_written(fresh_service: Any) -> None:
    service = fresh_service()
    ref = service.think("Plan.", steps=3, agent="planner")
    rows = service.lens(ref, top_k=4)
    written = say(service, "Plan.", max_tokens=1)
    assert [row.step for row in rows] == [1, 2, 3]
    assert all(len(row.tokens) == 4 for row in rows)
    assert rows[0].tokens[0][0] == service.model.tokenizer.decode(list(written.token_ids))
    probabilities = [p for _, p in rows[1].tokens]
    assert probabilities == sorted(probabilities, reverse=True)
    assert 0 < sum(probabilities) <= 1


def test_the_lens_holds_few_logits_at_a_time(fresh_service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    service = fresh_service()
    ref = service.think("Plan.", steps=TOGETHER + 3)
    logits, sizes = service.model.logits, []
    monkeypatch.setattr(service.model, "logits", lambda states: (sizes.append(len(states)), logits(states))[1])
    rows = service.lens(ref, top_k=2)
    assert [row.step for row in rows] == list(range(1, TOGETHER + 4))
    assert sizes == [TOGETHER, 3]


BAD_THINKS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"messages": []}, InvalidRequest, "at least one"),
    ({"steps": -1}, InvalidRequest, "from 0 on"),
    ({"steps": 1.5}, InvalidRequest, "from 0 on"),
    ({"agent": ""}, InvalidRequest, "name"),
    ({"steps": 5000}, ContextTooLong, "take fewer steps"),
    ({"messages": "word " * 3000}, ContextTooLong, "shorten the prompt"),
    ({"latents": [{"id": 1}]}, TamperedReference, "no reference"),
    ({"latents": ["lat_1"]}, TamperedReference, "no reference"),
]


@pytest.mark.parametrize(("bad", "error", "way_out"), BAD_THINKS)
def test_a_bad_think_is_refused_before_any_work(
    fresh_service: Any, bad: dict[str, Any], error: type[Exception], way_out: str
) -> None:
    service = fresh_service()
    call = {"messages": "Plan.", "steps": 3, **bad}
    with pytest.raises(error, match=way_out):
        service.think(**call)
    assert service.info()["ticks"] == 0
    assert service.references() == []


@pytest.mark.parametrize(
    "bad",
    [{"max_tokens": 0}, {"temperature": -0.1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": 0}, {"stop": [""]}, {"x": 1}],
)
def test_a_bad_speak_is_refused_at_the_call(fresh_service: Any, bad: dict[str, Any]) -> None:
    service = fresh_service()
    with pytest.raises(InvalidRequest):
        service.speak("Speak.", **bad)
    with pytest.raises(InvalidRequest):
        service.aspeak("Speak.", **bad)
    assert service.info()["ticks"] == 0


@pytest.mark.parametrize("field", FIELDS)
def test_a_reference_with_any_field_changed_is_refused(service: LatentService, field: str) -> None:
    ref: dict[str, Any] = {**service.think("Plan.", steps=1)}
    value = ref[field]
    changed = value + 1 if isinstance(value, int) else [*value, ref["id"]] if isinstance(value, list) else None
    ref[field] = changed if changed is not None else ("0" if value[-1] != "0" else "1").join([value[:-1], ""])
    with pytest.raises((TamperedReference, WrongModel)):
        service.think("Read.", [ref])  # type: ignore[list-item]


def test_references_of_other_models_and_other_stores_are_told_apart(fresh_service: Any) -> None:
    one = fresh_service(key=b"k" * 32)
    same_key, other_model = fresh_service(key=b"k" * 32), fresh_service("llama-untied", key=b"k" * 32)
    ref = one.think("Plan.", steps=1)
    with pytest.raises(UnknownReference, match="store="):
        same_key.think("Read.", [ref])
    with pytest.raises(WrongModel, match="hand its text over"):
        other_model.think("Read.", [ref])


def test_weights_changed_in_place_make_another_model() -> None:
    with LatentService.load(str(PARITY / "qwen3-tied" / "model"), device="cpu") as service:
        ref = service.think("Plan.", steps=1)
        with torch.no_grad():
            next(service.model.model.parameters()).add_(0.01)  # type: ignore[attr-defined]
        with pytest.raises(WrongModel):
            service.think("Read.", [ref])
        assert service.think("Plan.", steps=1)["model"] != ref["model"]


def test_the_same_weights_in_a_wider_dtype_are_the_same_model(parity_service: Callable[..., LatentService]) -> None:
    fingerprints = {parity_service("qwen3-tied", dtype).info()["fingerprint"] for dtype in ("float32", "float64")}
    assert len(fingerprints) == 1


def test_a_model_that_is_not_there_is_not_found() -> None:
    with pytest.raises(ModelNotFound):
        LatentService.load("/no/such/folder")


def test_an_unknown_setting_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match="kv_budget"):
        LatentService.load("bundled", kv_bugdet=1)


def test_a_seed_gives_the_same_sample_whoever_else_speaks(fresh_service: Any) -> None:
    alone = say(fresh_service(), "Speak.", temperature=1.0, top_p=0.9, seed=7)
    service = fresh_service()
    together = at_once([lambda i=i: say(service, "Speak.", temperature=1.0, top_p=0.9, seed=i) for i in range(8)])
    assert together[7].token_ids == alone.token_ids
    assert len({said.token_ids for said in together}) > 1


def test_one_seed_draws_otherwise_on_top_of_another_memory(fresh_service: Any) -> None:
    service = fresh_service()
    drawn = set()
    for question in "abcdef":
        ref = service.think(f"{question} is asked.", steps=0)
        drawn.add(say(service, "Speak.", [ref], temperature=1e6, seed=7).token_ids)  # all tokens are alike
    assert len(drawn) == 6


def test_a_text_ends_where_the_models_positions_end(fresh_service: Any) -> None:
    service = fresh_service(max_positions=64)
    said = say(service, "What is 1 plus 2?", max_tokens=10**6)
    assert said.finish in ("length", "stop")
    assert service.memory(said.ref).positions <= 64
    full = say(service, "What is 1 plus 2?", max_tokens=10**6, stop=None, temperature=1e6, seed=1)
    assert (full.finish, len(full.token_ids)) == ("length", 64 - len(service.memory(full.ref).segments[0].prompt_ids))
    ref = service.think("Plan.", steps=3)
    left = 64 - ref["positions"] - len(service.encode("What is 1 plus 2?", service.settings.speak_tag))
    assert len(say(service, "What is 1 plus 2?", [ref], max_tokens=left + 1, temperature=1e6, seed=1).token_ids) == left
    with pytest.raises(ContextTooLong):
        service.say("word " * 64)


def test_closing_a_stream_frees_its_slot(fresh_service: Any) -> None:
    service = fresh_service()
    stream = service.speak("Speak.", max_tokens=1500)
    next(stream)
    assert service.info()["rows"] == 1
    stream.close()
    say(service, "Something else.", max_tokens=2)  # two ticks later
    assert service.info()["rows"] == 0


async def test_cancelling_a_task_frees_its_slot(fresh_service: Any) -> None:
    service = fresh_service()
    begun = asyncio.Event()
    task = asyncio.create_task(service.athink("Plan.", steps=1500, on_step=lambda step: begun.set()))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await service.athink("Something else.", steps=2)
    assert service.info()["rows"] == 0


def test_an_engine_that_fails_once_loses_its_rows_and_goes_on(
    fresh_service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = fresh_service()
    hidden = service.model.hidden

    def fail_once(*arguments: Any) -> Any:
        monkeypatch.setattr(service.model, "hidden", hidden)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(service.model, "hidden", fail_once)
    with pytest.raises(EngineFailed, match="out of memory"):
        service.think("Plan.", steps=3)
    assert service.think("Plan.", steps=3)["steps"] == 3


def test_a_closed_service_takes_nothing(fresh_service: Any) -> None:
    service = fresh_service()
    stream = service.speak("Speak.", max_tokens=1500)
    next(stream)
    service.close()
    with pytest.raises(ServiceClosed):
        list(stream)
    with pytest.raises(ServiceClosed):
        service.think("Plan.")
    service.close()
    left, fresh = service._ticker.cache, service.model.new_cache()  # whoever keeps the variable keeps no slots
    assert (left.slots, left.capacity) == (fresh.slots, fresh.capacity)
