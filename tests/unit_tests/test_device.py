"""What depends on the device, with a stand-in for CUDA where there is none."""

from itertools import count
from typing import Any

import pytest
import torch

from langchain_latentmas.engine import device
from langchain_latentmas.engine import model as models
from langchain_latentmas.engine.device import Pace, free_bytes, free_bytes_for, prepare
from langchain_latentmas.engine.model import LanguageModel
from langchain_latentmas.engine.tick import Row, Ticker

from ..conftest import load_parts
from ..support import PARITY

CUDA = torch.device("cuda:1")


def test_what_torch_keeps_without_using_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"mem_get_info": (1000, 9000), "memory_reserved": 500, "memory_allocated": 300}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: {CUDA: value}[device])
    assert free_bytes(CUDA) == 1200
    assert free_bytes(torch.device("cpu")) > 1 << 20


def test_what_lies_on_several_devices_is_as_large_as_the_fullest_one_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = torch.device("cuda:0"), torch.device("cuda:1")
    monkeypatch.setattr(device, "free_bytes", {one: 3000, other: 400}.__getitem__)
    assert free_bytes_for([one] * 4) == 3000
    assert free_bytes_for([one, one, one, other]) == 1600
    assert free_bytes_for([one, other]) == 800


def test_no_attention_on_cuda_is_planned_for_its_exact_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    turned = list[bool]()
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", turned.append)
    prepare(torch.device("cpu"))
    assert turned == []
    prepare(CUDA)
    assert turned == [False]


def test_a_model_prepares_its_device_before_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    done, hidden = list[Any](), LanguageModel.hidden

    def computes(model: LanguageModel, *arguments: Any) -> torch.Tensor:
        done.append("computed")
        return hidden(model, *arguments)

    monkeypatch.setattr(models, "prepare", done.append)
    monkeypatch.setattr(LanguageModel, "hidden", computes)
    LanguageModel(*load_parts("qwen3-tied", "float64"))
    assert done[:2] == [torch.device("cpu"), "computed"]


@pytest.mark.parametrize(("built", "device", "said"), [("12.6", None, 1), ("12.6", "cpu", 0), (None, None, 0)])
def test_a_torch_built_for_cuda_says_that_it_finds_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, built: str | None, device: str | None, said: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    model = LanguageModel.load(str(PARITY / "qwen3-tied" / "model"), device=device)
    assert model.device == torch.device("cpu")
    assert caplog.text.count("no CUDA device can be used") == said


def test_the_host_waits_for_the_tick_before_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, log = count(), list[tuple[str, int]]()

    class Event:
        def __init__(self, **_: Any) -> None:
            self.number = next(numbers)

        def record(self, stream: Any) -> None:
            assert stream == ("stream of", CUDA)
            log.append(("queued", self.number))

        def synchronize(self) -> None:
            log.append(("done", self.number))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("stream of", device))
    tick = Ticker(LanguageModel(*load_parts("qwen3-tied", "float64")), max_rows=2, live_bytes=1 << 40)
    assert tick.pace is None  # a CPU is never behind
    tick.pace = Pace(CUDA)
    with torch.inference_mode():
        tick.join(Row((), 0, [[5, 6, 7]], steps=4, on_done=len, on_error=pytest.fail))
        while tick.rows:
            tick.step()
    assert log == [
        ("queued", 0),
        *(("queued", 1), ("done", 0)),
        *(("queued", 2), ("done", 1)),
        *(("queued", 3), ("done", 2)),
    ]
