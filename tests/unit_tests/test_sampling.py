import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from langchain_latentmas import LatentService
from langchain_latentmas.engine.sampling import Sampler, Sampling, shares
from langchain_latentmas.errors import InvalidRequest

from ..support import at_once, messages, say

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
PROMPT = messages("Tell me a story.", "You are a writer.")
CPU = torch.device("cpu")


def how(sampling: Sampling) -> tuple[float, int | None, float]:
    return sampling.temperature, sampling.top_k, sampling.top_p


def draws(sampling: Sampling, logits: torch.Tensor) -> list[int]:
    """A token for each line of logits, one after the other, by one row."""
    sampler = Sampler(sampling, CPU)
    return [int(sampler(shares(line[None], *how(sampling))[0])) for line in logits]


def drawn(sampling: Sampling, times: int = 400) -> torch.Tensor:
    """Relative frequencies of the tokens of LOGITS."""
    found = torch.tensor(draws(sampling, LOGITS.expand(times, -1)))
    return found.bincount(minlength=len(LOGITS)) / times


@pytest.mark.parametrize(
    ("sampling", "warpers"),
    [
        (Sampling(temperature=0.7, seed=1), [TemperatureLogitsWarper(0.7)]),
        (Sampling(temperature=1.5, top_k=3, seed=2), [TemperatureLogitsWarper(1.5), TopKLogitsWarper(3)]),
        (Sampling(temperature=1.0, top_p=0.8, seed=3), [TemperatureLogitsWarper(1.0), TopPLogitsWarper(0.8)]),
        (
            Sampling(temperature=2.0, top_k=5, top_p=0.9, seed=4),
            [TemperatureLogitsWarper(2.0), TopKLogitsWarper(5), TopPLogitsWarper(0.9)],
        ),
    ],
    ids=["temperature", "top_k", "top_p", "all"],
)
def test_tokens_are_those_of_transformers_processors(sampling: Sampling, warpers: list[Any]) -> None:
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(5)) * 3
    assert sampling.seed is not None
    generator = torch.Generator().manual_seed(sampling.seed)
    scores = [LogitsProcessorList(warpers)(None, row[None]).softmax(-1) for row in logits]
    expected = [int(torch.multinomial(row, 1, generator=generator)) for row in scores]

    assert draws(sampling, logits) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [7, 384, 5000])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (40, 1.0), (None, 0.9), (40, 0.9)])
def test_the_shares_of_a_row_are_those_that_it_has_alone_to_the_last_bit(
    top_k: int | None, top_p: float, vocabulary: int, dtype: torch.dtype
) -> None:
    """In bfloat16 many logits are equal, and which of them top_p leaves depends on how they are sorted."""
    logits = (torch.randn(33, vocabulary, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    lone = torch.cat([shares(row[None], 0.7, top_k, top_p) for row in logits])
    for rows in (2, 5, 33):
        assert torch.equal(shares(logits[:rows], 0.7, top_k, top_p), lone[:rows])


def test_top_k_leaves_the_likeliest_tokens() -> None:
    assert (drawn(Sampling(temperature=5, top_k=2, seed=0)) > 0).tolist() == [True, True, False, False, False, False]


def test_top_p_leaves_the_smallest_set_that_exceeds_it() -> None:
    shares = LOGITS.softmax(-1).cumsum(-1)
    assert shares[0] < 0.7 < shares[1]
    assert (drawn(Sampling(temperature=1, top_p=0.7, seed=0)) > 0).tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("temperature", [1, 1e-6, 1e-30, 5e-324])
def test_any_temperature_above_zero_works_whole_or_tiny(temperature: float) -> None:
    shares = drawn(Sampling(temperature=temperature, seed=0), 50)
    assert math.isclose(float(shares.sum()), 1, rel_tol=1e-6)
    if temperature < 1:
        assert shares[0] == 1


def test_half_precision_logits_are_sampled_in_float32() -> None:
    sampling = Sampling(temperature=0.5, top_p=0.9, seed=7)
    assert draws(sampling, LOGITS[None].bfloat16()) == draws(sampling, LOGITS[None])


def test_two_seeds_differ_and_no_seed_draws_one() -> None:
    def first(seed: int | None) -> list[int]:
        return draws(Sampling(temperature=3, seed=seed), LOGITS.expand(40, -1))

    assert first(1) == first(1)
    assert first(1) != first(2)
    assert first(None) != first(None)


WRONG: list[dict[str, Any]] = [
    {"max_tokens": 0},
    {"max_tokens": -3},
    {"max_tokens": 1.5},
    {"max_tokens": True},
    {"temperature": -0.1},
    {"temperature": math.nan},
    {"temperature": math.inf},
    {"top_p": 0},
    {"top_p": 1.01},
    {"top_p": math.nan},
    {"top_k": 0},
    {"top_k": 2.5},
    {"seed": -1},
    {"seed": 2**63},
    {"seed": 1.5},
    {"stop": ("",)},
    {"stop": ("x", 5)},
]


@pytest.mark.parametrize("values", WRONG, ids=str)
def test_values_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="(?i)" + next(iter(values))):
        Sampling(**{"temperature": 0.5, **values})


@given(st.integers(1, 9), st.floats(0, 100), st.floats(0, 1, exclude_min=True), st.integers(1, 500) | st.none())
def test_every_value_in_range_gives_a_token(max_tokens: int, temperature: float, top_p: float, top_k: int) -> None:
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=0)
    assert 0 <= draws(sampling, LOGITS[None])[0] < len(LOGITS)


def test_a_seed_gives_the_same_text_whatever_the_batch_neighbours(service: LatentService) -> None:
    options = {"temperature": 0.8, "top_p": 0.95, "top_k": 40, "max_tokens": 12}
    alone = [say(service, PROMPT, seed=seed, **options) for seed in range(6)]

    together = at_once([lambda seed=seed: say(service, PROMPT, seed=seed, **options) for seed in range(6)])  # type: ignore[misc]

    assert [said.token_ids for said in together] == [said.token_ids for said in alone]
    assert len({said.token_ids for said in alone}) > 1


def test_under_one_seed_every_agent_and_every_question_draws_for_itself(service: LatentService) -> None:
    options = {"temperature": 5.0, "seed": 3, "max_tokens": 12}
    texts = [
        say(service, messages(f"Tell me a story{end}", "You are a writer."), agent=agent, **options).token_ids
        for end in (".", "!")
        for agent in ("anne", "bert")
    ]
    assert len(set(texts)) == 4
    alike = max(
        sum(a == b for a, b in zip(one, other, strict=False)) for one in texts for other in texts if one != other
    )
    assert alike <= 3  # where all logits are about the same, the same numbers would draw the same tokens


def test_greedy_neighbours_of_a_sampling_row_stay_greedy(service: LatentService) -> None:
    alone = say(service, PROMPT)
    together = at_once([lambda: say(service, PROMPT), lambda: say(service, PROMPT, temperature=5.0)])
    assert together[0].token_ids == alone.token_ids
