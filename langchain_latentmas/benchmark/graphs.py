"""Whole graphs: many questions at once against one at a time, and latent edges against text."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from langchain_core.messages import HumanMessage

from .. import teams
from ..demo import held_out
from ..engine.model import LanguageModel
from ..errors import EngineFailed
from ..evaluation.run import cost
from ..evaluation.task import Relay
from ..service.local import LocalService, LocalSettings
from .spread import Spread, ratios

Arrangement = Literal["sequential", "hierarchical"]
TEAMS: tuple[Arrangement, ...] = ("sequential", "hierarchical")


def team(service: LocalService, arrangement: Arrangement, text: bool, steps: int, tokens: int) -> Any:
    """Three agents and a judger, compiled.

    Args:
        service: The model service.
        arrangement: The three one after the other, or at once.
        text: They speak instead of thinking. What they said is handed on with its KV, so that nobody prefills what
            others said: as good as text can get.
        steps: Latent steps of each of the three.
        tokens: Tokens of the judger, and of each of the three where they speak.
    """
    return teams.ARRANGEMENTS[arrangement](service, speak=text, steps=steps, max_tokens=tokens).compile()


def text_against_latent(
    model: LanguageModel, *, questions: int, steps: int, tokens: int, repeats: int, done: Callable[[], None]
) -> list[dict[str, Any]]:
    """The same teams as text and with latent edges, in turns, on one service.

    Args:
        model: The model; its `eos` must be empty, so that every text has its full length.
        questions: Asked at once.
        steps: Latent steps of a thinker.
        tokens: Tokens of every speaker.
        repeats: Turns.
        done: Called after each turn, one before them included, which is not counted.

    Returns:
        Per arrangement plain JSON: seconds of both, how many times longer text takes, and the ticks of both, whose
        ratio is about what can be reached.
    """
    rows = []
    with LocalService(model, _settings(3 * questions)) as service:
        asked = iter(range(1 << 30))

        def turn(arrangement: Arrangement, text: bool) -> tuple[float, int]:
            graph = team(service, arrangement, text, steps, tokens)
            inputs = [_question(next(asked)) for _ in range(questions)]  # never asked before, so nothing is known
            ticks, begun = service.info()["ticks"], time.perf_counter()
            # Of agents too: with as many threads as questions, the experts of one question would wait for each other.
            states = graph.batch(inputs, {"max_concurrency": 3 * questions})
            seconds = time.perf_counter() - begun
            for state in states:
                _check(state, (4 if text else 1) * tokens, 0 if text else 3 * steps)
            return seconds, service.info()["ticks"] - ticks

        for arrangement in TEAMS:
            turns: dict[bool, list[tuple[float, int]]] = {False: [], True: []}
            for i in range(-1, repeats):  # the first turn grows slots, and records steps: it is not counted
                for text in (True, False):
                    took = turn(arrangement, text)
                    turns[text] += [took] if i >= 0 else []
                    done()
            ratio = ratios(*([seconds for seconds, _ in turns[text]] for text in (True, False)))
            seconds = {text: Spread.of(seconds for seconds, _ in turns[text]) for text in turns}
            rows.append(
                {
                    "arrangement": arrangement,
                    "questions": questions,
                    "steps": steps,
                    "tokens": tokens,
                    "text_seconds": seconds[True].median,
                    "latent_seconds": seconds[False].median,
                    "text_over_latent": ratio.median,
                    "text_over_latent_spread": [ratio.min, ratio.max],
                    "text_ticks": turns[True][-1][1],
                    "latent_ticks": turns[False][-1][1],
                }
            )
    return rows


def concurrency(
    model: LanguageModel, *, concurrent: int, alone: int, repeats: int, done: Callable[[], None], **team: Any
) -> dict[str, Any]:
    """The demo's sequential graph with latent edges: questions per second, many at once and one at a time, in turns.

    Those at once go through `abatch`: threads, as many as questions, would get in each other's way.

    Args:
        model: The model, with the end tokens that it has.
        concurrent: Questions at once.
        alone: Questions that are asked one at a time.
        repeats: Turns.
        done: Called after each turn.
        **team: `steps` and `max_tokens`.

    Returns:
        Plain JSON: both throughputs, and how many times larger the first is.
    """
    problems = held_out(max(concurrent, alone), seed=0)

    def throughput(asked: Sequence[Any], at_once: bool) -> float:
        # A service of its own, since one that has thought a thought before returns it without work.
        with LocalService(model, _settings(concurrent)) as service:
            graph = Relay().graph(service, "sequential", **team).compile()

            def seconds(problems: Sequence[Any]) -> float:
                inputs: list[Any] = [{"messages": [HumanMessage(problem.question)]} for problem in problems]
                begun = time.perf_counter()
                if at_once:
                    asyncio.run(graph.abatch(inputs))
                else:
                    for one in inputs:
                        graph.invoke(one)
                return time.perf_counter() - begun

            seconds(held_out(len(asked) if at_once else 1, seed=1))  # allocates as many slots as it takes
            took = seconds(asked)
        done()
        return len(asked) / took

    many, single = [], []
    for _ in range(repeats):
        many.append(throughput(problems[:concurrent], at_once=True))
        single.append(throughput(problems[:alone], at_once=False))
    times = ratios(many, single)
    return {
        "concurrent": concurrent,
        "alone": alone,
        "per_second": Spread.of(many).median,
        "per_second_alone": Spread.of(single).median,
        "times": times.median,
        "times_spread": [times.min, times.max],
    }


def _settings(rows: int) -> LocalSettings:
    return LocalSettings.model_validate({"max_rows": max(64, rows)})


def _question(i: int) -> dict[str, Any]:
    return {"messages": [HumanMessage(f"Question {i}: what is {i % 89} plus {i % 97}?")], "latents": []}


def _check(state: dict[str, Any], tokens: int, steps: int) -> None:
    spent = cost(state)
    if (spent.output_tokens, spent.latent_steps) != (tokens, steps):
        raise EngineFailed(
            f"The graph decoded {spent.output_tokens} tokens and took {spent.latent_steps} latent steps instead of "
            f"{tokens} and {steps}."
        )
