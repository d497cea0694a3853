"""What the command line says before it loads anything, and how it loads."""

import gc
from typing import Any

import pytest
from typer.testing import CliRunner

from langchain_latentmas import LatentService, __version__
from langchain_latentmas.cli import app
from langchain_latentmas.commands.options import named
from langchain_latentmas.commands.session import load, settled
from langchain_latentmas.service.serving import ServeSettings

from ..conftest import Fresh


def test_the_version_is_that_of_the_package() -> None:
    lines = CliRunner().invoke(app, ["--version"]).stdout.splitlines()
    assert lines[0] == f"langchain-latentmas {__version__}"
    assert any(line.startswith("torch ") for line in lines)


@pytest.mark.parametrize("name", ["host", "port", "max_running", "max_waiting", "max_connections", "max_depth"])
def test_the_help_of_serve_shows_the_defaults(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    [line] = [
        line
        for line in CliRunner().invoke(app, ["serve", "--help"]).stdout.splitlines()
        if f"--{name.replace('_', '-')} " in line
    ]
    assert str(ServeSettings.model_fields[name].default) in line


def test_options_are_json_or_words() -> None:
    given = ["kv_budget=4GiB", "max_rows=8", 'speak_tag="<think>\\n"', 'template_args={"a": false}', "think_tag="]
    assert named(given) == {
        "kv_budget": "4GiB",
        "max_rows": 8,
        "speak_tag": "<think>\n",
        "template_args": {"a": False},
        "think_tag": "",
    }
    result = CliRunner().invoke(app, ["ask", "1 + 1?", "--option", "kv_budget"])
    assert result.exit_code == 2
    assert "NAME=VALUE" in result.output


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("bundled", {"device": "cuda", "dtype": "auto", "store": None, "max_rows": 4, "speak_tag": "!"}),
        ("vllm:bundled", {"store": None, "max_rows": 4, "speak_tag": "!"}),
        ("vllm+http://there", {"store": None, "max_rows": 4, "speak_tag": "!"}),
        ("http://there", {"speak_tag": "!"}),
    ],
)
def test_commands_load_with_the_environment_and_their_options(
    monkeypatch: pytest.MonkeyPatch, model: str, settings: dict[str, Any]
) -> None:
    loaded: list[dict[str, Any]] = []
    monkeypatch.setenv("LATENTMAS_DEVICE", "cuda")
    monkeypatch.setenv("LATENTMAS_STORE", "a folder that answers with thoughts of earlier runs")
    monkeypatch.setenv("LATENTMAS_OPTIONS", '{"max_rows": 4, "speak_tag": "?"}')
    monkeypatch.setattr(LatentService, "load", lambda _, **settings: loaded.append(settings))
    load(model, ["speak_tag=!"])
    assert loaded == [settings]


def test_an_environment_that_is_no_json_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTMAS_OPTIONS", "{speak_tag}")
    result = CliRunner().invoke(app, ["ask", "1 + 1?"])
    assert result.exit_code == 2
    assert "InvalidRequest" in result.stderr


def test_an_unknown_option_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTMAS_DEVICE", "cpu")
    result = CliRunner().invoke(app, ["ask", "1 + 1?", "--option", "kv_buget=1"])
    assert result.exit_code == 2
    assert "InvalidRequest" in result.stderr
    assert "kv_buget" in result.stderr


def test_no_collection_looks_through_what_was_there_when_a_command_began() -> None:
    with settled():
        assert gc.get_freeze_count() > 10_000
    assert gc.get_freeze_count() == 0


def test_another_model_is_told_by_lens_what_it_is_told_by_ask(
    monkeypatch: pytest.MonkeyPatch, fresh_service: Fresh
) -> None:
    told = {}
    for command in ("ask", "lens"):
        service, prompts = fresh_service(dtype="float32"), []
        encode = service.encode
        monkeypatch.setattr(service, "encode", lambda *a, of=encode, to=prompts: (to.append(of(*a)), to[-1])[1])
        monkeypatch.setattr(f"langchain_latentmas.commands.{command}.load", lambda *_, made=service: made)
        asked = [command, "Name three rivers.", "--model", "another", "--steps", "1", "--max-tokens", "1", "--json"]
        result = CliRunner().invoke(app, asked)
        assert result.exit_code == 0, result.output
        told[command] = prompts
    assert len(told["ask"]) == 4
    assert told["lens"] == told["ask"]
