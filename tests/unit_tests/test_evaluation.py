import errno
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from langgraph.graph import END
from rich.console import Console

from langchain_latentmas.commands.evaluate import picture
from langchain_latentmas.errors import (
    EngineFailed,
    GraderFailed,
    InvalidRequest,
    SandboxUnavailable,
    ServiceUnreachable,
)
from langchain_latentmas.evaluation import sandbox
from langchain_latentmas.evaluation.benchmarks import Published, task_named
from langchain_latentmas.evaluation.journal import MENDED, Journal, is_mended
from langchain_latentmas.evaluation.run import Answer, Comparison, Evaluation, Row, Summary, _compare
from langchain_latentmas.evaluation.task import Question, Split, Words
from langchain_latentmas.service.local import LocalService

CELLS = [
    ("single", "single"),
    ("text", "sequential"),
    ("latent", "sequential"),
    ("text", "hierarchical"),
    ("latent", "hierarchical"),
]
QUICK: dict[str, Any] = {"n": 4, "steps": 3, "max_tokens": 12}


@pytest.fixture
def fresh(bundled: LocalService) -> Iterator[LocalService]:
    """A service of the bundled model that has no thoughts yet."""
    with LocalService(bundled.model, bundled.settings) as service:
        yield service


@pytest.fixture(scope="module")
def of_one(bundled: LocalService, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The answers of an agent alone; nobody may change the file."""
    path = tmp_path_factory.mktemp("of_one") / "answers.jsonl"
    Evaluation(bundled, Words(), modes=["single"], **QUICK).run(path)
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def plain(summary: Summary) -> list[dict[str, Any]]:
    """Rows without what a clock says."""
    return [{**asdict(row), "seconds": None} for row in summary.rows]


def test_every_answer_of_every_cell_is_kept(fresh: LocalService, tmp_path: Path) -> None:
    path = tmp_path / "run" / "answers.jsonl"
    seen: list[tuple[Any, ...]] = []
    evaluation = Evaluation(fresh, Words(), **QUICK)
    summary = evaluation.run(path, lambda *progress: seen.append(progress))
    head, session, *answers = lines(path)
    assert head["task"] == "words"
    assert session["session"]["packages"]["torch"]
    assert [(line["mode"], line["arrangement"]) for line in answers] == [cell for cell in CELLS for _ in range(4)]
    assert [(row.mode, row.arrangement) for row in summary.rows] == CELLS
    assert seen == [(*cell, done, 4) for cell in CELLS for done in range(5)]
    for row in summary.rows:
        own = [line for line in answers if (line["mode"], line["arrangement"]) == (row.mode, row.arrangement)]
        assert {line["id"] for line in own} == {question.id for question in evaluation.questions}
        assert row.accuracy == 25 * sum(line["right"] for line in own)
        assert row.low <= row.accuracy <= row.high
        assert row.output_tokens == sum(line["output_tokens"] for line in own) / 4
        assert row.seconds == pytest.approx(sum(line["seconds"] for line in own))
        assert row.latent_steps == (9 if row.mode == "latent" else 0)
        assert not row.failed
        assert row.published is None
    by = {(row.mode, row.arrangement): row for row in summary.rows}
    text, latent, compared = by["text", "sequential"], by["latent", "sequential"], summary.comparisons["sequential"]
    assert text.output_tokens > latent.output_tokens
    assert compared.output_tokens == pytest.approx(text.output_tokens / latent.output_tokens)
    assert compared.points == latent.accuracy - text.accuracy
    assert json.loads(json.dumps(summary.as_json()))["rows"][0]["mode"] == "single"


def test_without_a_file_nothing_is_kept(fresh: LocalService) -> None:
    summary = Evaluation(fresh, Words(), modes=["latent"], arrangements=["hierarchical"], **QUICK).run()
    assert summary.answers is None
    assert [(row.mode, row.arrangement) for row in summary.rows] == [("latent", "hierarchical")]
    assert summary.comparisons == {}


async def test_it_runs_in_a_running_loop(fresh: LocalService) -> None:
    assert (await Evaluation(fresh, Split(), modes=["single", "latent"], **QUICK).arun()).n == 4


def test_it_goes_on_where_it_stopped(fresh: LocalService, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    whole = Evaluation(fresh, Words(), **QUICK).run(path)
    written = path.read_text().splitlines(keepends=True)
    # Killed in the middle of a line, in the middle of a cell.
    path.write_text("".join(written[:9]) + written[9][:30])
    asked: list[tuple[Any, ...]] = []
    with LocalService(fresh.model, fresh.settings) as other:
        evaluation = Evaluation(other, Words(), **QUICK)
        resumed = evaluation.run(path, lambda *progress: asked.append(progress))
    assert plain(resumed) == plain(whole)
    assert len(resumed.sessions) == 2
    assert asked[:3] == [("single", "single", 4, 4), ("text", "sequential", 3, 4), ("text", "sequential", 4, 4)]
    kept = [Answer(**json.loads(line)) for line in written[2:9]]
    before = [answer for answer in kept if answer.mode == "single"]
    assert resumed.rows[0].seconds == pytest.approx(sum(answer.seconds for answer in before))
    assert len(lines_of_answers(path)) == 20


def lines_of_answers(path: Path) -> set[tuple[str, str, str]]:
    found = set()
    for line in path.read_text().splitlines():
        try:
            read = json.loads(line)
        except ValueError:
            continue
        if "right" in read:
            found.add((read["mode"], read["arrangement"], read["id"]))
    return found


def test_a_finished_run_asks_nothing_again(fresh: LocalService, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    first = Evaluation(fresh, Words(), modes=["latent"], **QUICK).run(path)
    before = path.read_text()
    again = Evaluation(fresh, Words(), modes=["latent"], **QUICK).run(path)
    assert again.rows == first.rows
    assert path.read_text() == before


def test_other_modes_can_be_added_to_a_run(fresh: LocalService, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    Evaluation(fresh, Words(), modes=["latent"], **QUICK).run(path)
    summary = Evaluation(fresh, Words(), modes=["single", "latent"], **QUICK).run(path)
    assert [row.mode for row in summary.rows] == ["single", "latent", "latent"]
    assert len(lines_of_answers(path)) == 12


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"n": 5}, "n"),
        ({"steps": 4}, "steps"),
        ({"max_tokens": 13}, "max_tokens"),
        ({"temperature": 0.5}, "temperature"),
        ({"batch": 3}, "batch"),
    ],
)
def test_other_settings_are_refused(
    bundled: LocalService, of_one: Path, tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    path = Path(shutil.copy(of_one, tmp_path))
    with pytest.raises(InvalidRequest, match=rf"another run \(.*{named} was"):
        Evaluation(bundled, Words(), modes=["single"], **{**QUICK, **changed}).run(path)
    assert path.read_text() == of_one.read_text()


def test_another_model_is_refused(service: LocalService, of_one: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(of_one, tmp_path))
    with pytest.raises(InvalidRequest, match="another run"):
        Evaluation(service, Words(), modes=["single"], **QUICK).run(path)
    assert path.read_text() == of_one.read_text()


class Broken(Words):
    """One question is too long for the model, and the grader cannot take another one."""

    def questions(self, n: int | None = None, seed: int = 0) -> list[Question]:
        questions = super().questions(n, seed)
        questions[1] = questions[1]._replace(text="long " * 5000)
        return questions

    def grade(self, text: str, question: Question) -> bool:
        if question.id == "words-0-2":
            raise ZeroDivisionError("what is this?")
        return True


def test_a_failing_question_is_counted_and_named(fresh: LocalService, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    summary = Evaluation(fresh, Broken(), modes=["single", "latent"], **QUICK).run(path)
    for row in summary.rows:
        assert row.failed == {"ContextTooLong": 1, "the grader raised ZeroDivisionError": 1}
        assert row.accuracy == 50
    errors = {line["id"]: line["error"] for line in lines(path)[2:6]}
    assert errors["words-0-0"] == ""
    assert "positions" in errors["words-0-1"]
    assert errors["words-0-2"] == "the grader raised ZeroDivisionError: what is this?"


@pytest.mark.parametrize("error", [*MENDED, "ContextTooLong"], ids=str)
def test_which_errors_are_asked_again(error: Any) -> None:
    assert is_mended(f"{getattr(error, '__name__', error)}: why") is (error != "ContextTooLong")
    assert not is_mended("")


def test_what_fails_has_cost_something_too(fresh: LocalService, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    gone = Gone(EngineFailed)
    Evaluation(fresh, gone, modes=["text", "latent"], arrangements=["sequential"], **QUICK).run(path)
    answers = [Answer(**line) for line in lines(path)[1:] if "session" not in line]
    assert [bool(answer.error) for answer in answers].count(True) == 2
    assert all(answer.output_tokens > 0 for answer in answers)
    assert {answer.latent_steps for answer in answers if answer.mode == "latent"} == {9}


def test_seconds_of_different_machines_are_not_compared(fresh: LocalService, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    one = {**QUICK, "arrangements": ["sequential"]}
    summary = Evaluation(fresh, Words(), modes=["text"], **one).run(path)
    assert summary.on_one_machine
    path.write_text(path.read_text().replace('"processor": "', '"processor": "Another '))
    summary = Evaluation(fresh, Words(), modes=["text", "latent"], **one).run(path)
    assert not summary.on_one_machine
    compared = summary.comparisons["sequential"]
    assert compared.seconds is None
    assert compared.output_tokens > 1  # type: ignore[operator]


class Gone(Words):
    """Something fails behind the agents when one of the questions is to be answered."""

    def __init__(self, error: type[Exception] = ServiceUnreachable) -> None:
        super().__init__()
        self.error = error

    def graph(self, *args: Any, **options: Any) -> Any:
        def gate(state: dict[str, Any]) -> dict[str, Any]:
            if state["messages"][0].text == self.questions(4)[2].text:
                raise self.error("It cannot be reached.")
            return {}

        builder = super().graph(*args, **options)
        (last,) = [source for source, target in builder.edges if target == END]
        builder.edges.discard((last, END))
        builder.add_node("gate", gate)
        builder.add_edge(last, "gate")
        builder.add_edge("gate", END)
        return builder


def test_a_server_that_is_gone_ends_the_run_and_the_answers_are_kept(fresh: LocalService, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    one_by_one = {**QUICK, "batch": 1, "modes": ["single"]}
    with pytest.raises(ServiceUnreachable):
        Evaluation(fresh, Gone(), **one_by_one).run(path)
    assert len(lines_of_answers(path)) == 2
    assert len(Evaluation(fresh, Words(), **one_by_one).run(path).sessions) == 2
    assert len(lines_of_answers(path)) == 4


def test_what_waits_for_its_grader_when_a_run_ends_is_kept_and_graded(fresh: LocalService, tmp_path: Path) -> None:
    class Slow(Gone):
        def grade(self, text: str, question: Question) -> bool:
            return both_kept.wait(60)

    def on_answer(mode: str, arrangement: str, done: int, questions: int) -> None:
        if done == 2:
            both_kept.set()

    path, both_kept = tmp_path / "answers.jsonl", Event()
    one_by_one = {**QUICK, "batch": 1, "modes": ["single"]}
    with pytest.raises(ServiceUnreachable):
        Evaluation(fresh, Slow(), **one_by_one).run(path, on_answer)
    assert both_kept.is_set()
    kept = {line["id"]: line["text"] for line in lines(path)[2:]}
    assert sorted(kept) == ["words-0-0", "words-0-1"]
    assert all(kept.values())
    summary = Evaluation(fresh, Words(), **one_by_one).run(path)
    assert not summary.rows[0].failed
    assert kept.items() <= {line["id"]: line["text"] for line in lines(path)[5:]}.items()


@pytest.mark.parametrize("error", [GraderFailed, ZeroDivisionError])
def test_what_has_a_text_and_no_grader_is_graded_and_not_asked_again(
    fresh: LocalService, tmp_path: Path, error: type[Exception]
) -> None:
    class Ungraded(Words):
        def grade(self, text: str, question: Question) -> bool:
            raise error("not here")

    path = tmp_path / "answers.jsonl"
    first = Evaluation(fresh, Ungraded(), modes=["single"], **QUICK).run(path)
    assert first.rows[0].failed == {f"the grader raised {error.__name__}": 4}
    before = fresh.info()["ticks"]
    graded = Evaluation(fresh, Words(), modes=["single"], **QUICK).run(path)
    assert fresh.info()["ticks"] == before
    assert not graded.rows[0].failed
    assert graded.rows[0].seconds == first.rows[0].seconds


def test_what_a_retry_can_mend_is_asked_again(fresh: LocalService, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    whole = Evaluation(fresh, Words(), modes=["single"], **QUICK).run(path)
    written = path.read_text().splitlines()
    failed = {**json.loads(written[-1]), "right": False, "text": "", "error": "EngineFailed: out of memory"}
    path.write_text("\n".join([*written[:-1], json.dumps(failed)]) + "\n")
    again = Evaluation(fresh, Words(), modes=["single"], **QUICK).run(path)
    assert not again.rows[0].failed
    assert again.rows[0].accuracy == whole.rows[0].accuracy


def test_a_file_that_cannot_be_written_ends_the_run(
    fresh: LocalService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Journal.add

    def full(journal: Journal, line: dict[str, Any]) -> None:
        if line.get("id") == "words-0-2":
            raise OSError(errno.ENOSPC, "No space left on device")
        add(journal, line)

    path = tmp_path / "answers.jsonl"
    monkeypatch.setattr(Journal, "add", full)
    with pytest.raises(OSError, match="No space"):
        Evaluation(fresh, Words(), modes=["single"], **QUICK).run(path)
    monkeypatch.setattr(Journal, "add", add)
    assert len(Evaluation(fresh, Words(), modes=["single"], **QUICK).run(path).sessions) == 2


def test_thoughts_that_were_known_before_are_noticed(fresh: LocalService, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Evaluation(fresh, Words(), modes=["latent"], arrangements=["sequential"], **QUICK).run()
        assert "knew some thoughts" not in caplog.text
        Evaluation(fresh, Words(), modes=["latent"], arrangements=["sequential"], **QUICK).run()
    assert "latent, sequential: the service knew some thoughts" in caplog.text


def test_no_mode_starts_with_what_another_one_has_computed(fresh: LocalService) -> None:
    def reused(modes: list[str]) -> int:
        before = fresh.info()["reused"]
        Evaluation(fresh, Words(), modes=modes, arrangements=["hierarchical"], **QUICK).run()
        return int(fresh.info()["reused"]) - before

    text, latent = (reused([mode]) for mode in ("text", "latent"))
    assert reused(["text", "latent"]) <= text + latent  # text experts prefill what latent ones do


def test_seconds_on_a_server_are_qualified(fresh: LocalService, caplog: pytest.LogCaptureFixture) -> None:
    fresh.forget_prefixes = lambda: False  # type: ignore[method-assign]
    Evaluation(fresh, Words(), modes=["text", "latent"], arrangements=["sequential"], **QUICK).run()
    [warned] = [message for message in caplog.messages if "seconds are too few" in message]
    assert warned.startswith("latent, sequential: its prompts may begin as")


def test_a_sample_can_be_drawn_again(fresh: LocalService, tmp_path: Path) -> None:
    texts = []
    for name in ("a", "b"):
        path = tmp_path / name
        Evaluation(fresh, Words(), modes=["single"], temperature=1.5, **QUICK).run(path)
        texts.append({line["id"]: line["text"] for line in lines(path)[2:]})
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"modes": ["telepathy"]}, "no mode 'telepathy'; take of single, text, latent"),
        ({"arrangements": ["ring"]}, "no arrangement 'ring'"),
        ({"arrangements": [], "modes": ["latent"]}, "nothing to evaluate"),
        ({"modes": []}, "nothing to evaluate"),
        ({"batch": 0}, "batch"),
        ({"n": 0}, "at least 1"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"steps": -1}, "steps"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_wrong_options_are_refused_before_work_starts(bundled: LocalService, wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        Evaluation(bundled, Words(), **{**QUICK, **wrong})


def test_what_the_sandbox_cannot_guarantee_is_in_the_result(
    fresh: LocalService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"question": "Double it.", "entry_point": "f", "test": "assert f(2) == 4"}))
    summary = Evaluation(fresh, task_named(str(path), "code"), modes=["single"], max_tokens=8).run()
    assert summary.rows[0].accuracy == 0
    assert summary.sessions[0]["sandbox_missing"] == list(sandbox.missing())

    def unavailable() -> None:
        raise SandboxUnavailable("not here")

    monkeypatch.setattr(sandbox, "missing", unavailable)
    with pytest.raises(SandboxUnavailable):
        Evaluation(fresh, task_named(str(path), "code"), modes=["single"], max_tokens=8).run()


def test_published_figures_stand_beside_ours() -> None:
    rows = [
        Row("text", "sequential", 90.0, 85.0, 94.0, 3000.0, 0.0, 100.0, {}, Published(92.3, 2324.0, 1739.0)),
        Row("latent", "sequential", 91.0, 86.0, 95.0, 800.0, 120.0, 30.0, {"ContextTooLong": 2}, None),
    ]
    settings = {"temperature": 0.6, "top_p": 0.95, "seed": 7, "steps": 40, "max_tokens": 2048, "batch": 64}
    about = {"processor": "CPU", "cores": 2, "python": "3.11", "packages": {"torch": "2.13"}}
    compared = {"sequential": Comparison(1.0, -2.0, 4.0, 3.75, 3.3)}
    summary = Summary("gsm8k", 1319, rows, compared, settings, [about, about], "a.jsonl")
    console = Console(width=100, file=StringIO())
    console.print(picture(summary, {"name": "Qwen/Qwen3-8B"}))
    shown = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    for text in ("92.3 %", "2,324", "1,739", "paper", "3.8×", "3.3×", "+1.0", "-2.0 to +4.0", "seed 7", "2 sessions"):
        assert text in shown, text
    assert "2 × ContextTooLong" in shown
    assert "temperature 0.6, top-p 0.95" in shown


def test_rows_and_comparisons_are_what_the_answers_say() -> None:
    right = [Answer("text", "sequential", str(i), "x", i % 2 == 0, 10, 0, 0.5) for i in range(8)]
    failed = [Answer("text", "sequential", "8", error="ContextTooLong: too long", seconds=1.0)]
    row = Row.of([*right, *failed], None)
    assert (row.accuracy, row.seconds, row.failed) == (pytest.approx(400 / 9), 5.0, {"ContextTooLong": 1})
    assert row.output_tokens == pytest.approx(80 / 9)
    ours = [Answer("latent", "sequential", str(i), "x", True, 4, 3, 0.2) for i in range(20)]
    theirs = [Answer("text", "sequential", str(i), "x", False, 10, 0, 0.5) for i in range(20)]
    # All draws are alike; what 20 questions cannot show at 97.5 % is known in closed form.
    assert _compare(theirs, ours, timed=True) == pytest.approx((100, 100 * 0.025 ** (1 / 20), 100, 2.5, 2.5))
    assert _compare(ours, theirs, timed=True) == pytest.approx((-100, -100, -100 * 0.025 ** (1 / 20), 0.4, 0.4))
    assert _compare(theirs, ours, timed=False).seconds is None
