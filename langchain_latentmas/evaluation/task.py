"""A task: questions, the graph that is to answer them, and the grader; and the tasks of the bundled model."""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage
from langgraph.graph import StateGraph

from .. import bundled, teams
from ..bundled import tasks
from ..errors import InvalidRequest
from ..node import Prompt
from ..service import LatentService
from ..state import LatentState
from .roles import BOXED, BUNDLED, Roles


class Question(NamedTuple):
    """One question of a task."""

    id: str
    text: str
    answer: str
    """What the grader compares with, in the form that the task's grader wants."""
    facts: Mapping[str, str] = MappingProxyType({})
    """By agent name: what only that agent is told."""


class FactsState(LatentState):
    """State of a graph whose agents know different things."""

    facts: Mapping[str, str]


class Task(ABC):
    """Questions, the graphs that answer them, and a grader.

    Attributes:
        name: What the command line and the tables call it.
        steps: Latent steps of a thinker, where nobody says how many.
        max_tokens: Most tokens that one agent decodes, where nobody says how many.
        runs_code: Whether its grader runs what the agents wrote.
        published: Whether it is one of the paper's, and not only called like one.
    """

    name: str
    steps: int
    max_tokens: int
    runs_code: bool = False
    published: bool = False

    @abstractmethod
    def questions(self, n: int | None = None, seed: int = 0) -> list[Question]:
        """The questions of a run; the same for the same `n` and `seed`.

        Args:
            n: How many; None takes as many as the task has, or its usual number.
            seed: Which ones.

        Raises:
            InvalidRequest: If `n` is below 1 or more than there are.
        """

    @abstractmethod
    def grade(self, text: str, question: Question) -> bool:
        """Whether the text of the agent that answers gives the right answer."""

    @abstractmethod
    def roles(self, service: LatentService) -> Roles:
        """What the agents are told when the model of this service plays them."""

    def input(self, question: Question) -> dict[str, Any]:
        """The graph's input state for a question."""
        return {"messages": [HumanMessage(question.text)]}

    def graph(
        self,
        service: LatentService,
        arrangement: str,
        *,
        steps: int | None = None,
        max_tokens: int | None = None,
        reads: Sequence[str] | None = None,
        **options: Any,
    ) -> "StateGraph[LatentState]":
        """The team, or the single agent, that answers the questions of this task.

        Who answers is "judger", or "solver" where it is alone.

        Args:
            service: The model service.
            arrangement: One of `teams.ARRANGEMENTS`.
            steps: Latent steps of a thinker.
            max_tokens: Most tokens that one agent decodes.
            reads: Whom the judger reads; None means every tip, [] nobody.
            **options: More for the functions of `langchain_latentmas.teams`, say `temperature`.

        Returns:
            A builder; compile it.

        Raises:
            InvalidRequest: If there is no such arrangement.
        """
        if arrangement not in teams.ARRANGEMENTS:
            known = ", ".join(teams.ARRANGEMENTS)
            raise InvalidRequest(f"There is no arrangement {arrangement!r}; take one of {known}.")
        roles = self.roles(service)
        options = {"max_tokens": self.max_tokens if max_tokens is None else max_tokens, **options}
        if arrangement == "single":
            return teams.single(service, **{"solver": roles.solver, **options})
        team: dict[str, Any] = {
            "agents": roles.sequential if arrangement == "sequential" else roles.hierarchical,
            "judger": roles.judger,
            "steps": self.steps if steps is None else steps,
            "reads": reads,
        }
        return teams.ARRANGEMENTS[arrangement](service, **{**team, **options})


class BundledTask(Task):
    """A task that the bundled model was trained for, on held-out questions; other models can play it too."""

    relay: ClassVar[bool] = False
    """Whether the judger is kept from the question."""

    def __init__(self) -> None:
        self.steps, self.max_tokens = bundled.STEPS, 320

    def questions(self, n: int | None = None, seed: int = 0) -> list[Question]:
        """See `Task.questions`; 100 of them where nobody says how many."""
        n = 100 if n is None else n
        if n < 1:
            raise InvalidRequest(f"There must be at least 1 question, not {n}.")
        rng = random.Random(seed)
        return [self._question(rng, f"{self.name}-{seed}-{i}") for i in range(n)]

    def grade(self, text: str, question: Question) -> bool:
        r"""Whether the last \boxed{...} holds the answer."""
        return tasks.grade(text, int(question.answer))

    def roles(self, service: LatentService) -> Roles:
        """See `Task.roles`."""
        # A model that was trained to think after a tag was trained with these words too.
        return BUNDLED if service.info().get("think_tag") else BOXED

    def graph(self, service: LatentService, arrangement: str, **options: Any) -> "StateGraph[LatentState]":
        """See `Task.graph`."""
        return super().graph(
            service, arrangement, **({} if arrangement == "single" else {"relay": self.relay}) | options
        )

    def _question(self, rng: random.Random, key: str) -> Question:
        problem = tasks.problem(rng, split="test")
        return Question(key, problem.question, str(problem.answer))


class Words(BundledTask):
    """Word problems; everybody sees the question."""

    name = "words"


class Relay(BundledTask):
    """Word problems that the judger never sees: it knows of them what the others hand on."""

    name = "relay"
    relay = True


class Split(BundledTask):
    """Three experts hold one private fact each, and the judger is asked what takes all three."""

    name = "split"

    def input(self, question: Question) -> dict[str, Any]:
        """See `Task.input`."""
        return {**super().input(question), "facts": dict(question.facts)}

    def graph(self, service: LatentService, arrangement: str, **options: Any) -> "StateGraph[LatentState]":
        """See `Task.graph`."""
        roles = self.roles(service)
        told: dict[str, Any] = {"solver": _told_all(roles)}
        if arrangement != "single":
            prompts = roles.sequential if arrangement == "sequential" else roles.hierarchical
            told = {"agents": {name: _told_one(prompt, name) for name, prompt in prompts.items()}}
        return super().graph(service, arrangement, **{**told, "state": FactsState, **options})

    def _question(self, rng: random.Random, key: str) -> Question:
        problem = tasks.shared_problem(rng, "test")
        facts = {
            name: fact
            for team in (BUNDLED.sequential, BUNDLED.hierarchical)
            for name, fact in zip(team, problem.facts, strict=True)
        }
        return Question(key, problem.question, str(problem.answer), facts)


def _told_one(prompt: str, name: str) -> Prompt:
    def messages(state: FactsState) -> list[BaseMessage]:
        return [SystemMessage(prompt), HumanMessage(state["facts"][name])]

    return messages


def _told_all(roles: Roles) -> Prompt:
    def messages(state: FactsState) -> list[BaseMessage]:
        facts = [state["facts"][name] for name in roles.sequential]
        return [SystemMessage(roles.solver), HumanMessage(" ".join([*facts, state["messages"][-1].text]))]

    return messages


BUNDLED_TASKS: Mapping[str, type[BundledTask]] = {task.name: task for task in (Words, Relay, Split)}
