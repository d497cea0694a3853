import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from langchain_latentmas.cli import app

LATENTMAS = [sys.executable, "-m", "langchain_latentmas.cli", "eval"]
SMALL = ["--task", "relay", "--n", "12", "--steps", "6", "--max-tokens", "24", "--batch", "4"]


class Run(NamedTuple):
    """What a run printed, and where it wrote what it was not told to write elsewhere."""

    document: dict[str, Any]
    cache: Path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`SMALL` from its beginning to its end."""
    cache = tmp_path_factory.mktemp("cache")
    return Run(processed(*SMALL, XDG_CACHE_HOME=str(cache)), cache)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def call(*args: str) -> Any:
    """The command in this process."""
    return CliRunner().invoke(app, ["eval", *args])


def document(*args: str) -> dict[str, Any]:
    done = call(*args, "--json")
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


def processed(*args: str, **environment: str) -> dict[str, Any]:
    """What the command prints in a process of its own."""
    command = [*LATENTMAS, *args, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout))


def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_one_json_document(whole: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = whole.document
    assert (made["task"], made["n"]) == ("relay", 12)
    assert [(row["mode"], row["arrangement"]) for row in made["rows"]] == [
        ("single", "single"),
        ("text", "sequential"),
        ("latent", "sequential"),
        ("text", "hierarchical"),
        ("latent", "hierarchical"),
    ]
    for row in made["rows"]:
        assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 100
        assert row["output_tokens"] > 0
        assert row["seconds"] > 0
        assert row["latent_steps"] == (18 if row["mode"] == "latent" else 0)
    assert made["model"]["name"] == "bundled"
    assert made["settings"]["seed"] == 0
    assert made["sessions"][0]["packages"]["torch"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(whole.cache))
    again = document(*SMALL)
    assert len(again["sessions"]) == 1  # it measures anew
    assert [row["seconds"] for row in again["rows"]] != [row["seconds"] for row in made["rows"]]
    assert len(list(whole.cache.rglob("*.jsonl"))) == 1


def test_the_table(tmp_path: Path) -> None:
    done = call("--task", "words", "--n", "3", "--steps", "2", "--max-tokens", "16", "--out", str(tmp_path / "run"))
    assert done.exit_code == 0, done.output
    for shown in ("single agent", "sequential", "hierarchical", "text / latent", "seed 0", "torch", "answers.jsonl"):
        assert shown in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["n"], summary["model"]["name"]) == (3, "bundled")


@pytest.mark.parametrize("ended", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_goes_on_and_gives_the_same_summary(
    whole: Run, tmp_path: Path, ended: signal.Signals
) -> None:
    answers = tmp_path / "run" / "answers.jsonl"
    command = [*LATENTMAS, *SMALL, "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not answers.exists() or answers.read_text().count("\n") < 20:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(ended)
        process.wait(60)
        if ended == signal.SIGINT:
            assert process.returncode == 130
            assert process.stderr is not None
            said = process.stderr.read()
            assert "the same command goes on" in said
            assert "Warning" not in said
    kept = answers.read_text().count('"right"')
    assert 18 <= kept < 60
    resumed = processed(*SMALL, "--out", str(tmp_path / "run"))
    assert plain(resumed["rows"]) == plain(whole.document["rows"])
    assert len(resumed["sessions"]) == 2
    lines = [line for line in map(json.loads, answers.read_text().splitlines()) if "right" in line]
    graded = Counter((line["mode"], line["arrangement"], line["id"]) for line in lines if not line["error"])
    assert (len(graded), graded.total()) == (60, 60)
    # Only what an interrupt took from the grader is there twice, and was not asked again.
    waited = {(line["id"], line["text"], line["seconds"]) for line in lines if line["error"]}
    assert waited <= {(line["id"], line["text"], line["seconds"]) for line in lines if not line["error"]}
    refused = call(*SMALL, "--seed", "1", "--out", str(tmp_path / "run"), "--json")
    assert refused.exit_code == 2
    assert json.loads(refused.stdout)["error"] == "InvalidRequest"
    assert "seed was 0, is 1" in json.loads(refused.stdout)["message"]


def test_an_own_file(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": i + 1}) + "\n" for i in range(3)))
    made = document("--task", str(path), "--grader", "number", "--steps", "1", "--max-tokens", "4", "--modes", "single")
    assert (made["task"], made["n"]) == ("sums", 3)


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["--task", "nothing"], "InvalidRequest"),
        (["--task", "/no/such.jsonl"], "DatasetNotFound"),
        (["--task", "words", "--modes", "aloud"], "InvalidRequest"),
        (["--task", "words", "--model", "/no/such/folder"], "ModelNotFound"),
        (["--task", "words", "--grader", "number"], "InvalidRequest"),
    ],
)
def test_wrong_calls_end_with_one_line(args: list[str], error: str) -> None:
    done = call(*args, "--json")
    assert done.exit_code == 2
    assert json.loads(done.stdout)["error"] == error


def test_two_runs_at_once_keep_out_of_each_others_way(tmp_path: Path, cache: Path) -> None:
    command = [*LATENTMAS, *SMALL, "--modes", "latent", "--json"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as one,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other,
    ):
        made = [json.loads(process.communicate(timeout=240)[0]) for process in (one, other)]
    assert plain(made[0]["rows"]) == plain(made[1]["rows"])
    with FileLock(tmp_path / ".lock"):
        refused = call(*SMALL, "--out", str(tmp_path), "--json")
    assert "Another run is at work" in json.loads(refused.stdout)["message"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX")
def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    done = call("--task", "words", "--n", "1", "--json")
    assert done.exit_code == 2
    assert "--out" in json.loads(done.stdout)["message"]
