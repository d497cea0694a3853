"""A short version of `python -m tests.chaos`, which kills 20 times during 50 graphs."""

import pytest

from ..chaos import chaos


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("served", [False, True], ids=["in process", "served"])
def test_graphs_outlive_the_process_that_has_the_model(served: bool, capfd: pytest.CaptureFixture[str]) -> None:
    assert chaos(kills=3, graphs=6, seed=1, served=served), capfd.readouterr()
    assert "answers as undisturbed: 6 of 6; references lost: 0" in capfd.readouterr().out
