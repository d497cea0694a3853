"""The bundled model does what its card says, through the real service and the real command."""

import json
import subprocess
import sys
from typing import Any

import pytest

from langchain_latentmas import LatentService
from langchain_latentmas.bundled import MODEL
from langchain_latentmas.demo import held_out, run

N = 100


@pytest.fixture(scope="module")
def scores(bundled: LatentService) -> dict[tuple[str, str, int], int]:
    problems = held_out(N, seed=1)
    asked = [("sequential", "latent", 24), ("sequential", "latent", 32), ("hierarchical", "latent", 24)]
    asked += [("sequential", "cut", 24), ("hierarchical", "cut", 24), ("sequential", "text", 24)]
    return {
        (arrangement, mode, steps): run(bundled, arrangement, mode, problems, steps=steps, max_tokens=128)[0].right
        for arrangement, mode, steps in asked
    }


@pytest.mark.parametrize(("arrangement", "steps"), [("sequential", 24), ("sequential", 32), ("hierarchical", 24)])
def test_a_judger_that_never_saw_the_question_answers_it(scores: Any, arrangement: str, steps: int) -> None:
    assert scores[arrangement, "latent", steps] >= 0.8 * N


@pytest.mark.parametrize("arrangement", ["sequential", "hierarchical"])
def test_with_the_edge_cut_it_does_not(scores: Any, arrangement: str) -> None:
    assert scores[arrangement, "cut", 24] < 0.1 * N


def test_the_model_is_as_small_as_it_says(bundled: LatentService) -> None:
    assert bundled.info()["parameters"] <= 4_000_000
    assert json.loads((MODEL / "config.json").read_text())["head_dim"] % 32 == 0


def test_the_demo_prints_one_json_document() -> None:
    command = [sys.executable, "-m", "langchain_latentmas.cli", "demo", "--n", "5", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert "bundled" in str(shown["model"]) or shown["model"]


def test_a_wrong_call_of_the_command_is_one_line_and_exit_code_2() -> None:
    command = [sys.executable, "-m", "langchain_latentmas.cli", "demo", "--model", "/no/such/folder", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["error"] == "ModelNotFound"
