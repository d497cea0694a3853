"""Rule 3: what a row computes does not depend on who else is there, nor when it comes."""

import gc
import weakref
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from langchain_latentmas.engine import tick as ticks
from langchain_latentmas.engine.kv import KV, Placed
from langchain_latentmas.engine.model import LanguageModel
from langchain_latentmas.engine.sampling import Sampling
from langchain_latentmas.engine.tick import Result, Row, Spoken, Ticker
from langchain_latentmas.errors import NotFinite

from ..conftest import load_parts
from ..support import kv_difference, relative
from .test_model import random_model

EXACT = 1e-8  # relative, in float64


@dataclass
class Request:
    """What a row is made from, and what became of it."""

    inputs: Sequence[Sequence[int] | Tensor]
    steps: int = 0
    sampling: Sampling | None = None
    past: KV | None = None
    keep_hidden: bool = False
    results: list[Result] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    step_numbers: list[int] = field(default_factory=list)
    spoken: list[Spoken] = field(default_factory=list)

    def row(self) -> Row:
        return Row(
            past=[Placed(self.past, 0)] if self.past else (),
            start=self.past.positions if self.past else 0,
            inputs=self.inputs,
            steps=self.steps,
            sampling=self.sampling,
            keep_hidden=self.keep_hidden,
            on_done=self.results.append,
            on_error=self.errors.append,
            on_step=self.step_numbers.append,
            on_token=self.spoken.append,
        )


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(*load_parts("qwen3-tied", "float64"))


AHEAD = [False]


