"""What the command line says before it loads anything, and how it loads."""

import gc
import html
import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from langchain_latentmas import LatentService, __version__
from langchain_latentmas.bundled import EXPERTS, SEQUENTIAL
from langchain_latentmas.cli import app
from langchain_latentmas.commands.demo import MODES
from langchain_latentmas.commands.options import named
from langchain_latentmas.commands.picture import _ready
from langchain_latentmas.commands.session import load, settled
from langchain_latentmas.commands.terminal import lens_strip, printable
from langchain_latentmas.errors import InvalidRequest
from langchain_latentmas.service.identity import key_file
from langchain_latentmas.service.serving import ServeSettings

from ..conftest import Fresh

Called = Callable[..., str]


@pytest.fixture
def called(fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch) -> Called:
    """What a command prints on a small model that was trained to nothing."""
    monkeypatch.delenv("COLUMNS", raising=False)

    def call(command: str, *arguments: str) -> str:
        monkeypatch.setattr(f"langchain_latentmas.commands.{command}.load", lambda *_: fresh_service())
        result = CliRunner().invoke(app, [command, *arguments, "--model", "another"])
        assert result.exit_code == 0, result.output
        return result.stdout

    return call


def squeezed(text: str) -> str:
    """Without the blanks, however lines were broken."""
    return "".join(text.split())


def test_the_help_and_the_tasks_need_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import langchain_latentmas.bundled.tasks\n"
        "from langchain_latentmas.cli import app; app(['--help'])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "pass latent memory instead of text" in shown.stdout


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


@pytest.mark.parametrize("option", ["kv_budget", "=4GiB"])
@pytest.mark.parametrize("command", [["ask", "1 + 1?"], ["serve"], ["picture", "thoughts", "a.svg"]])
def test_an_option_that_reads_otherwise_is_told_in_a_line(
    command: list[str], option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*command, "--option", option])
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert line.startswith(f"InvalidRequest: --option {option!r} should read NAME=VALUE")


def test_as_json_an_error_is_json_too() -> None:
    result = CliRunner().invoke(app, ["ask", "1 + 1?", "--json", "--option", "kv_budget"])
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"] == "InvalidRequest"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ask", " "], "The question is empty"),
        (["lens", "\n"], "The question is empty"),
        (["picture", "steps", "a.svg", "--at", "1,x"], "--at takes whole numbers with commas between them, not '1,x'"),
        (["picture", "steps", "a.svg", "--at", "-1"], "Latent steps are 0 or more, not -1"),
        (["picture", "steps", "a.svg", "--task", "words", "--grader", "exact"], "'words' has a grader of its own"),
        (["picture", "thoughts", "a.svg", "--task", "no.jsonl"], "no.jsonl cannot be read"),
        (["picture", "thoughts", "a.svg", "--task", "no.jsonl", "--grader", "taste"], "There is no grader 'taste'"),
        (["audit", "--task", "words", "--each", "--edge", "planner->critic"], "by themselves anyway; leave --each out"),
    ],
)
def test_what_cannot_be_asked_is_told_before_a_model_is_loaded(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*arguments, "--model", "/no/such/model"])
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


