"""What a command shows while it loads a model."""

import logging
from collections.abc import Iterator
from contextlib import redirect_stderr
from io import StringIO

import pytest
from huggingface_hub.utils import tqdm
from transformers.utils import logging as transformers_logging

from langchain_latentmas.commands.session import hush, loading

from ..support import wait_for


class Terminal(StringIO):
    """What a terminal is sent."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def bars(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The bars of both libraries, as they are when a command begins; and then none, as after other tests."""
    monkeypatch.setenv("TERM", "xterm")
    transformers_logging.enable_progress_bar()
    yield
    transformers_logging.set_tqdm_hook(None)
    transformers_logging.disable_progress_bar()


def test_a_download_shows_its_bar_where_the_spinner_was() -> None:
    with redirect_stderr(Terminal()) as terminal, loading(show=True):
        hush()
        for _ in tqdm(range(3), desc="weights"):
            pass
    before, _, bars = terminal.getvalue().partition("weights:")
    assert "loading the model" in before
    assert "loading the model" not in bars
    assert "100%" in bars


def test_weights_that_are_there_are_loaded_without_a_bar() -> None:
    with redirect_stderr(Terminal()) as terminal:
        hush()
        assert list(transformers_logging.tqdm(range(3), desc="Loading weights")) == [0, 1, 2]
    assert terminal.getvalue() == ""


def test_where_nobody_looks_on_there_are_no_bars_and_no_spinner() -> None:
    with redirect_stderr(StringIO()) as file, loading(show=True):
        hush()
        for _ in tqdm(range(3), desc="Fetching 3 files"):
            pass
    assert file.getvalue() == ""


def test_a_warning_stands_on_a_line_of_its_own_beside_the_spinner() -> None:
    with redirect_stderr(Terminal()) as terminal, loading(show=True):
        hush()
        wait_for(lambda: "loading the model" in terminal.getvalue())
        logging.getLogger("langchain_latentmas").warning("Mind the gap.")
    [said] = [line for line in terminal.getvalue().split("\n") if "Mind the gap." in line]
    assert "loading the model" not in said.rpartition("\x1b[2K")[2]