@pytest.fixture(autouse=True, params=[False, True], ids=["", "ahead"])
def ahead(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tokens are read before the next step begins, as on a CPU, or after that, as on a GPU."""
    AHEAD.append(request.param)
    yield
    AHEAD.pop()


def ticker(model: LanguageModel, chunk: int = 512, max_rows: int = 32, live_bytes: int = 1 << 40) -> Ticker:
    made = Ticker(model, max_rows=max_rows, live_bytes=live_bytes, chunk=chunk)
    made.ahead = AHEAD[-1]
    return made


def finish(tick: Ticker) -> None:
    with torch.inference_mode():
        while tick.rows:
            tick.step()


def alone(model: LanguageModel, request: Request) -> Result:
    tick = ticker(model)
    with torch.inference_mode():
        tick.join(request.row())
    finish(tick)
    return request.results.pop()


def ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, 384, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def requests(model: LanguageModel) -> list[Request]:
    """Thinking, speaking and prefill-only requests of many lengths, on memories of many lengths or on none."""
    memories = [alone(model, Request([ids(n, n)], steps=s)).kv for n, s in ((3, 2), (31, 0), (90, 4))]
    made = []
    for i, (length, steps, tokens) in enumerate(
        [(5, 6, 0), (40, 0, 8), (1, 3, 0), (17, 0, 3), (133, 2, 0), (9, 0, 1), (60, 0, 0), (2, 9, 0), (12, 0, 6)]
    ):
        sampling = Sampling(max_tokens=tokens, temperature=0.9 * (i % 2), seed=i) if tokens else None
        made.append(Request([ids(length, 100 + i)], steps, sampling, [None, *memories][i % 4]))
    made.append(Request([ids(4, 7), torch.randn(6, 128, dtype=torch.float64), ids(3, 8)], past=memories[0]))
    return made


class Cases(list[tuple[Request, Result]]):
    """Requests and what each gives alone."""

    def __repr__(self) -> str:  # the tensors would fill hypothesis' report
        return f"{len(self)} requests"


@pytest.fixture(scope="module")
def cases(model: LanguageModel, requests: list[Request]) -> Cases:
    return Cases((request, alone(model, request)) for request in requests)


def assert_same(ours: Result, theirs: Result) -> None:
    assert kv_difference(ours.kv, theirs.kv) < EXACT
    assert relative(ours.thoughts, theirs.thoughts) < EXACT
    assert (ours.tokens, ours.finish) == (theirs.tokens, theirs.finish)


JOIN, CANCEL, TICKS = "join", "cancel", "ticks"
ACTIONS = st.lists(
    st.tuples(st.just(JOIN), st.integers(0, 9))
    | st.tuples(st.just(CANCEL), st.integers(0, 30))
    | st.tuples(st.just(TICKS), st.integers(1, 6)),
    min_size=1,
    max_size=24,
)


@settings(max_examples=40)
@example([(JOIN, 0), (JOIN, 1), (CANCEL, 0), (TICKS, 9)], 512, 1024, 2, 1 << 20)
@example([(JOIN, 4), (TICKS, 9), (JOIN, 0), (JOIN, 2), (TICKS, 1), (JOIN, 3), (TICKS, 2), (JOIN, 5)], 512, 60, 8, 1024)
@given(
    ACTIONS,
    st.sampled_from([1, 5, 32, 512]),
    st.sampled_from([1, 20, 60, 1024]),
    st.integers(1, 12),
    st.sampled_from([256, 512, 1024, 1 << 20]),
)
def test_any_schedule_of_rows_that_come_and_are_cancelled_equals_single_runs(
    model: LanguageModel,
    cases: Cases,
    actions: list[tuple[str, int]],
    chunk: int,
    pass_positions: int,
    max_rows: int,
    live_positions: int,
) -> None:
    tick = ticker(model, chunk, max_rows, live_positions * model.bytes_per_position)
    tick.pass_positions = pass_positions
    joined: list[tuple[int, Row, list[Result]]] = []
    with torch.inference_mode():
        for what, n in actions:
            if what == JOIN:
                row, results = cases[n][0].row(), list[Result]()
                row.on_done = results.append
                row.on_step = row.on_token = None
                if tick.fits(row):
                    tick.join(row)
                    joined.append((n, row, results))
            elif what == CANCEL and joined:
                joined[n % len(joined)][1].cancelled = True
            elif what == TICKS:
                for _ in range(n):
                    tick.step()
            assert len(tick.rows) <= max_rows
        finish(tick)
    assert not any(request.errors for request, _ in cases)

    for n, row, results in joined:
        assert len(results) == 1 or (row.cancelled and not results)
        for result in results:
            assert_same(result, cases[n][1])


def test_who_cannot_take_a_result_is_told_and_keeps_nobody_from_theirs(model: LanguageModel) -> None:
    def full(_: Result) -> None:
        raise RuntimeError("no room")

    tick = ticker(model)
    loser, other = Request([ids(3, 1)], steps=2), Request([ids(3, 2)], steps=2)
    rows = [loser.row(), other.row()]
    rows[0].on_done = full
    with torch.inference_mode():
        for row in rows:
            tick.join(row)
    finish(tick)
    assert [str(error) for error in loser.errors] == ["no room"]
    assert len(other.results) == 1
    assert not other.errors


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_prompt_in_chunks_equals_a_prompt_at_once(model: LanguageModel, cases: Cases, chunk: int) -> None:
    tick = ticker(model, chunk)
    rows = [request.row() for request, _ in cases]
    results: list[list[Result]] = [[] for _ in rows]
    with torch.inference_mode():
        for row, done in zip(rows, results, strict=True):
            row.on_done = done.append
            tick.join(row)
    finish(tick)
    for done, (_, theirs) in zip(results, cases, strict=True):
        assert_same(done[0], theirs)


def test_long_prompts_do_not_stall_a_row_that_is_thinking(model: LanguageModel) -> None:
    tick = ticker(model, chunk=4)
    thinker, reader = Request([ids(3, 1)], steps=5), Request([ids(40, 2)], steps=1)
    with torch.inference_mode():
        tick.join(thinker.row())
        tick.step()
        tick.join(reader.row())
        for _ in range(4):
            tick.step()
    assert len(thinker.results) == 1
    assert not reader.results


def test_many_prompts_stall_rows_that_decode_for_no_longer_than_one_pass(model: LanguageModel) -> None:
    tick = ticker(model, chunk=32)
    tick.pass_positions = 64
    thinker, readers = Request([ids(3, 1)], steps=20), [Request([ids(50, 10 + n)], steps=2) for n in range(6)]
    with torch.inference_mode():
        tick.join(thinker.row())
        tick.step()
        for reader in readers:
            tick.join(reader.row())
        while any(row.ids for row in tick.rows):
            before, taken = tick.prefilled, len(thinker.step_numbers)
            tick.step()
            assert before < tick.prefilled <= before + 64
            assert len(thinker.step_numbers) == taken + 1
    finish(tick)
    for request in (thinker, *readers):
        assert_same(request.results[0], alone(model, Request(request.inputs, request.steps)))


def test_where_nobody_decodes_every_prompt_is_gone_on_with(model: LanguageModel) -> None:
    tick = ticker(model, chunk=32)
    tick.pass_positions = 64
    with torch.inference_mode():
        for n in range(6):
            tick.join(Request([ids(50, n)], steps=2).row())
        tick.step()
    assert tick.prefilled == 6 * 32


def test_who_came_first_is_prefilled_first_wherever_its_slot_is(model: LanguageModel) -> None:
    tick, order = ticker(model, chunk=8), list[int]()
    tick.pass_positions = 8
    requests = [Request([ids(9 if n % 3 else 25, 10 + n)], steps=1) for n in range(16)]

    def joins(n: int) -> None:
        row = requests[n].row()
        row.on_done = lambda result: order.append(n) or requests[n].results.append(result)
        tick.join(row)

    with torch.inference_mode():
        for steps in (90, 1, 2, 5):  # of which some leave, and their slots are taken over
            tick.join(Request([ids(3, steps)], steps=steps).row())
        tick.step()
        for n in range(6):
            joins(n)
        for n in range(6, 16):
            tick.step()
            joins(n)
    finish(tick)
    assert order == list(range(16))
    for request in requests:
        assert_same(request.results[0], alone(model, Request(request.inputs, 1)))


def test_a_long_prompt_gets_its_chunk_beside_short_ones_where_a_pass_pads() -> None:
    other = LanguageModel(random_model("phi3"), load_parts("qwen3-tied", "float64")[1])
    assert other.decoder_fault
    tick, long = ticker(other, chunk=64), Request([ids(150, 1)], steps=2)
    row = long.row()
    with torch.inference_mode():
        for n in range(10):
            tick.join(Request([ids(2, 10 + n)], steps=4).row())
        tick.join(row)
        for n in range(10):
            tick.join(Request([ids(3, 30 + n)], steps=4).row())
        for position in (64, 128):
            tick.step()
            assert row.position == position
    finish(tick)
    assert_same(long.results[0], alone(other, Request(long.inputs, 2)))


def test_steps_are_reported_one_by_one(model: LanguageModel) -> None:
    request = Request([ids(3, 1)], steps=4)
    alone(model, request)
    assert request.step_numbers == [1, 2, 3, 4]


def test_no_steps_hand_the_prompt_over(model: LanguageModel) -> None:
    result = alone(model, Request([ids(6, 1)]))
    assert result.kv.positions == 6
    assert result.thoughts.shape == (0, 128)
    assert (result.tokens, result.text, result.finish) == ([], "", "")


@pytest.fixture
def scored(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the hidden states that logits are computed of, call by call; no token ends a text."""
    seen, logits = list[tuple[int, ...]](), model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: seen.append(tuple(hidden.shape)) or logits(hidden))
    monkeypatch.setattr(model, "eos", frozenset())
    return seen


