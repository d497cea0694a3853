"""Tasks from rows of data: the paper's nine benchmarks, and any local JSONL."""

import csv
import json
import random
import re
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import BadRow, DatasetNotFound, InvalidRequest, MissingExtra, first_line
from ..service import LatentService
from . import graders
from .graders import LETTERS, Checks
from .roles import CHOICE, CODE, MATH, MEDICAL, PLAIN, Roles
from .task import BUNDLED_TASKS, Question, Task

Row = Mapping[str, Any]
GRADERS = ("number", "letter", "code", "exact")


class RowTask(Task):
    """Questions out of rows of data."""

    def __init__(
        self,
        name: str,
        load: Callable[[], Sequence[Row]],
        read: Callable[[Row], tuple[str, str]],
        grader: str,
        roles: Roles,
        max_tokens: int,
        steps: int = 40,
    ) -> None:
        """Describes the task; rows are loaded when questions are asked for.

        Args:
            name: Its name.
            load: Gives all rows.
            read: From a row to the question's text and its answer as the grader wants it.
            grader: One of `GRADERS`.
            roles: What the agents are told.
            max_tokens: Most tokens that one agent decodes.
            steps: Latent steps of a thinker.

        Raises:
            InvalidRequest: If there is no such grader.
            MissingExtra: If the grader is not installed.
        """
        if grader not in GRADERS:
            raise InvalidRequest(f"There is no grader {grader!r}; take one of {', '.join(GRADERS)}.")
        graders.check_installed(grader)
        self.name, self.steps, self.max_tokens = name, steps, max_tokens
        self.grader, self._load, self._read, self._roles = grader, load, read, roles
        self.runs_code = grader == "code"

    @cached_property
    def _questions(self) -> list[Question]:
        questions = []
        for i, row in enumerate(self._load()):
            try:
                text, answer = self._read(row)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                raise BadRow(f"{self.name}: row {i + 1} cannot be read ({type(error).__name__}: {error}).") from error
            if not text.strip():
                raise BadRow(f"{self.name}: row {i + 1} has no question.")
            if not answer.strip():
                raise BadRow(f"{self.name}: row {i + 1} has no answer; correct it, or leave it out.")
            questions.append(Question(f"{self.name}-{i + 1}", text, answer))
        if not questions:
            raise BadRow(f"{self.name}: there are no rows.")
        return questions

    def questions(self, n: int | None = None, seed: int = 0) -> list[Question]:
        """See `Task.questions`; `n` of them are drawn at random, in the order of the rows.

        Raises:
            InvalidRequest: If `n` is below 1 or more than there are.
            DatasetNotFound: If the rows cannot be loaded.
            BadRow: If a row lacks its question or its answer.
        """
        known = self._questions
        n = len(known) if n is None else n
        if not 1 <= n <= len(known):
            raise InvalidRequest(f"{self.name} has {len(known)} questions; ask for 1 to {len(known)} of them, not {n}.")
        return [known[i] for i in sorted(random.Random(seed).sample(range(len(known)), n))]

    def grade(self, text: str, question: Question) -> bool:
        """See `Task.grade`, and `langchain_latentmas.evaluation.graders`."""
        if self.grader == "letter":
            return graders.letter(text, question.answer, _options_in(question.text))
        if self.grader == "code":
            return graders.code(text, Checks(**json.loads(question.answer)))
        return (graders.number if self.grader == "number" else graders.exact)(text, question.answer)

    def roles(self, service: LatentService) -> Roles:
        """See `Task.roles`."""
        return self._roles


def task_named(name: str, grader: str | None = None) -> Task:
    """The task that the command line calls `name`.

    Args:
        name: A bundled task, a benchmark, or the path of a JSONL file.
        grader: For a JSONL file: one of `GRADERS`; None takes "number".

    Raises:
        InvalidRequest: If there is no such task or grader, or a grader is given for a task that has its own.
        MissingExtra: If the task needs the extra `eval`, which is not installed.
    """
    if name.endswith(".jsonl"):
        return jsonl_task(Path(name), grader or "number")
    known: Mapping[str, Callable[[], Task]] = {**BUNDLED_TASKS, **BENCHMARKS}
    if name.lower() not in known:
        raise InvalidRequest(
            f"There is no task {name!r}; take one of {', '.join(known)}, or a path that ends in .jsonl."
        )
    if grader is not None:
        raise InvalidRequest(f"The task {name!r} has a grader of its own; grader is for JSONL files.")
    return known[name.lower()]()


def jsonl_task(path: Path, grader: str) -> RowTask:
    """A task from a local file, one JSON object per line.

    A line has `question` (or `problem`, `query`, `prompt`) and `answer`; with the grader "letter" also `options` (or
    `choices`), a list of texts, and its answer is a letter, or the text of an option; with the grader "code" it has
    `test` and `entry_point` instead of an answer, as in HumanEval.

    Args:
        path: The file.
        grader: One of `GRADERS`.
    """
    roles = {"number": MATH, "letter": CHOICE, "code": CODE}.get(grader, PLAIN)
    read = {"letter": _local_choice, "code": _local_code}.get(grader, _local_answer)
    return RowTask(path.stem, lambda: _lines(path), read, grader, roles, max_tokens=2048)


