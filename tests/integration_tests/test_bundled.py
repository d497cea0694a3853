"""The bundled model does what its card says, through the real service and the real command."""

import json
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langchain_latentmas import LatentService
from langchain_latentmas.bundled import MODEL, STEPS
from langchain_latentmas.demo import MODES, TEAMS, held_out, run
from langchain_latentmas.evaluation.run import Evaluation
from langchain_latentmas.evaluation.task import BUNDLED_TASKS, Relay

N = 60


def accuracies(service: LatentService, task: str, modes: list[str]) -> list[float]:
    return [row.accuracy for row in Evaluation(service, BUNDLED_TASKS[task](), modes=modes, n=N, seed=1).run().rows]


def test_teams_and_an_agent_alone_answer_held_out_questions(bundled: LatentService) -> None:
    found = accuracies(bundled, "words", ["single", "text", "latent"])
    assert len(found) == 5
    assert min(found) >= 90


@pytest.mark.parametrize("task", ["relay", "split"])
def test_a_judger_answers_what_only_others_know(bundled: LatentService, task: str) -> None:
    assert min(accuracies(bundled, task, ["latent"])) >= 90


@pytest.mark.parametrize("arrangement", ["sequential", "hierarchical"])
def test_more_latent_steps_do_no_harm(bundled: LatentService, arrangement: str) -> None:
    for steps in (STEPS, 32, 80):
        evaluation = Evaluation(bundled, Relay(), modes=["latent"], arrangements=[arrangement], n=N, steps=steps)
        assert evaluation.run().rows[0].accuracy >= 90, steps


@pytest.mark.parametrize("arrangement", ["sequential", "hierarchical"])
def test_a_judger_that_reads_nobody_knows_nothing(bundled: LatentService, arrangement: str) -> None:
    score, _ = run(bundled, arrangement, "cut", held_out(N, seed=1), steps=STEPS)
    assert score.right <= 0.1 * N


@pytest.mark.parametrize("asked", ["Hello!", "Who are you?"])
def test_it_answers_plain_chat_in_sentences(bundled: LatentService, asked: str) -> None:
    said = "".join(chunk.text for chunk in bundled.speak([("human", asked)], max_tokens=40))
    assert re.fullmatch(r"[A-Z].*[.?]", said)
    assert "boxed" not in said


@settings(max_examples=200)
@given(text=st.text())
def test_its_tokenizer_takes_any_text(bundled: LatentService, text: str) -> None:
    tokenizer = bundled.model.tokenizer
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_model_is_as_small_as_it_says(bundled: LatentService) -> None:
    assert f"A Qwen3 of {bundled.info()['parameters']:,} parameters" in (MODEL.parent / "README.md").read_text()
    assert json.loads((MODEL / "config.json").read_text())["head_dim"] % 32 == 0


def test_the_demo_prints_one_json_document() -> None:
    command = [sys.executable, "-m", "langchain_latentmas.cli", "demo", "--n", "5", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert (shown["model"]["name"], shown["questions"]) == ("bundled", 5)
    rows = [(score["arrangement"], score["mode"], score["questions"]) for score in shown["scores"]]
    assert rows == [(arrangement, mode, 5) for arrangement in TEAMS for mode in MODES]


def test_a_wrong_call_of_the_command_is_one_line_and_exit_code_2() -> None:
    command = [sys.executable, "-m", "langchain_latentmas.cli", "demo", "--model", "/no/such/folder", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["error"] == "ModelNotFound"
