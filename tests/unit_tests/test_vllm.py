"""The client of vLLM against a double of its completions API, and against the service in this process."""

import asyncio
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest

from langchain_latentmas import ChatLatentMAS, LatentService
from langchain_latentmas.errors import (
    AccessDenied,
    ContextTooLong,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    LatentMASError,
    MissingExtra,
    ModelNotFound,
    ModelNotSupported,
    ServiceBusy,
    ServiceClosed,
    ServiceUnreachable,
    TamperedReference,
    WrongModel,
)
from langchain_latentmas.service.memory import Layout
from langchain_latentmas.service.vllm import VLLMService
from langchain_latentmas.service.vllm_in_process import OF_THE_ENGINE, OURS
from langchain_latentmas.service.vllm_server import OF_THE_SERVER

from ..conftest import load_parts
from ..support import PARITY, Gate, at_once, messages, say, wait_for
from ..vllm_double import VLLMDouble, events, latents, problem

FOLDER = str(PARITY / "qwen3-tied" / "model")
QUESTION = messages("What is 12 plus 30?")
Connect = Callable[..., VLLMService]


@pytest.fixture
def double() -> VLLMDouble:
    model, tokenizer = load_parts("qwen3-tied", "float64")
    return VLLMDouble(model, tokenizer, FOLDER)


@pytest.fixture
def connect(double: VLLMDouble) -> Iterator[Connect]:
    made: list[VLLMService] = []

    def make(**settings: Any) -> VLLMService:
        made.append(VLLMService.load("vllm+http://there:8000", **{"transport": double.transport, **settings}))
        return made[-1]

    yield make
    for service in made:
        service.close()


@pytest.fixture
def vllm(connect: Connect) -> VLLMService:
    return connect()


def test_a_chain_ends_with_the_tokens_of_the_service_in_this_process(
    vllm: VLLMService, service: LatentService, double: VLLMDouble
) -> None:
    spoken = []
    for each in (vllm, service):
        planner = each.think(QUESTION, steps=5, agent="planner")
        critic = each.think(messages("Check it."), [planner], steps=3, agent="critic")
        said = say(each, messages("Answer."), [critic], max_tokens=12)
        spoken.append((said.token_ids, said.text, said.finish, said.usage, critic["positions"], critic["steps"]))
    assert spoken[0] == spoken[1]
    assert [latents(body["prompt"]) for body in double.requests] == [0, 5, 8]
    assert [body["max_tokens"] for body in double.requests] == [6, 4, 12]


def test_a_speaker_that_nobody_thought_for_and_steps_0(vllm: VLLMService, service: LatentService) -> None:
    assert say(vllm, QUESTION).token_ids == say(service, QUESTION).token_ids
    ours, theirs = (each.think(QUESTION, steps=0) for each in (vllm, service))
    assert say(vllm, QUESTION, [ours]).token_ids == say(service, QUESTION, [theirs]).token_ids


def test_what_was_spoken_can_be_read(vllm: VLLMService, service: LatentService) -> None:
    texts = []
    for each in (vllm, service):
        first = say(each, QUESTION, max_tokens=6)
        texts.append(say(each, messages("Again."), [first.ref], max_tokens=6).token_ids)
    assert texts[0] == texts[1]


async def test_async_and_all_at_once(vllm: VLLMService, service: LatentService) -> None:
    prompts = [messages(f"What is {i} plus 30?") for i in range(6)]
    refs = await asyncio.gather(*(vllm.athink(prompt, steps=4) for prompt in prompts))
    texts = []
    for ref in refs:
        texts.append("".join([c.text async for c in vllm.aspeak(messages("Answer."), [ref], max_tokens=8)]))
    theirs = [service.think(prompt, steps=4) for prompt in prompts]
    assert texts == [say(service, messages("Answer."), [ref], max_tokens=8).text for ref in theirs]


