"""Rules 1 and 2: what the published implementation computed, case by case."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from langchain_latentmas import LatentRef, LatentService

from ..support import MODELS, PARITY, parity_cases, relative, say

CLOSE = 2e-3  # of a tensor's largest value: float32 and another order of summation
CASES = [pytest.param(model, case, id=f"{model}-{case['key']}") for model in MODELS for case in parity_cases(model)]


@pytest.fixture(scope="module")
def reference() -> dict[str, dict[str, Tensor]]:
    return {model: load_file(PARITY / model / "reference.safetensors") for model in MODELS}


def prompt(agent: dict[str, Any]) -> list[tuple[str, str]]:
    return [("system", agent["system"]), ("human", agent["user"])]


@pytest.mark.parametrize(("model", "case"), CASES)
def test_thoughts_memory_and_words_are_those_of_the_published_implementation(
    model: str,
    case: dict[str, Any],
    reference: dict[str, dict[str, Tensor]],
    parity_service: Callable[..., LatentService],
) -> None:
    service = parity_service(model, "float32", case["realign"])
    theirs = {name.removeprefix(f"{case['key']}."): t for name, t in reference[model].items()}

    ref: LatentRef | None = None
    for i, agent in enumerate(case["agents"]):
        ref = service.think(prompt(agent), [ref] if ref else [], steps=case["steps"], agent=f"a{i}")
    assert ref is not None
    memory = service.memory(ref)
    said = say(service, prompt(case["judge"]), [ref], max_tokens=24)

    assert memory.positions == ref["positions"] == case["memory_tokens"]
    assert [segment.agent for segment in memory.segments] == [f"a{i}" for i in range(len(case["agents"]))]
    for i, (segment, agent) in enumerate(zip(memory.segments, case["agents"], strict=True)):
        assert list(segment.prompt_ids) == agent["input_ids"]
        assert len(segment.thoughts) == case["steps"]
        if case["steps"]:
            assert relative(segment.thoughts, theirs[f"a{i}.thoughts"]) < CLOSE
    assert relative(torch.stack(list(memory.keys)), theirs["keys"]) < CLOSE
    assert relative(torch.stack(list(memory.values)), theirs["values"]) < CLOSE
    assert list(said.token_ids) == case["greedy"]
