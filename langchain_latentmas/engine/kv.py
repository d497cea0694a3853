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

    def packed(self) -> "PackedKV":
        """The same in 8 bits."""
        keys, values = [_packed(t, dim=1) for t in self.keys], [_packed(t, dim=2) for t in self.values]
        return PackedKV(*map(list, zip(*keys, strict=True)), *map(list, zip(*values, strict=True)))

    def first(self, positions: int) -> "KV":
        """Its first positions, as views."""
        return KV([t[:, :positions] for t in self.keys], [t[:, :positions] for t in self.values])

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
    def join(cls, parts: Sequence["AnyKV"]) -> "KV":
        """Lays parts one behind the other, in new storage."""
        return cls(
            [torch.cat(layer, dim=1) for layer in zip(*(p.keys for p in parts), strict=True)],
            [torch.cat(layer, dim=1) for layer in zip(*(p.values for p in parts), strict=True)],
        )


class PackedKV(NamedTuple):
    """A KV in 8 bits, for memories that wait to be read; never changed once made.

    A number is a code from -127 to 127 times a scale: for keys one scale per head and channel, since it is channels
    that differ most in size, for values one per head and position (KIVI, arXiv 2402.02750, section 3). Scales have the
    dtype that the KV had, and are rounded to it before the codes are.
    """

    key_codes: Sequence[Tensor]
    """Per layer int8 [kv_heads, positions, head_dim]."""
    key_scales: Sequence[Tensor]
    """Per layer [kv_heads, 1, head_dim]."""
    value_codes: Sequence[Tensor]
    """Per layer int8 [kv_heads, positions, head_dim]."""
    value_scales: Sequence[Tensor]
    """Per layer [kv_heads, positions, 1]."""

    @property
    def keys(self) -> list[Tensor]:
        """Keys as in `KV`, computed anew each time."""
        return [codes * scales for codes, scales in zip(self.key_codes, self.key_scales, strict=True)]

    @property
    def values(self) -> list[Tensor]:
        """Values as in `KV`, computed anew each time."""
        return [codes * scales for codes, scales in zip(self.value_codes, self.value_scales, strict=True)]

    @property
    def positions(self) -> int:
        """Number of positions."""
        return self.key_codes[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, scales included."""
        return sum(t.nbytes for part in self for t in part)

    def packed(self) -> "PackedKV":
        """Itself."""
        return self

    def to(self, devices: Sequence[torch.device]) -> "PackedKV":
        """The same with each layer on its device; what is there already is not copied."""
        return PackedKV(*([t.to(device) for t, device in zip(part, devices, strict=True)] for part in self))


AnyKV = KV | PackedKV
"""What a memory may be stored as; both have `keys`, `values`, `positions` and `nbytes`."""


class Placed(NamedTuple):
    """A KV and where it stands in a memory."""

    kv: AnyKV
    start: int
    """First position it takes."""
    shift: int = 0
    """How far that is from where its keys were computed: they are re-rotated by as much."""


def _packed(t: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Codes of a tensor, and their scales along one dimension."""
    scales = (t.abs().amax(dim, keepdim=True) / 127).clamp_min(torch.finfo(t.dtype).tiny)
    return (t / scales).round_().clamp_(-127, 127).to(torch.int8), scales
