"""The audit on the bundled model, from Python and from the command line."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.audit_power import BYSTANDER, placebo, placebo_examples, relay_examples, right
from langchain_latentmas import LatentService, audit
from langchain_latentmas.cli import app
from langchain_latentmas.commands.audit import _pairs
from langchain_latentmas.errors import InvalidRequest, SandboxUnavailable
from langchain_latentmas.evaluation import sandbox
from langchain_latentmas.evaluation.task import Relay
from langchain_latentmas.evaluation.worth import Audit

N = 24
SEEDS = range(4)


def test_on_the_relay_it_finds_the_content(bundled: LatentService) -> None:
    graph = Relay().graph(bundled, "sequential")
    for seed in SEEDS:
        report = audit(graph, relay_examples(N, seed), right, conditions=["swapped", "cut"], seed=seed)
        assert report.edges[0].has_content
        assert report.edges[0].outcomes["intact"].accuracy > 50
        assert report.edges[0].outcomes["swapped"].accuracy < 20
        assert report.edges[0].outcomes["cut"].accuracy < 20
        assert "content is worth" in report.verdict


def test_on_a_placebo_it_finds_none(bundled: LatentService) -> None:
    found = 0
    for seed in SEEDS:
        report = audit(
            placebo(bundled), placebo_examples(N, seed), right, edges=[BYSTANDER], conditions=["swapped"], seed=seed
        )
        found += report.edges[0].has_content
        assert report.edges[0].crossed == N
    assert found <= 1  # at 5 % it may happen, but hardly twice in four


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_the_command_prints_writes_draws_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["audit", "--task", "relay", "--n", "20", "--steps", "4", "--max-tokens", "16", "--out", str(tmp_path)]
    picture = tmp_path / "audit.svg"
    shown = run(*arguments, "--conditions", "swapped,cut", "--plot", str(picture))
    assert shown.exit_code == 0, shown.output
    for phrase in ("all edges", "intact", "swapped", "content: intact - swapped", "McNemar"):
        assert phrase in shown.output
    assert picture.read_text().startswith("<?xml")
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 3 * 20
    # A picture that cannot be drawn after all takes nothing away.
    with monkeypatch.context() as patch:
        patch.setattr(Audit, "plot", lambda *_: (_ for _ in ()).throw(InvalidRequest("no room")))
        shown = run(*arguments, "--conditions", "swapped,cut", "--plot", str(picture))
    assert shown.exit_code == 2
    assert "content: intact - swapped" in shown.output
    # The same again asks nothing; one condition more asks that one.
    again = run(*arguments, "--conditions", "swapped,cut,zeroed", "--json")
    assert again.exit_code == 0, again.output
    document = json.loads(again.stdout)
    assert document["task"] == "relay"
    assert list(document["conditions"]) == ["intact", "swapped", "zeroed", "cut"]
    assert (tmp_path / "answers.jsonl").read_text().splitlines()[: len(lines)] == lines
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1 + 4 * 20
    other = run(*arguments, "--seed", "1")
    assert other.exit_code == 2
    assert "another run" in other.output.replace("\n", " ")


def test_the_command_takes_a_graph_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from langchain_latentmas.evaluation.task import Relay\n"
        "from langchain_latentmas.service.shared import shared_service\n"
        "def graph():\n"
        "    return Relay().graph(shared_service(), 'sequential', steps=2, max_tokens=8)\n"
        "def is_right(state, answer):\n"
        "    return len(state['messages'][-1].text) % 2 == answer\n"
    )
    rows = [{"input": f"Nora has {i} coins. How many coins does Nora have?", "answer": i % 2} for i in range(20)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--examples", "rows.jsonl", "--conditions", "swapped", "--out", "out", "--json"]
    shown = run("audit", "mine:graph", *options, "--grader", "mine:is_right", "--edge", "refiner->judger")
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["edges"][0]["edge"] == "refiner->judger"


def test_an_edited_graph_is_asked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [{"input": f"Nora has {i} coins. How many coins does Nora have?", "answer": i} for i in range(20)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("edited_part.py").write_text("STEPS = 2\n")
    Path("edited.py").write_text(
        "from edited_part import STEPS\n"
        "from langchain_latentmas.evaluation.task import Relay\n"
        "from langchain_latentmas.service.shared import shared_service\n"
        "def graph():\n"
        "    return Relay().graph(shared_service(), 'sequential', steps=STEPS, max_tokens=8)\n"
    )

    def latent_steps(*more: str) -> Any:
        for name in ("edited", "edited_part"):
            sys.modules.pop(name, None)
        shown = run("audit", "edited:graph", "--examples", "rows.jsonl", "--conditions", "intact", "--json", *more)
        return json.loads(shown.stdout)

    first = latent_steps("--out", "out")
    assert first["edges"][0]["outcomes"]["intact"]["latent_steps"] == 6
    assert latent_steps("--out", "out") == first
    latent_steps()
    (result,) = Path("cache").rglob("audit.json")
    result.unlink()  # as if it had been interrupted
    Path("edited_part.py").write_text("STEPS = 0  # edited\n")
    assert "another run" in latent_steps("--out", "out")["message"]
    assert latent_steps()["edges"][0]["outcomes"]["intact"]["latent_steps"] == 0
    assert len(list(Path("cache").rglob("answers.jsonl"))) == 2


def test_what_a_grader_could_not_take_is_asked_again_and_the_other_answers_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("graded.py").write_text(
        "from pathlib import Path\n"
        "from langchain_latentmas.evaluation.task import Relay\n"
        "from langchain_latentmas.service.shared import shared_service\n"
        "def graph():\n"
        "    return Relay().graph(shared_service(), 'sequential', steps=1, max_tokens=4)\n"
        "def is_right(state, answer):\n"
        "    if answer == 3 and Path('away').exists():\n"
        "        raise ConnectionError('the judge is away')\n"
        "    return True\n"
    )
    rows = [{"input": f"Nora has {i} coins. How many coins does Nora have?", "answer": i} for i in range(20)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def audited() -> Any:
        options = ["--examples", "rows.jsonl", "--grader", "graded:is_right", "--conditions", "swapped", "--json"]
        return json.loads(run("audit", "graded:graph", *options).stdout)

    Path("away").touch()
    first = audited()
    assert "2 answers failed for want of a device, a server or a grader" in first["verdict"]
    (answers,) = Path("cache").rglob("answers.jsonl")
    written = answers.read_text()
    Path("away").unlink()
    assert audited()["conditions"] == {"intact": 100, "swapped": 100}
    assert answers.read_text().startswith(written)
    assert answers.read_text().count("\n") == written.count("\n") + 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Name a graph"),
        (["mine:graph"], "A graph needs --examples"),
        (["mine:graph", "--examples", "x.jsonl", "--model", "bundled"], "brings its own model"),
        (["--task", "relay", "--n", "10"], "at least 20 examples"),
        (["--task", "relay", "--seed", "-1"], "seed must be a whole number from 0 on"),
        (["--task", "relay", "--edge", "planner"], "planner->critic"),
        (["--task", "relay", "--edge", "planner->nobody"], "there is no agent"),
        (["--task", "relay", "--plot", "audit.pdf"], ".png or .svg"),
        (["--task", "relay", "--plot", f"{__file__}/audit.svg"], "cannot be written"),
        (["--task", "nothing"], "no task"),
        (["no_such_module:graph", "--examples", "x.jsonl"], "no_such_module"),
        (["mine", "--examples", "x.jsonl"], "'mine' is not of the form module:name"),
        (["a:graph", "--examples", "x.jsonl", "--steps", "3"], "brings its own agents; --steps is for a --task"),
        (["--task", "relay", "--examples", "x.jsonl"], "brings its own questions; --examples is for a graph"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    shown = run("audit", *arguments, "--out", str(tmp_path))
    assert shown.exit_code == 2
    assert words in " ".join(shown.output.split())


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the module `plain`, whose graph says what it was told to say, and asks no model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "plain", raising=False)
    (tmp_path / "plain.py").write_text(
        "from typing import TypedDict\n"
        "from langgraph.graph import START, StateGraph\n"
        "State = TypedDict('State', {'said': dict, 'answer': str, 'result': str, 'latents': list})\n"
        "graph = StateGraph(State).add_node('one', lambda state: state['said']).add_edge(START, 'one')\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("lines", "grader", "words"),
    [
        (None, "exact", "The examples cannot be read"),
        ('{"input": "1 + 1?"}', "exact", 'example 1: a line has "input" and "answer" (KeyError: \'answer\')'),
        ('{"input": "1 + 1?", "answer": 2}', "taste", "There is no grader 'taste'; take one of number, letter, exact"),
        ('{"input": "1 + 1?", "answer": 2}', "plain:__name__", "plain:__name__ is no function"),
    ],
)
def test_examples_and_graders_of_no_use_are_told_before_any_work(
    plain: Path, lines: str | None, grader: str, words: str
) -> None:
    if lines is not None:
        (plain / "rows.jsonl").write_text(lines)
    shown = run("audit", "plain:graph", "--examples", "rows.jsonl", "--grader", grader, "--out", "out")
    assert shown.exit_code == 2
    assert words in " ".join(shown.output.split())


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"result": "2"}, "InvalidRequest: the state has neither messages nor answer; give --grader module:function."),
        ({"answer": "2"}, "EdgeNotCrossed"),  # so it was graded
    ],
)
def test_a_state_without_an_answer_takes_a_grader_of_ones_own(plain: Path, said: dict[str, str], words: str) -> None:
    rows = [{"input": {"said": said, "latents": [], "result": str(i)}, "answer": i} for i in range(20)]
    (plain / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shown = run("audit", "plain:graph", "--examples", "rows.jsonl", "--grader", "exact", "--out", "out")
    assert shown.exit_code == 2
    assert words in " ".join(shown.output.split())


def test_programs_that_cannot_be_run_here_are_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable() -> None:
        raise SandboxUnavailable("not here")

    monkeypatch.setattr(sandbox, "missing", unavailable)
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"question": "Double it.", "entry_point": "f", "test": "assert f(2) == 4"}))
    shown = run("audit", "--task", str(path), "--grader", "code", "--model", "/no/such/model")
    assert "SandboxUnavailable: not here" in shown.output


def test_thoughts_take_no_seed_below_0(tmp_path: Path) -> None:
    shown = run("picture", "thoughts", str(tmp_path / "a.svg"), "--seed", "-1", "--model", "/no/such/model")
    assert shown.exit_code == 2
    assert "--seed" in shown.output


def test_a_model_of_the_environment_is_for_agents_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTMAS_SERVICE", "a-model")
    shown = run("audit", "no_such_module:graph", "--examples", "x.jsonl")
    assert "There is no no_such_module:graph" in " ".join(shown.output.split())


@pytest.mark.parametrize("n", [-1, 0, 3])
def test_so_many_examples_are_refused(tmp_path: Path, n: int) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(2 * (json.dumps({"input": "1 + 1?", "answer": 2}) + "\n"))
    with pytest.raises(InvalidRequest, match="--n must lie between 1 and the 2 examples"):
        _pairs(path, n, 0)


def test_fewer_examples_are_drawn_by_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"input": "?", "answer": i}) + "\n" for i in range(40)))
    drawn = [[answer for _, answer in _pairs(path, 10, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] == sorted(drawn[0]) != drawn[2]
    assert [answer for _, answer in _pairs(path, None, 1)] == [*range(40)]


@pytest.mark.parametrize(
    "command", [["lens", "What?", "--html"], ["demo", "--svg"], ["picture", "steps"], ["picture", "thoughts"]]
)
def test_a_file_that_cannot_be_written_is_told_of_before_the_work(command: list[str]) -> None:
    shown = run(*command, f"{__file__}/page.svg", "--model", "/no/such/model")
    assert shown.exit_code == 2
    assert "cannot be written" in " ".join(shown.output.split())


def test_the_lens_is_a_table_and_a_page(tmp_path: Path) -> None:
    page = tmp_path / "lens.html"
    shown = run("lens", "Nora has 12 coins. She finds <b>5</b> more coins.", "--steps", "3", "--html", str(page))
    assert shown.exit_code == 0, shown.output
    for phrase in ("planner", "critic", "refiner", "answer"):
        assert phrase in shown.output
    assert "&lt;b&gt;5&lt;/b&gt;" in page.read_text()


def test_pictures_come_from_one_command_each(tmp_path: Path) -> None:
    steps, thoughts, bars, own = (tmp_path / name for name in ("steps.svg", "thoughts.svg", "bars.svg", "own.jsonl"))
    few = ["--n", "4", "--arrangements", "sequential"]
    shown = run("picture", "steps", str(steps), *few, "--at", "0,3", "--no-text")
    assert shown.exit_code == 0, shown.output
    shown = run("picture", "thoughts", str(thoughts), "--n", "4", "--steps", "3")
    assert shown.exit_code == 0, shown.output
    assert "coverage" in shown.output
    own.write_text("".join(json.dumps({"question": f"Is it {i}?", "answer": "yes"}) + "\n" for i in range(3)))
    for command in (["steps", str(steps), "--at", "0", "--no-text"], ["thoughts", str(thoughts), "--steps", "1"]):
        shown = run("picture", *command, "--task", str(own), "--grader", "exact", "--json")
        assert shown.exit_code == 0, shown.output
        assert json.loads(shown.stdout)["n"] == 3
    evaluated = run("eval", "--task", "relay", *few, "--steps", "3", "--modes", "text,latent", "--out", str(tmp_path))
    assert evaluated.exit_code == 0, evaluated.output
    shown = run("picture", "bars", str(bars), "--summary", str(tmp_path / "summary.json"))
    assert shown.exit_code == 0, shown.output
    assert all(path.read_text().startswith("<?xml") for path in (steps, thoughts, bars))
    wrong = run("picture", "bars", str(bars), "--summary", str(bars))
    assert wrong.exit_code == 2
