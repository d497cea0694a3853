"""Word problems, the roles that solve them, and the grader. Imports no torch."""

import random
import re
from typing import NamedTuple

ROLES: dict[str, str] = {
    "planner": "You are a planner. Plan the steps for the question.",
    "critic": "You are a critic. Check the plan for the question.",
    "refiner": "You are a refiner. Improve the plan for the question.",
    "judger": "You are a judger. Give the final answer.",
    "solver": "You are a helpful assistant. Solve the question step by step.",
    "arithmetic": "You are an arithmetic expert. Solve the question.",
    "logic": "You are a logic expert. Solve the question.",
    "reading": "You are a reading expert. Solve the question.",
}
SEQUENTIAL = ("planner", "critic", "refiner")
EXPERTS = ("arithmetic", "logic", "reading")

HE, SHE = "Tom Bob Max Sam Leo Ben Dan Jack".split(), "Ann Eva Zoe Ivy Mia Lily Emma Ruth".split()
# Test names occur in training as the friend in the story, never as its subject.
TEST_HE, TEST_SHE = "Paul Alex Omar".split(), "Nora Kate Jane".split()
ITEMS = "coins apples books pens cards shells stamps marbles cookies pencils".split()

# {n} the subject, {f} a friend, {a} the number, {i} the items. Held-out phrasings recombine trained words: every verb
# is trained in two frames and every frame with several verbs, else a model reads the frame and not the verb.
PHRASINGS: dict[str, dict[str, list[str]]] = {
    "train": {
        "+": [
            "{n} finds {a} more.",
            "{n} finds {a} {i}.",
            "{n} buys {a} more {i}.",
            "{n} buys {a} {i}.",
            "{n} wins {a} more {i}.",
            "{n} wins {a} {i}.",
            "{n} gets {a} more.",
            "{n} gets {a} {i} from {f}.",
            "{n} picks up {a} {i}.",
            "{f} gives {n} {a} {i}.",
        ],
        "-": [
            "{n} loses {a} of them.",
            "{n} loses {a} of the {i}.",
            "{n} sells {a} {i}.",
            "{n} sells {a} of the {i}.",
            "{n} drops {a} {i}.",
            "{n} drops {a} of the {i}.",
            "{n} gives away {a} {i}.",
            "{n} gives away {a} of them.",
            "{n} gives {a} {i} to {f}.",
            "{f} takes {a} {i} from {n}.",
        ],
        "*2": ["{n} doubles the {i}.", "The number of {i} doubles.", "Now {n} has twice as many {i}."],
        "*3": ["{n} triples the {i}.", "The number of {i} triples.", "Now {n} has three times as many {i}."],
    },
    "test": {
        "+": ["{n} finds {a} more {i}.", "{n} gets {a} more {i}.", "{n} wins {a} more.", "{n} buys {a} {i} from {f}."],
        "-": [
            "{n} loses {a} {i}.",
            "{n} sells {a} of them.",
            "{n} drops {a} of them.",
            "{n} gives away {a} of the {i}.",
        ],
        "*2": ["Then the number of {i} doubles.", "{n} doubles the number of {i}."],
        "*3": ["Then the number of {i} triples.", "{n} triples the number of {i}."],
    },
}
OPENINGS = ["{n} has {a} {i}.", "{n} starts with {a} {i}."]
ENDINGS = ["How many {i} does {n} have now?", "How many {i} does {n} have in the end?"]
SENTENCES = {
    "+": "{n} gets {a} more, so {v} + {a} = {w}.",
    "-": "{n} loses {a}, so {v} - {a} = {w}.",
    "*2": "The {i} double, so {v} * 2 = {w}.",
    "*3": "The {i} triple, so {v} * 3 = {w}.",
}


class Problem(NamedTuple):
    """A word problem with its two written solutions.

    Attributes:
        question: The story and its question, in English.
        chain: The short form, written after `<think>`: `12+5=17-3=14`.
        sentences: The long form, one sentence an operation.
        answer: The last value of the chain, 0..99.
    """

    question: str
    chain: str
    sentences: str
    answer: int


def problem(rng: random.Random, split: str = "train") -> Problem:
    """A problem of 2 to 4 steps with values in 0..99; the split "test" has names and phrasings never trained on."""
    he, she = (HE, SHE) if split == "train" else (TEST_HE, TEST_SHE)
    male = rng.random() < 0.5
    name = rng.choice(he if male else she)
    if split == "train" and rng.random() < 0.1:  # so that any name works, whatever its spelling
        name = _word(rng).capitalize()
    item = _word(rng) + "s" if split == "train" and rng.random() < 0.05 else rng.choice(ITEMS)
    friend = rng.choice([f for f in HE + SHE + TEST_HE + TEST_SHE if f != name])
    phrasings = PHRASINGS[split]

    v = rng.randint(2, 60)
    question, chain = [rng.choice(OPENINGS).format(n=name, a=v, i=item)], str(v)
    sentences = [f"{name} starts with {v} {item}."]
    for _ in range(rng.randint(2, 4)):
        op, a, w = operation(rng, v)
        clause = rng.choice(phrasings[op])
        # A pronoun only where it opens the sentence, so that it cannot mean the friend.
        subject = ("He" if male else "She") if clause.startswith("{n}") and rng.random() < 0.4 else name
        if clause.startswith("{") and rng.random() < 0.25:
            clause = "Then " + clause
            subject = subject.lower() if subject in ("He", "She") else subject
        question.append(clause.format(n=subject, f=friend, a=a, i=item))
        chain += f"{op[0]}{a}={w}"
        sentences.append(SENTENCES[op].format(n=name, i=item, a=a, v=v, w=w))
        v = w
    question.append(rng.choice(ENDINGS).format(n=name, i=item))
    return Problem(" ".join(question), chain, " ".join(sentences), v)


def operation(rng: random.Random, v: int) -> tuple[str, int, int]:
    """A random operation on `v`: its name ("+", "-", "*2" or "*3"), its operand and its result, 0..99."""
    possible = {"+": v < 99, "-": v > 0, "*2": 0 < v * 2 <= 99, "*3": 0 < v * 3 <= 99}
    op = rng.choice([o for o in ("+", "+", "-", "-", "*2", "*3") if possible[o]])
    a = rng.randint(1, min(20, 99 - v if op == "+" else v)) if op in "+-" else int(op[1])
    return op, a, {"+": v + a, "-": v - a}.get(op, v * a)


def _word(rng: random.Random) -> str:
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))


def answer_text(answer: int) -> str:
    """What a judger says."""
    return f"The answer is \\boxed{{{answer}}}."


def grade(text: str, answer: int) -> bool:
    r"""Whether the last \boxed{...} in `text` holds `answer`."""
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return bool(boxed) and boxed[-1].strip() == str(answer)


def prompt(role: str | None, user: str | None = None, think: bool = False) -> str:
    """The chat template over [system=ROLES[role]?, user?] with the generation prompt, and the think tag if asked."""
    system = "" if role is None else f"<|im_start|>system\n{ROLES[role]}<|im_end|>\n"
    asked = "" if user is None else f"<|im_start|>user\n{user}<|im_end|>\n"
    return f"{system}{asked}<|im_start|>assistant\n{'<think>' if think else ''}"


def notes(said: dict[str, str], question: str | None = None) -> str:
    """The user message of an agent that reads others as text: a paragraph for each, then the question if shown."""
    return "\n\n".join([f"{who}: {text}" for who, text in said.items()] + ([question] if question is not None else []))
