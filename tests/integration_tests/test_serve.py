"""A real server process, and graphs that run against it as they run in process."""

import inspect
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from typer.testing import CliRunner

from langchain_latentmas import ChatLatentMAS, LatentService, teams
from langchain_latentmas.cli import app
from langchain_latentmas.commands.serve import serve
from langchain_latentmas.errors import InvalidRequest, ServiceUnreachable, TamperedReference
from langchain_latentmas.service.identity import key_file
from langchain_latentmas.service.serving import ServeSettings
from langchain_latentmas.service.shared import shared_service
from tests.served import TOKEN, Process, certificate, client, port_of
from tests.support import say, wait_for

QUESTION = "Tom has 12 apples and buys 30 more. How many apples does Tom have?"
AGENTS = {"planner": "You are a planner. Plan the steps.", "critic": "You are a critic. Check the plan."}
ASKED: dict[str, Any] = {"messages": [HumanMessage(QUESTION)], "latents": []}


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with Process("--store", str(tmp_path_factory.mktemp("store"))) as process:
        yield process


@pytest.fixture(scope="module")
def remote(process: Process) -> Iterator[LatentService]:
    with client(process) as service:
        yield service


def refs_of(state: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**ref, "mac": ""} for ref in state["latents"]]


@pytest.mark.parametrize("arrangement", ["sequential", "hierarchical"])
async def test_teams_say_the_same_to_the_token(remote: LatentService, bundled: LatentService, arrangement: str) -> None:
    here, there = (
        teams.ARRANGEMENTS[arrangement](service, agents=AGENTS, steps=6, max_tokens=16).compile()
        for service in (bundled, remote)
    )
    expected = here.invoke(ASKED)
    said = there.invoke(ASKED)
    assert said["messages"][-1].content == expected["messages"][-1].content
    assert said["messages"][-1].usage_metadata == expected["messages"][-1].usage_metadata
    assert refs_of(said) == refs_of(expected)
    again = (await there.abatch([ASKED]))[0]
    assert refs_of(again) == refs_of(expected)


def test_progress_and_tokens_are_streamed(remote: LatentService) -> None:
    graph = teams.sequential(remote, steps=3, max_tokens=8).compile()
    events = list(
        graph.stream({**ASKED, "messages": [HumanMessage(QUESTION + " Go.")]}, stream_mode=["custom", "messages"])
    )
    steps = [event["step"] for kind, event in events if kind == "custom"]
    assert steps[:3] == [1, 2, 3]
    assert sum(kind == "messages" for kind, _ in events) > 1


