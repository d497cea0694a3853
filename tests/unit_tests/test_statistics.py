import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_latentmas.evaluation.statistics import by_question, holm, mcnemar, paired_bootstrap, unseen, wilson

answers = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [  # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_gives_the_published_intervals(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_of_nothing_is_everything() -> None:
    assert wilson(0, 0) == (0, 1)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.99))
def test_wilson_holds_the_share_and_mirrors(counts: tuple[int, int], level: float) -> None:
    right, n = counts
    low, high = wilson(right, n, level)
    assert 0 <= low <= right / n <= high <= 1
    mirrored = wilson(n - right, n, level)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high))
    wider = wilson(right, n, (1 + level) / 2)
    assert wider[0] <= low
    assert wider[1] >= high


@pytest.mark.parametrize(
    ("won", "lost", "p"),
    [(1, 9, 22 / 1024), (0, 5, 1 / 16), (4, 4, 1.0), (0, 0, 1.0), (0, 6, 1 / 32), (3, 12, 2 * 576 / 2**15)],
)
def test_mcnemar_is_the_binomial_test_of_what_changed(won: int, lost: int, p: float) -> None:
    ones = [True] * won + [False] * lost + [True, False, True]
    others = [False] * won + [True] * lost + [True, False, True]
    assert mcnemar(ones, others) == pytest.approx(p)
    assert mcnemar(others, ones) == pytest.approx(p)


@given(answers)
def test_mcnemar_sums_what_is_as_uneven(pairs: list[tuple[bool, bool]]) -> None:
    ones, others = zip(*pairs, strict=True)
    won, lost = pairs.count((True, False)), pairs.count((False, True))
    n = won + lost
    exact = sum(Fraction(math.comb(n, k), 2**n) for k in range(n + 1) if abs(2 * k - n) >= abs(won - lost))
    assert mcnemar(ones, others) == pytest.approx(float(exact))


def test_a_question_has_one_score_however_often_it_is_asked() -> None:
    assert by_question([1, 0, 1, 1, 1], "babca") == [1, 0.5, 1]
    assert by_question([True, False, True], "bac") == [True, False, True]


def test_mcnemar_of_scores_asks_which_of_the_two_is_larger() -> None:
    ones, others = [1, 0.75, 0.5, 0.25, 0.5], [0, 0.5, 0.25, 0.75, 0.5]
    assert mcnemar(ones, others) == mcnemar([1, 1, 1, 0, 1], [0, 0, 0, 1, 1])


@given(answers, st.integers(0, 5))
def test_bootstrap_brackets_the_difference_and_turns_with_its_sign(pairs: list[tuple[bool, bool]], seed: int) -> None:
    ones, others = zip(*pairs, strict=True)
    low, high = paired_bootstrap(ones, others, seed=seed, resamples=500)
    mean = (sum(ones) - sum(others)) / len(pairs)
    assert -1 <= low <= high <= 1
    assert low - 0.15 <= mean <= high + 0.15
    for sign, end in ((-1, -low), (1, high)):
        if sign not in {one - other for one, other in pairs}:
            assert end >= min(1, sign * mean + unseen(len(pairs), 0.975)) - 1e-9
    assert paired_bootstrap(ones, others, seed=seed, resamples=500) == (low, high)


def test_bootstrap_agrees_with_the_normal_interval_where_that_holds() -> None:
    ones, others = [1] * 300 + [0] * 700, [1] * 100 + [0] * 900  # 200 of 1000 lost, none won
    low, high = paired_bootstrap(ones, others)
    half = 1.96 * math.sqrt(0.2 * 0.8 / 1000)
    assert (low, high) == pytest.approx((0.2 - half, 0.2 + half), abs=0.003)


def test_bootstrap_pairs() -> None:
    # Unpaired, two shares of a half differ by up to 14 points here; paired, not at all.
    assert paired_bootstrap([1, 0] * 50, [1, 0] * 50) == pytest.approx((-0.036, 0.036), abs=1e-3)
    low, high = paired_bootstrap([1, 0] * 50, [1, 0] * 49 + [0, 0])
    assert low == pytest.approx(0.01 - unseen(100, 0.975))  # none was lost, which is no proof that none can be
    assert 0.01 <= high <= 0.04


def test_holm_gives_the_published_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_lies_between_single_and_bonferroni(ps: list[float]) -> None:
    adjusted = holm(ps)
    for p, q in zip(ps, adjusted, strict=True):
        assert p <= q <= 1
    assert min(adjusted) == pytest.approx(min(1.0, len(ps) * min(ps)))
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)


def test_unseen_is_the_rule_of_three() -> None:
    assert unseen(100) == pytest.approx(0.0295, abs=1e-4)
    assert (1 - unseen(40)) ** 40 == pytest.approx(0.05)
