"""vLLM in this process, behind the same interface as transformers."""

import asyncio
import os
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from shutil import copy, copytree, ignore_patterns
from types import SimpleNamespace
from typing import Any

import pytest

if find_spec("vllm.config") is None:  # a folder of that name, this one say, is no vLLM
    pytest.skip("vLLM is not installed; see `make test-vllm`", allow_module_level=True)
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import vllm
from transformers import GPT2Config
from vllm.v1.engine.async_llm import AsyncLLM

from langchain_latentmas import ChatLatentMAS, LatentService
from langchain_latentmas.bundled import MODEL, STEPS
from langchain_latentmas.errors import (
    ContextTooLong,
    InvalidRequest,
    LatentMASError,
    ModelNotFound,
    ModelNotSupported,
    ServiceClosed,
)
from langchain_latentmas.service.local import LocalService
from langchain_latentmas.teams import sequential

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

SMALL = {"enforce_eager": True, "block_size": 32, "max_model_len": 1024, "max_num_batched_tokens": 1024}
QUESTIONS = [f"Anna has {n} apples and buys 12 more. How many apples has she now?" for n in range(20, 36)]


@pytest.fixture(scope="module")
def service() -> Iterator[LatentService]:
    with LatentService.load("vllm:bundled", dtype="float32", kv_budget="64MiB", max_rows=32, engine=SMALL) as service:
        yield service


@pytest.fixture(scope="module")
def local() -> Iterator[LatentService]:
    with LatentService.load("bundled", device="cpu") as service:
        yield service


def hand_over(service: LatentService, question: str) -> tuple[Any, ...]:
    """What can be seen of two thinkers and a speaker."""
    steps: list[int] = []
    planner = service.think(question, steps=STEPS, agent="planner", on_step=steps.append)
    critic = service.think("Check it.", [planner], steps=STEPS, agent="critic")
    *chunks, last = service.speak("Answer.", [critic], max_tokens=24)
    ids = tuple(i for chunk in chunks for i in chunk.token_ids)
    return steps, critic["positions"], ids, "".join(c.text for c in [*chunks, last]), last.usage, last.finish_reason


def test_the_tokens_and_the_usage_of_the_service_on_transformers(service: LatentService, local: LatentService) -> None:
    for question in QUESTIONS[:4]:
        assert hand_over(service, question) == hand_over(local, question)


def test_graphs_all_at_once(service: LatentService, local: LatentService) -> None:
    inputs = [{"messages": [("human", question)]} for question in QUESTIONS]
    texts = [
        [state["messages"][-1].text for state in sequential(each, steps=STEPS, max_tokens=24).compile().batch(inputs)]
        for each in (service, local)
    ]
    assert texts[0] == texts[1]


async def test_text_streams_and_a_reader_who_leaves_is_taken_back(service: LatentService, local: LatentService) -> None:
    chunks = [chunk async for chunk in service.aspeak(QUESTIONS[0], max_tokens=24)]
    assert len(chunks) > 4
    assert "".join(c.text for c in chunks) == "".join(c.text for c in local.speak(QUESTIONS[0], max_tokens=24))
    leaving = service.aspeak(QUESTIONS[0], max_tokens=800, temperature=1.5, seed=1)
    await anext(leaving)
    await leaving.aclose()  # type: ignore[attr-defined]
    thinking = asyncio.create_task(service.athink(QUESTIONS[1], steps=900))
    await asyncio.sleep(0.5)
    thinking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await thinking
    deadline = time.monotonic() + 20
    while service._transport._llm.output_processor.has_unfinished_requests():  # type: ignore[attr-defined]
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


def test_the_lens_is_that_of_the_service_on_transformers(service: LatentService, local: LatentService) -> None:
    rows = [each.lens(each.think(QUESTIONS[0], steps=4, agent="planner"), top_k=1) for each in (service, local)]
    assert [[token for token, _ in row.tokens] for row in rows[0]] == [[t for t, _ in row.tokens] for row in rows[1]]
    for ours, theirs in zip(*rows, strict=True):
        assert ours.tokens[0][1] == pytest.approx(theirs.tokens[0][1], abs=0.01)


def test_a_chat_model_speaks_through_it(service: LatentService, local: LatentService) -> None:
    ours, theirs = (ChatLatentMAS(service=each, max_tokens=12).invoke(QUESTIONS[2]) for each in (service, local))
    assert (ours.text, ours.usage_metadata) == (theirs.text, theirs.usage_metadata)


def test_what_runs_there_is_said(service: LatentService) -> None:
    info = service.info()
    assert (info["model"], info["architecture"]) == ("bundled", "LatentQwen3ForCausalLM")
    assert info["prefix_caching"] is True
    assert info["vllm"] == vllm.__version__


def test_a_context_that_is_too_long_is_known_before(service: LatentService) -> None:
    with pytest.raises(ContextTooLong):
        service.think(QUESTIONS[0], steps=1024)


@pytest.mark.parametrize(
    ("model", "settings", "error", "named"),
    [
        ("bundled", {"device": "cpu"}, InvalidRequest, "engine="),
        ("bundled", {"patience": 3}, InvalidRequest, "engine"),
        ("bundled", {"engine": {"no_such_setting": 1}}, InvalidRequest, "no_such_setting"),
        ("bundled", {"engine": {"max_model_len": 10**6}}, InvalidRequest, "max_model_len"),
        ("bundled", {"engine": {"enable_prompt_embeds": True}}, ModelNotSupported, "--enable-prompt-embeds"),
        ("bundled", {"engine": {"hf_overrides": {"latent_token_id": 10**6}}}, ModelNotSupported, "latent_token_id"),
        ("bundled", {"merge": "rotate"}, InvalidRequest, "one chain"),
        ("/no/such/folder", {}, ModelNotFound, "Give vllm:"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(
    model: str, settings: dict[str, Any], error: type[LatentMASError], named: str
) -> None:
    with pytest.raises(error, match=named):
        LatentService.load(f"vllm:{model}", **settings)


def test_the_model_is_known_once_vllm_has_loaded_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the hub, its weights come while the engine starts."""

    def start(config: Any) -> SimpleNamespace:
        copy(MODEL / "model.safetensors", tmp_path)
        return SimpleNamespace(shutdown=lambda: None)

    copytree(MODEL, tmp_path, ignore=ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    monkeypatch.setattr(AsyncLLM, "from_vllm_config", start)
    with LatentService.load(f"vllm:{tmp_path}", dtype="float32") as there, LocalService.load("bundled") as here:
        assert there.facts["fingerprint"] == here.info()["fingerprint"]


def test_a_model_that_cannot_think_on_vllm(tmp_path: Path) -> None:
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    with pytest.raises(ModelNotSupported, match=r"GPT2LMHeadModel.*Qwen3ForCausalLM"):
        LatentService.load(f"vllm:{tmp_path}")


def test_a_plugin_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    with pytest.raises(ModelNotSupported, match="add latentmas"):
        LatentService.load("vllm:bundled")


@pytest.mark.parametrize("version", ["0.26.0", "0.33.0", "1.0.0"])
def test_a_version_that_is_not_supported(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.version, "__version__", version)
    with pytest.raises(ModelNotSupported, match=rf"<0\.33.*not with {version}"):
        LatentService.load("vllm:bundled")


def test_closing_ends_the_engine() -> None:
    service = LatentService.load("vllm:bundled", dtype="float32", kv_budget="64MiB", engine=SMALL)
    assert service.think("What is 12 plus 30?", steps=2)["steps"] == 2
    service.close()
    with pytest.raises(ServiceClosed):
        service.think("What is 12 plus 30?", steps=3)
    service.close()
