"""Recorded steps, with a recorder that runs on a CPU: what it replays is as fixed in place as on CUDA."""

import gc
import logging
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from langchain_latentmas import LatentService
from langchain_latentmas.engine import graphs as recorded_steps
from langchain_latentmas.engine.graphs import Compute, Graphs, Step
from langchain_latentmas.engine.graphs import Recorder as CudaRecorder
from langchain_latentmas.engine.model import LanguageModel
from langchain_latentmas.engine.ragged import bucket
from langchain_latentmas.engine.sampling import Sampling
from langchain_latentmas.engine.tick import Result, Row, Ticker
from langchain_latentmas.errors import NotFinite

from ..conftest import load_parts
from ..support import kv_difference, relative


class Recorder:
    """Keeps results in tensors of its own, which each replay overwrites."""

    def __init__(self) -> None:
        self.recorded: list[tuple[int, ...]] = []

    def __call__(self, compute: Compute) -> Compute:
        fixed = Step(*(part.clone() for part in compute()))
        self.recorded.append(tuple(fixed.hidden.shape))

        def replay() -> Step:
            for place, part in zip(fixed, compute(), strict=True):
                place.copy_(part)
            return fixed

        return replay


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(*load_parts("qwen3-tied", "float64"))


def run(model: LanguageModel, graphs: Graphs | None) -> list[Result]:
    """Five thinkers and speakers of different lengths; two of them come later, and the cache grows meanwhile."""
    tick, results = Ticker(model, max_rows=8, live_bytes=1 << 40, graphs=graphs), dict[int, Result]()
    with torch.inference_mode():
        for i, length in enumerate((4, 30, 117, 2, 150)):
            how = {"sampling": Sampling(max_tokens=9)} if i % 2 else {"steps": 5 + 4 * i}
            done = lambda result, i=i: results.__setitem__(i, result)  # noqa: E731
            ids = torch.randint(3, 384, (length,), generator=torch.Generator().manual_seed(i)).tolist()
            tick.join(Row((), 0, [ids], on_done=done, on_error=pytest.fail, **how))
            if i > 1:
                tick.step()
        while tick.rows:
            tick.step()
    return [results[i] for i in range(5)]


def test_replayed_steps_give_what_computed_ones_give(model: LanguageModel) -> None:
    recorder = Recorder()
    graphs = Graphs(recorder, tolerance=1e-8)
    for ours, theirs in zip(run(model, graphs), run(model, None), strict=True):
        assert kv_difference(ours.kv, theirs.kv) < 1e-8
        assert relative(ours.thoughts, theirs.thoughts) < 1e-8
        assert (ours.tokens, ours.finish) == (theirs.tokens, theirs.finish)
    assert graphs.fault is None
    assert {rows for rows, _ in recorder.recorded} >= {1, 4}


def test_slots_in_excess_take_nothing_from_a_row_that_fills_its_slot(model: LanguageModel) -> None:
    """Beside three that decode in four slots, a row fills the fourth to its last cell, a few positions a tick."""
    ends = []
    for graphs in (None, Graphs(Recorder(), tolerance=1e-8)):
        tick, found = Ticker(model, max_rows=4, live_bytes=1 << 40, chunk=9, graphs=graphs), list[Result]()
        with torch.inference_mode():
            for i in range(3):
                tick.join(Row((), 0, [[5 + i]], steps=60, on_done=len, on_error=pytest.fail))
            tick.step()
            ids = torch.randint(3, 384, (128,), generator=torch.Generator().manual_seed(1)).tolist()
            tick.join(Row((), 0, [ids], on_done=found.append, on_error=pytest.fail))
            assert tick.cache.capacity == 128
            while tick.rows:
                tick.step()
        ends += found
    assert kv_difference(ends[0].kv, ends[1].kv) < 1e-8


def test_one_graph_serves_many_steps_and_a_grown_cache_gets_new_ones(model: LanguageModel) -> None:
    recorder = Recorder()
    graphs = Graphs(recorder, tolerance=1e-8)
    tick = Ticker(model, max_rows=8, live_bytes=1 << 40, graphs=graphs)
    with torch.inference_mode():
        tick.join(Row((), 0, [[5] * 20], steps=40, on_done=len, on_error=pytest.fail))
        for _ in range(30):
            tick.step()
        assert len(recorder.recorded) == 1
        tick.join(Row((), 0, [[5] * 200], steps=1, on_done=len, on_error=pytest.fail))
        tick.step()
    assert len(recorder.recorded) == 2


