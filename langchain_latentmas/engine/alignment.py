"""The training-free map from the last hidden state to the input-embedding space."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .linear import linear

RIDGE = 1e-5
ROWS_AT_ONCE = 16384  # vocabulary rows per product, so that a 150k vocabulary needs no second copy of the matrices


class Alignment:
    """Turns a hidden state into the next input embedding (paper, section 3.1 and equation 3).

    `z = h·W`, rescaled to the mean row norm of the input embeddings, with `W = solve(OᵀO + 1e-5·I, OᵀI)`; without
    `realign`, `W` is left out. `W` is computed in float32, or in the model's own dtype if that is wider.

    Attributes:
        weight: `W` [hidden, hidden], or None where only the rescaling is done.
        norm: Mean row norm of the input embeddings, a scalar tensor.
    """

    def __init__(
        self, inputs: Tensor, outputs: Tensor, realign: bool, embed: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Computes `W` and the norm on the device of the matrices.

        Args:
            inputs: Input-embedding matrix [vocab, hidden].
            outputs: Output-embedding matrix [vocab, hidden]; may be the same tensor.
            realign: False keeps only the rescaling.
            embed: Makes input embeddings of token ids; None where they are the rows of the matrix as they are.
        """
        wide = torch.promote_types(inputs.dtype, torch.float32)
        hidden = inputs.shape[1]
        embed = embed or inputs.__getitem__
        self._transposed: Tensor | None = None
        with torch.no_grad():
            rows = torch.arange(len(inputs), device=inputs.device).split(ROWS_AT_ONCE)
            self.norm = torch.cat([embed(ids).to(wide).norm(dim=1) for ids in rows]).mean()
            if realign:
                gram = torch.zeros(hidden, hidden, dtype=wide, device=inputs.device)
                cross = torch.zeros_like(gram)
                for ids, o in zip(rows, outputs.split(ROWS_AT_ONCE), strict=True):
                    o = o.to(inputs.device, wide)
                    gram += o.T @ o
                    cross += o.T @ embed(ids).to(wide)
                gram += RIDGE * torch.eye(hidden, dtype=wide, device=inputs.device)
                self._transposed = torch.linalg.solve(gram, cross).T.contiguous()

    @classmethod
    def of(cls, model: nn.Module, realign: bool) -> "Alignment":
        """The alignment of a causal language model, from its input and output embeddings."""
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
        # Called, not only read: those of some models, as of Gemma, multiply their rows.
        return cls(inputs.weight.detach(), outputs.weight.detach(), realign, inputs)

    @property
    def weight(self) -> Tensor | None:
        """`W`."""
        return None if self._transposed is None else self._transposed.T

    def __call__(self, hidden: Tensor) -> Tensor:
        """Maps hidden states [..., hidden] to thoughts of the same shape, dtype and device."""
        z = hidden.to(self.norm.dtype)
        if self._transposed is not None:
            z = linear(z, self._transposed)
        return (z * (self.norm / z.norm(dim=-1, keepdim=True).clamp_min(1e-6))).to(hidden.dtype)
