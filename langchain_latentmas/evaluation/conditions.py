"""The questions of an audit, put to a graph under one condition after the other."""

import asyncio
import copy
import json
import random
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.messages import BaseMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import merge_configs
from langgraph.pregel import Pregel

from ..errors import EdgeNotCrossed, GraderFailed, InvalidRequest, NoPartner, ServiceUnreachable, first_line
from ..modes import Edge
from ..service import LatentService
from ..service.base import READING
from ..state import LatentRef
from .journal import GRADER, Journal, is_mended
from .worth import Answer

LEAST = 20  # questions; with fewer, McNemar's test can hardly find anything
CLASS_SIZE, CLASS_RATIO = 8, 2.0
Grade = Callable[[Any, Any], bool]
Progress = Callable[[str, int, int], None]
Member = TypeVar("Member")


class Scope(NamedTuple):
    """Edges that are altered together."""

    name: str
    edges: frozenset[Edge]
    all: bool = False


Change = Callable[[int, LatentService, Edge, int, LatentRef], list[LatentRef] | None]
"""From question, service, edge, number of the crossing and reference to what is read; None where that is missing."""


def _whole(i: int, service: LatentService, edge: Edge, number: int, ref: LatentRef) -> list[LatentRef]:
    return [ref]


class _Watch:
    """Sees one question through the graph: what crosses its edges, and what is read instead."""

    def __init__(self, i: int, change: Change) -> None:
        self.name, self.i, self.change = uuid.uuid4().hex, i, change
        self.crossings: dict[Edge, list[LatentRef]] = defaultdict(list)
        self.latent_steps = self.missing = 0
        self._older: dict[str, set[str]] = {}  # by memory, what it would have been made of
        self._lock = threading.Lock()

    def read(
        self, service: LatentService, agent: str, refs: Sequence[LatentRef], steps: int
    ) -> tuple[list[LatentRef], list[LatentRef]]:
        """See `Reading`."""
        with self._lock:
            self.latent_steps += steps
            older: set[str] = set().union(*(self._older.get(ref["id"], ()) for ref in refs))
            refs = [ref for ref in refs if ref["id"] not in older]
            numbers = []
            for ref in refs:
                numbers.append(len(self.crossings[ref["agent"], agent]))
                self.crossings[ref["agent"], agent].append(ref)
        read: list[LatentRef] = []
        for ref, number in zip(refs, numbers, strict=True):
            instead = self.change(self.i, service, (ref["agent"], agent), number, ref)
            self.missing += instead is None
            read += instead or []
        return refs, read

    def made(self, ref: LatentRef) -> None:
        """See `Reading`."""
        with self._lock:
            older = self._older.setdefault(ref["id"], set())
            older.update(ref["parents"], *(self._older.get(parent, ()) for parent in ref["parents"]))


