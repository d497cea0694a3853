import json
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from langchain_latentmas.errors import GraderFailed, MissingExtra
from langchain_latentmas.evaluation.boxed import boxed
from langchain_latentmas.evaluation.graders import (
    MARKED,
    TAIL,
    Checks,
    Mathematics,
    boxed_number,
    chosen,
    code,
    exact,
    letter,
    number,
)

from .test_sandbox import descriptors

DATA = Path(__file__).parent.parent / "data" / "benchmarks"


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


GSM8K, MEDQA, HUMANEVAL = rows("gsm8k_test_60.jsonl"), rows("medqa_40.jsonl"), rows("humaneval_20.jsonl")


def medqa(row: dict[str, Any]) -> tuple[str, list[str]]:
    options = [option[3:] for option in row["options"]]
    return "ABCDE"[options.index(row["answer"])], options


def checks(row: dict[str, Any]) -> Checks:
    return Checks(row["entry_point"], row["test"], before=row["prompt"], stub=row["prompt"])


@pytest.mark.parametrize("row", GSM8K, ids=lambda row: row["question"][:20])
def test_published_numbers_are_right_and_corrupted_ones_wrong(row: dict[str, Any]) -> None:
    answer = row["answer"].split("#### ")[1]
    plain = answer.replace(",", "")
    for right in (
        row["answer"],
        f"\\boxed{{{answer}}}",
        f"So ${plain} is it.\nThe answer is ${plain}.",
        f"\\boxed{{{plain}.0}}",
    ):
        assert number(right, answer), right
    solution = row["answer"].split("#### ")[0]
    for wrong in (
        str(int(plain) + 1),
        str(int(plain) - 1),
        f"{plain}0",
        f"-{plain}",
        f"{plain}.5",
        str(int(plain) * 2),
        plain[::-1] + "7",
        "",
    ):
        assert not wrong or not number(f"{solution}#### {wrong}", answer), wrong
        assert not number(f"{solution}\\boxed{{{wrong}}}", answer), wrong


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (r"\boxed{42.}", "42"),
        (r"\boxed{1,234.}", "1234"),
        (r"\boxed{\$18.}", "18"),
        (r"\boxed{\text{18}}", "18"),
        (r"\boxed{\text{18 apples}}", "18"),
        (r"\boxed{18~\text{apples}}", "18"),
        (r"\boxed{€18}", "18"),
        (r"\boxed{70 000}", "70000"),
        (r"\boxed{18 dollars}", "18"),
        (r"\boxed{\text{18 eggs}}", "18"),
        (r"\boxed{72 clips per day}", "72"),
        (r"\boxed{5 kg}", "5"),
        (r"\boxed{60.0\%}", "60"),
        (r"\boxed{2 \text{ million}}", "2000000"),
        (r"\boxed{3 dozen}", "36"),
        (r"\boxed{3 hundred thousand}", "300000"),
        (r"\boxed{2.5 \text{ hundred million dollars}}", "250000000"),
        (r"The answer is \(18\).", "18"),
        ("The answer is 5. No. Final answer: x = 18", "18"),
        ("**Answer**: 18, not 20", "18"),
        ("The answer is \N{MINUS SIGN}5", "-5"),
        ("\\boxed{\N{MINUS SIGN}5}", "-5"),
    ],
)
def test_numbers_are_right_however_they_are_dressed(said: str, answer: str) -> None:
    assert number(said, answer)
    assert not number(said, str(int(answer) + 1))


def test_rows_of_a_matrix_stay_rows() -> None:
    matrix = r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"
    assert number(rf"\boxed{{{matrix}}}", matrix)


@pytest.mark.parametrize(
    ("said", "held"),
    [
        (r"\boxed{14}", 14),
        (r"\boxed{14.0}", 14),
        (r"\boxed{14 \text{ coins}}", 14),
        (r"\boxed{14 coins}", 14),
        (r"\boxed{14 \text{ million}}", 14_000_000),
        (r"\boxed{14 thousand million stars}", 14_000_000_000),
        (r"\boxed{14 or more}", None),
        (r"\boxed{14 hundred and five}", None),
        (r"\boxed{14 thirds}", None),
        (r"\boxed{1 \text{ half}}", None),
        (r"\boxed{3 quarters of a cup}", None),
        (r"\boxed{14 quarters}", 14),
        (r"\boxed{14 third graders}", 14),
        (r"\boxed{14 x}", None),
        (r"\boxed{x}", None),
        ("14", None),
    ],
)
def test_a_box_holds_a_number_maybe_with_a_unit(said: str, held: int | None) -> None:
    assert boxed_number(said) == held


