import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from latentmas_vllm.positions import passes_needed, slots_before


def passes_by_trying(chunk: list[bool]) -> int:
    """Runs a chunk again and again, as the model does, and notes which hidden states are right."""
    right = [False] * len(chunk)
    passes = 0
    while not all(right):
        embedded = [not latent or i == 0 or right[i - 1] for i, latent in enumerate(chunk)]  # before a chunk: the cache
        right = [all(embedded[: i + 1]) for i in range(len(chunk))]
        passes += 1
    return passes


@given(st.lists(st.lists(st.booleans(), max_size=12), min_size=1, max_size=5).filter(any))
def test_as_many_passes_as_trying_takes(chunks: list[list[bool]]) -> None:
    latent = torch.tensor([token for chunk in chunks for token in chunk])
    starts = torch.tensor([0, *(len(chunk) for chunk in chunks)]).cumsum(0)
    assert int(passes_needed(latent, starts)) == max(1, *map(passes_by_trying, chunks))


@pytest.mark.parametrize(
    ("chunk", "passes"),
    [("....", 1), ("L", 1), ("L...", 1), (".L", 2), ("LLL", 3), ("..LLL..", 4), ("L..L", 2), (".L..L.", 3)],
)
def test_passes_of_one_chunk(chunk: str, passes: int) -> None:
    assert int(passes_needed(torch.tensor([c == "L" for c in chunk]), torch.tensor([0, len(chunk)]))) == passes


def test_padding_requests_take_no_pass() -> None:
    assert int(passes_needed(torch.tensor([False, True]), torch.tensor([0, 2, 2, 2]))) == 2


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
