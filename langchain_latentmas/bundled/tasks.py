"""Word problems and their grader. Imports no torch."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from ..evaluation.graders import boxed_number
from . import ROLES

HE = "Tom Bob Max Sam Leo Ben Dan Jack Carl Eric Fred Hugo Ivan Karl Luke Mark Nick Otto Pete Ray Paul Alex".split()
SHE = "Ann Eva Zoe Ivy Mia Lily Emma Ruth Anna Beth Cora Dora Ella Gina Hana Iris Judy Lena Mary Rita Nora Kate".split()
# Names made of two tokens: a held-out one never occurs in training, and each half of it does, in other names.
STARTS = "Al Be Da De El Fa Ga Jo Ka Ke La Ma Mi Ni Ol Ra Ro Sa Ta Vi".split()
HE_ENDS, SHE_ENDS = "ron vin den rik dor mir bert lan ton mon".split(), "ra na sa da ria lia nda tta mi ne".split()


def _names(listed: Sequence[str], ends: Sequence[str]) -> dict[str, list[str]]:
    made: dict[str, list[str]] = {"train": [], "test": []}
    for i, start in enumerate(STARTS):
        for j, end in enumerate(ends):
            if start + end not in listed:
                made["test" if (i + j) % 5 == 0 else "train"].append(start + end)
    return {"listed": list(listed), **made}


HIS_NAMES, HER_NAMES = _names(HE, HE_ENDS), _names(SHE, SHE_ENDS)
ITEMS = "coins apples books pens cards shells stamps marbles cookies pencils".split()

# {n} the subject, {f} a friend, {a} the number, {i} the items. A held-out phrasing is a verb in a frame that training
# never shows it in; every verb is trained in other frames and every frame with other verbs, else a model reads the
# frame and not the verb.
VERBS = {
    "+": ["finds", "buys", "wins", "gets", "picks up", "collects", "earns"],
    "-": ["loses", "sells", "drops", "gives away", "throws away", "uses up"],
}
FRAMES = {
    "+": [
        "{n} %s {a} {i}.",
        "{n} %s {a} more {i}.",
        "{n} %s {a} more.",
        "{n} %s another {a} {i}.",
        "{n} also %s {a} {i}.",
    ],
    "-": [
        "{n} %s {a} {i}.",
        "{n} %s {a} of the {i}.",
        "{n} %s {a} of them.",
        "{n} %s another {a} {i}.",
        "{n} also %s {a} {i}.",
    ],
}
HELD_OUT = {
    "+": ["{n} finds {a} more {i}.", "{n} gets {a} more {i}.", "{n} wins {a} more.", "{n} collects {a} {i}."],
    "-": [
        "{n} loses {a} {i}.",
        "{n} sells {a} of them.",
        "{n} drops {a} of them.",
        "{n} gives away {a} of the {i}.",
    ],
    "*2": ["Then the number of {i} doubles.", "{n} doubles the number of {i}."],
    "*3": ["Then the number of {i} triples.", "{n} triples the number of {i}."],
}
TRAINED = {
    op: [frame % verb for verb in VERBS[op] for frame in FRAMES[op] if frame % verb not in HELD_OUT[op]] for op in "+-"
} | {
    "*2": [
        "{n} doubles the {i}.",
        "{n} doubles all the {i}.",
        "The number of {i} doubles.",
        "Then the {i} double in number.",
        "Now {n} has twice as many {i}.",
    ],
    "*3": [
        "{n} triples the {i}.",
        "{n} triples all the {i}.",
        "The number of {i} triples.",
        "Then the {i} triple in number.",
        "Now {n} has three times as many {i}.",
    ],
}
TRAINED["+"] += ["{n} gets {a} {i} from {f}.", "{f} gives {n} {a} {i}.", "{f} gives {n} {a} more."] * 2
TRAINED["-"] += ["{n} gives {a} {i} to {f}.", "{f} takes {a} {i} from {n}.", "{f} takes {a} of the {i}."] * 2
PHRASINGS: dict[str, dict[str, list[str]]] = {"train": TRAINED, "test": HELD_OUT}
OPENINGS = ["{n} has {a} {i}.", "{n} starts with {a} {i}."]
ENDINGS = ["How many {i} does {n} have now?", "How many {i} does {n} have in the end?"]


class Problem(NamedTuple):
    """A word problem with its two written solutions.

    Attributes:
        question: The story and its question, in English.
        chain: The short form, written after `<think>`: ` 12 +5 17 -3 14`.
        sentences: The long form, as chat models write it.
        answer: The last value of the chain, 0..99.
    """

    question: str
    chain: str
    sentences: str
    answer: int


class SplitProblem(NamedTuple):
    """A question that takes three facts, each known to one agent alone.

    Attributes:
        facts: A short story each, without a question.
        question: What is asked about all three.
        parts: The facts as problems of their own: what an agent that knows one of them makes of it.
        sentences: The sum, written out.
        answer: The sum, 6..99.
    """

    facts: tuple[str, str, str]
    question: str
    parts: tuple[Problem, Problem, Problem]
    sentences: str
    answer: int


class Hero(NamedTuple):
    """Whom a story is about."""

    name: str
    pronoun: str
    item: str


def problem(rng: random.Random, split: str = "train") -> Problem:
    """A problem of 2 to 4 steps with values in 0..99.

    Args:
        rng: Where chance comes from.
        split: "train"; "known", the same without made-up words; or "test", with names and phrasings never trained on.
    """
    hero = _hero(rng, split)
    story = _story(rng, split, hero, start=rng.randint(2, 60), steps=rng.randint(2, 4), top=99)
    ending = rng.choice(ENDINGS).format(n=hero.name, i=hero.item)
    return story._replace(question=f"{story.question} {ending}")


def shared_problem(rng: random.Random, split: str = "train") -> SplitProblem:
    """Three stories of up to 2 steps with values in 2..33, and the question for their sum; splits as for `problem`."""
    heroes = [_hero(rng, split)]
    while len(heroes) < 3:
        other = _hero(rng, split)._replace(item=heroes[0].item)
        if other.name not in [hero.name for hero in heroes]:
            heroes.append(other)
    names = [hero.name for hero in heroes]
    a, b, c = (
        _story(rng, split, hero, rng.randint(2, 30), steps=rng.choice([0, 1, 1, 2]), top=33, bottom=2, others=names)
        for hero in heroes
    )
    question = f"How many {heroes[0].item} do {names[0]}, {names[1]} and {names[2]} have together?"
    two = a.answer + b.answer
    total = two + c.answer
    sentences = f"Together that is {a.answer} + {b.answer} = {two}, and {two} + {c.answer} = {total}."
    return SplitProblem((a.question, b.question, c.question), question, (a, b, c), sentences, total)


def operation(rng: random.Random, v: int, top: int = 99, bottom: int = 0, most: int = 20) -> tuple[str, int, int]:
    """A random operation on `v`.

    Args:
        rng: Where chance comes from.
        v: The value before.
        top: Highest result.
        bottom: Lowest result.
        most: Highest addend.

    Returns:
        Its name ("+", "-", "*2" or "*3"), its operand and its result.
    """
    possible = {"+": v + 2 <= top, "-": v - 2 >= bottom, "*2": 0 < v * 2 <= top, "*3": 0 < v * 3 <= top}
    op = rng.choice([o for o in ("+", "+", "-", "-", "*2", "*3") if possible[o]])
    a = rng.randint(2, min(most, top - v if op == "+" else v - bottom)) if op in "+-" else int(op[1])
    return op, a, {"+": v + a, "-": v - a}.get(op, v * a)


def _hero(rng: random.Random, split: str) -> Hero:
    name, male = _name(rng, split)
    item = _word(rng) + "s" if split == "train" and rng.random() < 0.05 else rng.choice(ITEMS)
    return Hero(name, "He" if male else "She", item)


def _name(rng: random.Random, split: str) -> tuple[str, bool]:
    """A name, and whether it is his."""
    male = rng.random() < 0.5
    names = HIS_NAMES if male else HER_NAMES
    if split == "test":
        return rng.choice(names["test"]), male
    kind = rng.choices(["listed", "train", "any"], [0.35, 0.5, 0.0 if split == "known" else 0.15])[0]
    if kind != "any":
        return rng.choice(names[kind]), male
    while True:  # any letters, so that any name works, whatever its spelling
        name = _word(rng).capitalize()
        if name not in HIS_NAMES["test"] + HER_NAMES["test"]:
            return name, male


def _story(
    rng: random.Random,
    split: str,
    hero: Hero,
    start: int,
    steps: int,
    top: int,
    bottom: int = 0,
    others: Sequence[str] = (),
) -> Problem:
    name, pronoun, item = hero
    friend = name
    while friend == name or friend in others:
        friend, _ = _name(rng, "train" if split == "test" else split)
    v = start
    opening = rng.choice(OPENINGS).format(n=name, a=v, i=item)
    question, chain, sentences = [opening], f" {v}", ["Let us go step by step.", opening]
    for number in range(1, steps + 1):
        op, a, w = operation(rng, v, top, bottom)
        clause = rng.choice(PHRASINGS["test" if split == "test" else "train"][op])
        # A pronoun only where it opens the sentence, so that it cannot mean the friend.
        subject = pronoun if clause.startswith("{n}") and rng.random() < 0.4 else name
        if clause.startswith("{") and rng.random() < 0.25:
            clause = "Then " + clause
            subject = subject.lower() if subject == pronoun else subject
        clause = clause.format(n=subject, f=friend, a=a, i=item)
        question.append(clause)
        chain += f" {op[0]}{a} {w}"
        sentences.append(
            f"Step {number}: {clause} There were {v} {item}, and {v} {op[0]} {a} = {w}, so now there are {w} {item}."
        )
        v = w
    sentences.append(f"So in the end {name} has {v} {item}.")
    return Problem(" ".join(question), chain, " ".join(sentences), v)


def _word(rng: random.Random) -> str:
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))


def answer_text(answer: int) -> str:
    """What a judger says."""
    return f"The answer is \\boxed{{{answer}}}."


def grade(text: str, answer: int) -> bool:
    r"""Whether the last \boxed{...} in `text` holds `answer`, maybe with a unit."""
    return boxed_number(text) == answer


def prompt(role: str | None, user: str | None = None, think: bool = False) -> str:
    """The chat template over [system=ROLES[role]?, user?] with the generation prompt, and the think tag if asked."""
    system = "" if role is None else f"<|im_start|>system\n{ROLES[role]}<|im_end|>\n"
    asked = "" if user is None else f"<|im_start|>user\n{user}<|im_end|>\n"
    return f"{system}{asked}<|im_start|>assistant\n{'<think>' if think else ''}"


def notes(said: dict[str, str], question: str | None = None) -> str:
    """The user message of an agent that reads others as text: a paragraph for each, then the question if shown."""
    return "\n\n".join([f"{who}: {text}" for who, text in said.items()] + ([question] if question is not None else []))