def test_the_environment_names_the_server(
    process: Process, bundled: LatentService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTMAS_SERVICE", process.address)
    assert shared_service() is shared_service(process.address)
    said = ChatLatentMAS(max_tokens=6).invoke(QUESTION)
    assert said.content == say(bundled, QUESTION, max_tokens=6).text


def test_a_graph_goes_on_when_the_server_is_killed_and_started_again(tmp_path: Path, bundled: LatentService) -> None:
    expected = say(bundled, "Count.", max_tokens=30, temperature=1, seed=3)
    with Process("--store", str(tmp_path)) as first, client(first, patience=120) as remote:
        ref = remote.think(QUESTION, steps=4)
        spoken = remote.speak("Count.", max_tokens=30, temperature=1, seed=3)
        chunks = [next(spoken)]
        first.ended(signal.SIGKILL)
        with ThreadPoolExecutor(1) as threads:
            rest = threads.submit(lambda: list(spoken))
            with Process("--store", str(tmp_path), port=port_of(first.address)):
                chunks += rest.result(120)
                assert tuple(token for chunk in chunks for token in chunk.token_ids) == expected.token_ids
                assert remote.memory(ref).positions == ref["positions"]
                assert remote.think(QUESTION, steps=4) == ref


def test_https(tmp_path: Path, bundled: LatentService) -> None:
    files = certificate(tmp_path)
    flags = ("--certificate", str(files["certificate"]), "--certificate-key", str(files["certificate_key"]))
    with Process("--store", str(tmp_path / "store"), *flags) as process:
        assert process.address.startswith("https://")
        with client(process, ca=files["certificate"], read_timeout=20, patience=0) as remote:
            ref = remote.think(QUESTION, steps=3)
            expected = say(bundled, "Count.", [bundled.think(QUESTION, steps=3)], max_tokens=8)
            assert say(remote, "Count.", [ref], max_tokens=8).token_ids == expected.token_ids
            assert remote.memory(ref).positions == ref["positions"]
        with pytest.raises(ServiceUnreachable, match="CERTIFICATE_VERIFY_FAILED"):
            client(process, patience=0)


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_work_end_and_exits_cleanly(tmp_path: Path, asked: signal.Signals) -> None:
    with Process("--store", str(tmp_path), "--drain", "300") as process, client(process, patience=0) as remote:
        # Thinking takes all of its steps, while a text may end at once.
        stop = lambda step: process.process.send_signal(asked) if step == 1 else None  # noqa: E731
        ref = remote.think("Count.", steps=1500, on_step=stop)
        assert ref["steps"] == 1500
        assert process.process.wait(300) == 0
        wait_for(lambda: process.log[-1]["message"] == "ended")
        assert [line["message"] for line in process.log[-3:-1]] == ["draining", "POST /v1/think"]


def test_settings_come_from_flag_environment_and_file(tmp_path: Path) -> None:
    file = tmp_path / "latentmas.toml"
    file.write_text(
        f'store = "{tmp_path / "store"}"\ndeadline = 11\ndrain = 1\nmax_body = 5000\n'
        '[tokens]\nanne = "the token of anne, long enough"\nbert = "the token of bert, long enough"\n'
    )
    flags = ("--config", str(file), "--deadline", "33", "--option", "max_rows=3", "--option", "merge=rebuild")
    with Process(*flags, LATENTMAS_MAX_BODY="6000", LATENTMAS_DEADLINE="22") as process:
        anne, bert = (client(process, token=f"the token of {name}, long enough") for name in ("anne", "bert"))
        info = anne.info()
        assert info["limits"] == {"deadline": 33, "keep_alive": 5, "max_body": 6000, "max_memory": 1 << 30}
        assert info["merge"] == "rebuild"
        ref = anne.think(QUESTION, steps=1)
        with pytest.raises(TamperedReference):
            bert.think("And?", [ref])
        assert bert.references() == []
        for each in (anne, bert):
            each.close()
    assert "token" not in str(process.log)


@pytest.mark.parametrize(
    ("flags", "environment", "why"),
    [
        (["--host", "0.0.0.0"], {}, "needs a token"),
        (["--port", "70000"], {}, "port"),
        (["--option", "nonsense=1"], {}, "nonsense"),
        (["--config", "/nowhere.toml"], {}, "no file"),
        ([], {"LATENTMAS_TOKEN": "short"}, "at least 16"),
        ([], {"LATENTMAS_TOKEN": "neither short nor\nin one line"}, "printable ASCII"),
        ([], {"LATENTMAS_TOKENS": "{"}, "cannot be read"),
        ([], {"LATENTMAS_TOKENS": '{"a": "one token for two", "b": "one token for two"}'}, "same token"),
        ([], {"LATENTMAS_TOKENS": '{"": "a token of nobody at all"}'}, "needs a name"),
        (["--max-memory", "2 apples"], {}, "max_memory: could not interpret byte unit"),
        (["--certificate", "/nowhere.pem"], {}, "needs both certificate and certificate_key"),
        (["--certificate", "/nowhere.pem", "--certificate-key", "/nowhere.pem"], {}, "certificate /nowhere.pem"),
        (["--model", "/nowhere"], {}, "nowhere"),
        (["--host", "192.0.2.1", "--model", "/nowhere"], {"LATENTMAS_TOKEN": TOKEN}, "cannot be listened on"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(
    flags: list[str],
    environment: dict[str, str],
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["serve", "--store", str(tmp_path), "--port", "0", *flags])
    assert result.exit_code == 2
    assert why in result.output.replace("\n", " ")


def test_every_setting_but_tokens_has_a_flag() -> None:
    flags = set(inspect.signature(serve).parameters) - {"config", "option"}
    assert flags == set(ServeSettings.model_fields) - {"token", "tokens", "options"}


def test_a_key_is_rotated_from_the_command_line(tmp_path: Path) -> None:
    key_file(tmp_path / "key")
    result = CliRunner().invoke(app, ["rotate-key", "--store", str(tmp_path), "--keep-days", "2"])
    assert result.exit_code == 0
    assert "2 days" in result.output
    assert CliRunner().invoke(app, ["rotate-key", "--store", str(tmp_path / "none")]).exit_code == 2


def test_a_server_that_runs_takes_the_fresh_key(tmp_path: Path) -> None:
    def rotated(days: str) -> None:
        assert CliRunner().invoke(app, ["rotate-key", "--store", str(tmp_path), "--keep-days", days]).exit_code == 0

    with Process("--store", str(tmp_path)) as process, client(process) as remote:
        old = remote.think(QUESTION, steps=1)
        rotated("2")
        wait_for(lambda: remote.think(QUESTION, steps=1)["mac"] != old["mac"])
        new = remote.think(QUESTION, steps=1)
        assert new["id"] == old["id"]
        child = remote.think("And then?", [old], steps=1)  # the old one is still read
        rotated("0")
        wait_for(lambda: remote.think(QUESTION, steps=1)["mac"] != new["mac"])
        for refused in (new, child):
            with pytest.raises(TamperedReference):
                remote.think("And then?", [refused], steps=1)
        assert remote.think("And then?", [old], steps=1)["id"] == child["id"]  # its two days are not over


def test_a_client_says_what_it_cannot_do(remote: LatentService) -> None:
    with pytest.raises(InvalidRequest, match="in this process"):
        remote.altered(remote.think(QUESTION, steps=1), "zeroed")