def test_tests_run_without_a_prompt_that_is_no_program() -> None:
    talk = "Write def add(a, b): that adds."
    tests = Checks("add", "assert add(1, 2) == 3", before=talk, stub=talk)
    assert code("```python\ndef add(a, b):\n    return a + b\n```", tests)
    assert not code("```python\ndef add(a, b):\n    return a - b\n```", tests)


@pytest.mark.parametrize("row", MEDQA, ids=lambda row: row["pid"])
def test_published_choices_are_right_and_other_ones_wrong(row: dict[str, Any]) -> None:
    right, options = medqa(row)
    assert letter(row["answer"], right, options)
    for i, option in enumerate(options):
        one = "ABCDE"[i]
        for said in (option, f"{one}. {option}", f"\\boxed{{{one}}}", f"The answer is ({one}).", f"Hm.\n**{one}**"):
            assert letter(said, right, options) == (one == right), said


@pytest.mark.parametrize("row", HUMANEVAL, ids=lambda row: row["entry_point"])
def test_published_programs_are_right_and_corrupted_ones_wrong(row: dict[str, Any]) -> None:
    program = row["prompt"] + row["canonical_solution"]
    assert code(f"Here it is:\n```python\n{program}```\nIt works.", checks(row))
    rng = random.Random(row["task_id"])
    corrupted = corruptions(row["canonical_solution"])
    for solution in rng.sample(corrupted, 3):
        assert not code(row["prompt"] + solution, checks(row)), solution


def corruptions(solution: str) -> list[str]:
    """Programs that are wrong for sure: they return something else, or nothing."""
    lines = solution.rstrip().splitlines()
    returned = re.sub(r"\breturn\b(.*)$", r"return [\1] if True else None", solution, count=0, flags=re.MULTILINE)
    return [
        returned,
        "    return None\n",
        "    pass\n",
        solution.replace("return", "yield"),
        "    " + "\n    ".join(line[4:] for line in lines[:-1]) + "\n    raise ValueError\n",
        "    return (\n",
    ]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{1} and \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed {3}", "3"),
        ("\\boxed{3", None),
        ("\\boxed{4} \\boxed{5", "4"),
        ("3", None),
        ("", None),
    ],
)
def test_the_last_whole_box_counts(text: str, content: str | None) -> None:
    assert boxed(text) == content


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{\\frac{1}{2}}", "0.5"),
        ("\\boxed{2\\sqrt{3}}", "\\sqrt{12}"),
        ("\\boxed{18\\text{ dollars}}", "18"),
        ("\\boxed{x = 18}", "18"),
        ("\\boxed{025}", "25"),
        ("\\boxed{1{,}000}", "1000"),
        ("First 17, and in the end 18.", "18"),
        ("**Final answer:** 1,234.50", "1234.5"),
        ("The answer is 18 because 3 of them are left.", "18"),
        ("\\boxed{12345678901234567890123}", "12345678901234567890123"),
        ("The answer is 12\\sqrt{3}.", "12\\sqrt{3}"),
        ("The answer is $12\\sqrt{3}$ cm.", "\\sqrt{432}"),
        ("The answer is 12√3.", "12\\sqrt{3}"),
        ("The answer is \\frac{1}{2}, not 3.", "0.5"),
        ("So the answer is 3 + 4 = 7.", "7"),
        ("Answer: 3*4", "12"),
        ("The answer is 2 \\times 10^3.", "2000"),
        ("The answer is 2 x 10^{3} because 10 cubed is 1000.", "2000"),
        ("The answer is 2**10.", "1024"),
        ("The answer is 3.5/2", "1.75"),
        ("Answer: 1.5e3", "1500"),
        ("The answer is 18\\,000.", "18000"),
        ("(The answer is 3/4)", "0.75"),
        ("The answer is 5 apples.", "5"),
        ("The answer is 5 a day.", "5"),
        ("The answer is $18.", "18"),
        ("The answer is 18 dollars", "18"),
        ("The answer is 18\\text{ dollars}.", "18"),
        ("The answer is 50%.", "50"),
        ("The answer is 50km/h", "50"),
        ("The answer is 18 - it was 20 before.", "18"),
        ("The answer is **18** (9 + 9).", "18"),
        ("The answer is 18! No doubt.", "18"),
        ("(The answer is 18)", "18"),
        ("The answer is 18 or so.", "18"),
        ("The answer is 3/4 or 0.75.", "0.75"),
        ("\\boxed{25\\%}", "0.25"),
        ("\\boxed{12.5%}", "0.125"),
        ("\\boxed{100\\%}", "1"),
    ],
)
def test_numbers_are_compared_by_value(text: str, answer: str) -> None:
    assert number(text, answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{18} No: \\boxed{19}", "18"),
        ("\\boxed{19} It is 18.", "18"),
        ("\\boxed{18.5}", "18"),
        ("\\boxed{25}", "0.25"),
        ("\\boxed{25\\%}", "0.5"),
        ("\\boxed{\\frac{5}{0}}", "5"),
        ("\\boxed{nan}", "18"),
        ("\\boxed{}", "18"),
        ("\\boxed{12345678901234567890124}", "12345678901234567890123"),
        ("The answer is 12\\sqrt{3}.", "12"),
        ("So the answer is 3 + 4 = 7.", "3"),
        ("The answer is 5x.", "5"),
        ("The answer is 5xy", "5"),
        ("The answer is 5 - x", "5"),
        ("The answer is 12 sqrt(3).", "12"),
        ("The answer is 5 1/2.", "5"),
        ("The answer is 3:4", "3"),
        ("The answer is 3.5/2", "3"),
        ("Answer: 1.5e3", "1.5"),
        ("The answer is 18 or 20.", "18"),
        ("The answer is $18, or $20.", "18"),
        ("I do not know.", "18"),
        ("", "18"),
        ("\\boxed{" * 100_000, "18"),
        ("\\boxed{__import__('os').system('false')}", "0"),
    ],
)
def test_other_numbers_are_wrong(text: str, answer: str) -> None:
    assert not number(text, answer)


