"""Accuracy against latent steps."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..service import LatentService
from .run import Evaluation
from .task import Task


class Point(NamedTuple):
    """One point of a curve."""

    steps: int
    """Latent steps of each thinker."""
    accuracy: float
    """Right answers in %."""
    low: float
    """Lower end of its 95 % Wilson interval."""
    high: float


def curve(
    service: LatentService,
    task: Task,
    arrangement: str,
    steps: Sequence[int],
    *,
    n: int,
    seed: int = 0,
    on_answer: Callable[[str, str, int, int], None] | None = None,
) -> list[Point]:
    """Evaluates a team with latent edges at several numbers of steps, on the same questions.

    Args:
        service: The model service.
        task: What is asked.
        arrangement: "sequential" or "hierarchical".
        steps: Latent steps of each thinker.
        n: Number of questions.
        seed: Which ones.
        on_answer: Called after every answer with mode, arrangement, answers so far and number of questions.

    Returns:
        A point for each of `steps`.
    """
    points = []
    for count in steps:
        evaluation = Evaluation(
            service, task, modes=["latent"], arrangements=[arrangement], n=n, seed=seed, steps=count
        )
        row = evaluation.run(on_answer=on_answer).rows[0]
        points.append(Point(count, row.accuracy, row.low, row.high))
    return points
