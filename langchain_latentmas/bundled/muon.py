"""Muon in float32, for processors without instructions for bfloat16."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)  # of https://kellerjordan.github.io/posts/muon/
STEPS = 5
MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon(..., adjust_lr_fn="match_rms_adamw")`, but for the dtype that it multiplies in.

    torch's takes bfloat16. Where the processor cannot multiply it (AVX2 and no more), that takes 30 to 90 times as long
    as float32, and the recipe a day instead of an hour.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        """Takes what is to be trained.

        Args:
            matrices: Parameters [m, n].
            lr: Rate, as AdamW would have it (arXiv 2502.16982, section 2.2).
            weight_decay: Decoupled, per unit of `lr`.
        """
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Takes one step along the orthogonalised momentum of every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for matrix in group["params"]:
                if (grad := matrix.grad) is None:
                    continue
                if not (state := self.state[matrix]):
                    state["momentum"] = torch.zeros_like(grad)
                momentum = state["momentum"]
                momentum.lerp_(grad, 1 - MOMENTUM)
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                along = orthogonalized(grad.lerp(momentum, MOMENTUM))
                matrix.add_(along, alpha=-0.2 * max(matrix.shape) ** 0.5 * group["lr"])


def orthogonalized(matrix: Tensor) -> Tensor:
    """About the nearest matrix whose singular values are all 1: they come to lie between 0.7 and 1.2.

    Args:
        matrix: [m, n], float32.

    Returns:
        The same shape.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.T if len(matrix) > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)  # so that no singular value is above 1
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if len(matrix) > matrix.shape[1] else x
