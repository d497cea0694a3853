"""OpenAI servers of vLLM, started here, and LangGraph graphs that run on them unchanged."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
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
from langchain_latentmas.bundled import EXPERTS, MODEL, ROLES, STEPS
from langchain_latentmas.commands.doctor import diagnose
from langchain_latentmas.demo import held_out, run
from langchain_latentmas.evaluation.task import BUNDLED_TASKS
from langchain_latentmas.teams import hierarchical, sequential

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

GRAPHS, BLOCK = 40, 32
TEAMS = "sequential", "chained"
COOKBOOK = Path(__file__).parents[3] / "cookbook"
FLAGS = (
    "--dtype float32 --enforce-eager --max-num-seqs 64 --max-num-batched-tokens 2048 --max-model-len 2048 "
    f"--block-size {BLOCK} --kv-cache-memory-bytes {128 << 20}"
)


@contextmanager
def vllm_server(log: Path, *flags: str, **environment: str) -> Iterator[str]:
    """A server on a free port; ends with the block."""
    env = {
        **os.environ,
        "VLLM_PLUGINS": "latentmas",
        "VLLM_SERVER_DEV_MODE": "1",  # for /reset_prefix_cache
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    command = ["vllm.entrypoints.openai.api_server", "--model", str(MODEL), *FLAGS.split(), *flags]
    with started(command, log, env) as url:
        yield url


@contextmanager
def started(command: Sequence[str], log: Path, env: dict[str, str]) -> Iterator[str]:
    """A module that serves HTTP, on a free port."""
    port = free_port()
    with log.open("w") as out:
        run = [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(run, env=env, stdout=out, stderr=out)
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


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


LATENT_FLAGS = ("--hf-overrides", '{"architectures": ["LatentQwen3ForCausalLM"]}')


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with vllm_server(tmp_path_factory.mktemp("vllm") / "log", *LATENT_FLAGS) as url:
        yield url


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Another server, with as little KV memory as one request of the longest kind needs."""
    blocks = ("--num-gpu-blocks-override", str(2048 // BLOCK + 1))
    with vllm_server(tmp_path_factory.mktemp("replica") / "log", *LATENT_FLAGS, *blocks) as url:
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
def expected(local: LatentService, inputs: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What the service in this process answers, by team.

    Parallel experts are one chain on vLLM, as if each had seen the earlier ones; tips are read by agent name unless
    `reads` says otherwise.
    """
    chain = {name: ROLES[name] for name in sorted(EXPERTS)}
    chained = sequential(local, agents=chain, steps=STEPS, max_tokens=24).compile()
    return {"sequential": answers(team(local), inputs), "chained": answers(chained, inputs)}


def team(service: LatentService, name: str = "sequential") -> Any:
    arrange = {"sequential": sequential, "chained": hierarchical}[name]
    return arrange(service, steps=STEPS, max_tokens=24).compile()


def answers(graph: Any, inputs: list[dict[str, Any]]) -> list[str]:
    return [state["messages"][-1].text for state in graph.batch(inputs, {"max_concurrency": 16})]


def metric(address: str, name: str) -> float:
    lines = httpx.get(f"{address}/metrics").text
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", lines, re.MULTILINE))


def test_graphs_one_after_the_other_end_with_the_tokens_of_the_service_in_this_process(
    vllm: LatentService, inputs: list[dict[str, Any]], expected: dict[str, list[str]]
) -> None:
    graph = team(vllm)
    assert [graph.invoke(each)["messages"][-1].text for each in inputs[:10]] == expected["sequential"][:10]


@pytest.mark.parametrize("name", TEAMS)
def test_all_at_once_with_text_requests_in_between(
    name: str, vllm: LatentService, local: LatentService, inputs: list[dict[str, Any]], expected: dict[str, list[str]]
) -> None:
    prompts = [each["messages"] for each in inputs[:16]]

    def text(service: LatentService, prompt: Any) -> str:
        return "".join(chunk.text for chunk in service.speak(prompt, max_tokens=40))

    alone = [text(local, prompt) for prompt in prompts]
    with ThreadPoolExecutor(16) as threads:
        spoken = [threads.submit(text, vllm, prompt) for prompt in prompts]
        assert answers(team(vllm, name), inputs) == expected[name]
        assert [one.result() for one in spoken] == alone


@pytest.mark.parametrize("name", TEAMS)
def test_after_all_kv_is_gone(
    name: str, address: str, vllm: LatentService, inputs: list[dict[str, Any]], expected: dict[str, list[str]]
) -> None:
    """The judgers' memories are prefilled anew, all thoughts in them."""
    team(vllm, name).batch(inputs)
    httpx.post(f"{address}/reset_prefix_cache").raise_for_status()
    assert answers(team(vllm, name), inputs) == expected[name]  # what was thought is known here; only the judgers ask


@pytest.mark.parametrize("name", TEAMS)
def test_with_so_little_memory_that_requests_are_preempted(
    name: str, replica: str, inputs: list[dict[str, Any]], expected: dict[str, list[str]]
) -> None:
    before = metric(replica, "vllm:num_preemptions_total")
    with LatentService.load(f"vllm+{replica}") as service:
        assert answers(team(service, name), inputs) == expected[name]
    assert metric(replica, "vllm:num_preemptions_total") > before


def test_what_was_read_as_one_chain_is_said(vllm: LatentService, inputs: list[dict[str, Any]]) -> None:
    assert team(vllm, "chained").invoke(inputs[0])["messages"][-1].response_metadata["merge"] == "chained"


def test_the_demo_streams(vllm: LatentService, local: LatentService) -> None:
    *problems, fresh = held_out(5, seed=0)  # what was thought before is known, and reports no steps
    asked = {"messages": [("human", fresh.question)]}
    for arrangement in ("sequential", "single"):
        texts = [
            [answer.state["messages"][-1].text for answer in run(each, arrangement, "latent", problems, steps=STEPS)[1]]
            for each in (vllm, local)
        ]
        assert texts[0] == texts[1]
    graph = sequential(vllm, steps=STEPS).compile()
    parts = list(graph.stream(asked, stream_mode=["messages", "custom"]))
    spoken = [part[0].text for mode, part in parts if mode == "messages"]
    assert "".join(spoken) == graph.invoke(asked)["messages"][-1].text
    assert len([text for text in spoken if text]) > 1
    assert any(mode == "custom" for mode, _ in parts)


def test_a_graph_of_the_cookbook_streams(
    vllm: LatentService, local: LatentService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notebook's own cells, up to where its converted graph runs, and that graph once more as a stream."""
    notebook = json.loads((COOKBOOK / "02_convert_a_chain.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"][:4]
    states, streams = [], []
    for service in (vllm, local):
        monkeypatch.setattr(LatentService, "load", lambda model, service=service: service)
        names: dict[str, Any] = {}
        for cell in cells:
            exec(cell, names)
        states.append(names["state"])
        asked = {"question": names["problems"][0].question}
        streams.append([part.text for part, _ in names["graph"].stream(asked, stream_mode="messages") if part.text])
    assert states[0]["plan"].startswith("[latent planner")
    assert states[0]["answer"] == states[1]["answer"] != ""
    assert "".join(streams[0]).endswith(states[0]["answer"])
    assert len(streams[0]) > 4


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
    address: str, replica: str, local: LatentService, inputs: list[dict[str, Any]], tmp_path: Path
) -> None:
    """A reference that was thought on one server is read on another, which has never seen it."""
    with ExitStack() as stack:
        here, there = (
            stack.enter_context(LatentService.load(f"vllm+{url}", store=tmp_path / "store"))
            for url in (address, replica)
        )

        def hand_over(thinker: LatentService, speaker: LatentService, prompt: Any) -> list[int]:
            first = thinker.think(prompt, steps=STEPS, agent="planner")
            second = speaker.think("Check it.", [first], steps=STEPS, agent="critic")
            return [i for chunk in thinker.speak("Answer.", [second], max_tokens=24) for i in chunk.token_ids]

        for each in inputs[:5]:
            assert hand_over(here, there, each["messages"]) == hand_over(local, local, each["messages"])


@pytest.mark.parametrize("policy", ["round_robin", "cache_aware"])
def test_two_replicas_behind_a_load_balancer(
    policy: str,
    address: str,
    replica: str,
    inputs: list[dict[str, Any]],
    expected: dict[str, list[str]],
    tmp_path: Path,
) -> None:
    """The router of the vLLM project; agents of one graph land on either server."""
    router = ["vllm_router.launch_router", "--worker-urls", address, replica, "--policy", policy]
    ports = ["--prometheus-port", str(free_port())]
    before = [metric(url, "vllm:request_success_total") for url in (address, replica)]
    with (
        started([*router, *ports], tmp_path / "log", dict(os.environ)) as url,
        LatentService.load(f"vllm+{url}") as service,
    ):
        assert answers(team(service), inputs) == expected["sequential"]
        after = [metric(url, "vllm:request_success_total") for url in (address, replica)]
        assert all(finding.fine for finding in diagnose(url))
    served = [late - early for early, late in zip(before, after, strict=True)]
    assert sum(served) == 4 * GRAPHS
    if policy == "round_robin":
        assert served[0] == served[1]


def test_doctor_finds_nothing_wrong(address: str) -> None:
    findings = {finding.name: finding for finding in diagnose(f"vllm+{address}", "bundled")}
    assert all(finding.fine for finding in findings.values()), findings
    assert "token 5 of LatentQwen3ForCausalLM" in findings["LATENT"].said


def test_doctor_names_what_a_plain_server_lacks(tmp_path: Path) -> None:
    with vllm_server(tmp_path / "log", "--no-enable-prefix-caching", VLLM_PLUGINS="") as plain:
        finding = list(diagnose(plain))[-1]
        assert (finding.name, finding.fine) == ("plugin", False)
        assert "VLLM_PLUGINS=latentmas" in finding.way_out
