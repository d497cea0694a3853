import inspect

import pytest
from langgraph.types import RetryPolicy

import langchain_latentmas
from langchain_latentmas import errors
from langchain_latentmas.evaluation.journal import is_mended
from langchain_latentmas.service.wire import Problem

ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]
MENDED_BY_A_RETRY = {
    errors.EngineFailed,
    errors.ServiceClosed,
    errors.ServiceBusy,
    errors.DeadlineExceeded,
    errors.ServiceUnreachable,
    errors.StoreBusy,
    errors.LatentMASError,
}


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_is_caught_by_the_common_base(kind: type[Exception]) -> None:
    assert issubclass(kind, errors.LatentMASError)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_langgraph_retries_only_what_a_retry_can_mend(kind: type[Exception]) -> None:
    retried = RetryPolicy().retry_on
    assert callable(retried)
    assert retried(kind("why")) is (kind in MENDED_BY_A_RETRY)


def test_numbers_that_overflow_are_no_failure_of_the_engine() -> None:
    """The same request overflows again: neither a client nor an evaluation should repeat it."""
    assert Problem.of(errors.NotFinite("why")).status == 422
    assert not is_mended("NotFinite: why")


def test_a_reference_of_another_model_is_an_invalid_reference() -> None:
    for kind in (errors.TamperedReference, errors.WrongModel, errors.UnknownReference):
        assert issubclass(kind, errors.InvalidReference)


def test_every_public_name_can_be_imported() -> None:
    for name in langchain_latentmas.__all__:
        assert getattr(langchain_latentmas, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = langchain_latentmas.nothing_here


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("\nfirst\nsecond"), "first"),
        (RuntimeError(""), "RuntimeError"),
        (AssertionError(), "AssertionError"),
        (ValueError(" \n "), "ValueError"),
    ],
)
def test_an_error_has_a_first_line_even_if_it_says_nothing(error: Exception, line: str) -> None:
    assert errors.first_line(error) == line
