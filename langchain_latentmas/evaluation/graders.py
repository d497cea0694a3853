"""Graders: does a text give the right answer? Numbers, letters, code, and words as they are."""

import json
import math
import re
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from fractions import Fraction
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import ClassVar, NamedTuple

from ..errors import GraderFailed, MissingExtra
from . import harness, sandbox
from .boxed import boxed

HARNESS = Path(harness.__file__)
MATH_SECONDS = 15.0
MINUS = "\N{MINUS SIGN}"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TAIL = 2000  # characters at the end of a text in which an answer is looked for that no \boxed{} marks
NUMBER = r"[+-]?(?:\d{1,3}(?:(?:,|\{,\}|\\,)\d{3})+|\d+)(?:\.\d+)?"
_COMMAND = r"\\(?!text|math|mbox)[a-z]+"
_VARIABLE = r"(?:[a-z]|[abcxyz]+)(?![a-z'’])"
_OPERAND = rf"[-+({{]*(?:\.?\d|√|{_COMMAND}|(?![ai][ \t]){_VARIABLE})"
# A number with the mathematics behind it: in "12\sqrt{3} cm" and "18 - 2" all of it, in "18 - it was 20" the 18 alone.
EXPRESSION = rf"""
    (?: {NUMBER} | [+-]?\\(?:[dt]?frac|sqrt|pi)(?![a-z]) )
    (?:
        (?: [ \t]*+[-+/^=×·÷±√][ \t]*+ | [ \t]++[*x][ \t]++ | \*\*? | : )(?={_OPERAND})
        | [ \t]*+(?: {_COMMAND} | (?:sqrt|pi)(?![a-z]) )[ \t]*+
        | [({{](?={_OPERAND})
        | [)}}]
        | \.?\d
        | [ \t]++\d+/\d
        | (?<![a-z]){_VARIABLE}
    )*+
"""
# What an answer stands behind; "must answer 10 questions" is none.
_MARK = r"(?:answer[*_]*+(?:\s++is\b\s*+:?+|\s*+[:=])|(?m:^)[ \t*_]*+(?:final\s++)?+answer\b)"
MARKED = re.compile(
    rf"(?:\#\#\#\#|{_MARK})[*_$€£\s]*+(?:\\[(\[]\s*+)?+(?:[a-z]\s*+=\s*+)?+[$€£]?+"
    rf"({EXPRESSION}(?:[ \t*_$,]*+\bor\b[ \t*_$€£]*+(?:{EXPRESSION}))*+)",  # "18 or 20" is neither
    re.IGNORECASE | re.VERBOSE,
)
_TEXT = r"\\(?:text|textbf|textrm|textit|mathrm|mathbf)\s*\{([^{}]*)\}"
# A number, and what it counts: in LaTeX's \text{...}, or a word that is neither a variable nor a part of a sum.
MEASURED = re.compile(
    rf"(?P<number>.*?\d)\s*(?:\\?%|{_TEXT}"
    r"|(?P<unit>(?:(?!sqrt|mod)[a-z]{3,}|[kcm]?[mgl]|ft|lb|oz|hr|am|pm)(?:[ .'-]+[a-z]+)*))",
    re.IGNORECASE,
)
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
# Mathematics in words, and parts of something; 25 quarters by themselves are coins, and 18 third graders are children.
NO_UNIT = re.compile(
    r"(?:and|or|plus|minus|times|over|squared|cubed|factorial)(?: .*)?|quarters? of .*"
    r"|(?:half|halves|(?:third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth)s?)(?: of .*)?"
)
_MARKUP = r"[*_(\[$\s`\"'“\\]*+"
# A letter alone: no part of a word, no article or pronoun ("A beta blocker", "I think"), and not ruled out behind it.
_CHOSEN = r"""(?x:
    (?![A-Za-z'’])
    (?! (?<=[AI])[ \t]++(?!(?:is|because|since|as|and|but|not|or|due|which|if|in|by|for|from|with)\b)[a-z] )
    (?! [*_)\]]*+\s++(?:
        (?:is|was)(?: n['’]t | (?:\s++(?:\w+ly|also))*+\s++(?:not|incorrect|wrong|false|out|ruled\s++out) )
        | can(?: not | ['’]t | \s++be\s++(?:ruled\s++out|excluded|eliminated) )
    )\b )
    (?! [*_)\]]*+\s*+(?:/|\bor\b|\band\b)\s*+[*_(\[]*+(?:option\s++)?+[A-HJ-Z](?![A-Za-z]) )
)"""

