"""Loaders against rows with the fields that each data set has on the hub; the texts of six of them are our own."""

import json
import urllib.error
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from langchain_latentmas.errors import BadRow, DatasetNotFound, InvalidRequest, MissingExtra
from langchain_latentmas.evaluation import benchmarks, graders
from langchain_latentmas.evaluation.benchmarks import BENCHMARKS, jsonl_task, published, task_named
from langchain_latentmas.evaluation.task import BUNDLED_TASKS
from langchain_latentmas.service.local import LocalService
from langchain_latentmas.teams import ARRANGEMENTS

from .test_graders import GSM8K, HUMANEVAL, MEDQA

AIME = {
    "id": 60,
    "problem": "Find the sum of all integers $n$ with $1 \\le n \\le 9$.",
    "solution": "It is $\\boxed{045}$.",
    "answer": "045",
    "url": "https://artofproblemsolving.com/wiki",
    "year": "2024",
}
ARC = {
    "id": "Mercury_1",
    "question": "Which of these is a planet?",
    "choices": {"text": ["the Sun", "the Moon", "Mars", "Sirius"], "label": ["A", "B", "C", "D"]},
    "answerKey": "C",
}
ARC_OF_DIGITS = {**ARC, "choices": {"text": ["lead", "ice", "wood"], "label": ["1", "2", "3"]}, "answerKey": "3"}
GPQA = {
    "Record ID": "rec06pnAkLOr2t2mp",
    "Question": "Which of these is largest?",
    "Correct Answer": "an ocean\n",
    "Incorrect Answer 1": "a lake",
    "Incorrect Answer 2": "a pond",
    "Incorrect Answer 3": "a puddle",
    "High-level domain": "Physics",
}
MBPP = {
    "task_id": 2,
    "code": "import math\ndef helper(x):\n    return x\n\ndef shared(a, b):\n    return tuple(set(a) & set(b))\n",
    "prompt": "Write a function to find what two tuples share.",
    "source_file": "Benchmark Questions Verification V2.ipynb",
    "test_imports": ["import math"],
    "test_list": ["assert set(shared((3, 4), (4, 5))) == set((4,))", "assert set(shared((1,), (2,))) == set(())"],
    "test": (
        "import numpy as np\nfrom math import inf\n\n"
        "def is_floats(x) -> bool:\n    return isinstance(x, float)\n\n"
        "def assertion(out, exp, atol):\n    exact_match = out == exp\n"
        "    if atol == 0 and is_floats(exp):\n        atol = 1e-6\n"
        "    if not exact_match and atol != 0:\n        assert np.allclose(out, exp, rtol=1e-07, atol=atol)\n"
        "    else:\n        assert exact_match, f'out: {out}, exp: {exp}'\n\n"
        "inputs = [[[3, 4, 5], [5, 7, 4]], [[1, 2], [3, 4]]]\nresults = [(4, 5), ()]\n"
        "for i, (inp, exp) in enumerate(zip(inputs, results)):\n    assertion(set(shared(*inp)), set(exp), 0)\n"
    ),
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "openai/gsm8k": GSM8K,
    "HuggingFaceH4/aime_2024": [AIME],
    "yentinglin/aime_2025": [{**AIME, "year": "2025"}],
    "Idavidrein/gpqa": [GPQA, {**GPQA, "Record ID": "recZ13cwgDQf9jRd9"}],
    "allenai/ai2_arc": [ARC, ARC_OF_DIGITS],
    "evalplus/mbppplus": [MBPP],
    "evalplus/humanevalplus": HUMANEVAL,
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was asked of the hub, which has `ROWS`."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, config: str | None, *, split: str) -> Any:
        asked.append((path, config, split))
        # A data set has one type per column, and rows of other lengths come back as lists.
        return [datasets.Dataset.from_list([row])[0] for row in ROWS[path]]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(benchmarks.urllib.request, "urlopen", lambda url, timeout: BytesIO(json.dumps(MEDQA).encode()))
    return asked


OF_CODE = ("mbpp+", "humaneval+")  # whose answers are tests


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name not in OF_CODE])
def test_benchmarks_load_and_grade_their_own_answers(hub: list[tuple[Any, ...]], name: str) -> None:
    task = task_named(name)
    for question in task.questions()[:5]:
        assert task.grade(f"So it is \\boxed{{{question.answer}}}.", question)
        assert not task.grade("So it is \\boxed{Z0}.", question)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_questions_of_a_benchmark_have_ids_of_their_own(hub: list[tuple[Any, ...]], name: str) -> None:
    questions = task_named(name).questions()
    assert len({question.id for question in questions}) == len(questions)


