"""How sure a figure is: intervals and tests for answers that are right or wrong. Imports no torch."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000


def wilson(right: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of a share (Wilson 1927, score interval).

    Args:
        right: How many were right.
        n: Of how many.
        level: Confidence.

    Returns:
        Its two ends as fractions of 1; (0, 1) where `n` is 0.
    """
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, factor = right / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / factor
    half = z / factor * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # An end that is 0 or 1 by algebra must not miss it by rounding.
    return (0.0 if right == 0 else middle - half), (1.0 if right == n else middle + half)


def by_question(scores: Sequence[float], questions: Sequence[Hashable]) -> list[float]:
    """The mean score of each question, for what wants one score per question.

    Answers to one question are not independent of each other, however often it is asked; those to different ones are.

    Args:
        scores: One per answer.
        questions: Of each answer, what tells its question from others.

    Returns:
        A score per question, in the order in which they first come; the scores themselves where each was asked once.
    """
    asked: dict[Hashable, list[float]] = defaultdict(list)
    for score, question in zip(scores, questions, strict=True):
        asked[question].append(score)
    return [sum(own) / len(own) for own in asked.values()]


def paired_bootstrap(
    ones: Sequence[float], others: Sequence[float], *, seed: int = 0, level: float = 0.95, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The interval of a mean difference between two scores of the same questions (Efron 1979, percentiles).

    Questions are drawn with replacement, each with both of its scores, so what makes a question hard for both cancels.
    Where no question was lost, or none won, no draw shows any; on that side the interval reaches at least as far as
    what `n` questions cannot show (`unseen`).

    Args:
        ones: A score per question between 0 and 1, say 1 for right.
        others: The scores of the same questions, in the same order, under the other condition.
        seed: Of the draws.
        level: Confidence.
        resamples: Number of draws.

    Returns:
        The two ends, in the unit of the scores.
    """
    differences = np.subtract(ones, others, dtype=float)
    # Only how often each difference is drawn matters, and there are few different ones.
    values, counts = np.unique(differences, return_counts=True)
    n = len(differences)
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, resamples)
    low, high = map(float, np.quantile(drawn @ values / n, [(1 - level) / 2, (1 + level) / 2]))
    mean, bound = float(differences.mean()), unseen(n, (1 + level) / 2)
    if values[0] >= min(0.0, mean):
        low = max(-1.0, min(low, mean - bound))
    if values[-1] <= max(0.0, mean):
        high = min(1.0, max(high, mean + bound))
    return low, high


def mcnemar(ones: Sequence[float], others: Sequence[float]) -> float:
    """Exact two-sided p of McNemar's test: are questions lost and questions won equally likely?

    With scores between 0 and 1 it is the sign test, of which McNemar's is the case of right and wrong.

    Args:
        ones: A score per question, say whether it was answered right.
        others: The same under the other condition, in the same order.

    Returns:
        The probability, if the two conditions were equally good, of wins and losses at least as uneven as these; 1
        where no question was answered differently.
    """
    won = sum(one > other for one, other in zip(ones, others, strict=True))
    lost = sum(other > one for one, other in zip(ones, others, strict=True))
    rarer, n = min(won, lost), won + lost
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(rarer + 1)) / 2**n)


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusts the p-values of several tests so that all of them together err as rarely as one (Holm 1979).

    Args:
        ps: One p-value per test.

    Returns:
        The adjusted ones, in the same order; compare them with the level of a single test.
    """
    adjusted = [0.0] * len(ps)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


def unseen(n: int, level: float = 0.95) -> float:
    """The largest share of questions that may behave otherwise when none of `n` did (exact "rule of three").

    Args:
        n: Number of questions.
        level: Confidence.

    Returns:
        A fraction of 1.
    """
    return float(1 - (1 - level) ** (1 / n))
