from collections.abc import Sequence
from itertools import count, islice, takewhile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from latentmas_vllm.positions import passes_needed, slots_before

BLOCK = 3


class Step:
    """Requests that vLLM schedules together, over its prefix cache; L is a latent token.

    Attributes:
        cached: KV blocks by all that stands up to their end.
        requests: Their tokens.
        starts: Where the chunk of each begins; it ends with the request.
        tables: KV blocks of each, in order.
    """

    def __init__(self, requests: Sequence[str], before: Sequence[str] = ()) -> None:
        self.cached: dict[str, int] = {}
        self.blocks = count(1)
        for each in (before, requests):
            self.requests, self.starts, self.tables = list[str](), list[int](), list[list[int]]()
            for request in each:
                self.schedule(request)

    def schedule(self, request: str) -> None:
        """Reads what whole blocks there are of all but the last token, and offers its own before it has filled them."""
        ends = range(BLOCK, len(request) + BLOCK, BLOCK)
        readable = takewhile(lambda end: end < len(request) and request[:end] in self.cached, ends)
        table = [self.cached[request[:end]] for end in readable]
        self.requests.append(request)
        self.starts.append(len(table) * BLOCK)
        self.tables.append([*table, *islice(self.blocks, len(ends) - len(table))])
        for end, block in zip(ends, self.tables[-1], strict=True):
            if end <= len(request):
                self.cached.setdefault(request[:end], block)

    def passes(self) -> int:
        """How many the plugin takes."""
        sizes = [len(request) - start for request, start in zip(self.requests, self.starts, strict=True)]
        places = [(row, p) for row, start in enumerate(self.starts) for p in range(start, start + sizes[row])]
        return passes_needed(
            torch.tensor([p > 0 and self.requests[row][p] == "L" for row, p in places]),
            torch.tensor([p for _, p in places]),
            torch.tensor([row for row, _ in places]),
            torch.tensor([0, *sizes]).cumsum(0),
            torch.nn.utils.rnn.pad_sequence([torch.tensor(table) for table in self.tables], batch_first=True),
            BLOCK,
        )

    def passes_by_trying(self) -> int:
        """Runs the chunks again and again, as the model does, and notes which hidden states are right."""

        def slots(row: int) -> list[tuple[int, int]]:
            return [(self.tables[row][p // BLOCK], p % BLOCK) for p in range(len(self.requests[row]))]

        chunks = [(slots(row), request, self.starts[row]) for row, request in enumerate(self.requests)]
        right = {slot: False for slot, _, start in chunks for slot in slot[start:]}
        passes = 0
        while not all(right.values()):  # what is not in it is of an earlier step
            embedded = {
                slot[p]: request[p] != "L" or p == 0 or right.get(slot[p - 1], True)
                for slot, request, start in chunks
                for p in range(start, len(request))
            }
            right = {
                slot[p]: all(embedded.get(each, True) for each in slot[: p + 1])
                for slot, request, start in chunks
                for p in range(start, len(request))
            }
            passes += 1
        return passes


@given(
    st.lists(st.text("L.", min_size=1, max_size=12), min_size=1, max_size=4),
    st.lists(st.text("L.", min_size=1, max_size=12), max_size=2),
)
def test_as_many_passes_as_trying_takes(requests: list[str], before: list[str]) -> None:
    alike = [request + rest for request in requests for rest in ("", "L.", ".LLL.")]
    step = Step(alike, before)
    assert step.passes() == step.passes_by_trying()


@pytest.mark.parametrize(
    ("chunk", "passes"),
    [("....", 1), ("L", 1), ("L...", 1), (".L", 2), ("LLL", 3), ("..LLL..", 4), ("L..L", 2), (".L..L.", 3)],
)
def test_passes_of_one_chunk(chunk: str, passes: int) -> None:
    assert Step([f"...{chunk}"], before=["..."]).passes() == passes


@pytest.mark.parametrize(
    ("requests", "passes"),
    [
        (["....", "...LLLLLLLL."], 9),  # and not 8, as behind a block that is there
        (["...LLL.", "...LLLLL."], 6),  # begins behind the other one's thoughts
        (["...LLL.", "...LLLLLL.", "...LLLLLLLL."], 9),
        (["....", *(f"...{'L' * n}." for n in range(6))], 6),  # side by side, and not one after the other
    ],
)
def test_passes_where_one_chunk_begins_behind_what_another_one_computes(requests: list[str], passes: int) -> None:
    assert Step(requests).passes() == passes
    assert Step(requests[::-1], before=requests).passes() == max(Step([each], requests).passes() for each in requests)


def test_padding_requests_take_no_pass() -> None:
    latent, positions, requests = torch.tensor([False, True]), torch.tensor([0, 1]), torch.tensor([0, 0])
    starts, table = torch.tensor([0, 2, 2, 2]), torch.tensor([[1], [0], [0]])
    assert passes_needed(latent, positions, requests, starts, table, BLOCK) == 2


@given(
    st.integers(1, 8), st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=4), st.randoms()
)
def test_slots_of_the_positions_before(block_size: int, requests: list[tuple[int, int]], random: "object") -> None:
    blocks = 60 // block_size + 1
    ids = list(range(1, len(requests) * blocks + 1))
    random.shuffle(ids)  # type: ignore[attr-defined]
    table = torch.tensor(ids).reshape(len(requests), blocks)
    positions = [p for start, length in requests for p in range(start, start + length)]
    rows = [row for row, (_, length) in enumerate(requests) for _ in range(length)]
    before = slots_before(torch.tensor(positions), torch.tensor(rows), table, block_size)
    for row, position, slot in zip(rows, positions, before.tolist(), strict=True):
        assert (
            slot == int(table[row, max(position - 1, 0) // block_size]) * block_size + max(position - 1, 0) % block_size
        )
