"""Moving keys to other positions: RoPE rotations compose, so a key is re-rotated by the offset alone."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .kv import KV, AnyKV, computed


def _halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


class Rotary:
    """Turns keys by a position offset, in the convention that the model was seen to use.

    Attributes:
        frequencies: Inverse frequencies [rotary_dim / 2], float64.
    """

    def __init__(self, frequencies: Tensor, style: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.frequencies = frequencies.double()
        self.style = style

    @classmethod
    def probe(cls, model: nn.Module, at: Callable[[int], KV], offset: int, tolerance: float) -> "Rotary | None":
        """Finds out by trial how the keys of a model are turned.

        Reading a configuration cannot tell halves from pairs, nor a scaling that composes from one that does not;
        computing the same tokens at two places can.

        Args:
            model: The model; its rotary module is the one that holds `inv_freq`.
            at: Computes the KV of the same few tokens from a given position on.
            offset: How far apart the two places are.
            tolerance: Largest difference allowed, relative to the largest key.

        Returns:
            The rotary, or None where no known rotation takes the keys of one place to those of the other.
        """
        inverse = [buffer for name, buffer in model.named_buffers() if name.split(".")[-1] == "inv_freq"]
        if not inverse or any(not torch.equal(inverse[0], other) for other in inverse):
            return None
        here, there = at(0), at(offset)
        for style in (_halves, _pairs):
            rotary = cls(inverse[0].detach().cpu(), style)
            pairs = zip(rotary.turn(here, offset).keys, there.keys, strict=True)
            if all((a - b).abs().max() <= tolerance * b.abs().max() for a, b in pairs):
                return rotary
        return None

    def turn(self, kv: AnyKV, offset: int) -> AnyKV:
        """The same positions, `offset` further on: keys re-rotated in float32 or wider, values shared."""
        if not offset:
            return kv
        angle = self.frequencies * offset
        angles: dict[torch.device, tuple[Tensor, Tensor]] = {}

        def turned(keys: Tensor) -> Tensor:
            if keys.device not in angles:
                wide = torch.promote_types(keys.dtype, torch.float32)
                angles[keys.device] = angle.cos().to(keys.device, wide), angle.sin().to(keys.device, wide)
            return self._turn(keys, *angles[keys.device])

        return KV(computed(turned, kv.keys), kv.values)

    def _turn(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        wide = cos.dtype
        dim = 2 * len(self.frequencies)
        turned = self.style(keys[..., :dim].to(wide), cos, sin).to(keys.dtype)
        return torch.cat([turned, keys[..., dim:]], dim=-1) if dim < keys.shape[-1] else turned