@given(
    st.integers(-(10**40), 10**40), st.integers(1, 10**6), st.sampled_from(["\\boxed{%s}", "#### %s", "Answer: %s."])
)
def test_whole_numbers_equal_themselves_and_nothing_else(value: int, offset: int, said: str) -> None:
    assert number(said % value, str(value))
    assert number(said % f"{value:,}", str(value))
    assert not number(said % (value + offset), str(value))


@given(
    st.text(alphabet="ab {}\\", max_size=30).filter(lambda text: text.count("{") == text.count("}")),
    st.text(max_size=20),
)
def test_what_is_boxed_is_found(content: str, before: str) -> None:
    depths = [content[: i + 1].count("{") - content[: i + 1].count("}") for i in range(len(content))]
    assume(all(depth >= 0 for depth in depths))
    assert boxed(f"{before}\\boxed{{{content}}}") == content.strip()


def test_mathematics_that_hangs_is_a_failed_grader_and_the_next_one_works() -> None:
    mathematics = Mathematics()
    assert mathematics.equal("\\boxed{0.5}", "\\boxed{\\frac{1}{2}}")  # the first one waits for an import
    tower = "\\boxed{" + "9^{" * 6 + "9" + "}" * 7
    with pytest.raises(GraderFailed, match="within 2 s"):
        mathematics.equal(tower, "\\boxed{8^{8^{8^{8}}}}", seconds=2)
    assert mathematics.equal("\\boxed{0.5}", "\\boxed{\\frac{1}{2}}")
    assert not mathematics.equal("\\boxed{0.5}", "\\boxed{\\frac{1}{3}}")


def test_mathematics_finds_what_this_process_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "math_verify.py").write_text("parse = str\ndef verify(gold, said): return [gold, said] == ['a', 'b']\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert Mathematics().equal("b", "a")


def test_mathematics_that_is_not_installed_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtra, match=r"pip install -e '\.\[eval\]'"):
        Mathematics().equal("\\boxed{1}", "\\boxed{1}")


def test_mathematics_that_cannot_be_started_is_a_failed_grader_and_starts_later() -> None:
    mathematics = Mathematics()
    with descriptors(0), pytest.raises(GraderFailed, match="cannot be started"):
        mathematics.equal("\\boxed{1}", "\\boxed{1}")
    assert mathematics.equal("\\boxed{1}", "\\boxed{1}")


