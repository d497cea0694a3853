"""Text edges against latent ones on held-out problems: what `latentmas demo` shows and the benchmarks measure."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.graph.state import CompiledStateGraph

from .bundled.tasks import Problem, grade, problem
from .errors import InvalidRequest
from .evaluation.run import TEAMS, Cost, cost, usage
from .evaluation.task import Relay
from .service import LatentService

__all__ = ["MODES", "TEAMS", "Answer", "Score", "Transcript", "Turn", "answer_all", "cost", "held_out", "run", "turns"]

MODES = ("text", "latent", "cut")
"""What crosses the edges: text, latent memory, or latent memory that the judger does not read (the control)."""


class Answer(NamedTuple):
    """What a graph made of one question: its last state, and whether the last message there is right."""

    state: dict[str, Any]
    right: bool
    cost: Cost


@dataclass(frozen=True)
class Score:
    """One line of the table.

    Attributes:
        arrangement: Which graph.
        mode: What crossed its edges, one of `MODES`.
        questions: How many were asked.
        right: How many were answered right.
        output_tokens: Decoded by all agents, per question.
        latent_steps: Taken by all agents, per question.
        latent_steps_read: In the memory that the last agent read, per question.
        seconds: Wall clock for all questions together.
    """

    arrangement: str
    mode: str
    questions: int
    right: int
    output_tokens: float
    latent_steps: float
    latent_steps_read: float
    seconds: float

    @classmethod
    def of(cls, arrangement: str, mode: str, answers: Sequence[Answer], seconds: float) -> "Score":
        """Sums answers up."""
        tokens, steps, read = (sum(parts) / len(answers) for parts in zip(*(a.cost for a in answers), strict=True))
        right = sum(answer.right for answer in answers)
        return cls(arrangement, mode, len(answers), right, tokens, steps, read, seconds)


@dataclass(frozen=True)
class Turn:
    """What one agent did about one question.

    Attributes:
        agent: Who.
        text: What it said; None where it thought.
        output_tokens: Tokens that it decoded.
        latent_steps: Latent steps that it took.
        lens: The likeliest tokens and their probabilities, per latent step.
    """

    agent: str
    text: str | None
    output_tokens: int
    latent_steps: int
    lens: list[list[tuple[str, float]]]


@dataclass(frozen=True)
class Transcript:
    """How one question went.

    Attributes:
        arrangement: Which graph.
        mode: What crossed its edges.
        right: Whether the answer was right.
        turns: What each agent did.
    """

    arrangement: str
    mode: str
    right: bool
    turns: list[Turn]


def held_out(n: int, seed: int) -> list[Problem]:
    """Problems whose names and phrasings the bundled model was never trained on.

    Raises:
        InvalidRequest: If `n` is below 1.
    """
    if n < 1:
        raise InvalidRequest(f"There must be at least 1 question, not {n}.")
    rng = random.Random(seed)
    return [problem(rng, split="test") for _ in range(n)]


def answer_all(
    graph: "CompiledStateGraph[Any, Any, Any, Any]",
    problems: Sequence[Problem],
    *,
    edges: str = "latent",
    on_agent: Callable[[], None] | None = None,
) -> tuple[list[Answer], float]:
    """Puts all problems to a graph at once; their agents share the ticks of its service.

    Args:
        graph: A compiled graph whose last message is the answer.
        problems: The problems.
        edges: "latent" or "text".
        on_agent: Called whenever an agent is done, from any thread.

    Returns:
        The answers in the order of the problems, and the seconds that it all took.
    """
    config = {
        "configurable": {"edges": edges},
        "max_concurrency": len(problems),
        "callbacks": [_AgentsDone(on_agent)] if on_agent else [],
    }
    begun = time.perf_counter()
    states = graph.batch([{"messages": [HumanMessage(p.question)]} for p in problems], config)  # type: ignore[arg-type]
    seconds = time.perf_counter() - begun
    answers = [
        Answer(state, grade(state["messages"][-1].text, asked.answer), cost(state))
        for state, asked in zip(states, problems, strict=True)
    ]
    return answers, seconds


def run(
    service: LatentService,
    arrangement: str,
    mode: str,
    problems: Sequence[Problem],
    *,
    on_agent: Callable[[], None] | None = None,
    **options: Any,
) -> tuple[Score, list[Answer]]:
    """Puts all problems to a team at once, its judger kept from the question.

    Args:
        service: The model service. One that has thought about these problems before still knows its thoughts, and takes
            no time for them.
        arrangement: One of `TEAMS`.
        mode: One of `MODES`.
        problems: The problems.
        on_agent: Called whenever an agent is done, from any thread.
        **options: As `Task.graph` takes them.

    Returns:
        The score, and the answers in the order of the problems.
    """
    if mode == "cut":
        options["reads"] = []
    service.forget_prefixes()  # text and latent teams begin their prompts alike; whoever came second would be faster
    graph: CompiledStateGraph[Any, Any, Any, Any] = Relay().graph(service, arrangement, **options).compile()
    answers, seconds = answer_all(graph, problems, edges="text" if mode == "text" else "latent", on_agent=on_agent)
    return Score.of(arrangement, mode, answers, seconds), answers


def ratios(scores: Sequence[Score]) -> dict[str, dict[str, float]]:
    """How many times more text costs than latent edges, per arrangement: output tokens and seconds."""
    by = {(score.arrangement, score.mode): score for score in scores}
    return {
        arrangement: {
            name: getattr(by[arrangement, "text"], name) / getattr(by[arrangement, "latent"], name)
            for name in ("output_tokens", "seconds")
        }
        for arrangement in dict.fromkeys(score.arrangement for score in scores)
    }


def turns(service: LatentService, state: Mapping[str, Any], top_k: int = 3) -> list[Turn]:
    """Who did what on the way to a graph's last state.

    Args:
        service: Reads the thoughts out.
        state: The last state of a latent graph.
        top_k: Tokens per thought.

    Returns:
        Those who thought, then those who spoke, each in the order of the state.
    """
    said = [message for message in state["messages"] if isinstance(message, AIMessage)]
    spoke = {(message.response_metadata.get("latent_ref") or {}).get("id") for message in said}
    thought = [ref for ref in state.get("latents", []) if ref["id"] not in spoke]
    return [
        *(Turn(r["agent"], None, 0, r["steps"], [row.tokens for row in service.lens(r, top_k)]) for r in thought),
        *(Turn(m.response_metadata["agent"], m.text, usage(m)["output_tokens"], 0, []) for m in said),
    ]


class _AgentsDone(BaseCallbackHandler):
    """Counts nodes, not graphs."""

    def __init__(self, on_agent: Callable[[], None]) -> None:
        self.on_agent = on_agent

    def on_chain_end(self, outputs: Any, *, tags: list[str] | None = None, **kwargs: Any) -> None:
        if any(tag.startswith("graph:step") for tag in tags or []):
            self.on_agent()
