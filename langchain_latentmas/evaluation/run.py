"""An evaluation: a task under several modes and arrangements, every answer kept, and what they sum up to."""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig

from ..errors import InvalidRequest, ServiceUnreachable
from ..service import LatentService
from . import sandbox
from .benchmarks import Published, published
from .journal import GRADER, Journal, digest, is_mended, pinned
from .machine import machine, version_of
from .statistics import paired_bootstrap, wilson
from .task import Question, Task

logger = logging.getLogger(__name__)

MODES = ("single", "text", "latent")
"""One agent alone, a team whose edges carry text, a team whose edges carry latent memory."""
TEAMS = ("sequential", "hierarchical")


class Cost(NamedTuple):
    """What an answer took."""

    output_tokens: int
    """Decoded by all agents together."""
    latent_steps: int
    """Taken by all agents together."""
    latent_steps_read: int
    """Of those, the ones in the memory that the last agent read."""


def cost(state: Mapping[str, Any]) -> Cost:
    """What a graph's last state says about the work of its agents."""
    said = [message for message in state["messages"] if isinstance(message, AIMessage)]
    return Cost(
        output_tokens=sum(usage(message)["output_tokens"] for message in said),
        latent_steps=sum(ref["steps"] for ref in state.get("latents", [])),
        latent_steps_read=usage(said[-1])["output_token_details"]["latent_steps"] if said else 0,
    )


def usage(message: AIMessage) -> dict[str, Any]:
    """What a message of `ChatLatentMAS` says about its cost."""
    assert message.usage_metadata is not None  # it always says it
    return dict(message.usage_metadata)


@dataclass(frozen=True)
class Answer:
    """What a graph made of one question.

    Attributes:
        mode: One of `MODES`.
        arrangement: "single", or one of `TEAMS`.
        id: Of the question.
        text: What the last agent said.
        right: What the grader thinks of it.
        output_tokens: Decoded by all agents.
        latent_steps: Taken by all agents.
        seconds: Wall clock from the answer before it, of the same mode and arrangement, or from the start.
        error: Name and message of what went wrong; the answer counts as wrong.
    """

    mode: str
    arrangement: str
    id: str
    text: str = ""
    right: bool = False
    output_tokens: int = 0
    latent_steps: int = 0
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Row:
    """All answers of one mode and arrangement.

    Attributes:
        mode: One of `MODES`.
        arrangement: "single", or one of `TEAMS`.
        accuracy: In %; what failed counts as wrong.
        low: Lower end of its 95 % Wilson interval.
        high: Upper end.
        output_tokens: Decoded by all agents, per question.
        latent_steps: Taken by all agents, per question.
        seconds: Wall clock for all questions, summed over the sessions that it took.
        failed: How many questions failed, by the name of the error.
        published: What the paper reports for this row.
    """

    mode: str
    arrangement: str
    accuracy: float
    low: float
    high: float
    output_tokens: float
    latent_steps: float
    seconds: float
    failed: Mapping[str, int]
    published: Published | None

    @classmethod
    def of(cls, answers: Sequence[Answer], known: Published | None) -> "Row":
        """Sums answers up."""
        n, right = len(answers), sum(answer.right for answer in answers)
        low, high = wilson(right, n)
        return cls(
            mode=answers[0].mode,
            arrangement=answers[0].arrangement,
            accuracy=100 * right / n,
            low=100 * low,
            high=100 * high,
            output_tokens=sum(answer.output_tokens for answer in answers) / n,
            latent_steps=sum(answer.latent_steps for answer in answers) / n,
            seconds=sum(answer.seconds for answer in answers),
            failed=dict(Counter(answer.error.split(":")[0] for answer in answers if answer.error)),
            published=known,
        )


class Comparison(NamedTuple):
    """Latent edges against text, on the same questions."""

    points: float
    """Accuracy of latent edges less that of text."""
    low: float
    """Lower end of its 95 % interval (paired bootstrap over the questions)."""
    high: float
    output_tokens: float | None
    """How many times more text decodes; None where latent edges decode nothing."""
    seconds: float | None
    """How many times longer text takes; None where not all was asked on one machine."""


