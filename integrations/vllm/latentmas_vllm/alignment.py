"""The training-free map from the last hidden state to the input-embedding space, on sharded vocabularies too."""

from collections.abc import Callable

import torch
from torch import Tensor

RIDGE = 1e-5
ROWS_AT_ONCE = 16384


class Alignment:
    """Turns a hidden state into the next input embedding, as `langchain_latentmas.engine.alignment` does.

    `z = h·W`, rescaled to the mean row norm of the input embeddings, with `W = solve(OᵀO + 1e-5·I, OᵀI)` in float32
    (paper, section 3.1 and equation 3). `OᵀO`, `OᵀI` and the norm are sums over the vocabulary, so every rank adds up
    its own rows and `all_reduce` adds up the ranks.

    Attributes:
        weight: `W` [hidden, hidden], or None where only the rescaling is done.
        norm: Mean row norm of the input embeddings, a scalar tensor.
    """

    def __init__(
        self,
        inputs: Tensor,
        outputs: Tensor,
        *,
        vocab_size: int,
        realign: bool = True,
        all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        """Computes `W` and the norm on the device of the matrices.

        Args:
            inputs: This rank's rows of the input-embedding matrix [rows, hidden], without padding.
            outputs: The same rows of the output-embedding matrix; may be the same tensor.
            vocab_size: Rows of all ranks together.
            realign: False keeps only the rescaling.
            all_reduce: Sums a tensor over the ranks.
        """
        wide = torch.promote_types(inputs.dtype, torch.float32)
        hidden = inputs.shape[1]
        self.weight: Tensor | None = None
        rows = inputs.split(ROWS_AT_ONCE)
        self.norm = all_reduce(torch.cat([part.to(wide).norm(dim=1) for part in rows]).sum()) / vocab_size
        if realign:
            gram = torch.zeros(hidden, hidden, dtype=wide, device=inputs.device)
            cross = torch.zeros_like(gram)
            for i, o in zip(rows, outputs.split(ROWS_AT_ONCE), strict=True):
                o = o.to(wide)
                gram += o.T @ o
                cross += o.T @ i.to(wide)
            gram, cross = all_reduce(gram), all_reduce(cross)
            self.weight = torch.linalg.solve(gram + RIDGE * torch.eye(hidden, dtype=wide, device=inputs.device), cross)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Maps hidden states [..., hidden] to thoughts of the same shape, dtype and device."""
        z = hidden.to(self.norm.dtype)
        if self.weight is not None:
            z = z @ self.weight
        return (z * (self.norm / z.norm(dim=-1, keepdim=True).clamp_min(1e-6))).to(hidden.dtype)