def test_what_is_asked_of_the_hub(hub: list[tuple[Any, ...]]) -> None:
    for name in BENCHMARKS:
        task_named(name).questions(1)
    assert hub == [
        ("openai/gsm8k", "main", "test"),
        ("HuggingFaceH4/aime_2024", None, "train"),
        ("yentinglin/aime_2025", None, "train"),
        ("Idavidrein/gpqa", "gpqa_diamond", "train"),
        ("allenai/ai2_arc", "ARC-Easy", "test"),
        ("allenai/ai2_arc", "ARC-Challenge", "test"),
        ("evalplus/mbppplus", None, "test"),
        ("evalplus/humanevalplus", None, "test"),
    ]


def test_numbers(hub: list[tuple[Any, ...]]) -> None:
    assert [question.answer for question in task_named("gsm8k").questions()[:3]] == ["18", "3", "70000"]
    assert task_named("aime24").questions()[0].answer == "45"


def test_options_get_letters_in_their_order(hub: list[tuple[Any, ...]]) -> None:
    letters, digits = task_named("arc-easy").questions()
    assert letters.text == "Which of these is a planet?\nA. the Sun\nB. the Moon\nC. Mars\nD. Sirius"
    assert (letters.answer, digits.answer) == ("C", "C")
    assert digits.text.endswith("\nC. wood")


@given(st.lists(st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1), min_size=2, max_size=10))
def test_options_are_read_back_from_the_question(options: list[str]) -> None:
    texts = [" ".join(option.split()) for option in options]
    assume(all(texts))
    assert benchmarks._options_in(benchmarks._with_options("Which?", options)) == texts


def test_the_right_option_of_gpqa_is_not_always_at_the_same_place(hub: list[tuple[Any, ...]]) -> None:
    task = task_named("gpqa-diamond")
    questions = task.questions()
    assert questions == task_named("gpqa-diamond").questions()
    for question in questions:
        assert f"\n{question.answer}. an ocean" in question.text
        assert task.grade("an ocean", question)
        assert not task.grade("a pond", question)
    assert len({question.answer for question in questions}) == 2


def test_medqa_answers_are_right_as_published(hub: list[tuple[Any, ...]]) -> None:
    task = task_named("medqa")
    for question, row in zip(task.questions(), MEDQA, strict=True):
        assert task.grade(row["answer"], question)
        assert question.text.count("\nA. ") == 1
        wrong = next(option for option in row["options"] if row["answer"] not in option)
        assert not task.grade(wrong[3:], question)


def test_code_is_run(hub: list[tuple[Any, ...]]) -> None:
    task = task_named("mbpp+")
    question = task.questions()[0]
    assert "shared((3, 4), (4, 5))" in question.text
    assert task.grade(f"```python\n{MBPP['code']}```", question)
    assert not task.grade("```python\ndef shared(a, b):\n    return a\n```", question)
    task = task_named("humaneval+")
    question = task.questions()[0]
    assert task.grade(HUMANEVAL[0]["prompt"] + HUMANEVAL[0]["canonical_solution"], question)
    assert not task.grade("    return None", question)


