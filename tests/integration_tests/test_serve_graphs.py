"""The graphs of demo, examples and cookbook, in this process and against a real `latentmas serve`: the same tokens.

What both services know in the end is compared. The id of a memory is a digest of all that it was made from: the prompt
of an agent, the memories it read, the tokens it said. So the ids are the same where every agent read and said the same.

CI asks few questions and runs two notebooks: one converts a graph of a chat model, one has agents, the lens and
checkpoints; `make notebooks` runs all of them in a process. All of them, with the questions that they ask:
`QUESTIONS=20 pytest tests/integration_tests/test_serve_graphs.py`.
"""

import asyncio
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from langgraph.errors import GraphRecursionError

from benchmarks.conversions import EDGES, build
from langchain_latentmas import ChatLatentMAS, LatentService, demo
from tests.served import Process, client

COOKBOOK = Path(__file__).parents[2] / "cookbook"
NOTEBOOKS = sorted(COOKBOOK.glob("*.ipynb" if "QUESTIONS" in os.environ else "0[67]*.ipynb"))
QUESTIONS = int(os.environ.get("QUESTIONS", "2"))
STEPS, MAX_TOKENS = 6, 96


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with Process("--store", str(tmp_path_factory.mktemp("there"))) as process:
        yield process


@pytest.fixture(scope="module")
def there(process: Process) -> Iterator[LatentService]:
    with client(process) as service:
        yield service


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("here")


@pytest.fixture(scope="module")
def here(folder: Path) -> Iterator[LatentService]:
    with LatentService.load("bundled", device="cpu", store=folder) as service:
        yield service


def known(service: LatentService) -> set[str]:
    return {stored.ref["id"] for stored in service.references()}


@pytest.mark.parametrize("mode", demo.MODES)
@pytest.mark.parametrize("arrangement", demo.TEAMS)
def test_the_demo(here: LatentService, there: LatentService, arrangement: str, mode: str) -> None:
    problems = demo.held_out(QUESTIONS, seed=0)
    said = []
    for service in (here, there):
        score, answers = demo.run(service, arrangement, mode, problems, steps=STEPS, max_tokens=MAX_TOKENS)
        said.append([([m.text for m in a.state["messages"]], a.cost, a.right) for a in answers])
        assert score.output_tokens > 0
    assert said[0] == said[1]
    assert known(here) == known(there)


@pytest.mark.parametrize("name", EDGES)
def test_an_example(here: LatentService, there: LatentService, name: str) -> None:
    said = []
    for service in (here, there):
        graph = build(name, True, ChatLatentMAS(service=service, max_tokens=MAX_TOKENS), STEPS)
        asked = [problem.question for problem in demo.held_out(QUESTIONS, seed=1)]
        inputs: list[Any] = [
            {"messages": [("human", q)]} if name == "chain_of_messages" else {"question": q} for q in asked
        ]
        states = asyncio.run(graph.abatch(inputs, {"recursion_limit": 12}, return_exceptions=True))
        said.append([answer(state) for state in states])
    assert said[0] == said[1]
    assert known(here) == known(there)


def answer(state: Any) -> str:
    if isinstance(state, GraphRecursionError):  # a supervisor that routes in circles does so in both places
        return "none"
    return state["messages"][-1].text if "messages" in state else state["answer"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook(
    path: Path,
    process: Process,
    folder: Path,
    here: LatentService,
    there: LatentService,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    shown = []
    for load in (
        f'LatentService.load("bundled", device="cpu", store="{folder}")',
        f'LatentService.load("{process.address}")',
    ):
        run(path, load)
        # A server that goes on has its KV; a second service in the process has to rebuild it.
        shown.append(re.sub(r"rebuilds: \d+", "", capsys.readouterr().out))
    assert shown[0] == shown[1]
    assert known(here) == known(there)


def run(path: Path, load: str) -> None:
    """Runs the cells of a notebook with another line that loads the service, and fewer questions."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    code, loads = re.subn(r'LatentService\.load\("bundled".*?\)', lambda _: load, code)
    assert loads
    code = re.sub(r"held_out\((\d+),", lambda asked: f"held_out({min(int(asked[1]), QUESTIONS)},", code)
    exec(compile(code, str(path), "exec"), {"__name__": path.stem})
