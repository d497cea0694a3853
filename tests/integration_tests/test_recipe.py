"""The recipe of the bundled model can be run again."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from langchain_latentmas import LatentService
from langchain_latentmas.bundled import MODEL, evaluate, train


@pytest.fixture(autouse=True)
def _as_it_is(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiles nothing, which would take longer than the few steps here, and leaves the threads as they were."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    yield
    torch.set_num_threads(threads)


def test_it_makes_a_model_that_thinks_and_speaks(
    tmp_path: Path, bundled: LatentService, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, few in {"ROUNDS": 2, "AGAIN": 1, "MEASURED": 4}.items():
        monkeypatch.setattr(train, name, few)
    train.fit(seed=3, steps=5, alignment=0.5, second_pass=True, out=tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("right: solver 0.0 %") == 3
    assert "Still below 98% after 2 rounds more: solver, first" in printed
    with LatentService.load(str(tmp_path)) as made:
        assert made.info()["parameters"] == bundled.info()["parameters"]
        assert made.info()["fingerprint"] != bundled.info()["fingerprint"]
        ref = made.think([("human", "Sara has 12 coins.")], steps=3)
        assert made.say([("human", "How many?")], [ref], max_tokens=4).ref
    assert (tmp_path / "tokenizer.json").read_text() == (MODEL / "tokenizer.json").read_text()


@pytest.mark.parametrize(("again", "passes"), [(98.0, True), (97.9, False), (100.0, True)])
def test_another_seed_has_to_come_within_two_points(
    again: float, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[Any] = []
    monkeypatch.setattr(train, "fit", lambda *how: fitted.append(how))
    monkeypatch.setattr(train, "ProcessPoolExecutor", lambda most, _: ThreadPoolExecutor(most))
    monkeypatch.setattr(
        evaluate, "figures", lambda folder, n, **_: {"words: single": 100.0 if folder == MODEL else again, "relay": 1.0}
    )
    if passes:
        train.train(check=True)
    else:
        with pytest.raises(typer.Exit) as ended:
            train.train(check=True)
        assert ended.value.exit_code == 1
    seed, steps, alignment, second_pass, folder = fitted[0]
    assert (seed, steps, alignment, second_pass) == (train.OTHER_SEED, train.STEPS, 0.5, True)
    assert folder != MODEL