def _lines(path: Path) -> list[Row]:
    try:
        written = path.read_text(encoding="utf-8").split("\n")  # JSON may hold what `str.splitlines` takes for more
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetNotFound(f"{path} cannot be read: {error}") from error
    rows: list[Row] = []
    for i, line in enumerate(written):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadRow(f"{path}, line {i + 1}: this is no JSON ({error}).") from error
        if not isinstance(row, dict):
            raise BadRow(f"{path}, line {i + 1}: this is no JSON object.")
        rows.append(row)
    return rows


def _hub(path: str, config: str | None, split: str) -> Sequence[Row]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra.of("eval", "The benchmarks need datasets") from error
    try:
        return list(datasets.load_dataset(path, config, split=split))
    except Exception as error:  # whatever the network, the hub or the file brings up
        raise _unreachable(path, error) from error


def _medqa_rows() -> Sequence[Row]:
    try:
        with urllib.request.urlopen(MEDQA_ROWS, timeout=60) as answer:
            return list(json.load(answer))
    except (OSError, ValueError) as error:
        raise _unreachable(MEDQA_ROWS, error) from error


def _unreachable(source: str, error: Exception) -> DatasetNotFound:
    return DatasetNotFound(
        f"The data set {source} cannot be loaded ({first_line(error)}). Is the network there, and access granted (hf "
        "auth login)? A local copy works as --task file.jsonl."
    )


def _with_options(question: str, options: Sequence[str]) -> str:
    lettered = (f"{letter}. {' '.join(option.split())}" for letter, option in zip(LETTERS, options, strict=False))
    return "\n".join([question.strip(), *lettered])


def _options_in(text: str) -> list[str]:
    """The options of a question that `_with_options` wrote, or that were written like that, with a line for each."""
    options: list[str] = []
    for line in text.splitlines():
        if line.startswith(f"{LETTERS[len(options) % 26]}. "):
            options.append(line[3:])
        elif line.startswith("A. "):
            options = [line[3:]]
    return options if len(options) > 1 else []


def _plain_options(options: Sequence[Any]) -> list[str]:
    """Options without the letters in front of them, if all have theirs."""
    texts = [str(option).strip() for option in options]
    lettered = [re.match(rf"[(\[]?{letter}[)\].:]\s+", text) for letter, text in zip(LETTERS, texts, strict=False)]
    return (
        [text[m.end() :] if m else text for m, text in zip(lettered, texts, strict=False)] if all(lettered) else texts
    )


def _letter_of(answer: Any, options: Sequence[str]) -> str:
    """The letter of an answer that is a letter, or the text of one option."""
    said = "" if answer is None else str(answer).strip()
    if not said:
        raise ValueError("it has no answer")
    if said in options:
        return LETTERS[options.index(said)]
    if (letter := said.strip("().").upper()) in tuple(LETTERS[: len(options)]):
        return letter
    raise ValueError(f"the answer {said!r} is none of its options")


def _first(row: Row, *names: str) -> str:
    for name in names:
        if row.get(name) not in (None, ""):
            return str(row[name])
    raise KeyError(f"it needs {' or '.join(names)}")


def _local_answer(row: Row) -> tuple[str, str]:
    answer = row.get("answer")
    return _first(row, "question", "problem", "query", "prompt"), "" if answer is None else str(answer).split("####")[
        -1
    ]


def _local_choice(row: Row) -> tuple[str, str]:
    given = row.get("options") or row.get("choices") or ()
    options = _plain_options(list(given.values()) if isinstance(given, dict) else given)
    text = _first(row, "question", "problem", "query", "prompt")
    if not options:
        return text, _letter_of(row.get("answer"), list(LETTERS))
    return _with_options(text, options), _letter_of(row.get("answer"), options)


def _local_code(row: Row) -> tuple[str, str]:
    text = _first(row, "question", "prompt", "problem", "query")
    stub = str(row.get("prompt") or "") if "def " in str(row.get("prompt") or "") else ""
    return text, _checks(Checks(_first(row, "entry_point"), _first(row, "test"), before=stub, stub=stub))


def _checks(checks: Checks) -> str:
    return json.dumps(checks._asdict())


def _gsm8k(row: Row) -> tuple[str, str]:
    _, mark, answer = row["answer"].rpartition("####")
    return row["question"], answer.strip() if mark else ""


def _aime(row: Row) -> tuple[str, str]:
    return row["problem"], str(int(row["answer"]))