def test_slots_in_excess_stay_within_the_positions_that_a_model_has_learned() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", vocab_size=384, n_embd=32, n_layer=1, n_head=2, n_positions=200)
    model = LanguageModel(AutoModelForCausalLM.from_config(config).double(), load_parts("qwen3-tied", "float64")[1])
    recorder = Recorder()
    for graphs in (None, Graphs(recorder, tolerance=1e-8)):
        tick, found = Ticker(model, max_rows=4, live_bytes=1 << 40, graphs=graphs), list[Result]()
        with torch.inference_mode():
            for length in (190, 5, 9):
                tick.join(Row((), 0, [[7] * length], steps=4, on_done=found.append, on_error=pytest.fail))
            while tick.rows:
                tick.step()
        assert [len(result.thoughts) for result in found] == [4, 4, 4]
    assert recorder.recorded[0] == (4, 32)


def recorded_once(model: LanguageModel) -> tuple[Ticker, Recorder]:
    """A ticker with a thinker whose step was recorded, and what recorded it."""
    recorder = Recorder()
    tick = Ticker(model, max_rows=8, live_bytes=1 << 40, graphs=Graphs(recorder, tolerance=1e-8))
    with torch.inference_mode():
        tick.join(Row((), 0, [[5] * 20], steps=40, on_done=len, on_error=pytest.fail))
        tick.step()
        tick.step()
    assert len(recorder.recorded) == 1
    return tick, recorder


def test_weights_that_were_changed_get_new_graphs() -> None:
    model = LanguageModel(*load_parts("qwen3-tied", "float64"))
    tick, recorder = recorded_once(model)
    with torch.inference_mode():
        before = weakref.ref(model.alignment)
        model.refresh()
        tick.step()
    assert len(recorder.recorded) == 2
    gc.collect()
    assert before() is None  # nor are the old ones kept


@pytest.mark.parametrize("first", [True, False], ids=["one is there", "none is there"])
def test_a_hook_that_comes_later_gets_new_graphs(first: bool) -> None:
    part, tokenizer = load_parts("qwen3-tied", "float64")
    norm, hooks = part.get_decoder().norm, []
    if first:
        hooks.append(norm.register_forward_hook(lambda *_: None))
    try:
        model = LanguageModel(part, tokenizer)
        tick, recorder = recorded_once(model)
        hooks.append(norm.register_forward_hook(lambda *_: None))
        if first:  # as many as before
            hooks.pop(0).remove()
        with torch.inference_mode():
            model.refresh_if_changed()
            tick.step()
        assert len(recorder.recorded) == 2
    finally:
        for hook in hooks:
            hook.remove()


