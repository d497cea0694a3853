"""Keys and values of a run of positions."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class KV(NamedTuple):
    """Keys and values of some contiguous positions, never changed once made.

    One tensor per layer, each [kv_heads, positions, head_dim], on the layer's device. Keys carry their rotation.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]

    @property
    def positions(self) -> int:
        """Number of positions."""
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def split(self, lengths: Sequence[int]) -> list["KV"]:
        """Cuts along the positions; every part gets storage of its own, so that it can be freed alone."""
        keys = [[part.clone() for part in t.split(list(lengths), dim=1)] for t in self.keys]
        values = [[part.clone() for part in t.split(list(lengths), dim=1)] for t in self.values]
        return [KV([k[i] for k in keys], [v[i] for v in values]) for i in range(len(lengths))]

    def to(self, devices: Sequence[torch.device]) -> "KV":
        """The same KV with each layer on its device; what is there already is not copied."""
        keys = [t.to(device) for t, device in zip(self.keys, devices, strict=True)]
        return KV(keys, [t.to(device) for t, device in zip(self.values, devices, strict=True)])

    @classmethod
    def join(cls, parts: Sequence["KV"]) -> "KV":
        """Lays parts one behind the other, in new storage."""
        return cls(
            [torch.cat(layer, dim=1) for layer in zip(*(p.keys for p in parts), strict=True)],
            [torch.cat(layer, dim=1) for layer in zip(*(p.values for p in parts), strict=True)],
        )


class Placed(NamedTuple):
    """A KV and where it stands in a memory."""

    kv: KV
    start: int
    """First position it takes."""
    shift: int = 0
    """How far that is from where its keys were computed: they are re-rotated by as much."""