@dataclass(frozen=True)
class Summary:
    """What an evaluation found.

    Attributes:
        task: Its name.
        n: Number of questions.
        rows: One per mode and arrangement.
        comparisons: By arrangement.
        settings: What the answers depend on; the same settings give the same questions.
        sessions: Machine and versions of every session that contributed; more than one after an interruption.
        answers: Where every answer is, if anywhere.
    """

    task: str
    n: int
    rows: list[Row]
    comparisons: dict[str, Comparison]
    settings: dict[str, Any]
    sessions: list[dict[str, Any]]
    answers: str | None

    @property
    def on_one_machine(self) -> bool:
        """Whether all sessions ran on the same processor and device, with as many threads."""
        return _on_one_machine(self.sessions)

    def as_json(self) -> dict[str, Any]:
        """As plain JSON."""
        rows = [{**asdict(row), "published": row.published and row.published._asdict()} for row in self.rows]
        comparisons = {arrangement: comparison._asdict() for arrangement, comparison in self.comparisons.items()}
        return {**vars(self), "rows": rows, "comparisons": comparisons}


class Evaluation:
    """A task, a model service, and how the one is put to the other."""

    def __init__(
        self,
        service: LatentService,
        task: Task,
        *,
        modes: Sequence[str] = MODES,
        arrangements: Sequence[str] = TEAMS,
        n: int | None = None,
        seed: int = 0,
        steps: int | None = None,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        batch: int = 64,
    ) -> None:
        """Checks everything; the work starts with `run`.

        Args:
            service: The model service. Seconds are right if it has not thought about these questions before: one that
                has still knows its thoughts.
            task: What is asked.
            modes: Of `MODES`.
            arrangements: Of `TEAMS`, for the modes "text" and "latent".
            n: Number of questions; None takes the task's own number.
            seed: Which questions, and of sampling.
            steps: Latent steps of a thinker; None takes the task's.
            max_tokens: Most tokens that one agent decodes; None takes the task's.
            temperature: 0 means greedy.
            top_p: Nucleus sampling.
            batch: Questions at work at a time; the next one starts when one is done.

        Raises:
            InvalidRequest: If a mode or an arrangement is unknown, a number out of range, or a row without an answer.
            DatasetNotFound: If the task's rows cannot be loaded.
        """
        _check("mode", modes, MODES)
        _check("arrangement", arrangements, TEAMS)
        if batch < 1:
            raise InvalidRequest(f"batch must be at least 1, not {batch}.")
        if not (0 <= temperature < math.inf and 0 < top_p <= 1):
            raise InvalidRequest(
                f"temperature must be finite, at least 0, and top_p in (0, 1], not {temperature} and {top_p}."
            )
        self.service, self.task, self.batch = service, task, batch
        self.questions = task.questions(n, seed)
        self.steps = task.steps if steps is None else steps
        self.options: dict[str, Any] = {
            "max_tokens": task.max_tokens if max_tokens is None else max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed if temperature > 0 else None,
        }
        self.cells = [
            (mode, arrangement)
            for arrangement in ("single", *TEAMS)
            for mode in MODES
            if mode in modes and (arrangement == "single" if mode == "single" else arrangement in arrangements)
        ]
        if not self.cells:
            raise InvalidRequest("There is nothing to evaluate: the modes text and latent need an arrangement.")
        self.graphs = {cell: self._graph(cell[1]) for cell in self.cells}  # wrong options are found here
        self.model = str(service.info().get("model", service.name))
        self.settings: dict[str, Any] = {
            "version": version_of("langchain-latentmas"),
            "task": task.name,
            "n": len(self.questions),
            "seed": seed,
            "questions": digest(self.questions),
            "prompts": digest(task.roles(service)),
            "model": pinned(service),
            "steps": self.steps,
            **{name: value for name, value in self.options.items() if name != "seed"},
            "batch": batch,
        }

    def run(self, path: str | Path | None = None, on_answer: "OnAnswer | None" = None) -> Summary:
        """Asks all questions that have no answer yet.

        Args:
            path: A JSONL file that gets every answer as it comes. If it is there already, the run goes on where it
                stopped; what failed for want of a working device or server is asked again, and what for want of a
                grader, or was not graded yet when the run was interrupted, is graded.
            on_answer: Called after every answer with mode, arrangement, answers so far, and number of questions.

        Returns:
            What came of it.

        Raises:
            InvalidRequest: If the file was begun with other settings.
            SandboxUnavailable: If the grader has to run code, which cannot be done here.
            ServiceUnreachable: If the server is gone for longer than its client waits; the answers so far are kept.
        """
        return asyncio.run(self.arun(path, on_answer))

    async def arun(self, path: str | Path | None = None, on_answer: "OnAnswer | None" = None) -> Summary:
        """Like `run`, for a running event loop."""
        device = self.service.info().get("device", "cpu")
        session: dict[str, Any] = {"begun": time.strftime("%Y-%m-%d %H:%M:%S"), **machine(device)}
        if self.task.runs_code:
            session["sandbox_missing"] = list(await asyncio.to_thread(sandbox.missing))
        with nullcontext() if path is None else Journal(path, self.settings) as journal:
            return await self._run(journal, session, on_answer or (lambda *progress: None), path)

    async def _run(
        self, journal: Journal | None, session: dict[str, Any], on_answer: "OnAnswer", path: str | Path | None
    ) -> Summary:
        lines = journal.lines if journal else []
        sessions = [line["session"] for line in lines if "session" in line]
        known = {
            (answer.mode, answer.arrangement, answer.id): answer
            for answer in (Answer(**line) for line in lines if "session" not in line)
        }
        answers = {key: answer for key, answer in known.items() if not is_mended(answer.error)}
        ungraded = {key: replace(known[key], error="") for key in known.keys() - answers.keys() if known[key].text}
        pending = {
            cell: [question for question in self.questions if (*cell, question.id) not in answers]
            for cell in self.cells
        }
        if any(pending.values()):
            sessions.append(session)
            if journal:
                journal.add({"session": session})
        for cell, questions in pending.items():
            done = len(self.questions) - len(questions)
            on_answer(*cell, done, len(self.questions))

            def keep(answer: Answer) -> None:
                answers[answer.mode, answer.arrangement, answer.id] = answer
                if journal:
                    journal.add(asdict(answer))
                nonlocal done
                done += 1
                on_answer(answer.mode, answer.arrangement, done, len(self.questions))

            if questions:
                if not self.service.forget_prefixes() and cell != self.cells[0]:
                    logger.warning(
                        "%s, %s: its prompts may begin as those that the server has just computed, so that its seconds "
                        "are too few; measure seconds with a model in this process, or one mode at a time",
                        *cell,
                    )
                said = {key[-1]: answer for key, answer in ungraded.items() if key[:-1] == cell}
                if len(said) < len(questions):
                    await self._warm_up(cell, questions[0])
                try:
                    await self._ask(cell, questions, said, keep)
                except ExceptionGroup as group:  # say, a disk that is full, or a server that is gone
                    raise group.exceptions[0] from None
        return self._summary(answers, sessions, None if path is None else str(path))

    async def _ask(
        self,
        cell: tuple[str, str],
        questions: Sequence[Question],
        said: Mapping[str, Answer],
        keep: "Callable[[Answer], None]",
    ) -> None:
        """Puts questions to the graph, `batch` at a time; grades and keeps each answer as it comes.

        Args:
            cell: Mode and arrangement.
            questions: What to ask.
            said: By question, answers from before that only want grading.
            keep: Gets each answer.
        """
        mode, arrangement = cell
        graph = self.graphs[cell].compile()
        room = asyncio.Semaphore(self.batch)
        graders = asyncio.Semaphore(sandbox.AT_ONCE)  # who waits for the sandbox keeps a thread from the service
        before = self.service.info().get("thoughts", 0)
        config = _config(mode, self.batch)
        taken, last = 0, time.perf_counter()

        async def ask(question: Question) -> Answer:
            nonlocal taken, last
            text, failed, state = "", "", self.task.input(question)
            try:
                async for reached in graph.astream(state, config, stream_mode="values"):
                    state = reached
                text = state["messages"][-1].text
            except ServiceUnreachable:  # its client has waited: the other questions would fail as well
                raise
            except Exception as error:
                failed = _named(error)
            spent = cost(state)  # what failed has cost something too
            taken += spent.latent_steps
            seconds, last = time.perf_counter() - last, time.perf_counter()
            return Answer(
                mode,
                arrangement,
                question.id,
                text=text,
                output_tokens=spent.output_tokens,
                latent_steps=spent.latent_steps,
                seconds=seconds,
                error=failed,
            )

        async def grade(answer: Answer, question: Question) -> None:
            if not answer.error:
                try:
                    async with graders:
                        right = bool(await asyncio.to_thread(self.task.grade, answer.text, question))
                    answer = replace(answer, right=right)
                except asyncio.CancelledError:  # the run ends: the next one has only to grade this
                    keep(replace(answer, error="GraderFailed: the run ended before it came to this answer"))
                    raise
                except Exception as error:
                    answer = replace(answer, error=f"{GRADER}{_named(error)}")
            keep(answer)

        async def one(question: Question) -> None:
            async with room:
                answer = said.get(question.id) or await ask(question)
            await grade(answer, question)  # meanwhile the next one is asked

        async with asyncio.TaskGroup() as tasks:
            for question in questions:
                tasks.create_task(one(question))
        if self.service.info().get("thoughts", taken) - before < 0.9 * taken:
            logger.warning(
                "%s, %s: the service knew some thoughts from before, so that its seconds are too few; "
                "measure on a fresh service",
                mode,
                arrangement,
            )

    async def _warm_up(self, cell: tuple[str, str], question: Question) -> None:
        """Asks something else first, so that nobody's seconds include what is done once in a process."""
        other = question._replace(
            text=f"Warm up. {question.text}", facts={name: f"Warm up. {fact}" for name, fact in question.facts.items()}
        )
        graph = self._graph(cell[1], steps=min(self.steps, 2), max_tokens=2).compile()
        await graph.abatch([self.task.input(other)], _config(cell[0], 1), return_exceptions=True)

    def _graph(self, arrangement: str, **options: Any) -> Any:
        return self.task.graph(self.service, arrangement, **{"steps": self.steps, **self.options, **options})

    def _summary(
        self, answers: Mapping[tuple[str, str, str], Answer], sessions: list[dict[str, Any]], path: str | None
    ) -> Summary:
        by = {cell: [answers[(*cell, question.id)] for question in self.questions] for cell in self.cells}
        named = self.task.name if self.task.published else ""
        rows = [Row.of(by[cell], published(named, self.model, *cell)) for cell in self.cells]
        timed = _on_one_machine(sessions)
        compared = {
            arrangement: _compare(by["text", arrangement], by["latent", arrangement], timed)
            for arrangement in TEAMS
            if ("text", arrangement) in by and ("latent", arrangement) in by
        }
        return Summary(self.task.name, len(self.questions), rows, compared, self.settings, sessions, path)


OnAnswer = Callable[[str, str, int, int], None]


def _on_one_machine(sessions: Sequence[Mapping[str, Any]]) -> bool:
    places = {tuple(each.get(name) for name in ("processor", "cores", "torch_threads", "device")) for each in sessions}
    return len(places) <= 1


def _compare(text: Sequence[Answer], latent: Sequence[Answer], timed: bool) -> Comparison:
    ones, others = [float(a.right) for a in latent], [float(a.right) for a in text]
    low, high = paired_bootstrap(ones, others)
    one, other = Row.of(text, None), Row.of(latent, None)
    return Comparison(
        other.accuracy - one.accuracy,
        100 * low,
        100 * high,
        one.output_tokens / other.output_tokens if other.output_tokens else None,
        one.seconds / other.seconds if timed and other.seconds else None,
    )


def _check(what: str, named: Sequence[str], known: Sequence[str]) -> None:
    for name in named:
        if name not in known:
            raise InvalidRequest(f"There is no {what} {name!r}; take of {', '.join(known)}.")


def _config(mode: str, batch: int) -> RunnableConfig:
    return {"max_concurrency": batch, "configurable": {"edges": "text" if mode == "text" else "latent"}}


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:500]}"
