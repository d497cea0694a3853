"""How many threads a pass takes, and that others keep theirs."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from langchain_latentmas.engine.model import LanguageModel
from langchain_latentmas.engine.threads import READ, SHARED, Threads
from langchain_latentmas.engine.tick import Row, Ticker

from ..conftest import load_parts


@pytest.fixture(autouse=True)
def three() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def threads(size: int) -> Threads:
    """Of a model with products of so many multiplications a position."""
    embeddings = nn.Parameter(torch.zeros(7, 1))
    body = nn.Module()
    body.embeddings, body.norm, body.matrix = embeddings, nn.Parameter(torch.zeros(9)), nn.Linear(size, 1, bias=False)
    return Threads(body, embeddings)


def test_only_large_products_are_shared_out() -> None:
    large = threads(SHARED // READ)
    assert [large.of(n) for n in (1, READ, 1000)] == [3, 3, 3]
    small = threads(SHARED // 64)
    assert [small.of(n) for n in (1, 63, 64)] == [1, 1, 3]


def test_whoever_takes_a_pass_has_its_own_number_again_behind_it() -> None:
    small = threads(SHARED // 64)
    with small.taken(1):
        assert torch.get_num_threads() == 1
        with small.taken(64):
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 1
    with pytest.raises(ZeroDivisionError), small.taken(1):
        _ = 1 / 0
    assert torch.get_num_threads() == 3


def test_a_tick_takes_one_but_for_passes_that_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(*load_parts("qwen3-tied", "float64"))
    seen: list[tuple[int, int]] = []
    forward = model.hidden

    def hidden(embeds: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append((len(embeds), torch.get_num_threads()))
        return forward(embeds, *rest)

    monkeypatch.setattr(model, "hidden", hidden)
    monkeypatch.setattr(model.threads, "_product", SHARED // 50)
    done: list[Any] = []
    ticker = Ticker(model, max_rows=2, live_bytes=1 << 30)
    for length in (20, 60):
        ticker.join(Row(past=(), start=0, inputs=[[5] * length], steps=1, on_done=done.append, on_error=done.append))
        with torch.inference_mode():
            ticker.step()
    assert (20, 1) in seen
    assert (60, 3) in seen
    assert torch.get_num_threads() == 3