def test_slots_in_excess_see_something(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tick = Ticker(model, max_rows=8, live_bytes=1 << 40, graphs=Graphs(Recorder(), tolerance=1e-8))
    seen, hidden = [], model.hidden

    def looked_at(embeds: Tensor, positions: Tensor, masks: list[Tensor], *more: Any) -> Tensor:
        seen.extend((mask == 0).any(-1) for mask in masks)
        return hidden(embeds, positions, masks, *more)

    monkeypatch.setattr(model, "hidden", looked_at)
    with torch.inference_mode():
        for length in (150, 20, 9):  # the last cell is out of sight of the bucket
            tick.join(Row((), 0, [[5] * length], steps=2, on_done=len, on_error=pytest.fail))
        while tick.rows:
            tick.step()
    assert {1, 2, 4} <= {len(rows) for rows in seen}  # prefilled in two runs, decoded in four slots
    assert all(rows.all() for rows in seen)


def test_a_replay_that_differs_is_not_used_and_said(model: LanguageModel, caplog: pytest.LogCaptureFixture) -> None:
    wrong = lambda compute: lambda: Step(compute().inputs, compute().hidden * 1.01)  # noqa: E731
    graphs = Graphs(wrong, tolerance=1e-8)
    with caplog.at_level(logging.WARNING):
        found = run(model, graphs)
    assert graphs.fault == "a replayed step differs by 1.0e-02"
    assert "CUDA graphs are off" in caplog.text
    assert "a new start" not in caplog.text
    assert [r.tokens for r in found] == [r.tokens for r in run(model, None)]


def test_a_row_that_overflows_neither_turns_them_off_nor_reaches_the_slots_in_excess(model: LanguageModel) -> None:
    graphs = Graphs(Recorder(), tolerance=1e-8)
    tick, ends = Ticker(model, max_rows=4, live_bytes=1 << 40, graphs=graphs), dict[str, Any]()

    def join(name: str, inputs: list[Any], steps: int) -> None:
        keep = lambda end: ends.__setitem__(name, end)  # noqa: E731
        tick.join(Row((), 0, inputs, on_done=keep, on_error=keep, steps=steps))

    with torch.inference_mode():
        join("one", [[5, 6, 7]], 12)
        join("two", [[8, 9]], 12)
        join("three", [torch.full((2, 128), torch.inf, dtype=torch.float64)], 2)
        join("four", [[10, 11, 12]], 3)  # decodes in the last slot, then leaves it in excess
        while tick.rows:
            tick.step()
            if "five" not in ends and "four" in ends and len(tick.rows) == 2:
                ends["five"] = None
                join("five", [[13, 14, 15]], 8)
    assert isinstance(ends["three"], NotFinite)
    assert graphs.fault is None
    for name, ids, steps in (("one", [5, 6, 7], 12), ("five", [13, 14, 15], 8)):
        alone = Ticker(model, max_rows=1, live_bytes=1 << 40)
        results: list[Result] = []
        with torch.inference_mode():
            alone.join(Row((), 0, [ids], on_done=results.append, on_error=pytest.fail, steps=steps))
            while alone.rows:
                alone.step()
        assert relative(ends[name].thoughts, results[0].thoughts) < 1e-8


def test_what_a_replay_leaves_as_it_is_passes_for_nothing(model: LanguageModel) -> None:
    def record_nothing(compute: Compute) -> Compute:  # as on another device than the one that is recorded
        step = compute()
        return lambda: step

    graphs = Graphs(record_nothing, tolerance=1e-8)
    assert [r.tokens for r in run(model, graphs)] == [r.tokens for r in run(model, None)]
    assert graphs.fault == "a replayed step differs by nan"


def test_a_pool_whose_graphs_are_all_gone_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch refuses to record into a pool whose graphs are all gone (vLLM's pull request 53682)."""
    cuda, used = stand_in(), list[tuple[object, object]]()
    cuda.graph_pool_handle.side_effect = count().__next__
    cuda.graph = lambda graph, pool, stream, **_: used.append((pool, stream)) or nullcontext()
    monkeypatch.setattr(torch, "cuda", cuda)
    record = CudaRecorder(torch.device("cuda:1"))
    compute = lambda: Step(torch.zeros(1), torch.zeros(1))  # noqa: E731
    living = [record(compute), record(compute)]
    living.clear()
    record(compute)
    cuda.Stream.assert_called_once_with(torch.device("cuda:1"))
    assert used == [(0, record.stream), (0, record.stream), (1, record.stream)]


def stand_in() -> MagicMock:
    """For `torch.cuda`."""
    cuda = MagicMock()
    cuda.CUDAGraph = type("CUDAGraph", (), {"replay": lambda self: None})
    return cuda


def test_two_services_do_not_record_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most, cuda = list[int](), list[int](), stand_in()

    @contextmanager
    def graph(*_: Any, **__: Any) -> Iterator[None]:
        inside.append(1)
        time.sleep(0.1)
        most.append(len(inside))
        yield
        inside.pop()

    cuda.graph = graph
    monkeypatch.setattr(torch, "cuda", cuda)
    recorders = [CudaRecorder(torch.device("cuda:0")) for _ in range(2)]
    compute = lambda: Step(torch.zeros(1), torch.zeros(1))  # noqa: E731
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda record: record(compute), recorders))
    assert most == [1, 1]


def test_who_could_not_record_goes_on_behind_what_was_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    def short() -> Step:
        raise torch.OutOfMemoryError("CUDA out of memory")

    cuda = stand_in()
    monkeypatch.setattr(torch, "cuda", cuda)
    record = CudaRecorder(torch.device("cuda:0"))
    with pytest.raises(torch.OutOfMemoryError):
        record(short)
    cuda.current_stream.return_value.wait_stream.assert_called_once_with(record.stream)
    record(lambda: Step(torch.zeros(1), torch.zeros(1)))  # the next one gets its turn