def test_threads(vllm: VLLMService) -> None:
    calls = [lambda i=i: say(vllm, messages(f"What is {i}?"), max_tokens=4).token_ids for i in range(6)]
    together = at_once(calls)
    assert together == [call() for call in calls]


def test_several_tips_are_one_chain_and_the_result_says_so(vllm: VLLMService, double: VLLMDouble) -> None:
    tips = [vllm.think(messages(text), steps=2, agent=text) for text in ("One.", "Two.")]
    said = say(vllm, messages("Answer."), tips)
    assert said.usage["merge"] == "chained"
    assert said.usage["latent_steps"] == 4
    one, two, answer = (body["prompt"] for body in double.requests)
    assert answer[: len(one) + len(two) + 4] == [*one, 0, 0, *two, 0, 0]
    assert say(vllm, messages("Answer."), tips[:1]).usage["merge"] == "none"
    assert [segment.agent for segment in vllm.memory(said.ref).segments] == ["One.", "Two.", "agent"]


def test_steps_are_reported_and_a_known_think_asks_nobody(vllm: VLLMService, double: VLLMDouble) -> None:
    steps: list[int] = []
    ref = vllm.think(QUESTION, steps=5, on_step=steps.append)
    assert steps == [1, 2, 3, 4, 5]
    assert vllm.think(QUESTION, steps=5) == ref
    assert len(double.requests) == 1


def test_the_lens_is_that_of_the_service_in_this_process(vllm: VLLMService, service: LatentService) -> None:
    rows = []
    for each in (vllm, service):
        first = each.think(QUESTION, steps=2, agent="planner")
        rows.append(each.lens(each.think(messages("Check."), [first], steps=3, agent="critic"), top_k=3))
    for ours, theirs in zip(*rows, strict=True):
        assert ours[:2] == theirs[:2]
        assert [token for token, _ in ours.tokens] == [token for token, _ in theirs.tokens]
        assert [p for _, p in ours.tokens] == pytest.approx([p for _, p in theirs.tokens], rel=0.02)  # less LATENT's
    assert vllm.lens(vllm.think(QUESTION, steps=0)) == []
    with pytest.raises(InvalidRequest, match="--max-logprobs"):
        vllm.lens(first, top_k=21)


@pytest.mark.parametrize("mode", ["processed_logprobs", "raw_logits"])
def test_a_lens_of_what_are_no_probabilities_is_refused(mode: str, connect: Connect, double: VLLMDouble) -> None:
    assert double.facts
    double.facts["logprobs_mode"] = mode
    vllm = connect()
    ref = vllm.think(QUESTION, steps=2)
    with pytest.raises(InvalidRequest, match=f"--logprobs-mode {mode}"):
        vllm.lens(ref)


def test_markers_pass_through_text(vllm: VLLMService) -> None:
    ref = vllm.think(QUESTION, steps=2, agent="planner")
    text, refs = vllm.take_markers(f"He said {vllm.marker(ref)} so.")
    assert (text, refs) == ("He said  so.", [ref])
    with pytest.raises(TamperedReference):
        vllm.think(QUESTION, [{**ref, "steps": 3}])


def test_references_outlive_client_and_server(connect: Connect, tmp_path: Path) -> None:
    first = connect(store=tmp_path)
    ref = first.think(QUESTION, steps=3)
    said = say(first, messages("Answer."), [ref])
    first.close()
    again = connect(store=tmp_path)
    assert say(again, messages("Answer."), [ref]).token_ids == said.token_ids
    assert [stored.ref for stored in again.references()].count(ref) == 1


def test_references_of_vllm_and_of_a_service_in_this_process_are_told_apart(
    vllm: VLLMService, service: LatentService
) -> None:
    with pytest.raises(WrongModel):
        vllm.think(QUESTION, [service.think(QUESTION, steps=1)])


