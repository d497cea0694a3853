"""The recipe's optimizer does what torch's does."""

import pytest
import torch
from torch import nn

from langchain_latentmas.bundled.muon import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_it_steps_as_torch_does_but_for_the_dtype(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    untouched = nn.Parameter(torch.ones(shape))  # without a gradient
    mine = Muon([ours, untouched], lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    moved = (theirs - 1).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # torch's rounds to 8 bits
    assert torch.equal(untouched, torch.ones(shape))


@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
def test_all_singular_values_become_about_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalized(torch.randn(shape)))
    assert values.min() > 0.6
    assert values.max() < 1.3