# A block of code, and what stands before its fence where that indents it: blanks, or the mark of a list's item.
FENCED = re.compile(
    r"(?:^([ \t]*+(?:(?:[-*+]|\d+[.)])[ \t]++)?+))?```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL | re.MULTILINE
)
# A function, a class, an import or a constant of a module, with the lines that are indented under it.
DEFINITION = re.compile(
    r"""
    ^(?:@.*\n){0,9}+
    (?: (?:async[ ]+)?(?:def|class)[ ]+\w | import[ ] | from[ ].*[ ]import[ ] | [A-Z_][A-Z\d_]*[ ]*=(?!=) )
    .*(?:\n(?:[ \t)\]}].*)?(?=\n|\Z))*+
    """,
    re.MULTILINE | re.VERBOSE,
)


def check_installed(grader: str) -> None:
    """Looks for what a grader needs.

    Args:
        grader: "number", "letter", "code" or "exact".

    Raises:
        MissingExtra: If it is not there.
    """
    if grader == "number" and find_spec("math_verify") is None:
        raise MissingExtra.of("eval", "Grading numbers needs math-verify")


def number(text: str, answer: str) -> bool:
    r"""Whether a text's final number is the right one, however it is written (math-verify).

    The final number is the last \boxed{...}; where there is none, the number behind the last "####" or "answer is",
    with the mathematics that goes on from it; else what math-verify takes for it, as a rule the last one. A percentage
    may be asked for as such, or as a share: `25\%` is both 25 and 0.25.

    Args:
        text: What the agent said.
        answer: The right answer, a number or LaTeX.

    Raises:
        MissingExtra: If math-verify is needed and not installed.
        GraderFailed: If it cannot compare the two.
    """
    text = text.replace(MINUS, "-")
    said = boxed(text)
    said = _marked(text[-TAIL:]) if said is None else _tidied(said)
    if said is not None and (ours := _measured(said)) is not None and (theirs := _plain_number(answer)) is not None:
        return ours == theirs or ("%" in said and ours == 100 * theirs)
    return Mathematics.shared().equal(text[-TAIL:] if said is None else f"\\boxed{{{said}}}", f"\\boxed{{{answer}}}")


def boxed_number(text: str) -> Fraction | None:
    r"""What the last \boxed{...} holds, if that is a plain number, maybe with a unit; needs no math-verify."""
    said = boxed(text.replace(MINUS, "-"))
    return None if said is None else _measured(_tidied(said))


def letter(text: str, answer: str, options: Sequence[str] = ()) -> bool:
    r"""Whether a text chooses the right letter.

    The choice is the last \boxed{...}; where there is none, the letter behind the last "answer is"; else the last
    letter that has a line to itself, or stands behind "option"; else what the last line, or the whole text, is.

    Args:
        text: What the agent said.
        answer: The right letter.
        options: The options' texts without their letters, in order; they are understood as well.
    """
    return chosen(text, options) == answer.strip().upper()


def chosen(text: str, options: Sequence[str] = ()) -> str | None:
    """The letter that a text chooses; see `letter`."""
    letters = LETTERS[: len(options) or 26]
    if (said := boxed(text)) is not None:
        return _choice(said, letters, options)
    tail, one = text[-TAIL:].strip(), rf"(?<![A-Za-z])([{letters}]){_CHOSEN}"
    asked = (
        r"(?:(?:answer|(?:correct|right|best)\s++(?:option|choice))[*_]*+"
        r"(?:\s++(?:is\b|(?:must|would)\s++be\b)\s*+:?+|\s*+[:=–-])|(?m:^)[ \t*_]*+(?:final\s++)?+answer\b)"
    )
    for pattern in (
        rf"(?i:{asked}{_MARKUP}(?:not\s++(?:option\s++)?\w\W++but\s++)?+(?:option{_MARKUP})?+){one}",
        rf"(?m:^)[*_(\[]*+([{letters}])[*_)\]]*+[.:]?+[ \t]*+(?m:$)",
        rf"(?i:(?:option|choice|choose|select|(?:must|should|has\s++to)\s++be){_MARKUP}){one}"
        rf"|(?i:hence|thus|therefore),?+\s*+[*_]*+\({one}"
        rf"|{one}[*_)\]]*+\s++is\s++(?:the\s++)?+(?:right|correct|answer)",
    ):
        if found := list(re.finditer(pattern, tail)):
            return str(found[-1][found[-1].lastindex or 0])
    said = re.split(r"(?i:(?:answer|(?:correct|right|best)\s+(?:option|choice))(?:\s+is:?|:))", tail)[-1]
    return _choice(said, letters, options) or _choice(tail.splitlines()[-1] if tail else "", letters, options)


