"""What several test files share."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event
from typing import Any, NamedTuple

import torch
from torch import Tensor

from langchain_latentmas import LatentRef, LatentService
from langchain_latentmas.engine.kv import KV
from langchain_latentmas.service import Usage

PARITY = Path(__file__).parent / "data" / "parity"
MODELS = ("qwen3-tied", "llama-untied")
FIELDS = ("id", "agent", "model", "parents", "positions", "steps", "mac")


class Said(NamedTuple):
    """A text that was spoken to its end."""

    text: str
    token_ids: tuple[int, ...]
    ref: LatentRef
    usage: Usage
    finish: str


def messages(user: str, system: str = "You are a planner.") -> list[tuple[str, str]]:
    return [("system", system), ("human", user)]


def say(service: LatentService, prompt: Any, latents: Sequence[LatentRef] = (), **sampling: Any) -> Said:
    """Speaks to the end."""
    chunks = list(service.speak(prompt, latents, **{"max_tokens": 16, **sampling}))
    last = chunks[-1]
    assert last.ref is not None
    assert last.usage is not None
    assert last.finish_reason is not None
    tokens = tuple(token for chunk in chunks for token in chunk.token_ids)
    return Said("".join(chunk.text for chunk in chunks), tokens, last.ref, last.usage, last.finish_reason)


def at_once(calls: Iterable[Callable[[], Any]]) -> list[Any]:
    """Runs every call in a thread of its own, all released at the same moment; returns their results in order."""
    calls = list(calls)
    barrier = Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        barrier.wait(60)
        return call()

    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result(120) for future in [threads.submit(run, call) for call in calls]]


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max()) if theirs.numel() else 0.0


def kv_difference(ours: Any, theirs: Any) -> float:
    """Largest relative difference between the keys and values of two memories or KVs, layer by layer."""
    pairs = [*zip(ours.keys, theirs.keys, strict=True), *zip(ours.values, theirs.values, strict=True)]
    return max(relative(a, b) for a, b in pairs)


def kv_copy(memory: Any) -> KV:
    return KV([keys.clone() for keys in memory.keys], [values.clone() for values in memory.values])


def kv_equal(ours: Any, theirs: Any) -> bool:
    pairs = [*zip(ours.keys, theirs.keys, strict=True), *zip(ours.values, theirs.values, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


def parity_cases(model: str) -> list[dict[str, Any]]:
    return json.loads((PARITY / model / "reference.json").read_text())["cases"]


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Returns as soon as the condition holds, for what sends no event."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Gate:
    """Lets the test hold the tick thread inside a forward pass: closed until `open`, tells when somebody is in."""

    def __init__(self) -> None:
        self.entered, self.opened = Event(), Event()

    def wait(self) -> None:
        self.entered.set()
        assert self.opened.wait(60)

    def open(self) -> None:
        self.opened.set()