@pytest.mark.parametrize("chunk", [8, 512])
def test_who_thinks_computes_no_logits(model: LanguageModel, scored: list[tuple[int, ...]], chunk: int) -> None:
    tick = ticker(model, chunk)
    requests = [Request([ids(40, 1)], steps=5), Request([ids(40, 2)]), Request([ids(3, 3)], keep_hidden=True)]
    with torch.inference_mode():
        for request in requests:
            tick.join(request.row())
    finish(tick)
    assert all(request.results for request in requests)
    assert scored == []


def test_who_speaks_computes_logits_of_one_position_a_token(
    model: LanguageModel, scored: list[tuple[int, ...]]
) -> None:
    speaker, thinker = Request([ids(40, 1)], sampling=Sampling(max_tokens=3)), Request([ids(40, 2)], steps=5)
    tick = ticker(model, chunk=8)
    with torch.inference_mode():
        for request in (speaker, thinker):
            tick.join(request.row())
    finish(tick)
    assert len(speaker.results[0].tokens) == 3
    assert scored == [(1, 128)] * 3


@pytest.mark.parametrize("chunk", [4, 512])
def test_the_hidden_states_of_a_prefill_are_there_on_demand(model: LanguageModel, chunk: int) -> None:
    assert alone(model, Request([ids(9, 1)])).hidden is None
    inputs = [[ids(9, 1), torch.ones(2, 128, dtype=torch.float64)], [ids(3, 2)], [ids(150, 3)]]
    tick, found = ticker(model, chunk), []
    with torch.inference_mode():
        for each in inputs:
            row = Request(each, keep_hidden=True).row()
            row.on_done = found.append
            tick.join(row)
    finish(tick)
    together = {len(result.hidden): result.hidden for result in found}
    for each in inputs:
        hidden = alone(model, Request(each, keep_hidden=True)).hidden
        assert relative(together[sum(map(len, each))], hidden) < 1e-9


