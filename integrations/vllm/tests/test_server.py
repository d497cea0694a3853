"""OpenAI servers of vLLM, started here, and LangGraph graphs that run on them unchanged."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

if find_spec("vllm.config") is None:  # a folder of that name, this one say, is no vLLM
    pytest.skip("vLLM is not installed; see `make test-vllm`", allow_module_level=True)

from langchain_latentmas import LatentService
from langchain_latentmas.bundled import MODEL
from langchain_latentmas.commands.doctor import diagnose
from langchain_latentmas.evaluation.task import BUNDLED_TASKS
from langchain_latentmas.teams import HIERARCHICAL, hierarchical, sequential

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

GRAPHS, STEPS, BLOCK = 40, 8, 32
FLAGS = (
    "--dtype float32 --enforce-eager --max-num-seqs 64 --max-num-batched-tokens 2048 --max-model-len 2048 "
    f"--block-size {BLOCK} --kv-cache-memory-bytes {128 << 20} --host 127.0.0.1"
)


@contextmanager
def vllm_server(log: Path, *flags: str, **environment: str) -> Iterator[str]:
    """A server on a free port; ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL), "--port", str(port)]
    env = {
        **os.environ,
        "VLLM_PLUGINS": "latentmas",
        "VLLM_SERVER_DEV_MODE": "1",  # for /reset_prefix_cache
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with log.open("w") as out:
        process = subprocess.Popen([*command, *FLAGS.split(), *flags], env=env, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 600
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


LATENT_FLAGS = ("--hf-overrides", '{"architectures": ["LatentQwen3ForCausalLM"]}')


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with vllm_server(tmp_path_factory.mktemp("vllm") / "log", *LATENT_FLAGS) as url:
        yield url


@pytest.fixture(scope="module")
def local() -> Iterator[LatentService]:
    with LatentService.load("bundled", device="cpu") as service:
        yield service


@pytest.fixture
def vllm(address: str) -> Iterator[LatentService]:
    """A client that knows no memory yet."""
    httpx.post(f"{address}/reset_prefix_cache").raise_for_status()
    with LatentService.load(f"vllm+{address}") as service:
        yield service


@pytest.fixture(scope="module")
def inputs() -> list[dict[str, Any]]:
    task = BUNDLED_TASKS["relay"]()
    return [task.input(question) for question in task.questions(GRAPHS, seed=1)]


@pytest.fixture(scope="module")
def expected(local: LatentService, inputs: list[dict[str, Any]]) -> list[str]:
    return answers(team(local), inputs)


def team(service: LatentService) -> Any:
    return sequential(service, steps=STEPS, max_tokens=24).compile()


def answers(graph: Any, inputs: list[dict[str, Any]]) -> list[str]:
    return [state["messages"][-1].text for state in graph.batch(inputs, {"max_concurrency": 16})]


def metric(address: str, name: str) -> float:
    lines = httpx.get(f"{address}/metrics").text
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", lines, re.MULTILINE))


def test_graphs_end_with_the_tokens_of_the_service_in_this_process(
    vllm: LatentService, inputs: list[dict[str, Any]], expected: list[str]
) -> None:
    graph = team(vllm)
    assert [graph.invoke(each)["messages"][-1].text for each in inputs[:10]] == expected[:10]
    assert answers(graph, inputs) == expected


def test_with_text_requests_in_between(
    vllm: LatentService, local: LatentService, inputs: list[dict[str, Any]], expected: list[str]
) -> None:
    prompts = [each["messages"] for each in inputs[:16]]

    def text(service: LatentService, prompt: Any) -> str:
        return "".join(chunk.text for chunk in service.speak(prompt, max_tokens=40))

    alone = [text(local, prompt) for prompt in prompts]
    with ThreadPoolExecutor(16) as threads:
        spoken = [threads.submit(text, vllm, prompt) for prompt in prompts]
        assert answers(team(vllm), inputs) == expected
        assert [one.result() for one in spoken] == alone


def test_after_all_kv_is_gone(
    address: str, vllm: LatentService, inputs: list[dict[str, Any]], expected: list[str]
) -> None:
    """The judgers' memories are prefilled anew, all thoughts in them."""
    team(vllm).batch(inputs)
    httpx.post(f"{address}/reset_prefix_cache").raise_for_status()
    assert answers(team(vllm), inputs) == expected  # what was thought is known here; only the judgers ask


def test_parallel_experts_are_read_as_one_chain(
    vllm: LatentService, local: LatentService, inputs: list[dict[str, Any]]
) -> None:
    """As if each had seen the earlier ones: the same thoughts as in a chain, and so the same answers."""
    parallel = hierarchical(vllm, steps=STEPS, max_tokens=24).compile()
    states = parallel.batch(inputs, {"max_concurrency": 16})
    assert {state["messages"][-1].response_metadata["merge"] for state in states} == {"chained"}
    # Tips are read by agent name unless `reads` says otherwise.
    agents = {name: HIERARCHICAL[name] for name in sorted(HIERARCHICAL)}
    chain = sequential(local, agents=agents, steps=STEPS, max_tokens=24).compile()
    assert [state["messages"][-1].text for state in states] == answers(chain, inputs)


def test_hand_overs_are_free(address: str, vllm: LatentService) -> None:
    """What a memory's whole blocks hold comes from the prefix cache: for one reader, and for 16 at once."""
    ref = vllm.think("What is 12 plus 30? " * 8, steps=STEPS, agent="planner")
    blocks = ref["positions"] // BLOCK * BLOCK
    assert blocks > 0
    before = metric(address, "vllm:prefix_cache_hits_total")
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda i: list(vllm.speak(f"Answer {i}.", [ref], max_tokens=2)), range(16)))
    assert metric(address, "vllm:prefix_cache_hits_total") - before >= 16 * blocks