@pytest.mark.parametrize("stop", ["e", "th"])
def test_stop_strings_end_the_text_and_the_request(
    stop: str, vllm: VLLMService, service: LatentService, double: VLLMDouble
) -> None:
    ours, theirs = (say(each, QUESTION, max_tokens=40, stop=[stop]) for each in (vllm, service))
    assert (ours.text, ours.token_ids, ours.finish) == (theirs.text, theirs.token_ids, theirs.finish)
    wait_for(lambda: double.open == 0)


def test_sampling_is_handed_on(vllm: VLLMService, double: VLLMDouble) -> None:
    for _ in range(2):
        double.answers.append(events({"choices": [{"token_ids": [2]}]}))
        assert say(vllm, QUESTION, temperature=0.7, top_p=0.9, top_k=5, seed=3).token_ids == (2,)
    asked, again = double.requests
    assert (asked["temperature"], asked["top_p"], asked["top_k"]) == (0.7, 0.9, 5)
    assert asked["seed"] == again["seed"] != 3  # made of the seed, the agent and the prompt
    assert asked["stop_token_ids"] == [2]
    assert asked["repetition_penalty"] == 1.0


async def test_a_cancelled_think_is_taken_back(vllm: VLLMService, double: VLLMDouble) -> None:
    double.hold.clear()
    task = asyncio.create_task(vllm.athink(QUESTION, steps=50))
    await asyncio.to_thread(wait_for, lambda: double.open == 1)
    task.cancel()
    await asyncio.to_thread(wait_for, lambda: double.open == 0 and vllm.info()["rows"] == 0)