@pytest.mark.parametrize(("there", "given", "taken"), [(30, None, 30), (120, None, 100), (120, 7, 7)])
def test_a_picture_takes_as_many_questions_as_there_are_up_to_a_limit(
    there: int, given: int | None, taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langchain_latentmas.commands.picture.load", lambda *_: nullcontext())
    rows = tmp_path / "own.jsonl"
    rows.write_text("".join(f'{{"question": "Is it {i}?", "answer": "yes"}}\n' for i in range(there)))
    with _ready(tmp_path / "a.svg", str(rows), "exact", given, 100, 0, "bundled", None, True) as (asked, n, _):
        assert (asked.name, n) == ("own", taken)


@pytest.mark.parametrize(("command", "most"), [("steps", 100), ("thoughts", 40)])
def test_the_help_of_pictures_says_how_many_questions_they_take(
    command: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert f"as many as there are, up to {most}." in CliRunner().invoke(app, ["picture", command, "--help"]).stdout


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


def test_an_error_names_the_environment_where_its_option_came_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTMAS_OPTIONS", '{"patience": 5, "speak_tag": "!"}')
    result = CliRunner().invoke(app, ["ask", "1 + 1?"])
    assert "InvalidRequest: LATENTMAS_OPTIONS: Setting patience: Extra inputs" in result.stderr
    monkeypatch.setenv("LATENTMAS_OPTIONS", '{"speak_tag": "!", "merge": "rotate"}')
    for option in ("kv_buget=1", "merge=never"):
        result = CliRunner().invoke(app, ["ask", "1 + 1?", "--option", option])
        assert f"InvalidRequest: Setting {option.partition('=')[0]}: " in result.stderr


def test_an_unknown_option_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTMAS_DEVICE", "cpu")
    result = CliRunner().invoke(app, ["ask", "1 + 1?", "--option", "kv_buget=1"])
    assert result.exit_code == 2
    assert "InvalidRequest" in result.stderr
    assert "kv_buget" in result.stderr


def test_serve_takes_bytes_with_a_unit_from_flag_environment_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, taken = tmp_path / "latentmas.toml", []

    def refuse(settings: ServeSettings) -> None:
        taken.append(settings)
        raise InvalidRequest("That was enough.")

    monkeypatch.setattr("langchain_latentmas.commands.serve._service", refuse)
    monkeypatch.setenv("LATENTMAS_MAX_HEADERS", "64 KiB")
    file.write_text('max_memory = "2GiB"\n')
    result = CliRunner().invoke(app, ["serve", "--config", str(file), "--max-body", "2MiB"])
    assert "That was enough." in result.output
    [settings] = taken
    assert (settings.max_body, settings.max_headers, settings.max_memory) == (2 << 20, 64 << 10, 2 << 30)
    assert ServeSettings.gather(None, {"max_body": "4096"}).max_body == 4096


@pytest.mark.parametrize(("name", "given"), [("max_body", "1000"), ("max_headers", 1000), ("max_memory", -1)])
def test_bytes_out_of_range_are_refused(name: str, given: str | int) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name}: Input should be greater than or equal to"):
        ServeSettings.gather(None, {name: given})


def test_a_key_is_rotated_in_the_store_of_the_file_and_without_the_extra_of_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)  # as if it were not installed
    assert "MissingExtra" in CliRunner().invoke(app, ["serve"]).output
    before = {name: key_file(tmp_path / name / "key") for name in ("told", "filed")}
    file = tmp_path / "latentmas.toml"
    file.write_text(f'store = "{tmp_path / "filed"}"\n')
    monkeypatch.setenv("LATENTMAS_CONFIG", str(file))
    for name, more in (("filed", []), ("told", ["--store", str(tmp_path / "told")])):
        result = CliRunner().invoke(app, ["rotate-key", *more])
        assert result.exit_code == 0, result.output
        assert key_file(tmp_path / name / "key") != before.pop(name)
        assert all(key_file(tmp_path / other / "key") == key for other, key in before.items())


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


@pytest.mark.parametrize(
    ("arrangement", "edges", "steps"),
    [("sequential", "latent", 3), ("hierarchical", "latent", 0), ("sequential", "text", 3)],
)
def test_ask_shows_what_every_agent_thought_or_said(called: Called, arrangement: str, edges: str, steps: int) -> None:
    asked = ["ask", "Name three rivers.", "--arrangement", arrangement, "--edges", edges]
    asked += ["--steps", str(steps), "--max-tokens", "4"]
    told, shown = json.loads(called(*asked, "--json")), squeezed(called(*asked))
    thinkers = SEQUENTIAL if arrangement == "sequential" else EXPERTS
    assert [turn["agent"] for turn in told["agents"]] == [*thinkers, "judger"]
    assert [turn["text"] is None for turn in told["agents"]] == [edges == "latent"] * 3 + [False]
    for turn in told["agents"]:
        content = lens_strip(turn["lens"]).plain or "no latent steps: its prompt's KV alone"
        content = content if turn["text"] is None else printable(turn["text"])
        assert squeezed(f"{turn['agent']} {content}") in shown
    tokens, thought = sum(turn["output_tokens"] for turn in told["agents"]), 3 * steps if edges == "latent" else 0
    assert squeezed(f"{arrangement}, {edges} edges") in shown
    assert squeezed(f"{tokens} tokens decoded, {thought} latent steps") in shown
    assert told.pop("seconds") > 0
    assert told.pop("model")["name"]
    assert told | {"agents": []} == {
        "question": "Name three rivers.",
        "arrangement": arrangement,
        "edges": edges,
        "answer": told["agents"][-1]["text"],
        "agents": [],
        "output_tokens": tokens,
        "latent_steps": thought,
        "latent_steps_read": thought,
    }


def test_demo_prints_its_scores_and_draws_what_it_prints(called: Called, tmp_path: Path) -> None:
    asked, drawn = ["demo", "--n", "2", "--steps", "3", "--max-tokens", "4"], tmp_path / "new" / "demo.svg"
    told, shown = json.loads(called(*asked, "--json")), called(*asked, "--svg", str(drawn))
    lines = [line.split() for line in shown.splitlines()]
    assert [(score["arrangement"], score["mode"]) for score in told["scores"]] == [
        (arrangement, mode) for arrangement in ("sequential", "hierarchical") for mode in MODES
    ]
    for score in told["scores"]:
        steps = 9 if score["mode"] == "latent" else 0  # with its edge cut, the judger reads none of them
        row = f"{MODES[score['mode']]} {score['right']} of 2 {score['output_tokens']:.1f} {steps}".split()
        assert row in [line[: len(row)] for line in lines]
    ratios = [line[3] for line in lines if line[:3] == ["text", "/", "latent"]]
    assert ratios == [f"{ratio['output_tokens']:.1f}×" for ratio in told["ratios"].values()]
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawn.read_text())
    assert squeezed(html.unescape("".join(texts))) == squeezed(f"latentmas demo {shown}")