def test_hidden_states_of_a_prefill_keep_none_of_other_rows(model: LanguageModel) -> None:
    tick = ticker(model, chunk=8)
    reader = Request([ids(40, 1)], keep_hidden=True).row()
    with torch.inference_mode():
        for row in (reader, Request([ids(40, 2)]).row()):
            tick.join(row)
        tick.step()
    assert [part.shape for part in reader.prefilled] == [(8, 128)]
    assert reader.prefilled[0].untyped_storage().nbytes() == reader.prefilled[0].nbytes


def test_every_spoken_token_is_in_the_memory_the_last_one_too(model: LanguageModel) -> None:
    prompt = ids(9, 3)
    spoken = alone(model, Request([prompt], sampling=Sampling(max_tokens=5)))
    read = alone(model, Request([prompt + spoken.tokens]))
    assert len(spoken.tokens) == 5
    assert kv_difference(spoken.kv, read.kv) < EXACT


def test_an_end_token_ends_the_text_and_is_no_part_of_it(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request([ids(9, 3)], sampling=Sampling(max_tokens=6))
    whole = alone(model, request)
    last = whole.tokens[3]
    assert last not in whole.tokens[:3]
    monkeypatch.setattr(model, "eos", model.eos | {last})
    ended = alone(model, request)
    assert ended.tokens == whole.tokens[:4]
    assert ended.finish == "stop"
    assert whole.finish == "length"


def test_a_hole_is_not_seen(model: LanguageModel) -> None:
    """Behind a hole, only distance counts: without the hole's keys, what lies in it makes no difference."""
    first, second = (alone(model, Request([ids(8, seed)])).kv for seed in (1, 2))
    results = []
    for before in (first, second):
        request = Request([ids(5, 3)], steps=2)
        row = request.row()
        row.past, row.start, row.holes = [Placed(before, 0)], 8, [(0, 8)]
        row.position = 8
        tick = ticker(model)
        with torch.inference_mode():
            tick.join(Request([ids(150, 4)]).row())  # prefilled beside it, in another run
            tick.join(row)
        finish(tick)
        results.append(request.results[0])
    assert kv_difference(results[0].kv, results[1].kv) < EXACT
    assert kv_difference(results[0].kv, alone(model, Request([ids(5, 3)], steps=2, past=first)).kv) > 1e-3


def test_a_row_joins_only_where_rows_and_bytes_allow(model: LanguageModel) -> None:
    with torch.inference_mode():
        few = ticker(model, max_rows=1)
        assert few.fits(Request([ids(3, 1)]).row())
        few.join(Request([ids(3, 1)], steps=1).row())
        assert not few.fits(Request([ids(3, 1)]).row())

        small = ticker(model, live_bytes=2 * 128 * model.bytes_per_position)
        small.join(Request([ids(3, 1)], steps=1).row())
        assert small.fits(Request([ids(100, 1)]).row())
        assert not small.fits(Request([ids(200, 1)]).row())


def test_a_single_row_is_let_in_however_small_the_budget_and_leaves_room_for_others(model: LanguageModel) -> None:
    tick = ticker(model, live_bytes=2 * 128 * model.bytes_per_position)
    with torch.inference_mode():
        assert tick.fits(Request([ids(500, 1)]).row())
        tick.join(Request([ids(500, 1)]).row())
        finish(tick)
        tick.join(Request([ids(3, 1)], steps=2).row())
        assert tick.fits(Request([ids(3, 2)]).row())


def test_a_long_row_that_is_gone_keeps_no_others_out(model: LanguageModel) -> None:
    tick = ticker(model, live_bytes=8 * 128 * model.bytes_per_position)
    many = [Request([ids(3, n)], steps=2) for n in range(8)]
    with torch.inference_mode():
        tick.join(Request([ids(5, 1)], sampling=Sampling(max_tokens=900)).row())
        tick.rows[0].cancelled = True
        tick.step()
        assert tick.cache.capacity == 1024
        for request in many:
            assert tick.fits(request.row())
            tick.join(request.row())
    assert (tick.cache.slots, tick.cache.capacity) == (8, 128)
    finish(tick)
    for request in many:
        assert_same(request.results[0], alone(model, Request(request.inputs, steps=2)))


@pytest.mark.parametrize("sampling", [None, Sampling(max_tokens=3), Sampling(max_tokens=3, temperature=1.0)], ids=str)
def test_what_overflows_ends_alone_and_leaves_nothing(model: LanguageModel, sampling: Sampling | None) -> None:
    broken = Request([torch.full((2, 128), torch.inf, dtype=torch.float64), ids(3, 9)], 4 * (not sampling), sampling)
    beside, after = Request([ids(3, 1)], steps=5), Request([ids(4, 2)], steps=3)
    tick = ticker(model)
    with torch.inference_mode():
        for request in (broken, beside):
            tick.join(request.row())
        tick.step()
        tick.join(after.row())
    finish(tick)
    assert [type(error) for error in broken.errors] == [NotFinite]
    assert "infinite numbers or NaN" in str(broken.errors[0])
    assert not broken.results
    for request in (beside, after):
        assert_same(request.results[0], alone(model, Request(request.inputs, request.steps)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_speaker_that_overflows_on_the_way_ends_there(temperature: float) -> None:
    model = LanguageModel(*deepcopy(load_parts("llama-untied", "float64")))
    model.eos = frozenset()
    sampling = Sampling(max_tokens=20, temperature=temperature, seed=0)
    broken, beside = Request([ids(9, 3)], sampling=sampling), Request([ids(4, 2)], steps=12)
    spoken = alone(model, broken).tokens
    last = next(token for n, token in enumerate(spoken) if n > 1 and token not in (*broken.inputs[0], *spoken[:n]))
    broken.spoken.clear()
    with torch.no_grad():
        model.model.get_input_embeddings().weight[last] = torch.inf
    tick = ticker(model)
    with torch.inference_mode():
        for request in (broken, beside):
            tick.join(request.row())
    finish(tick)
    assert [token for token, _ in broken.spoken] == spoken[: spoken.index(last) + 1]
    assert [type(error) for error in broken.errors] == [NotFinite]
    assert "infinite numbers or NaN" in str(broken.errors[0])
    assert not broken.results
    assert tick.spoken == len(broken.spoken)
    assert_same(beside.results[0], alone(model, Request(beside.inputs, beside.steps)))


def overflowing(steps: int) -> Request:
    return Request([torch.full((2, 128), torch.inf, dtype=torch.float64), ids(3, 9)], steps)


def test_what_overflows_and_is_moved_leaves_nothing_where_it_was(model: LanguageModel) -> None:
    first, broken, after = Request([ids(3, 1)], steps=1), overflowing(6), Request([ids(4, 2)], steps=9)
    tick = ticker(model)
    with torch.inference_mode():
        for request in (first, broken):
            tick.join(request.row())
        tick.step()  # the first one leaves, and what overflows takes its slot
        assert first.results
        tick.join(after.row())  # where that was before, and its keys in sight
    finish(tick)
    assert [type(error) for error in broken.errors] == [NotFinite]
    assert_same(after.results[0], alone(model, Request(after.inputs, steps=9)))


def test_what_overflows_and_trades_places_leaves_nothing_there(model: LanguageModel) -> None:
    """One that prefills in chunks lies behind; one that is ready to decode goes before it."""
    tick = ticker(model, chunk=4)
    long = Request([torch.full((40, 128), torch.inf, dtype=torch.float64)], 2)
    short = Request([ids(3, 1)], steps=30)
    with torch.inference_mode():
        for request in (long, short):
            tick.join(request.row())
        for _ in range(5):
            tick.step()
    finish(tick)
    assert [type(error) for error in long.errors] == [NotFinite]
    assert_same(short.results[0], alone(model, Request(short.inputs, steps=30)))


def test_a_cancelled_row_that_overflowed_leaves_nothing(model: LanguageModel) -> None:
    tick, after = ticker(model, chunk=2), Request([ids(4, 2)], steps=3)
    with torch.inference_mode():
        tick.join(Request([torch.full((6, 128), torch.inf, dtype=torch.float64)], 5).row())
        tick.step()
        tick.rows[0].cancelled = True
        tick.join(after.row())
    finish(tick)
    assert_same(after.results[0], alone(model, Request(after.inputs, 3)))


def test_counters_count_ticks_thoughts_tokens_and_prompt_positions(model: LanguageModel) -> None:
    tick = ticker(model)
    with torch.inference_mode():
        tick.join(Request([ids(7, 1)], steps=3).row())
        tick.join(Request([ids(5, 2)], sampling=Sampling(max_tokens=2)).row())
    finish(tick)
    assert (tick.thoughts, tick.spoken, tick.prefilled) == (3, 2, 12)
    assert tick.ticks == 3  # the prompts are read and the first steps taken in the same tick


def test_dropping_all_rows_frees_their_slots(model: LanguageModel) -> None:
    tick = ticker(model)
    row = Request([ids(7, 1)], steps=3).row()
    with torch.inference_mode():
        tick.join(row)
        tick.step()
    assert tick.clear() == [row]
    assert tick.rows == []
    slots = [weakref.ref(t) for t in tick.cache._tensors]
    gc.disable()  # they may be a third of a GPU, and a full collection may be far away
    try:
        tick.renew()
        assert slots
        assert all(slot() is None for slot in slots)
    finally:
        gc.enable()
    assert tick.cache.bytes_per_position == 0


def test_thoughts_are_on_the_cpu_before_anybody_takes_them(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, cpu = list[tuple[int, ...]](), torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copied.append(tuple(tensor.shape)) or cpu(tensor))
    alone(model, Request([ids(3, 1)], steps=4))
    assert copied == [(4, 128)]


def test_rows_that_sample_alike_share_the_work_and_draw_for_themselves(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [{"temperature": 1.0, "top_p": 0.9}, {"temperature": 1, "top_p": 0.9}, {"temperature": 0.5, "top_k": 40}]
    requests = [Request([ids(5, i)], sampling=Sampling(max_tokens=6, seed=i, **kinds[i % 3])) for i in range(6)]
    monkeypatch.setattr(model, "eos", frozenset())
    lone = [alone(model, request) for request in requests]
    tick, sizes, shares = ticker(model), list[int](), ticks.shares
    monkeypatch.setattr(ticks, "shares", lambda logits, *how: sizes.append(len(logits)) or shares(logits, *how))
    with torch.inference_mode():
        tick.join(Request([ids(5, 9)], sampling=Sampling(max_tokens=6)).row())  # greedy
        for request in requests:
            tick.join(request.row())
    finish(tick)
    assert sizes == [4, 2] * 6
    for request, theirs in zip(requests, lone, strict=True):
        assert_same(request.results[0], theirs)
