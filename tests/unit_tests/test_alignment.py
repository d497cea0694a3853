"""Rule 2."""

import pytest
import torch
from torch import Tensor

from langchain_latentmas.engine import alignment
from langchain_latentmas.engine.alignment import RIDGE, Alignment

from ..conftest import load_parts
from ..support import MODELS


@pytest.fixture
def matrices() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(50, 12, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def test_w_is_the_ridge_solution_of_the_paper(matrices: tuple[Tensor, Tensor]) -> None:
    inputs, outputs = matrices
    made = Alignment(inputs, outputs, realign=True)
    expected = torch.linalg.inv(outputs.T @ outputs + RIDGE * torch.eye(12)) @ outputs.T @ inputs
    torch.testing.assert_close(made.weight, expected, rtol=1e-10, atol=1e-12)


def test_a_thought_has_the_mean_norm_of_the_input_embeddings(matrices: tuple[Tensor, Tensor]) -> None:
    inputs, outputs = matrices
    hidden = torch.randn(3, 5, 12, dtype=torch.float64) * 7
    for realign in (True, False):
        thoughts = Alignment(inputs, outputs, realign)(hidden)
        assert thoughts.shape == hidden.shape
        torch.testing.assert_close(thoughts.norm(dim=-1), inputs.norm(dim=1).mean().expand(3, 5))


def test_without_realign_only_the_length_changes(matrices: tuple[Tensor, Tensor]) -> None:
    made = Alignment(*matrices, realign=False)
    hidden = torch.randn(4, 12, dtype=torch.float64)
    assert made.weight is None
    torch.testing.assert_close(torch.cosine_similarity(made(hidden), hidden), torch.ones(4, dtype=torch.float64))


def test_tied_embeddings_align_to_themselves(matrices: tuple[Tensor, Tensor]) -> None:
    made = Alignment(matrices[0], matrices[0], realign=True)
    torch.testing.assert_close(made.weight, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_map_is_computed_in_float32_or_wider_and_keeps_the_dtype_of_the_state(
    matrices: tuple[Tensor, Tensor], dtype: torch.dtype, wide: torch.dtype
) -> None:
    made = Alignment(matrices[0].to(dtype), matrices[1].to(dtype), realign=True)
    assert made.weight is not None
    assert made.weight.dtype == made.norm.dtype == wide
    assert made(torch.ones(2, 12, dtype=dtype)).dtype == dtype


def test_a_large_vocabulary_is_summed_in_parts(
    matrices: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Alignment(*matrices, realign=True)
    monkeypatch.setattr(alignment, "ROWS_AT_ONCE", 7)
    parts = Alignment(*matrices, realign=True)
    assert whole.weight is not None
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(parts.norm, whole.norm)


def test_a_state_of_zeros_stays_finite(matrices: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(Alignment(*matrices, realign=True)(torch.zeros(1, 12).double()), torch.zeros(1, 12).double())


def test_what_is_fed_for_a_token_counts_and_not_what_is_stored(
    matrices: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, outputs = matrices
    monkeypatch.setattr(alignment, "ROWS_AT_ONCE", 7)
    made = Alignment(inputs, outputs, realign=True, embed=lambda ids: 8 * inputs[ids])
    expected = Alignment(8 * inputs, outputs, realign=True)
    assert made.weight is not None
    torch.testing.assert_close(made.weight, expected.weight)
    torch.testing.assert_close(made.norm, expected.norm)


@pytest.mark.parametrize("name", MODELS)
def test_that_of_a_model_with_plain_embeddings_is_made_of_their_matrix_bit_by_bit(name: str) -> None:
    model = load_parts(name, "float32")[0]
    made = Alignment.of(model, realign=True)
    plain = [each.weight.detach() for each in (model.get_input_embeddings(), model.get_output_embeddings())]
    expected = Alignment(*plain, realign=True)
    assert made.weight is not None
    assert expected.weight is not None
    assert torch.equal(made.weight, expected.weight)
    assert torch.equal(made.norm, expected.norm)
