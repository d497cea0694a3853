"""Training rows in the shapes of usual agent graphs: reflection, plan-and-execute, debate, map-reduce, supervisor.

The first stage of the recipe teaches roles; these teach what user code does around them: notes with other labels or
none, what is left of a prompt once its markers are taken out, assistant turns of other agents, routing by text.
Imports no torch.
"""

import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

from . import EXPERTS, ROLES, SEQUENTIAL
from .tasks import Problem, answer_text, notes

EXTRA_ROLES: dict[str, str] = {
    "executor": "You are an executor. Carry out the plan.",
    "supervisor": "You are a supervisor. Say who acts next, solver or judger.",
}
APPROVED = "I checked the plan, and it is right. "

Kind = Literal["prompt", "spoken", "thought"]


class Part(NamedTuple):
    """A stretch of a row; parts of unequal blocks above 0 are blind to each other."""

    text: str
    kind: Kind
    block: int = 0


def turn(role: str, user: str | None = None, said: Sequence[str] = (), think: bool = False, block: int = 0) -> Part:
    """A prompt: system, user, assistant turns of others, and the generation prompt."""
    messages = [("system", {**ROLES, **EXTRA_ROLES}[role])]
    messages += [("user", user)] if user is not None else []
    messages += [("assistant", text) for text in said]
    text = "".join(f"<|im_start|>{who}\n{content}<|im_end|>\n" for who, content in messages)
    return Part(f"{text}<|im_start|>assistant\n{'<think>' if think else ''}", "prompt", block)


def latent_pattern(rng: random.Random, p: Problem) -> list[Part]:
    """Thinkers and a speaker, as `switch_edges` leaves their prompts: where a text stood, nothing or its label."""
    thought, answer = Part(p.chain, "thought"), Part(answer_text(p.answer), "spoken")
    solved = f"{p.sentences} {answer_text(p.answer)}"

    def left(*names: str, shown: bool) -> str | None:
        """What is left of notes by these agents, with the question behind it."""
        labels = notes(dict.fromkeys(names, "")) if rng.random() < 0.6 else ""
        return "\n\n".join(part for part in (labels, p.question if shown else "") if part).strip() or None

    shape = rng.choice(["chain", "reflection", "execute", "debate", "map", "supervisor"])
    if shape == "chain":
        names = [*SEQUENTIAL][: rng.choice([1, 2, 2, 3])]
        parts: list[Part] = []
        for i, name in enumerate(names):
            user = left(*names[:i], shown=True) if i else p.question
            parts += [turn(name, user, think=True), thought]
        return [*parts, turn("judger", left(*names, shown=rng.random() < 0.3)), answer]
    if shape == "reflection":
        draft = notes({"solver": solved}, p.question) if rng.random() < 0.7 else notes({}, f"{solved}\n\n{p.question}")
        return [turn("critic", draft, think=True), thought, turn("solver", left("critic", shown=True)), _spoken(solved)]
    if shape == "execute":
        parts = [turn("planner", p.question, think=True), thought]
        parts += [turn("executor", left("planner", shown=False), think=True), thought]
        return [*parts, turn("judger", left("executor", shown=False)), answer]
    if shape in ("debate", "map"):
        names = rng.sample(EXPERTS, 2) if shape == "debate" else [rng.choice(EXPERTS)] * rng.choice([2, 3])
        if shape == "map" and rng.random() < 0.5:
            names = [*EXPERTS]
        parts = []
        for block, name in enumerate(names, 1):
            parts += [turn(name, p.question, think=True, block=block), thought._replace(block=block)]
        if shape == "debate":
            parts += [turn(names[1], left(*names, shown=True), think=True), thought]
        return [*parts, turn("judger", left(*dict.fromkeys(names), shown=rng.random() < 0.2)), answer]
    parts = [turn("solver", p.question, think=True), thought]
    if rng.random() < 0.5:
        return [*parts, turn("supervisor", left("solver", shown=True)), _spoken("judger")]
    return [*parts, turn("judger", left("solver", shown=rng.random() < 0.3)), answer]


def text_pattern(rng: random.Random, p: Problem) -> list[Part]:
    """The same graphs with text on their edges; one turn."""
    answer, solved = answer_text(p.answer), f"{p.sentences} {answer_text(p.answer)}"

    def said(*names: str, text: str = p.sentences, shown: bool = True) -> str:
        """Notes of these agents, labelled or not, with the question behind them."""
        texts = [f"{name}: {text}" if labelled else text for name in names]
        return "\n\n".join([*texts, p.question] if shown else texts)

    labelled = rng.random() < 0.6
    shape = rng.choice(["notes", "reflect", "improve", "execute", "rebut", "judge", "supervise", "turns"])
    if shape == "notes":
        name = rng.choice(["critic", "refiner"])
        spoken = (APPROVED if name == "critic" else "") + p.sentences
        return [turn(name, said(*SEQUENTIAL[: rng.choice([1, 2])])), _spoken(spoken)]
    if shape == "reflect":
        return [turn("critic", said("solver", text=solved)), _spoken(APPROVED + p.sentences)]
    if shape == "improve":
        return [turn("solver", said("critic", text=APPROVED + p.sentences)), _spoken(solved)]
    if shape == "execute":
        return [turn("executor", said("planner", shown=False)), _spoken(p.sentences)]
    if shape == "rebut":
        names = rng.sample(EXPERTS, 2)
        return [turn(names[1], said(*names)), _spoken(p.sentences)]
    if shape == "judge":
        names = rng.choice([["executor"], ["solver"], [*EXPERTS[:2]], [*EXPERTS], ["planner", "critic"], ["planner"]])
        text = rng.choice([p.sentences, p.sentences, solved, APPROVED + p.sentences])
        return [turn("judger", said(*names, text=text, shown=rng.random() < 0.2)), _spoken(answer)]
    if shape == "supervise":
        if rng.random() < 0.4:
            return [turn("supervisor", p.question), _spoken("solver")]
        if rng.random() < 0.4:
            return [turn("supervisor", p.question, [solved]), _spoken("judger")]
        return [turn("supervisor", said("solver", text=solved)), _spoken("judger")]
    turns = [p.sentences, APPROVED + p.sentences, p.sentences][: rng.choice([1, 2, 3])]
    role = ("critic", "refiner", "judger")[len(turns) - 1] if rng.random() < 0.6 else "judger"
    spoken = {"critic": APPROVED + p.sentences, "refiner": p.sentences, "judger": answer}[role]
    return [turn(role, p.question, turns), _spoken(spoken)]


def _spoken(text: str) -> Part:
    return Part(text, "spoken")