def exact(text: str, answer: str) -> bool:
    r"""Whether the last \boxed{...}, or else the whole text, is the answer.

    Case, blanks, a final stop and the `\text{...}` around words make no difference.
    """
    said = boxed(text)
    return _words(text if said is None else said) == _words(answer)


class Checks(NamedTuple):
    """What a program is tested with."""

    name: str
    """The function that they call."""
    code: str
    """Statements that call it, or a function `check(candidate)`."""
    before: str = ""
    """Code that the tests need, say helper functions of the prompt."""
    stub: str = ""
    """Code that an answer may continue: imports, and the head of the function."""


def code(text: str, tests: Checks, limits: sandbox.Limits | None = None) -> bool:
    """Whether a text's program passes its tests; both run in sandboxes, apart from each other.

    Args:
        text: What the agent said; see `program_of`.
        tests: The tests.
        limits: For each of the two.

    Raises:
        GraderFailed: If the tests themselves are broken.
        SandboxUnavailable: If untrusted code cannot be run here.
    """
    source = HARNESS.read_text()
    before = tests.before if _compiles(tests.before) else ""  # not so where a prompt only talks of a function
    _, checks = sandbox.run(
        f"{source}\n\nserve(PIPES, {program_of(text, tests)!r}, {tests.name!r})\n",
        f"{source}\n\ncheck(PIPES, {before!r}, {tests.code!r}, {tests.name!r})\n",
        limits=limits,
    )
    if checks.status == harness.BROKEN:
        raise GraderFailed(f"The tests of {tests.name} are broken: {checks.errors.strip()[-300:]}")
    return checks.ended == "by itself" and checks.status == 0


def program_of(text: str, tests: Checks) -> str:
    """The program in a text: its last fenced block that defines the function, else the text; the stub in front.

    Where that block uses what only other blocks define or import, their definitions and imports come along, but none
    of their other statements: these may be examples, or a draft. The indentation of a fence is no part of its block.
    """
    blocks = [_unindented(block, re.sub(r"\S", " ", before)) for before, block in FENCED.findall(text)]
    defines = re.compile(rf"^(?:async\s+)?def\s+{re.escape(tests.name)}\b|^{re.escape(tests.name)}\s*=", re.MULTILINE)
    whole = [block for block in [text, *blocks] if defines.search(block) and "```" not in block]
    if whole:
        program = [tests.stub if _compiles(tests.stub) else "", whole[-1]]
        known = {name for source in program for part in DEFINITION.findall(source) for name in _defined(part)}
        parts = [part for block in blocks if block != whole[-1] for part in DEFINITION.findall(block)]
        helpers = [part for part in parts if not known & _defined(part)]
        used = set(re.findall(r"(?<![.\w])[^\W\d]\w*", whole[-1]))
        if any(used & _defined(part) for part in helpers):
            program[1:1] = helpers
        return "\n".join(program)
    return tests.stub + (blocks[-1] if blocks else text)


class Mathematics:
    """math-verify in a process of its own: its alarms need a main thread, and sympy can hang in spite of them."""

    _shared: ClassVar["Mathematics | None"] = None
    _sharing: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    @classmethod
    def shared(cls) -> "Mathematics":
        """The one of this process."""
        with cls._sharing:
            cls._shared = cls._shared or cls()
            return cls._shared

    def equal(self, said: str, answer: str, seconds: float = MATH_SECONDS) -> bool:
        """Whether the mathematical expressions in two texts are equal.

        Raises:
            MissingExtra: If math-verify is not installed.
            GraderFailed: If it cannot be started, finds no expression in the answer, raises, or takes longer than
                `seconds`.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            process = self._process
            assert process.stdin is not None
            assert process.stdout is not None
            line = ""
            try:
                process.stdin.write(json.dumps([said, answer]) + "\n")
                process.stdin.flush()
                if select.select([process.stdout], [], [], seconds)[0]:
                    line = process.stdout.readline()
            except OSError:
                pass
            if not line:
                process.kill()
                process.communicate()
                raise GraderFailed(f"math-verify did not come to an end within {seconds:.0f} s.")
        verdict = json.loads(line)
        if verdict == "missing":
            raise MissingExtra.of("eval", "Grading mathematics needs math-verify")
        if isinstance(verdict, str):
            raise GraderFailed(f"math-verify: {verdict}")
        return bool(verdict)

    @staticmethod
    def _start() -> "subprocess.Popen[str]":
        try:
            return subprocess.Popen(
                [sys.executable, "-I", "-c", _WORKER, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError as error:
            raise GraderFailed(f"math-verify cannot be started ({error}); see to it, and grade again.") from error


# One request per line. What math-verify writes on stdout must not be taken for a verdict. Modules are looked for where
# the process that asks finds its own, once the standard library is loaded.
_WORKER = """
import json, logging, os, sys
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
logging.disable()
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
except (ImportError, ValueError):
    pass