def _gpqa(row: Row) -> tuple[str, str]:
    options = [row[name].strip() for name in ("Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))]
    right = options[0]
    random.Random(row["Record ID"]).shuffle(options)  # the data set has the right one first
    return _with_options(row["Question"], options), LETTERS[options.index(right)]


def _arc(row: Row) -> tuple[str, str]:
    labels, texts = row["choices"]["label"], row["choices"]["text"]  # labels are letters in most rows, else digits
    return _with_options(row["question"], texts), LETTERS[labels.index(row["answerKey"])]


def _medqa(row: Row) -> tuple[str, str]:
    options = _plain_options(row["options"])
    stem = row["query"].partition(f"\nA. {options[0]}")[0]
    return _with_options(stem, options), _letter_of(row["answer"], options)


def _mbpp(row: Row) -> tuple[str, str]:
    defined = re.findall(r"^def\s+(\w+)", row["code"], re.MULTILINE)
    name = next((name for name in defined if re.search(rf"\b{name}\s*\(", row["test_list"][0])), defined[-1])
    tests = "\n".join([*row.get("test_imports", ()), row["test"]])
    examples = "\n".join(row["test_list"])
    return f"{row['prompt'].strip()}\nThese must hold:\n{examples}", _checks(Checks(name, tests)) if row["test"] else ""


def _humaneval(row: Row) -> tuple[str, str]:
    checks = Checks(row["entry_point"], row["test"], before=row["prompt"], stub=row["prompt"])
    text = f"Complete this function:\n```python\n{row['prompt'].strip()}\n```"
    return text, _checks(checks) if row["test"] else ""


MEDQA_ROWS = "https://raw.githubusercontent.com/Gen-Verse/LatentMAS/main/data/medqa.json"
"""The rows that the published code ships, which are on no hub."""
_Source = tuple[str, str | None, str]
_DATA: Mapping[str, tuple[_Source | None, Callable[[Row], tuple[str, str]], str, Roles, int, str]] = {
    "gsm8k": (("openai/gsm8k", "main", "test"), _gsm8k, "number", MATH, 2048, "GSM8K"),
    "aime24": (("HuggingFaceH4/aime_2024", None, "train"), _aime, "number", MATH, 20000, "AIME24"),
    "aime25": (("yentinglin/aime_2025", None, "train"), _aime, "number", MATH, 20000, "AIME25"),
    "gpqa-diamond": (("Idavidrein/gpqa", "gpqa_diamond", "train"), _gpqa, "letter", CHOICE, 8192, "GPQA-D"),
    "arc-easy": (("allenai/ai2_arc", "ARC-Easy", "test"), _arc, "letter", CHOICE, 2048, "ARC-E"),
    "arc-challenge": (("allenai/ai2_arc", "ARC-Challenge", "test"), _arc, "letter", CHOICE, 2048, "ARC-C"),
    "mbpp+": (("evalplus/mbppplus", None, "test"), _mbpp, "code", CODE, 4096, "MBPP+"),
    "humaneval+": (("evalplus/humanevalplus", None, "test"), _humaneval, "code", CODE, 4096, "HumanEval+"),
    "medqa": (None, _medqa, "letter", MEDICAL, 4096, "MedQA"),
}
"""By name: where the rows are, how they are read, the grader, the roles, the paper's most tokens and its name."""


def _benchmark(name: str) -> RowTask:
    source, read, grader, roles, max_tokens, _ = _DATA[name]
    task = RowTask(name, lambda: _hub(*source) if source else _medqa_rows(), read, grader, roles, max_tokens)
    task.published = True
    return task


BENCHMARKS: Mapping[str, Callable[[], RowTask]] = {name: lambda name=name: _benchmark(name) for name in _DATA}  # type: ignore[misc]
"""The paper's nine."""


class Published(NamedTuple):
    """One figure of the paper's tables 1 to 3."""

    accuracy: float
    """In %."""
    output_tokens: float
    """Per question."""
    seconds: float
    """Of the whole run, on the authors' machine."""


def published(task: str, model: str, mode: str, arrangement: str) -> Published | None:
    """What the paper reports for a task, a model, a mode and an arrangement.

    Args:
        task: A name as in `BENCHMARKS`.
        model: A model's name or path; the paper has Qwen3 of 4B, 8B and 14B.
        mode: "single", "text" or "latent".
        arrangement: "single", "sequential" or "hierarchical".

    Returns:
        The figures, or None where the paper has none.
    """
    size = re.search(r"qwen3-(4b|8b|14b)(?![\w-])", model.lower())
    if task not in _DATA or size is None:
        return None
    setting = "hier" if arrangement == "hierarchical" else "seq"
    row = _published().get((setting, _DATA[task][-1], size[1].upper()))
    return None if row is None else Published(*(float(row[f"{what}_{mode}"]) for what in ("acc", "tok", "sec")))


@cache
def _published() -> dict[tuple[str, str, str], dict[str, str]]:
    with Path(__file__).with_name("published.csv").open(encoding="utf-8") as file:
        return {(row["setting"], row["task"], row["model"]): row for row in csv.DictReader(file)}
