"""The questions of an audit, put to a graph under one condition after the other."""

import asyncio
import copy
import random
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import merge_configs
from langgraph.pregel import Pregel

from ..errors import EdgeNotCrossed, GraderFailed, InvalidRequest, NoPartner, ServiceUnreachable
from ..modes import Edge
from ..service import LatentService
from ..service.base import READING
from ..state import LatentRef
from .journal import Journal, is_mended
from .worth import Answer

CLASS_SIZE, CLASS_RATIO = 8, 2.0
GRADER = "the grader raised "
Grade = Callable[[Any, Any], bool]
Progress = Callable[[str, int, int], None]


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

    async def run(self, scope: str, condition: str, change: Change, edges: Any = None) -> list[Answer]:
        """All answers under one condition, those in the journal included."""
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
                self.on_answer(name, len(answers), len(self.examples))

        if self.on_answer:
            self.on_answer(name, len(answers), len(self.examples))
        await self._ask([i for i in range(len(self.examples)) if i not in answers], change, edges, done)
        return [answers[i] for i in range(len(self.examples))]

    async def altered(self, scope: Scope, condition: str) -> list[Answer]:
        """All answers with some edges altered."""
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
            edges = "text" if scope.all else {"->".join(edge): "text" for edge in scope.edges}
            return await self.run(scope.name, condition, _whole, edges)
        if condition == "swapped":
            done = {line["example"] for line in self._known(scope.name, condition)}
            gone = {partners[i] for i in partners.keys() - done} - self.memories.keys()
            await self._ask(sorted(gone), _whole, None, self._remember)
        return await self.run(scope.name, condition, change)

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
        standing = [of for of in lines.values() if ("", "intact") in of and not _is_mended(of["", "intact"])]
        return [
            of[scope, condition] for of in standing if (scope, condition) in of and not _is_mended(of[scope, condition])
        ]

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

    async def intact(self) -> list[Answer]:
        """All answers of the graph as it is.

        Raises:
            GraderFailed: If the grader raised on every answer.
            InvalidRequest: If the graph failed on every question.
            EdgeNotCrossed: If no memory crossed any edge.
        """
        answers = await self.run("", "intact", _whole)
        if all(answer.error.startswith(GRADER) for answer in answers):
            raise GraderFailed(f"The grader raised on every answer: {answers[0].error.removeprefix(GRADER)}")
        if all(answer.error for answer in answers):
            raise InvalidRequest(f"The graph failed on every example: {answers[0].error}")
        if not any(self.crossed.values()):
            raise EdgeNotCrossed(
                "No memory crossed any edge of this graph on any example. Is there an agent that thinks, and one that "
                "reads it? An edge of an ordinary graph becomes latent with switch_edges."
            )
        return answers

    def crossed_by(self, scope: Scope) -> int:
        """In how many questions a memory crossed one of these edges."""
        return sum(any(edge in scope.edges for edge, _ in crossed) for crossed in self.crossed.values())

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
        """Whose memory each question gets in "swapped": another's of its length class that crossed the same edges.

        A derangement within each class; questions that crossed none of the edges have no partner.
        """
        alike: dict[frozenset[Edge], list[tuple[int, int]]] = defaultdict(list)
        for i, crossed in sorted(self.crossed.items()):
            lengths = [(edge, positions) for edge, positions in crossed if edge in scope.edges]
            if lengths:
                alike[frozenset(edge for edge, _ in lengths)].append((sum(length for _, length in lengths), i))
        rng = random.Random(self.seed)
        partners: dict[int, int] = {}
        for members in alike.values():
            for group in _length_classes(members, scope.name, rng):
                rng.shuffle(group)
                partners |= dict(zip(group, group[1:] + group[:1], strict=True))
        return partners

    def notes(self, scope: Scope) -> list[str]:
        """What was done otherwise than asked for."""
        if not (missing := self.missing[scope.name]):
            return []
        return [f"swapped: {missing} times the other question had no memory to give, and nothing was read"]


def _is_mended(line: Mapping[str, Any]) -> bool:
    error = line["answer"]["error"]
    return error.startswith(GRADER) or is_mended(error)


def _named(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _length_classes(members: list[tuple[int, int]], edge: str, rng: random.Random) -> list[list[int]]:
    """Cuts questions into as few classes of 2 to 8 as can be, whose lengths differ by a factor of 2 at most.

    Args:
        members: Pairs of length and question.
        edge: For the message.
        rng: Orders questions of equal length.

    Raises:
        NoPartner: If there are no such classes.
    """
    rng.shuffle(members)
    members.sort(key=lambda member: member[0])
    sizes = {0: (0, 0)}  # by the number of questions that are in classes: of how many classes, and the last one's size
    for end in range(2, len(members) + 1):
        fitting = [
            (sizes[end - size][0] + 1, size)
            for size in range(2, min(CLASS_SIZE, end) + 1)
            if end - size in sizes and members[end - 1][0] <= CLASS_RATIO * members[end - size][0]
        ]
        if fitting:
            sizes[end] = min(fitting)
    if (end := max(sizes)) < len(members):
        length, i = members[end]
        raise NoPartner(
            f"What crosses {edge} on example {i} has {length} positions, and of the examples with half to twice as "
            "many there, none is left to swap with. Leave this example out, or add some of its kind."
        )
    classes: list[list[int]] = []
    while end:
        size = sizes[end][1]
        classes.insert(0, [i for _, i in members[end - size : end]])
        end -= size
    return classes