sys.path[:] = json.loads(sys.argv[1])
for line in sys.stdin:
    said, answer = json.loads(line)
    try:
        from math_verify import parse, verify
        gold = parse(answer)
        verdict = verify(gold, parse(said)) if gold else "it finds no expression in the answer " + answer
    except ImportError:
        verdict = "missing"
    except BaseException as error:
        verdict = f"{type(error).__name__}: {error}"
    print(json.dumps(verdict), file=out, flush=True)
"""


def _marked(text: str) -> str | None:
    """The expression behind the last mark, as LaTeX; None where there is none."""
    found = MARKED.findall(text)
    if not found:
        return None
    said = re.sub(r"\s+[x×]\s+", r" \\times ", found[-1]).replace("**", "^").replace("√", "\\sqrt ")
    balanced = said.count("(") == said.count(")") and said.count("{") == said.count("}")
    return said if balanced else said.rstrip(")}")


def _tidied(said: str) -> str:
    r"""The content of a box without what math-verify trips over: `\text{...}` around all, a final stop, `70 000`."""
    said = re.sub(r"(?<!\\)\\ ", " ", said.replace("~", " ")).strip()
    if whole := re.fullmatch(rf"{_TEXT}\.?", said):
        said = whole[1]
    said = said.strip(" €£").rstrip(".").strip()
    return said.replace(" ", "") if re.fullmatch(r"[+-]?\d{1,3}(?: \d{3})+", said) else said


def _plain_number(text: str) -> Fraction | None:
    """A number without any mathematics to it: `1,234.50`, `$18`, `1.5e3`."""
    bare = text.strip().strip("$").replace("\\$", "").replace("\\,", "").replace("{,}", ",").strip()
    bare = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", bare)
    return Fraction(bare) if re.fullmatch(r"[+-]?\d{1,50}(\.\d{1,50})?([eE][+-]?\d{1,3})?", bare) else None


def _measured(said: str) -> Fraction | None:
    r"""A plain number, maybe with a unit or in percent: `18 apples`, `60.0\%`, `2 \text{ hundred million dollars}`."""
    found = MEASURED.fullmatch(said.strip())
    if found is None or found["number"] == said:
        return _plain_number(said)
    words = (found[2] or found["unit"] or "").lower().split()
    scales = [SCALES[word] for word in takewhile(SCALES.__contains__, words)]
    value = None if NO_UNIT.fullmatch(" ".join(words[len(scales) :])) else _plain_number(found["number"])
    return None if value is None else value * math.prod(scales)


def _choice(said: str, letters: str, options: Sequence[str]) -> str | None:
    """The letter that a short text names: by itself, or by its option, or in front of its option."""
    bare = re.sub(_TEXT, r"\1", said).strip(" \n\t*_$.")
    one = rf"(?:(?i:option|choice|answer)\s*+:?+\s*+)?+[(\[]?([{letters}{letters.lower()}])"
    if found := re.fullmatch(rf"{one}[)\].:,]?", bare):
        return found[1].upper()
    found = re.fullmatch(rf"{one}[)\].:,–-]?\s+[–-]?(.+)", bare) if options else None
    if found and _words(options[letters.index(found[1].upper())]) == _words(found[2]):
        return found[1].upper()
    named = [letters[i] for i, option in enumerate(options) if _words(option) == _words(bare)]
    if len(named) == 1:
        return named[0]
    found = re.match(rf"{one}[)\].:]", bare)
    return found[1].upper() if found else None


def _words(text: str) -> str:
    return " ".join(re.sub(_TEXT, r"\1", text).split()).strip(" .").casefold()


def _defined(part: str) -> set[str]:
    """The names that a `DEFINITION` gives; none for `from math import *`."""
    head = re.sub(r"[()]|#.*", "", part) if re.match(r"from\b|import\b", part) else ""
    if head:
        names = re.split(r"\bimport\b", head, maxsplit=1)[1].split(",")
        return {name.split()[-1].split(".")[0] for name in names if name.split()}
    return set(re.findall(r"^(?:async +)?(?:def|class) +(\w+)|^(\w+) *=", part, re.MULTILINE)[0]) - {""}


def _unindented(block: str, by: str) -> str:
    """A block without the indentation of its fence; as it is, if it was not indented with it."""
    if not block.lstrip("\n").startswith(by):
        return block
    return "\n".join(line.removeprefix(by) for line in block.split("\n"))


def _compiles(source: str) -> bool:
    try:
        compile(source, "stub", "exec")
    except (SyntaxError, ValueError):
        return False
    return True