@dataclass
class Questions:
    """The questions of an audit, put to the graph under one condition after the other."""

    graph: Pregel
    edges: Sequence[Edge]
    """Those that can be seen in it, its subgraphs' included."""
    examples: Sequence[tuple[Any, Any]]
    grade: Grade
    seed: int
    concurrency: int
    config: RunnableConfig
    context: Any
    on_answer: Progress | None
    journal: Journal | None = None
    crossed: dict[int, list[tuple[Edge, int]]] = field(default_factory=dict)
    """By question, what crossed its edges in the intact run, and its length in positions."""
    memories: dict[int, Mapping[Edge, list[LatentRef]]] = field(default_factory=dict)
    """The memories themselves, as far as they were made in this process."""
    missing: Counter[str] = field(default_factory=Counter)

    async def run(
        self, scope: str, condition: str, change: Change, edges: Any = None, left_out: Collection[int] = ()
    ) -> list[Answer | None]:
        """All answers under one condition, those in the journal included; None of an example that is left out."""
        wanted = [i for i in range(len(self.examples)) if i not in left_out]
        answers: dict[int, Answer] = {}
        for line in self._known(scope, condition):
            answers[line["example"]] = Answer(**line["answer"])
            self.missing[scope] += line["missing"]
            if condition == "intact":
                self.crossed[line["example"]] = [((a, b), positions) for a, b, positions in line["crossed"]]
        name = f"{condition}, {scope}" if scope else condition
        last = time.perf_counter()

        def done(i: int, answer: Answer, watch: _Watch) -> None:
            nonlocal last
            now = time.perf_counter()
            answers[i] = replace(answer, seconds=now - last)
            last = now
            crossed = [(edge, ref["positions"]) for edge, refs in watch.crossings.items() for ref in refs]
            self.missing[scope] += watch.missing
            if condition == "intact":
                self.crossed[i], self.memories[i] = crossed, watch.crossings
            if self.journal:
                line = {"edges": scope, "condition": condition, "example": i, "answer": asdict(answers[i])}
                line["missing"], line["crossed"] = watch.missing, [(*edge, positions) for edge, positions in crossed]
                self.journal.add(line)
            if self.on_answer:
                self.on_answer(name, len(answers), len(wanted))
            broken = len(answers) == LEAST and all(each.error.startswith(GRADER) for each in answers.values())
            if broken and condition == "intact":  # before the hours of work
                why = answer.error.removeprefix(GRADER)
                raise GraderFailed(f"The grader raised on each of the first {LEAST} answers: {why}")

        if self.on_answer:
            self.on_answer(name, len(answers), len(wanted))
        await self._ask([i for i in wanted if i not in answers], change, edges, done)
        return [answers.get(i) for i in range(len(self.examples))]

    async def altered(self, scope: Scope, condition: str) -> list[Answer | None]:
        """All answers with some edges altered; None of an example that has nobody to be swapped with.

        Raises:
            InvalidRequest: If the graph failed on every example under "swapped", without which there is no verdict.
        """
        partners = self.partners(scope)

        def change(i: int, service: LatentService, edge: Edge, number: int, ref: LatentRef) -> list[LatentRef] | None:
            if edge not in scope.edges and not scope.all:
                return [ref]
            if condition == "cut":
                return []
            if condition == "swapped":
                theirs = self.memories[partners[i]].get(edge) if i in partners else None
                return [theirs[min(number, len(theirs) - 1)]] if theirs else None
            return [service.altered(ref, condition, self.seed % 10**9)]  # type: ignore[arg-type]

        if condition == "text":
            named = {"->".join(own): "text" for edge in scope.edges for own in self._leaving(edge)}
            return await self.run(scope.name, condition, _whole, "text" if scope.all else named)
        if condition == "swapped":
            done = {line["example"] for line in self._known(scope.name, condition)}
            gone = {partners[i] for i in partners.keys() - done} - self.memories.keys()
            await self._ask(sorted(gone), _whole, None, self._remember)
            answers = await self.run(scope.name, condition, change, left_out=self.alone(scope))
            return _unless_all_failed(condition, answers)
        return await self.run(scope.name, condition, change)

    def _leaving(self, edge: Edge) -> list[Edge]:
        """The graph's edges over which an agent sends what crosses this one: itself, or where it is none, all of them.

        A string that names a memory goes on in the state to readers that no edge leads to.
        """
        own = [edge] if edge in self.edges else [each for each in self.edges if each[0] == edge[0]]
        return own or [edge]

    def _known(self, scope: str, condition: str) -> list[dict[str, Any]]:
        """The lines of the journal that stand.

        What failed for want of a grader or a working device is asked again, and if that was the intact run, under all
        conditions: what would be swapped into the question, and what of it into others, was not known.
        """
        lines: dict[int, dict[tuple[str, str], dict[str, Any]]] = defaultdict(dict)
        for line in self.journal.lines if self.journal else []:
            if line["condition"] == "intact":
                lines[line["example"]].clear()
            lines[line["example"]][line["edges"], line["condition"]] = line

        def stands(of: Mapping[tuple[str, str], dict[str, Any]], at: tuple[str, str]) -> bool:
            return at in of and not is_mended(of[at]["answer"]["error"])

        both = [of for of in lines.values() if stands(of, ("", "intact")) and stands(of, (scope, condition))]
        return [of[scope, condition] for of in both]

    def _remember(self, i: int, answer: Answer, watch: _Watch) -> None:
        self.memories[i] = watch.crossings

    async def _ask(
        self, questions: Sequence[int], change: Change, edges: Any, done: Callable[[int, Answer, _Watch], None]
    ) -> None:
        room = asyncio.Semaphore(self.concurrency)

        async def one(i: int) -> None:
            async with room:
                watch = _Watch(i, change)
                done(i, await self._answer(i, watch, edges), watch)

        try:
            async with asyncio.TaskGroup() as tasks:
                for i in questions:
                    tasks.create_task(one(i))
        except BaseExceptionGroup as group:  # what ends an audit is not a question's own failure: say, a full disk
            raise group.exceptions[0] from None

    async def _answer(self, i: int, watch: _Watch, edges: Any) -> Answer:
        asked, expected = self.examples[i]
        usage = UsageMetadataCallbackHandler()
        own: RunnableConfig = {"configurable": {"thread_id": watch.name}, "callbacks": [usage]}
        if edges is not None:
            own["configurable"]["edges"] = edges
        right, error = False, ""
        token = READING.set(watch)
        try:
            state = await self.graph.ainvoke(
                copy.deepcopy(asked), merge_configs(self.config, own), context=self.context
            )
            if isinstance(state, Mapping) and state.get("__interrupt__"):  # LangGraph's word for a run that waits
                error = "InvalidRequest: the graph calls interrupt() and waits for a human; audit it without."
        except ServiceUnreachable:  # its client has waited: the other questions would fail as well
            raise
        except Exception as raised:
            error = _named(raised)
        finally:
            READING.reset(token)
        if not error:
            try:
                right = bool(await asyncio.to_thread(self.grade, state, expected))
            except Exception as raised:
                error = f"{GRADER}{_named(raised)}"
        tokens = sum(used["output_tokens"] for used in usage.usage_metadata.values())
        return Answer(right, tokens, watch.latent_steps, error=error)

    async def intact(self) -> list[Answer | None]:
        """All answers of the graph as it is.

        Raises:
            GraderFailed: If the grader raised on each of the first 20 answers.
            InvalidRequest: If the graph failed on every question.
            EdgeNotCrossed: If no memory crossed any edge.
        """
        answers = _unless_all_failed("intact", await self.run("", "intact", _whole))
        if not any(self.crossed.values()):
            raise EdgeNotCrossed(
                "No memory crossed any edge of this graph on any example. Is there an agent that thinks, and one that "
                "reads it? An edge of an ordinary graph becomes latent with switch_edges."
            )
        return answers

    def crossing(self, scope: Scope) -> dict[int, list[tuple[Edge, int]]]:
        """By example, which of these edges a memory crossed, and its length; those where none did are not in it."""
        crossed = {i: [one for one in self.crossed[i] if one[0] in scope.edges] for i in sorted(self.crossed)}
        return {i: crossings for i, crossings in crossed.items() if crossings}

    def scopes(self, edges: Sequence[Edge] | str) -> list[Scope]:
        """What is altered together: all edges or the named ones first, then each of them."""
        crossed = dict.fromkeys(edge for i in sorted(self.crossed) for edge, _ in self.crossed[i])
        for edge in [] if isinstance(edges, str) else edges:
            if edge not in crossed:
                raise EdgeNotCrossed(
                    f"No memory crossed the edge {'->'.join(edge)} on any example; crossed were: "
                    f"{', '.join(map('->'.join, crossed))}. A memory counts for the edge of the agent that handed it "
                    "over last."
                )
        each = list(dict.fromkeys(crossed if isinstance(edges, str) else edges))
        singles = [Scope("->".join(edge), frozenset([edge])) for edge in each]
        if len(each) == 1:
            return [singles[0]._replace(all=isinstance(edges, str))]
        if isinstance(edges, str):
            together = Scope("all edges", frozenset(crossed), all=True)
            return [together, *(singles if edges == "each" else [])]
        return [Scope(", ".join(scope.name for scope in singles), frozenset(each)), *singles]

    def partners(self, scope: Scope) -> dict[int, int]:
        """Whose memory each example gets in "swapped": another question's, of about its length, over the same edges.

        A derangement of the questions within each length class; examples that ask the same count as one question. Those
        that crossed none of the edges, or are `alone`, are not in it.

        Raises:
            NoPartner: If nobody has one.
        """
        alike: dict[frozenset[Edge], dict[str, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
        for i, crossings in self.crossing(scope).items():
            edges, length = frozenset(edge for edge, _ in crossings), sum(length for _, length in crossings)
            alike[edges][self.questions[i]].append((length, i))
        rng = random.Random(self.seed)
        partners: dict[int, int] = {}
        for questions in alike.values():
            repeats = [sorted(those) for those in questions.values()]
            for group in _length_classes([(those[len(those) // 2][0], those) for those in repeats], rng):
                rng.shuffle(group)
                for ours, theirs in zip(group, group[1:] + group[:1], strict=True):
                    for k, (length, i) in enumerate(ours):
                        other, j = theirs[k % len(theirs)]
                        if max(length, other) <= CLASS_RATIO * min(length, other):  # who samples repeats himself unlike
                            partners[i] = j
        if not partners:
            raise NoPartner(
                f"What crosses {scope.name} cannot be swapped: no two questions have memories there whose lengths "
                "differ by less than a factor of 2. Add examples of about one length, or name other edges."
            )
        return partners

    @cached_property
    def questions(self) -> list[str]:
        """By example, what tells its question from others."""
        return [told(question) for question, _ in self.examples]

    def alone(self, scope: Scope) -> set[int]:
        """The examples in which a memory crossed these edges, and no other question's can be swapped with it."""
        return self.crossing(scope).keys() - self.partners(scope).keys()

    def notes(self, scope: Scope) -> list[str]:
        """What was done otherwise than asked for."""
        notes = []
        if alone := len(self.alone(scope)):
            notes.append(f"swapped: {alone} left out, for want of another question with a memory of about that length")
        if missing := self.missing[scope.name]:
            notes.append(f"swapped: {missing} times the other question had no memory to give, and nothing was read")
        return notes


def told(part: object) -> str:
    """An example or a part of it as JSON: messages without their ids, which any run of a graph gives them."""
    return json.dumps(part, sort_keys=True, default=_plain)


def _plain(value: object) -> object:
    return value.model_dump(exclude={"id"}) if isinstance(value, BaseMessage) else str(value)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)[:200]}"


def _unless_all_failed(condition: str, answers: list[Answer | None]) -> list[Answer | None]:
    """The answers, if there are any."""
    errors = [answer.error for answer in answers if answer is not None]
    if all(errors):
        raise InvalidRequest(f"Under {condition!r} the graph failed on every example: {errors[0]}")
    return answers


def _length_classes(members: list[tuple[int, Member]], rng: random.Random) -> list[list[Member]]:
    """Cuts questions into classes of 2 to 8 whose lengths differ by a factor of 2 at most.

    As few questions as can be stay without a class, and then there are as few classes as can be.

    Args:
        members: Pairs of length and question.
        rng: Orders questions of equal length.
    """
    rng.shuffle(members)
    members.sort(key=lambda member: member[0])
    best = [(0, 0, 0)]  # of the first so many questions: how many are alone, in how many classes, the last one's size
    for end in range(1, len(members) + 1):
        best.append(
            min(
                (best[end - size][0] + (size == 1), best[end - size][1] + 1, size)
                for size in range(1, min(CLASS_SIZE, end) + 1)
                if members[end - 1][0] <= CLASS_RATIO * members[end - size][0]
            )
        )
    classes: list[list[Member]] = []
    end = len(members)
    while end:
        size = best[end][2]
        if size > 1:
            classes.insert(0, [member for _, member in members[end - size : end]])
        end -= size
    return classes
