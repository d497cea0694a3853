import json
from functools import partial
from pathlib import Path

import pytest

from langchain_latentmas.commands.folder import ANSWERS, run_folder
from langchain_latentmas.errors import InvalidRequest
from langchain_latentmas.evaluation.journal import Journal

TEXT = "zwölf\n\r\n\u2028\u2029\x85\x0b\x0c\x1c"  # with all that `str.splitlines` takes for the end of a line


def test_lines_are_there_for_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    with Journal(path, {"seed": 1, "about": {"edge": ("a", "b")}}) as journal:
        assert journal.lines == []
        journal.add({"i": 1, "text": TEXT})
    with Journal(path, {"seed": 1, "about": {"edge": ("a", "b")}}) as journal:
        assert journal.lines == [{"i": 1, "text": TEXT}]


@pytest.mark.parametrize("cut", [1, 5])
def test_a_line_that_was_cut_off_is_not_counted_and_harms_no_other(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "answers.jsonl"
    with Journal(path, {}) as journal:
        journal.add({"i": 1})
        journal.add({"i": 2})
    path.write_text(path.read_text()[:-cut])
    with Journal(path, {}) as journal:
        complete = [{"i": 1}, {"i": 2}][: 2 if cut == 1 else 1]
        assert journal.lines == complete
        journal.add({"i": 3})
    with Journal(path, {}) as journal:
        assert journal.lines == [*complete, {"i": 3}]


def test_a_line_that_was_cut_off_inside_of_a_letter_is_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with Journal(path, {}) as journal:
        journal.add({"i": "ö"})
        journal.add({"i": "ö"})
    path.write_bytes(path.read_bytes()[:-4])
    with Journal(path, {}) as journal:
        journal.add({"i": 3})
    with Journal(path, {}) as journal:
        assert journal.lines == [{"i": "ö"}, {"i": 3}]


@pytest.mark.parametrize("cut", [1, 5, 13, 14])
def test_a_journal_that_was_cut_off_inside_of_its_head_is_begun_anew(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "answers.jsonl"
    Journal(path, {"seed": "one"}).__exit__()
    path.write_text(path.read_text()[:cut])
    with Journal(path, {"seed": "two"}) as journal:
        journal.add({"i": 1})
    with Journal(path, {"seed": "two"}) as journal:
        assert journal.lines == [{"i": 1}]


@pytest.mark.parametrize("written", ['{"seed": 2}\n', '{"i": 1}\n', "[1, 2]\nnothing\n{}\n"])
def test_the_journal_of_another_run_is_refused(tmp_path: Path, written: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(written)
    with pytest.raises(InvalidRequest, match="another run"):
        Journal(path, {"seed": 1})
    assert path.read_text() == written


def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "thesis.txt"
    path.write_text("Chapter 1\n")
    with pytest.raises(InvalidRequest, match="no journal"):
        Journal(path, {"seed": 1})
    assert path.read_text() == "Chapter 1\n"


@pytest.mark.parametrize(
    ("errors", "kept"),
    [
        ([], False),
        (["ContextTooLong"], False),
        (["EngineFailed: out of memory"], True),
        (["the grader raised KeyError: 'x'"], True),
    ],
    ids=str,
)
def test_a_run_whose_failures_may_be_mended_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errors: list[str], kept: bool
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run = partial(run_folder, None, "eval", "words", {}, "summary.json", list)
    with run() as folder:
        (folder / ANSWERS).write_text("answers")
        (folder / "summary.json").write_text(json.dumps(errors))
    with run() as folder:
        assert (folder / ANSWERS).exists() == kept
