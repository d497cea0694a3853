"""What an edge is worth: answers under several conditions, the effects between them, a verdict. Imports no torch."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from .journal import is_mended
from .statistics import by_question, holm, mcnemar, paired_bootstrap, wilson

AS_WELL = 5.0  # points that nobody would miss
FEW_POINTS = 10.0  # what an audit should be able to show
CONDITIONS = ("intact", "swapped", "zeroed", "random", "cut", "text")
EFFECTS = {
    "content": ("intact", "swapped"),
    "presence": ("swapped", "cut"),
    "worth": ("intact", "cut"),
    "against_text": ("intact", "text"),
}


@dataclass(frozen=True)
class Answer:
    """One question under one condition.

    Attributes:
        right: What the grader said; False where something failed.
        output_tokens: Decoded by all agents.
        latent_steps: Taken by all agents.
        seconds: The share of the wall clock that fell to it; questions run side by side.
        error: What failed, as `Type: message`; "" if nothing did.
    """

    right: bool
    output_tokens: int = 0
    latent_steps: int = 0
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Outcome:
    """All answers under one condition, but for those that were left out of it.

    Attributes:
        accuracy: Right answers in %, between `low` and `high` (Wilson, over the answers; where questions were asked
            more than once, it is too narrow).
        low: In %.
        high: In %.
        right: Right answers.
        output_tokens: Per answer, decoded by all agents.
        latent_steps: Per answer, taken by all agents.
        seconds: Per answer, wall clock of the whole batch divided by its size. A service that still knows a thought
            takes no time for it, so what is run after "intact" may seem fast.
        p: McNemar's exact p against "intact"; see `Effect`.
        errors: What failed, and how often; each counts as a wrong answer.
    """

    accuracy: float
    low: float
    high: float
    right: int
    output_tokens: float
    latent_steps: float
    seconds: float
    p: float
    errors: Mapping[str, int]

    @classmethod
    def of(
        cls,
        given: Sequence[Answer | None],
        intact: Sequence[Answer | None],
        questions: Sequence[Hashable],
        level: float,
    ) -> "Outcome":
        """Sums answers up."""
        answers = [answer for answer in given if answer is not None]
        n, right = len(answers), sum(answer.right for answer in answers)
        low, high = wilson(right, n, level)
        return cls(
            accuracy=100 * right / n,
            low=100 * low,
            high=100 * high,
            right=right,
            output_tokens=sum(answer.output_tokens for answer in answers) / n,
            latent_steps=sum(answer.latent_steps for answer in answers) / n,
            seconds=sum(answer.seconds for answer in answers) / n,
            p=mcnemar(*_scores(intact, given, questions)),
            errors=Counter(answer.error for answer in answers if answer.error),
        )


@dataclass(frozen=True)
class Effect:
    """The difference between two conditions on the same questions, in points of accuracy.

    Every question counts once, however often it was asked: with the difference between the shares of its answers that
    were right.

    Attributes:
        points: The mean difference.
        low: Lower end of the paired bootstrap interval over the questions.
        high: Its upper end.
        p: McNemar's exact p, two-sided, of the questions that got better and worse (where some were asked more than
            once, the sign test); adjusted (Holm) where several edges were audited together.
    """

    points: float
    low: float
    high: float
    p: float

    @classmethod
    def of(
        cls,
        ones: Sequence[Answer | None],
        others: Sequence[Answer | None],
        questions: Sequence[Hashable],
        seed: int,
        level: float,
    ) -> "Effect":
        """The effect of having `ones` rather than `others`, on what was asked under both."""
        a, b = _scores(ones, others, questions)
        low, high = paired_bootstrap(a, b, seed=seed, level=level)
        return cls(100 * (sum(a) - sum(b)) / len(a), 100 * low, 100 * high, mcnemar(a, b))

    @property
    def half(self) -> float:
        """The further of the two ends, in points from the middle."""
        return max(self.high - self.points, self.points - self.low)

    @property
    def signed(self) -> str:
        """In words, with its sign."""
        return f"{self.points:+.0f} ± {self.half:.0f} points"

    def __str__(self) -> str:
        return f"{abs(self.points):.0f} ± {self.half:.0f} points"


@dataclass(frozen=True)
class EdgeWorth:
    """What one edge is worth, or several at once.

    Attributes:
        edge: "planner->critic", or "all edges", or several.
        n: Different questions.
        crossed: Those of them in which a memory crossed it.
        alone: Those that are left out of "swapped", and of the effects it is in: no memory is like theirs.
        level: Confidence of intervals and tests.
        outcomes: By condition; those under which not all failed.
        effects: By name, see `EFFECTS`; those of whose conditions there are outcomes.
        notes: What was done otherwise than asked for, and how often.
        tests: How many edges were tested together; each is held to a stricter test then (Holm).
    """

    edge: str
    n: int
    crossed: int
    alone: int
    level: float
    outcomes: Mapping[str, Outcome]
    effects: Mapping[str, Effect]
    notes: Sequence[str] = ()
    tests: int = 1

    @classmethod
    def of(
        cls,
        edge: str,
        answers: Mapping[str, Sequence[Answer | None]],
        questions: Sequence[Hashable],
        crossed: int,
        *,
        seed: int = 0,
        level: float = 0.95,
        notes: Sequence[str] = (),
    ) -> "EdgeWorth":
        """Compares the conditions.

        Args:
            edge: Its name.
            answers: By condition, in one order, None where one was left out; "intact" and "swapped" at least.
            questions: Of each answer, what tells its question from others.
            crossed: Different questions in which a memory crossed it.
            seed: Of the bootstrap.
            level: Confidence.
            notes: See the class.
        """
        failed = {name: why for name, those in answers.items() if (why := _failed(those))}
        outcomes = {
            name: Outcome.of(those, answers["intact"], questions, level)
            for name, those in answers.items()
            if name not in failed
        }
        effects = {
            name: Effect.of(answers[one], answers[other], questions, seed, level)
            for name, (one, other) in EFFECTS.items()
            if one in outcomes and other in outcomes
        }
        left_out = (f"{name}: left out, since every question failed there ({why})" for name, why in failed.items())
        n = len(set(questions))
        swapped = {one for one, answer in zip(questions, answers["swapped"], strict=True) if answer is not None}
        return cls(edge, n, crossed, n - len(swapped), level, outcomes, effects, (*notes, *left_out))

    @property
    def has_content(self) -> bool:
        """Whether it matters for the answers which question's memory crosses this edge."""
        return self._significant("content")

    @property
    def sign(self) -> int:
        """1 if this edge is surely of use, -1 if it surely does harm, else 0; follows the tests, like the verdict."""
        effects = [(name, self.effects[name]) for name in ("content", "worth") if name in self.effects]
        least = min(effect.points * self._significant(name) for name, effect in effects)
        return (least > 0) - (least < 0)

    @property
    def verdict(self) -> str:
        """What to make of it, in words; follows the tests alone, at the stated level."""
        content, worth = self.effects["content"], self.effects.get("worth")
        presence, against = map(self._if_significant, ("presence", "against_text"))
        one = "->" in self.edge and "," not in self.edge
        its, edge = ("this edge's", "the edge") if one else ("these edges'", "the edges")
        if not self.has_content:
            parts = [f"no detectable content: {self._instead(edge)} (content {content.signed})"]
            if (swapped := self.crossed - self.alone) < self._fewest:
                had = f"{edge} had a memory{' to swap' if self.alone else ''} on {swapped} of {self.n} questions"
                parts.append(f"{had}, too few to show any: ask more")
            elif self.least > FEW_POINTS:
                parts.append(f"{self.n - self.alone} questions show none below {self.least:.0f} points, ask more")
        elif content.points < 0:
            parts = [f"{its} content does harm: {self._instead(edge)} (content {content.signed})"]
        elif worth is not None and not self._clearly("worth"):
            said = f"the reader uses {its} content ({content}), but"
            against_cut = f"(intact against cut {worth.signed})"
            presence = None
            if worth.high <= AS_WELL:
                parts = [f"{said} answers as well without any: cut {edge} {against_cut}"]
            else:
                parts = [f"{said} may answer as well without any {against_cut}: ask more questions"]
        elif worth is not None and presence is not None and presence.points < 0:
            presence = None
            parts = [f"{edge} {'is' if one else 'are'} worth {worth}; another question's memory costs {content}"]
        else:
            parts = [f"{its} content is worth {content}"]
        if presence is not None:
            parts.append(f"its mere presence {'adds' if presence.points > 0 else 'costs'} {presence}")
        if against is not None:
            parts.append(f"as text the graph is {against} {'worse' if against.points > 0 else 'better'}")
        errors = [each for outcome in self.outcomes.values() for each in outcome.errors.items()]
        if failed := sum(n for error, n in errors if is_mended(error)):
            parts.append(f"{failed} answers failed for want of a device, a server or a grader: run it again")
        return "; ".join(parts)

    @property
    def least(self) -> float:
        """The smallest content, in points, that so many questions can show: where each that changes is lost."""
        return min(100.0, 100 * self._fewest / (self.n - self.alone))

    @property
    def _fewest(self) -> int:
        """How many questions have to change at least, all for the worse, if the test is to tell."""
        return next(k for k in count(1) if self.tests * mcnemar([True] * k, [False] * k) < 1 - self.level)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: accuracies in %, effects in points."""
        effects = {name: vars(effect) for name, effect in self.effects.items()}
        return {
            "edge": self.edge,
            "n": self.n,
            "crossed": self.crossed,
            "alone": self.alone,
            "conditions": {name: outcome.accuracy for name, outcome in self.outcomes.items()},
            **effects,
            "verdict": self.verdict,
            "outcomes": {name: {**vars(o), "errors": dict(o.errors)} for name, o in self.outcomes.items()},
            "notes": list(self.notes),
        }

    def _instead(self, edge: str) -> str:
        """What to do where the content is of no use: whatever the tests do not speak against."""
        advice = [] if self._clearly("against_text") else ["keep text"]
        advice += [] if self._clearly("worth") else [f"cut {edge}"]
        return " or ".join(advice) or "any memory does"

    def _clearly(self, name: str) -> bool:
        """Whether an effect is surely above 0."""
        return self._significant(name) and self.effects[name].points > 0

    def _if_significant(self, name: str) -> Effect | None:
        return self.effects[name] if self._significant(name) else None

    def _significant(self, name: str) -> bool:
        return name in self.effects and self.effects[name].p < 1 - self.level


def _scores(
    ones: Sequence[Answer | None], others: Sequence[Answer | None], questions: Sequence[Hashable]
) -> tuple[list[float], list[float]]:
    """Two scores per question, the shares of its answers that are right, of what was asked under both conditions."""
    both = [(a, b, q) for a, b, q in zip(ones, others, questions, strict=True) if a is not None and b is not None]
    asked = [q for _, _, q in both]
    return by_question([a.right for a, _, _ in both], asked), by_question([b.right for _, b, _ in both], asked)


def _failed(answers: Sequence[Answer | None]) -> str:
    """Why all questions failed under a condition, and would again; "" if one did not, or may not."""
    errors = [answer.error for answer in answers if answer is not None]
    return errors[0] if all(errors) and not any(map(is_mended, errors)) else ""


@dataclass(frozen=True)
class Audit:
    """The result of `langchain_latentmas.audit`.

    Attributes:
        task: What was asked.
        n: Different questions.
        seed: Of the swaps, the noise and the bootstrap.
        level: Confidence of intervals and tests.
        edges: What was audited; where several edges were, all of them at once first.
        about: What the answers depend on beside the questions, as it was given.
    """

    task: str
    n: int
    seed: int
    level: float
    edges: Sequence[EdgeWorth]
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, task: str, edges: Sequence[EdgeWorth], *, seed: int, level: float, about: Mapping[str, Any] | None = None
    ) -> "Audit":
        """Puts edges together; the p-values of each effect are adjusted for their number (Holm)."""
        edges = list(edges)
        for name in EFFECTS:
            having = [i for i, edge in enumerate(edges) if name in edge.effects]
            for i, p in zip(having, holm([edges[i].effects[name].p for i in having]), strict=True):
                effects = {**edges[i].effects, name: replace(edges[i].effects[name], p=p)}
                edges[i] = replace(edges[i], effects=effects, tests=len(edges))
        return cls(task, edges[0].n, seed, level, tuple(edges), about or {})

    @property
    def verdict(self) -> str:
        """That of the first of `edges`."""
        return self.edges[0].verdict

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: task, n, and of the first of `edges` conditions (accuracy in %), effects and verdict; then all.

        A key for an effect whose conditions were not run is null.
        """
        first = self.edges[0].to_json()
        return {
            "task": self.task,
            "n": self.n,
            "seed": self.seed,
            "level": self.level,
            "about": dict(self.about),
            "conditions": first["conditions"],
            **{name: first.get(name) for name in EFFECTS},
            "verdict": self.verdict,
            "edges": [edge.to_json() for edge in self.edges],
        }

    def plot(self, path: str | Path) -> None:
        """Draws right answers under each condition, with their intervals, as PNG or SVG.

        Raises:
            MissingExtra: If matplotlib is not installed.
            InvalidRequest: If the file's name ends in neither .png nor .svg.
        """
        from .pictures import draw_audit

        draw_audit(self, path)
