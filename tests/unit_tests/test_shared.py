"""The service that is taken where none is given."""

import os
from types import SimpleNamespace

import pytest

from langchain_latentmas import LatentService
from langchain_latentmas.errors import InvalidRequest
from langchain_latentmas.service import shared

from ..conftest import Fresh


def test_a_service_that_was_closed_is_loaded_anew(fresh_service: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_services", {})
    monkeypatch.setattr(LatentService, "load", lambda *_, **__: fresh_service())
    first = shared.shared_service()
    assert shared.shared_service() is shared.loaded() is first
    first.close()
    assert shared.loaded() is None
    second = shared.shared_service()
    assert second is not first
    assert shared.loaded() is second
    assert second.think("Plan.", steps=1)


def test_a_service_of_before_a_fork_is_loaded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_services", {})
    monkeypatch.setattr(LatentService, "load", lambda *_, **__: SimpleNamespace(closed=False))
    before = shared.shared_service()
    assert shared.loaded() is before
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert shared.loaded() is None
    assert shared.shared_service() is not before


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("bundled", '{"token": "of a vLLM server"}', "Setting token: "),
        ("bundled", '{"kv_budget": "much", "merge": "auto"}', "Setting kv_budget: "),
        ("vllm+http://127.0.0.1:9", '{"realign": false}', "realign is not for a client to say"),
        ("vllm:bundled", '{"kv_disk_budget": 0}', "kv_disk_budget is not for vLLM"),
    ],
)
def test_an_option_that_is_refused_is_said_to_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, model: str, options: str, said: str
) -> None:
    monkeypatch.setattr(shared, "_services", {})
    monkeypatch.setenv("LATENTMAS_OPTIONS", options)
    with pytest.raises(InvalidRequest, match=f"^LATENTMAS_OPTIONS: {said}"):
        shared.shared_service(model)
