from hypothesis import given
from hypothesis import strategies as st

from langchain_latentmas.service.budget import Budget


def sized(limit: int) -> Budget[str]:
    return Budget(limit, len)


def test_the_least_recently_used_value_goes_first() -> None:
    budget = sized(6)
    for key in "abc":
        budget.put(key, "xx")
    assert budget.get("a") == "xx"
    budget.put("d", "xx")
    assert [key in budget for key in "abcd"] == [True, False, True, True]
    assert budget.evictions == 1


def test_a_value_larger_than_the_limit_displaces_nobody() -> None:
    budget = sized(4)
    budget.put("a", "xx")
    budget.put("b", "x" * 5)
    assert "b" not in budget
    assert budget.get("a") == "xx"


def test_a_larger_value_under_a_known_key_is_not_mistaken_for_the_old_one() -> None:
    budget = sized(4)
    budget.put("a", "xx")
    budget.put("a", "x" * 5)
    assert budget.get("a") is None
    assert budget.used == 0


def test_a_limit_of_zero_keeps_nothing() -> None:
    budget = sized(0)
    budget.put("a", "x")
    assert budget.get("a") is None
    assert len(budget) == budget.used == 0


def test_clearing_counts_no_evictions() -> None:
    budget = sized(4)
    budget.put("a", "xx")
    budget.clear()
    assert (len(budget), budget.used, budget.evictions) == (0, 0, 0)


@given(st.integers(0, 12), st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 9) | st.none()), max_size=40))
def test_it_never_holds_more_than_the_limit_and_what_it_holds_is_what_was_put_last(
    limit: int, calls: list[tuple[str, int | None]]
) -> None:
    budget, last = sized(limit), dict[str, str]()
    for key, size in calls:
        if size is None:
            assert budget.get(key) in (None, last.get(key))
        else:
            last[key] = "x" * size
            budget.put(key, last[key])
        assert budget.used <= limit
        assert budget.used == sum(len(budget.get(key) or "") for key in "abcd")