def test_a_sample_is_drawn_by_seed_and_keeps_the_order(hub: list[tuple[Any, ...]]) -> None:
    task = task_named("gsm8k")
    ten = [int(question.id.split("-")[1]) for question in task.questions(10, seed=1)]
    assert ten == sorted(ten)
    assert ten == [int(question.id.split("-")[1]) for question in task.questions(10, seed=1)]
    assert ten != [int(question.id.split("-")[1]) for question in task.questions(10, seed=2)]
    with pytest.raises(InvalidRequest, match="60 questions; ask for 1 to 60"):
        task.questions(61)


def test_a_hub_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Couldn't reach it on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DatasetNotFound, match=r"openai/gsm8k cannot be loaded \(Couldn't reach it on the Hub\)\."):
        task_named("gsm8k").questions()

    def unreachable(url: str, timeout: float) -> Any:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(benchmarks.urllib.request, "urlopen", unreachable)
    with pytest.raises(DatasetNotFound, match=r"medqa.json cannot be loaded .*no route"):
        task_named("medqa").questions()


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graders, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install -e '\.\[eval\]'"):
        task_named("gsm8k")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install -e '\.\[eval\]'"):
        task_named("arc-easy").questions()


def test_an_unknown_task_is_refused_with_what_there_is() -> None:
    with pytest.raises(InvalidRequest, match=r"no task 'gsm9k'; take one of words, relay, split, gsm8k, .* medqa"):
        task_named("gsm9k")
    with pytest.raises(InvalidRequest, match="has a grader of its own"):
        task_named("gsm8k", "exact")
    with pytest.raises(InvalidRequest, match="no grader 'taste'"):
        task_named("x.jsonl", "taste")
    assert {type(task_named(name)) for name in BUNDLED_TASKS} == set(BUNDLED_TASKS.values())


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(*rows: Any) -> str:
        path = tmp_path / "own.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return str(path)

    return write


def test_own_numbers(write: Callable[..., str]) -> None:
    task = task_named(write({"question": "1+1?", "answer": 2}, "", {"problem": "2+2?", "answer": "so #### 4"}))
    assert [(q.id, q.text, q.answer.strip()) for q in task.questions()] == [
        ("own-1", "1+1?", "2"),
        ("own-2", "2+2?", "4"),
    ]


def test_a_line_of_json_ends_at_a_newline_only(tmp_path: Path) -> None:
    path, answer = tmp_path / "own.jsonl", "1\u2028\u2029\x85"
    path.write_bytes(
        b"\r\n".join(json.dumps({"question": answer, "answer": i}, ensure_ascii=False).encode() for i in "ab")
    )
    assert [(q.text, q.answer) for q in task_named(str(path), "exact").questions()] == [(answer, "a"), (answer, "b")]


def test_own_options(write: Callable[..., str]) -> None:
    rows = [
        {"question": "Where?", "options": ["here", "there"], "answer": "there"},
        {"question": "Where?", "choices": {"A": "here", "B": "there"}, "answer": "b"},
        {"question": "Where?", "options": ["A. here", "B. there"], "answer": "(B)"},
        {"question": "Where?\nA. here\nB. there", "answer": "b."},
    ]
    for question in task_named(write(*rows), "letter").questions():
        assert (question.text, question.answer) == ("Where?\nA. here\nB. there", "B")
    row = {"question": "How many?", "options": [1, 0], "answer": 0}
    assert task_named(write(row), "letter").questions()[0].answer == "B"


def test_options_that_share_a_line_are_chosen_by_their_letters(write: Callable[..., str]) -> None:
    task = task_named(write({"question": "2+2?\nA. 3 B. 4 C. 5 D. 6", "answer": "B"}), "letter")
    question = task.questions()[0]
    assert task.grade("\\boxed{B}", question)
    assert not task.grade("\\boxed{A}", question)