def test_an_answer_without_an_expression_is_a_failed_grader() -> None:
    with pytest.raises(GraderFailed, match="no expression in the answer"):
        number("\\boxed{five}", " ")


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("B.", "B"),
        ("\\boxed{\\text{B}}", "B"),
        ("\\boxed{B. Beta blocker}", "B"),
        ("The correct option is B, because option A is not.", "B"),
        ("The answer is B, since option A is wrong.", "B"),
        ("Option A is wrong, so it must be option B", "B"),
        ("Answer: **B**", "B"),
        ("Answer: B. Beta blocker", "B"),
        ("A is not it.\nB", "B"),
        ("beta  blocker.", "B"),
        ("The answer is: Beta blocker", "B"),
        ("C. difficile", "D"),
        ("Option B is incorrect. It must be C.", "C"),
        ("Option B is clearly not it. Option (C) can be excluded. Option D it is.", "D"),
        ("**Option C** isn't right, so **B** is the answer.", "B"),
        ("The answer is not A but C.", "C"),
        ("The answer isn't A.", None),
        ("**Answer**: Option B", "B"),
        ("The answer is **Option B**.", "B"),
        ("Answer: A, of course", "A"),
        ("The answer is A because it thins blood.", "A"),
        ("Answer: A beta blocker", None),
        ("\\boxed{Option B}", "B"),
        ("\\boxed{\\text{Option B}}", "B"),
        ("\\boxed{option (b): Beta blocker}", "B"),
        ("\\boxed{C \\text{ Codeine}}", "C"),
        ("\\boxed{C - Codeine}", "C"),
        ("\\boxed{C Aspirin}", None),
        ("\\boxed{Answer: B}", "B"),
        ("\\boxed{\\textrm{B},}", "B"),
        ("\\boxed{A and B}", None),
        ("The answer is \\(C\\)", "C"),
        ('The answer is "C".', "C"),
        ("Answer - C", "C"),
        ("I choose B.", "B"),
        ("Hence (C)", "C"),
        ("The correct choice is Codeine.", "C"),
        ("Answer: A or B", None),
        ("The correct answer is **B**, since the answer C would need fever.", "B"),
        ("Answer: Z", None),
        ("The answer is a matter of taste.", None),
        ("Can't say.", None),
        ("", None),
        ("\\boxed{}", None),
        ("\\boxed{AB}", None),
    ],
)
def test_choices_are_read(text: str, choice: str | None) -> None:
    assert chosen(text, ["Aspirin", "Beta blocker", "Codeine", "C. difficile"]) == choice


@pytest.mark.parametrize("text", ["\\boxed{B}", "The answer is B", "B", "(b)", "Option B", "A"])
def test_a_letter_comes_before_an_option_of_the_same_name(text: str) -> None:
    assert chosen(text, ["O", "A", "B", "AB"]) == text.strip("()}").upper()[-1]
    assert chosen("\\boxed{AB}", ["O", "A", "B", "AB"]) == "D"


def test_a_pronoun_is_no_choice() -> None:
    assert chosen("Answer: I think B is right") == "B"
    assert chosen("Answer: I cannot say") is None
    assert chosen("Answer: I") == "I"


@pytest.mark.parametrize(
    "mark", ["answer", "answer is", "the correct option", "option", "answer is not A but", "####", "\\boxed"]
)
@pytest.mark.parametrize("blank", [" ", "\n", " *", "_"])
def test_long_runs_of_blanks_take_no_time(mark: str, blank: str) -> None:
    begun = time.thread_time()
    for said in (mark + blank * 100_000, mark + blank * 900 + "." + blank * 900 + "Z"):
        assert chosen(said, ["Yes", "No"]) is None
        assert MARKED.findall(said[-TAIL:]) == []
    assert time.thread_time() - begun < 1


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("\\boxed{Paris}", "paris", True),
        (" Paris. ", "Paris", True),
        ("New  York", "new york", True),
        ("\\boxed{\\text{New York}}", "new york", True),
        ("\\boxed{\\text{Paris}.}", "\\textbf{Paris}", True),
        ("It is Paris", "Paris", False),
        ("\\boxed{\\text{Rome}}", "Paris", False),
    ],
)
def test_words_are_compared_as_they_are(text: str, answer: str, right: bool) -> None:
    assert exact(text, answer) is right


SORT = Checks("order", "assert order([2, 1]) == [1, 2]")


@pytest.mark.parametrize(
    "text",
    [
        "def order(x): return sorted(x)",
        "```python\ndef order(x):\n    return sorted(x)\n```",
        "First:\n```\ndef other(x): return x\n```\nthen\n```py\ndef order(x): return sorted(x)\n```\nor\n```\n1\n```",
        "```python\ndef order(x):\n    return sorted(x)",
        "import numpy as np\ndef order(x): return np.sort(np.array(x))",
        "1. So:\n\n   ```python\n   def order(x):\n\n       return sorted(x)\n   ```\n2. Done.",
        "- ```\n  def order(x):\n      return sorted(x)\n  ```",
        "\t```\n\tdef order(x):\n\t\treturn sorted(x)\n\t```",
        "   ```\ndef order(x):\n  if x:\n    return sorted(x)\n   ```",
    ],
)
def test_programs_are_found_in_texts(text: str) -> None:
    assert code(text, SORT)