@pytest.mark.parametrize("begun", [True, False], ids=["half recorded", "not begun"])
def test_torch_is_not_left_in_a_recording_that_failed(monkeypatch: pytest.MonkeyPatch, begun: bool) -> None:
    """Its allocator knows what is recorded into, and `torch.cuda.graph` tells it of the end only where that worked."""
    under_way, used, cuda = set[tuple[int, int]](), {1: 0}, stand_in()

    class Graph:
        def __init__(self, graph: object, pool: int, stream: Any, **_: Any) -> None:
            self.begins = stream.device.index, pool

        def __enter__(self) -> None:
            under_way.add(self.begins)
            used[self.begins[1]] += 1

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    def end(device: int, pool: int) -> None:
        if (device, pool) not in under_way:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        under_way.remove((device, pool))

    def release(device: int, pool: int) -> None:
        used[pool] -= 1

    cuda.graph, cuda.graph_pool_handle.return_value, cuda.Stream.return_value.device = Graph, 1, torch.device("cuda:3")
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", release)
    passes = iter([2, 1] if begun else [])  # two, before anything is recorded

    def compute() -> Step:
        if next(passes, None) is None:
            raise RuntimeError("operation not permitted")
        return Step(torch.zeros(1), torch.zeros(1))

    with pytest.raises(RuntimeError, match="previous error" if begun else "not permitted"):
        CudaRecorder(torch.device("cuda:3"))(compute)
    assert not under_way
    assert used == {1: 0}


def test_memory_that_is_short_for_a_while_does_not_turn_them_off(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder, short = Recorder(), [True] * 3

    def record(compute: Compute) -> Compute:
        if short:
            short.pop()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
        return recorder(compute)

    monkeypatch.setattr(recorded_steps, "AGAIN", 2)
    graphs = Graphs(record, tolerance=1e-8)
    with caplog.at_level(logging.WARNING):
        found = run(model, graphs)
    for ours, theirs in zip(found, run(model, None), strict=True):
        assert kv_difference(ours.kv, theirs.kv) < 1e-8
        assert ours.tokens == theirs.tokens
    assert graphs.fault is None
    assert not short
    assert recorder.recorded
    assert caplog.text.count("CUDA out of memory") == 1


def test_without_them_a_gpu_meets_few_lengths_too(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU reads the cells that it needs; the slots lie there here, whatever the model says of its device."""
    lengths, hidden = dict[str, list[int]](), model.hidden
    found = dict[str, list[Result]]()
    for device in ("cpu", "cuda"):
        tick, lengths[device], found[device] = Ticker(model, max_rows=4, live_bytes=1 << 40), [], []
        with torch.inference_mode(), monkeypatch.context() as patch:
            for length in (20, 150):
                row = Row((), 0, [[5] * length], steps=6, on_done=found[device].append, on_error=pytest.fail)
                tick.join(row)
            tick.step()

            def looked_at(
                embeds: Tensor, at: Tensor, masks: list[Tensor], *more: Any, seen: list[int] = lengths[device]
            ) -> Tensor:
                seen.append(masks[0].shape[3])
                return hidden(embeds, at, masks, *more)

            patch.setattr(model, "hidden", looked_at)
            patch.setattr(model, "device", torch.device(device))
            while tick.rows:
                tick.step()
    assert lengths == {"cpu": [152, 153, 154, 155, 156], "cuda": [192] * 5}
    for ours, theirs in zip(*found.values(), strict=True):
        assert relative(ours.thoughts, theirs.thoughts) < 1e-8


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        (
            "operation not permitted when stream is capturing\nCUDA kernel errors might be ...",
            "operation not permitted when stream is capturing",
        ),
        ("", "RuntimeError"),
    ],
)
def test_a_step_that_cannot_be_recorded_is_computed(
    model: LanguageModel, caplog: pytest.LogCaptureFixture, said: str, fault: str
) -> None:
    def refuse(compute: Compute) -> Compute:
        raise RuntimeError(said)

    graphs = Graphs(refuse, tolerance=1e-8)
    assert [r.tokens for r in run(model, graphs)] == [r.tokens for r in run(model, None)]
    assert graphs.fault == fault
    assert "a new start, cuda_graphs=False" in caplog.text


def test_there_are_none_on_a_cpu(model: LanguageModel) -> None:
    assert Graphs.of(model) is None
    with LatentService.load("bundled") as service:
        assert service.info()["cuda_graphs"] == "off"


@given(st.integers(1, 100_000))
def test_a_bucket_is_at_most_half_as_much_again(length: int) -> None:
    assert length <= bucket(length) <= max(128, length * 1.5)