def test_tokens_stream_and_a_reader_who_leaves_is_taken_back(address: str, vllm: LatentService) -> None:
    chunks = vllm.speak("What is 12 plus 30?", temperature=1.5, seed=1, max_tokens=1500)
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 30
    while metric(address, "vllm:num_requests_running"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_lens_is_that_of_the_service_in_this_process(vllm: LatentService, local: LatentService) -> None:
    rows = [
        each.lens(each.think("What is 12 plus 30?", steps=STEPS, agent="planner"), top_k=1) for each in (vllm, local)
    ]
    for ours, theirs in zip(*rows, strict=True):
        assert ours.step == theirs.step
        assert ours.tokens[0][1] == pytest.approx(theirs.tokens[0][1], abs=0.01)


def test_agents_on_different_replicas(
    address: str, local: LatentService, inputs: list[dict[str, Any]], tmp_path: Path
) -> None:
    """A reference that was thought on one server is read on another, which has never seen it."""
    with ExitStack() as stack:
        other = stack.enter_context(vllm_server(tmp_path / "log", *LATENT_FLAGS))
        here, there = (
            stack.enter_context(LatentService.load(f"vllm+{url}", store=tmp_path / "store")) for url in (address, other)
        )

        def hand_over(thinker: LatentService, speaker: LatentService, prompt: Any) -> list[int]:
            first = thinker.think(prompt, steps=STEPS, agent="planner")
            second = speaker.think("Check it.", [first], steps=STEPS, agent="critic")
            return [i for chunk in thinker.speak("Answer.", [second], max_tokens=24) for i in chunk.token_ids]

        for each in inputs[:5]:
            assert hand_over(here, there, each["messages"]) == hand_over(local, local, each["messages"])


def test_doctor_finds_nothing_wrong(address: str) -> None:
    findings = {finding.name: finding for finding in diagnose(f"vllm+{address}", "bundled")}
    assert all(finding.fine for finding in findings.values()), findings
    assert "token 5 of LatentQwen3ForCausalLM" in findings["LATENT"].said


def test_doctor_names_what_a_plain_server_lacks(tmp_path: Path) -> None:
    with vllm_server(tmp_path / "log", "--no-enable-prefix-caching", VLLM_PLUGINS="") as plain:
        finding = list(diagnose(plain))[-1]
        assert (finding.name, finding.fine) == ("plugin", False)
        assert "VLLM_PLUGINS=latentmas" in finding.way_out