def test_a_block_loses_no_more_than_the_indentation_of_its_fence() -> None:
    assert code("So:\n  ```python\n      return sorted(x)\n  ```", SORT._replace(stub="def order(x):\n    x = x[:]\n"))


@pytest.mark.parametrize(
    "blocks",
    [
        ["import math\ndef key(\n    x,\n) -> int:\n\n    return x // ONE\nprint(order([]))", "ONE = 1", "key=key"],
        ["from math import (\n    sin,\n    cos as cosine,\n)", "key=lambda x: -cosine(x)"],
        ["import functools\n@functools.cache\ndef key(x: List[int]):\n    return x", "key=lambda x: key(x)"],
        ["key=helper\n\ndef sort(x): return None", "reverse=False", "def sort(x): return None\nraise ValueError"],
        ["import nowhere\nKEY = nowhere.key", "key=None"],
    ],
)
def test_definitions_of_other_blocks_come_along_where_they_are_used(blocks: list[str]) -> None:
    blocks = [re.sub("^(key|reverse)=.*", r"def order(x): return sorted(x, \g<0>)", block) for block in blocks]
    text = "".join(f"So:\n```python\n{block}\n```\n" for block in blocks)
    assert code(text, SORT._replace(stub="from typing import List\n"))


def test_what_crosses_from_a_program_to_its_tests_is_plain_data() -> None:
    tests = """
import collections, decimal, math
assert give(1) == {1: (2.5, None, True, 'é', b'x', {1, 2}, 1j)}
assert math.isnan(give(2))
assert list(give(3)) == [0, 1, 2] and give(3) != [0, 1, 2]
assert give(4) == collections.Counter('aab') and give(5) == decimal.Decimal('0.1')
assert give(n=6) == 10 ** 50
try:
    give(7)
except KeyError as error:
    assert error.args == ("'k'",)
else:
    assert False
"""
    program = """
import collections, decimal
def give(n):
    if n == 7: raise KeyError('k')
    return [None, {1: (2.5, None, True, 'é', b'x', {1, 2}, 1j)}, float('nan'), iter(range(3)),
            collections.Counter('aab'), decimal.Decimal('0.1'), 10 ** 50][n]
"""
    assert code(program, Checks("give", tests))


def test_what_numpy_made_and_views_of_dictionaries_cross_from_anywhere_in_a_value() -> None:
    tests = """
mean, rest = give(0)
assert type(mean) is float and rest == {'std': 0.5, 'all': [[1, 2]], 'ok': True, 'when': [(1, 2)]}
assert give(1) == {'b', 'a'} and list(give(1)) == ['b', 'a']
keys, values, items = give(2)
assert keys == {'b', 'a'} and list(values) == [[1], 2] and sorted(items, key=str) == [('a', 2), ('b', [1])]
"""
    program = """
import numpy as np
def give(n):
    d = {'b': [1], 'a': 2}
    inner = {'std': np.std([1, 2]), 'all': [np.array([1, 2])], 'ok': np.bool_(True), 'when': [tuple(np.array([1, 2]))]}
    return [(np.mean([1, 2]), inner), d.keys(), (d.keys(), d.values(), d.items())][n]
"""
    assert code(program, Checks("give", tests))


@pytest.mark.parametrize("tests", ["assert check(2) == 4", "def check(candidate):\n    assert candidate(2) == 4"])
def test_a_function_may_be_called_check(tests: str) -> None:
    assert code("def check(x): return 2 * x", Checks("check", tests))
    assert not code("def check(x): return x", Checks("check", tests))


@pytest.mark.parametrize(
    ("tests", "why"),
    [
        ("assert order(lambda: 1) == 1", "cannot cross"),
        ("assert order(", "SyntaxError"),
        ("x = 1", "never call order"),
        ("def test(): order(1)", "never call order"),
        ("import nowhere\nassert order(1) == 1", "ModuleNotFoundError: No module named 'nowhere'"),
        ("def check(candidate):\n    assert WANTED == candidate(1)", "NameError"),
    ],
)
def test_broken_tests_are_a_failed_grader(tests: str, why: str) -> None:
    with pytest.raises(GraderFailed, match=why):
        code("def order(x): return x", Checks("order", tests))