async def test_whoever_leaves_while_recipes_are_read_asks_nobody(
    vllm: VLLMService, double: VLLMDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref, gate, ids = await vllm.athink(QUESTION, steps=2), Gate(), vllm._ids

    def slow(layout: Layout) -> list[int]:
        gate.wait()
        return ids(layout)

    monkeypatch.setattr(vllm, "_ids", slow)
    task = asyncio.create_task(vllm.athink("Never.", [ref], steps=3))
    assert await asyncio.wait_for(asyncio.to_thread(gate.entered.wait, 60), 30)  # the event loop goes on
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.open()
    assert (await vllm.athink("Next.", [ref], steps=1))["steps"] == 1
    assert [body["max_tokens"] for body in double.requests] == [3, 2]


def test_a_stream_that_is_left_is_taken_back(vllm: VLLMService, double: VLLMDouble) -> None:
    chunks = vllm.speak(QUESTION, max_tokens=400)
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    wait_for(lambda: double.open == 0)


def test_closing_ends_what_is_at_work(vllm: VLLMService, double: VLLMDouble) -> None:
    double.hold.clear()

    def close() -> None:
        wait_for(lambda: double.open == 1)
        vllm.close()

    def think() -> None:
        with pytest.raises(ServiceClosed):
            vllm.think(QUESTION, steps=5)

    at_once([think, close])
    with pytest.raises(ServiceClosed):
        vllm.think(QUESTION, steps=6)
    vllm.close()


def test_closing_ends_also_what_somebody_waits_for(vllm: VLLMService) -> None:
    begun = Event()

    async def for_ever() -> None:
        begun.set()
        await asyncio.Event().wait()

    def close() -> None:
        assert begun.wait(60)
        vllm.close()

    def call() -> None:
        with pytest.raises(ServiceClosed):
            vllm._transport.call(for_ever())

    at_once([call, close])


@pytest.mark.parametrize("call", ["think", "speak"])
def test_a_latent_token_in_the_text_is_refused(call: str, vllm: VLLMService, double: VLLMDouble) -> None:
    with pytest.raises(InvalidRequest, match=r"<\|endoftext\|>"):
        getattr(vllm, call)(messages("What is <|endoftext|> plus 30?"))
    assert double.requests == []


def test_a_context_that_is_too_long_is_known_here(vllm: VLLMService, double: VLLMDouble) -> None:
    with pytest.raises(ContextTooLong):
        vllm.think(QUESTION, steps=500)
    assert double.requests == []
    steps = vllm.info()["max_positions"] - len(vllm.encode(QUESTION, ""))
    assert vllm.think(QUESTION, steps=steps)["positions"] == 511  # vLLM takes it


@pytest.mark.parametrize(
    ("answer", "error", "named"),
    [
        (problem(400, "This model's maximum context length is 512"), ContextTooLong, "512"),
        (problem(400, "top_k must be -1"), InvalidRequest, "top_k"),
        (problem(404, "The model `served` does not exist"), WrongModel, "served"),
        (problem(401, "Unauthorized"), AccessDenied, "token="),
        (problem(500, "out of memory"), EngineFailed, "out of memory"),
        (httpx.Response(502, text="bad gateway"), ServiceUnreachable, "bad gateway"),
        (httpx.Response(504, text="gateway timeout"), DeadlineExceeded, "gateway timeout"),
        (problem(503, "overloaded"), ServiceBusy, "overloaded"),
        (events({"error": {"message": "engine died"}}), EngineFailed, "engine died"),
        (events({"choices": [{"token_ids": [0]}]}), ServiceUnreachable, "ended"),
        (events({"choices": [{"token_ids": [7]}]}), EngineFailed, "token 7"),
    ],
)
def test_what_goes_wrong_over_there_has_a_name_here(
    answer: httpx.Response, error: type[LatentMASError], named: str, connect: Connect, double: VLLMDouble
) -> None:
    vllm = connect(patience=0)
    double.answers.append(answer)
    with pytest.raises(error, match=named):
        vllm.think(QUESTION, steps=3)
    assert vllm.think(QUESTION, steps=3)["steps"] == 3  # and the next one gets through


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_a_thought_that_ends_before_its_last_step_is_no_memory(
    tokens: int, vllm: VLLMService, double: VLLMDouble
) -> None:
    double.answers.append(events({"choices": [{"token_ids": [double.latent] * tokens}]}, done=True))
    with pytest.raises(EngineFailed, match="ended the answer early"):
        vllm.think(QUESTION, steps=3)
    assert vllm.references() == []
    assert vllm.think(QUESTION, steps=3)["steps"] == 3
    assert [body["max_tokens"] for body in double.requests] == [4, 4]  # nobody knows the thought by then


def test_a_text_that_ends_before_its_end_is_no_text(vllm: VLLMService, double: VLLMDouble) -> None:
    double.answers.append(events({"choices": [{"token_ids": [7, 8]}]}, done=True))
    with pytest.raises(EngineFailed, match="ended the answer early"):
        say(vllm, QUESTION, max_tokens=3)
    assert vllm.references() == []
    assert len(double.requests) == 1


@pytest.mark.parametrize("thinks", [True, False])
def test_an_answer_that_the_server_s_own_limit_ends_is_no_failure_that_passes(
    thinks: bool, vllm: VLLMService, double: VLLMDouble
) -> None:
    ids = [double.latent if thinks else 7] * 3
    double.answers.append(events({"choices": [{"token_ids": ids, "finish_reason": "length"}]}, done=True))
    with pytest.raises(InvalidRequest, match=r"after 3 tokens, and 5 .* max_new_tokens"):
        vllm.think(QUESTION, steps=4) if thinks else say(vllm, QUESTION, max_tokens=5)


def test_a_thought_where_words_were_asked_for_is_no_silent_gap(vllm: VLLMService, double: VLLMDouble) -> None:
    double.answers.append(events({"choices": [{"token_ids": [7, 8, double.latent]}]}))
    chunks = vllm.speak(QUESTION, max_tokens=5)
    assert [next(chunks).token_ids, next(chunks).token_ids] == [(7,), (8,)]
    with pytest.raises(EngineFailed, match="latent token 0"):
        next(chunks)


def test_a_thought_whose_connection_breaks_is_thought_again(vllm: VLLMService, double: VLLMDouble) -> None:
    told: list[int] = []
    double.answers += [events({"choices": [{"token_ids": [double.latent] * tokens}]}) for tokens in (2, 1)]
    assert vllm.think(QUESTION, steps=3, on_step=told.append)["steps"] == 3
    assert len(double.requests) == 3
    assert told == [1, 2, 3]
    assert vllm.info()["thoughts"] == 3


def test_a_thought_behind_a_balancer_that_lost_its_server_is_thought_again(
    vllm: VLLMService, double: VLLMDouble
) -> None:
    double.answers.append(httpx.Response(502, text="bad gateway"))
    assert vllm.think(QUESTION, steps=3)["steps"] == 3
    assert len(double.requests) == 2


def test_a_server_that_takes_its_time_is_none_that_is_gone(vllm: VLLMService, double: VLLMDouble) -> None:
    double.answers.append(httpx.ReadTimeout("nothing came"))
    with pytest.raises(DeadlineExceeded, match="read_timeout"):
        say(vllm, QUESTION, max_tokens=2)
    assert say(vllm, QUESTION, max_tokens=2).token_ids


def test_so_is_one_that_takes_its_time_for_a_lens(vllm: VLLMService, double: VLLMDouble) -> None:
    ref = vllm.think(QUESTION, steps=2)
    double.answers.append(httpx.ReadTimeout("nothing came"))
    with pytest.raises(DeadlineExceeded, match="read_timeout"):
        vllm.lens(ref)
    assert len(double.requests) == 2  # it may still be at work on it


def test_so_is_one_that_takes_its_time_to_say_who_it_is() -> None:
    def late(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("nothing came")

    with pytest.raises(DeadlineExceeded, match="read_timeout"):
        VLLMService.load("vllm+http://there:8000", transport=httpx.MockTransport(late), patience=0)


def test_a_server_that_is_busy_is_waited_for(vllm: VLLMService, double: VLLMDouble) -> None:
    double.answers += [problem(503, "overloaded"), problem(429, "too many")]
    ref = vllm.think(QUESTION, steps=2)
    assert ref["steps"] == 2
    assert len(double.requests) == 3
    double.answers += [problem(503, "overloaded"), httpx.Response(502, text="bad gateway")]
    assert len(vllm.lens(ref)) == 2
    assert len(double.requests) == 6


def test_a_server_that_comes_back_with_another_model(vllm: VLLMService, double: VLLMDouble) -> None:
    assert double.facts
    double.answers.append(problem(503, "restarting"))
    double.facts["fingerprint"] = "cd" * 16
    with pytest.raises(WrongModel, match="load the service anew"):
        vllm.think(QUESTION, steps=2)


@pytest.mark.parametrize("change", [{"fingerprint": "cd" * 16}, {"latent_token_id": 5}, {"alignment": "rescale"}])
def test_one_that_failed_is_asked_who_it_is_before_it_is_asked_more(
    change: dict[str, Any], vllm: VLLMService, double: VLLMDouble
) -> None:
    assert double.facts
    ref = vllm.think(QUESTION, steps=2)
    double.answers.append(problem(500, "out of memory"))
    with pytest.raises(EngineFailed):
        vllm.think(QUESTION, [ref])
    double.facts |= change
    for call in (lambda: vllm.think(QUESTION, [ref]), lambda: say(vllm, QUESTION, [ref]), lambda: vllm.lens(ref)):
        with pytest.raises(WrongModel, match="load the service anew"):
            call()
    assert len(double.requests) == 2


def test_one_that_was_not_heard_of_for_a_while_is_asked_too(
    vllm: VLLMService, double: VLLMDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert double.facts
    ref = vllm.think(QUESTION, steps=2)
    asked, double.facts = double.facts, None
    assert vllm.think(QUESTION, [ref], steps=1)  # it has just answered, so nobody asks for its facts
    double.facts = asked
    monkeypatch.setattr("langchain_latentmas.service.vllm.SURE_SECONDS", 0, raising=False)
    assert say(vllm, QUESTION, [ref]).token_ids
    asked["fingerprint"] = "cd" * 16
    with pytest.raises(WrongModel, match="load the service anew"):
        say(vllm, QUESTION, [ref])


def test_one_that_answers_all_the_time_is_asked_now_and_then(
    vllm: VLLMService, double: VLLMDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a balancer, it need not be the one that answered before."""
    assert double.facts
    monkeypatch.setattr("langchain_latentmas.service.vllm.KNOWN_SECONDS", 0)
    ref = vllm.think(QUESTION, steps=2)
    double.facts["fingerprint"] = "cd" * 16
    with pytest.raises(WrongModel, match="load the service anew"):
        say(vllm, QUESTION, [ref])


def test_what_http_says_of_a_request_is_not_told(vllm: VLLMService, double: VLLMDouble) -> None:
    double.answers.append(httpx.LocalProtocolError("Illegal header value b'Bearer secret'"))
    with pytest.raises(InvalidRequest) as raised:
        vllm.think(QUESTION, steps=2)
    assert "secret" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("facts", [None, {}])  # not there, or a page of what stands before the server
def test_a_server_without_the_plugin(facts: dict[str, Any] | None, connect: Connect, double: VLLMDouble) -> None:
    double.facts = facts
    with pytest.raises(ModelNotSupported, match="VLLM_PLUGINS=latentmas"):
        connect()


def test_a_model_without_a_latent_token(connect: Connect, double: VLLMDouble) -> None:
    assert double.facts
    double.facts |= {"latent_token_id": None, "architecture": "Qwen3ForCausalLM"}
    with pytest.raises(ModelNotSupported, match=r"Qwen3ForCausalLM.*--hf-overrides"):
        connect()


def test_weights_that_nobody_knows(connect: Connect, double: VLLMDouble) -> None:
    assert double.facts
    double.facts["fingerprint"] = None
    with pytest.raises(ModelNotSupported, match="safetensors"):
        connect()


def test_a_model_without_a_name_is_none_of_vllm(connect: Connect, double: VLLMDouble) -> None:
    del double.model_card["id"]
    with pytest.raises(ModelNotFound, match="no vLLM server"):
        connect()


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="<html>Welcome</html>"),
        httpx.Response(404, text="Not Found"),
        *(httpx.Response(200, json=said) for said in ({}, [], ["a"], "ok")),
        *(httpx.Response(200, json={"data": data}) for data in ([], {}, None, ["a"], [["a"]])),
    ],
    ids=lambda answer: f"{answer.status_code} {answer.text}",
)
def test_what_is_no_vllm_server(answer: httpx.Response) -> None:
    with pytest.raises(ModelNotFound, match=r"http://there:8000 is no vLLM server"):
        VLLMService.load("vllm+http://there:8000", transport=httpx.MockTransport(lambda _: answer), patience=0)


def test_another_tokenizer(connect: Connect, double: VLLMDouble, tmp_path: Path) -> None:
    with pytest.raises(WrongModel, match="tokenizer="):
        connect(tokenizer=str(Path(__file__).parents[2] / "langchain_latentmas" / "bundled" / "model"))
    with pytest.raises(ModelNotFound, match="tokenizer="):
        connect(tokenizer=str(tmp_path))


def test_a_tokenizer_of_its_own_has_no_revision_of_the_server_s(connect: Connect, double: VLLMDouble) -> None:
    assert double.facts
    double.facts["revision"] = "abcdef"
    assert connect().facts["revision"] == "abcdef"
    assert connect(tokenizer=FOLDER).facts["revision"] is None


def test_a_key(connect: Connect, double: VLLMDouble) -> None:
    double.key = "secret"
    with pytest.raises(AccessDenied, match="token="):
        connect()
    for token in ("secret", "secret\n"):
        assert say(connect(token=token), QUESTION, max_tokens=1).token_ids


def test_a_key_from_the_environment(connect: Connect, double: VLLMDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    double.key = "secret"
    monkeypatch.setenv("LATENTMAS_TOKEN", "secret")
    assert say(connect(), QUESTION, max_tokens=1).token_ids
    with pytest.raises(AccessDenied, match="token="):
        connect(token="another")
    monkeypatch.setenv("LATENTMAS_TOKEN", "two\nlines")
    with pytest.raises(InvalidRequest, match="token") as caught:
        connect()
    assert "lines" not in str(caught.value)


def test_an_empty_key_in_the_environment_is_none(
    connect: Connect, double: VLLMDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTMAS_TOKEN", "")
    assert say(connect(), QUESTION, max_tokens=1).token_ids
    double.key = "secret"
    with pytest.raises(AccessDenied, match="token="):
        connect()


def test_a_key_that_others_can_read_on_the_way_is_told_of(
    connect: Connect, double: VLLMDouble, caplog: pytest.LogCaptureFixture
) -> None:
    connect()
    assert "unencrypted" not in caplog.text
    double.key = "secret"
    connect(token="secret")
    assert "the key for http://there:8000 travels unencrypted" in caplog.text


def test_nobody_there() -> None:
    with pytest.raises(ServiceUnreachable, match="vLLM"):
        LatentService.load("vllm+http://127.0.0.1:9", patience=0)


def test_a_server_without_prefix_caching_works_and_says_so(
    connect: Connect, double: VLLMDouble, caplog: pytest.LogCaptureFixture
) -> None:
    assert double.facts
    double.facts["prefix_caching"] = False
    assert connect().think(QUESTION, steps=1)
    assert "prefix caching" in caplog.text


@pytest.mark.parametrize("name", sorted(OF_THE_SERVER))
def test_what_the_server_decides_is_no_setting_here(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"start the server with (--|CUDA_VISIBLE_DEVICES)"):
        VLLMService.load("vllm+http://there:8000", **{name: 1})


@pytest.mark.parametrize("setting", [*({name: 1} for name in OF_THE_ENGINE), *({"engine": {name: 1}} for name in OURS)])
def test_what_vllm_in_this_process_decides_is_no_setting_either(setting: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="engine"):
        LatentService.load("vllm:bundled", **setting)


@pytest.mark.parametrize(
    "url",
    [
        "vllm+http://",
        "vllm+http://user:password@there:8000",
        "vllm+http://there?x=1",
        "vllm+http://[::1",
        "vllm+http://there:70000",
        "vllm+http://127.0.0.999:8000",
        "vllm+http://there..now:8000",
    ],
)
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(InvalidRequest, match="vllm\\+http://host:port"):
        LatentService.load(url)


def test_several_memories_are_one_chain_and_no_setting_changes_that(connect: Connect) -> None:
    with pytest.raises(InvalidRequest, match="one chain"):
        connect(merge="rotate")


def test_vllm_in_this_process_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "latentmas_vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtra, match=r"\.\[vllm\]' -e integrations/vllm"):
        LatentService.load("vllm:bundled")


def test_what_vllm_cannot_do_is_said(vllm: VLLMService, tmp_path: Path) -> None:
    ref = vllm.think(QUESTION, steps=1)
    for call in (
        lambda: vllm.altered(ref, "zeroed"),
        lambda: vllm.export_memory(ref),
        lambda: vllm.import_memory(tmp_path),
        lambda: vllm.tenants(["a"]),
    ):
        with pytest.raises(InvalidRequest):
            call()


def test_a_chat_model_speaks_through_it(vllm: VLLMService, service: LatentService) -> None:
    ours, theirs = (
        [chunk.text for chunk in ChatLatentMAS(service=each, max_tokens=8).stream(QUESTION)] for each in (vllm, service)
    )
    assert "".join(ours) == "".join(theirs) != ""