def test_own_code_and_words(write: Callable[..., str]) -> None:
    task = task_named(write({"question": "Double it.", "entry_point": "f", "test": "assert f(2) == 4"}), "code")
    assert task.grade("def f(x): return 2 * x", task.questions()[0])
    task = task_named(write({"question": "Capital of France?", "answer": "Paris"}), "exact")
    assert task.grade("\\boxed{Paris}", task.questions()[0])


@pytest.mark.parametrize(
    ("row", "grader", "why"),
    [
        ({"question": "1+1?"}, "number", "own: row 1 has no answer"),
        ({"question": "1+1?", "answer": ""}, "exact", "own: row 1 has no answer"),
        ({"question": "1+1?", "answer": None}, "number", "own: row 1 has no answer"),
        ({"answer": "2"}, "number", "own: row 1 .*question or problem"),
        ({"question": " ", "answer": "2"}, "number", "own: row 1 has no question"),
        ({"question": "?", "options": ["a", "b"], "answer": "c"}, "letter", "none of its options"),
        ({"question": "?", "options": ["a", "b"]}, "letter", "it has no answer"),
        ({"question": "?", "options": ["a", ""], "answer": ""}, "letter", "it has no answer"),
        ({"question": "?"}, "letter", "it has no answer"),
        ({"question": "?", "answer": "."}, "letter", "none of its options"),
        ({"question": "?", "entry_point": "f"}, "code", "test"),
        ("{", "number", "line 1: this is no JSON"),
        ("[1]", "number", "line 1: this is no JSON object"),
        ("", "number", "there are no rows"),
    ],
)
def test_bad_rows_are_named_before_work_starts(write: Callable[..., str], row: Any, grader: str, why: str) -> None:
    with pytest.raises(BadRow, match=why):
        task_named(write(row), grader).questions()


def test_a_row_of_a_benchmark_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*GSM8K[:2], {"question": "Why?", "answer": "No mark here."}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    with pytest.raises(BadRow, match="gsm8k: row 3 has no answer"):
        task_named("gsm8k").questions()
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: [ARC, {**ARC, "answerKey": ""}])
    with pytest.raises(BadRow, match="arc-easy: row 2 cannot be read"):
        task_named("arc-easy").questions()


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(DatasetNotFound, match=r"nowhere\.jsonl cannot be read"):
        task_named("/nowhere.jsonl").questions()


@pytest.mark.parametrize("grader", benchmarks.GRADERS)
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_every_family_has_its_own_roles(bundled: LocalService, grader: str, arrangement: str) -> None:
    task = jsonl_task(Path("own.jsonl"), grader)
    roles = task.roles(bundled)
    nodes = {"solver"} if arrangement == "single" else {*getattr(roles, arrangement), "judger"}
    assert set(task.graph(bundled, arrangement).nodes) == nodes
    assert "code block" in roles.judger if grader == "code" else "\\boxed" in roles.judger


def test_published_figures() -> None:
    assert published("gsm8k", "Qwen/Qwen3-4B", "latent", "sequential") == (88.2, 607, 375)
    assert published("gsm8k", "Qwen/Qwen3-14B", "text", "hierarchical") == (90.8, 3021, 3675)
    assert published("gpqa-diamond", "/models/Qwen3-8B/", "single", "single") == (39.9, 6435, 813)
    assert published("aime24", "Qwen/Qwen3-4B", "text", "sequential") is None  # not in the paper
    assert task_named("medqa").published
    assert not jsonl_task(Path("medqa.jsonl"), "letter").published  # whatever is in it
    assert published("gsm8k", "bundled", "text", "sequential") is None
    assert published("gsm8k", "Qwen/Qwen3-4B-Thinking-2507", "text", "sequential") is None
    assert published("words", "Qwen/Qwen3-4B", "text", "sequential") is None
    for name in BENCHMARKS:
        assert published(name, "Qwen3-8B", "latent", "hierarchical") is not None
