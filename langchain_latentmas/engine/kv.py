"""Keys and values of a run of positions."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

AT_ONCE = 1 << 22  # numbers of all layers up to which what is computed of them may be held several times

Side = Tensor | Sequence[Tensor]
"""Keys or values of all layers: one tensor [layers, kv_heads, positions, head_dim], or one [kv_heads, positions,
head_dim] per layer. As one tensor, what is done to all of them is one call instead of one for each."""


def stacked(layers: Side) -> Side:
    """One tensor, where all layers are alike and on one device; else as it is."""
    if isinstance(layers, Tensor) or len({(t.shape, t.dtype, t.device) for t in layers}) > 1:
        return layers
    return torch.stack(list(layers))


def of_each(layers: Side, change: Callable[[Tensor], Tensor]) -> Side:
    """What `change` makes of every layer. It may get all at once, so it counts dimensions from the last one."""
    return change(layers) if isinstance(layers, Tensor) else [change(layer) for layer in layers]


def computed(change: Callable[..., Tensor], *sides: Side) -> Side:
    """As `of_each`, for what takes memory besides its result: from some size on layer by layer."""
    whole = [side for side in sides if isinstance(side, Tensor)]
    if len(whole) < len(sides):
        return [change(*layers) for layers in zip(*sides, strict=True)]
    if whole[0].numel() <= AT_ONCE:
        return change(*whole)
    first = change(*(side[0] for side in whole))
    result = first.new_empty(len(whole[0]), *first.shape)
    result[0] = first
    for i in range(1, len(result)):
        result[i] = change(*(side[i] for side in whole))
    return result


class KV(NamedTuple):
    """Keys and values of some contiguous positions, never changed once made.

    Each layer's are on its device. Keys carry their rotation.
    """

    keys: Side
    values: Side

    @property
    def positions(self) -> int:
        """Number of positions."""
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(map(_nbytes, self))

    def stacked(self) -> "KV":
        """The same with all layers in one tensor, where they are alike."""
        return KV(*map(stacked, self))

    def packed(self) -> "PackedKV":
        """The same in 8 bits."""
        key_scales = computed(partial(_scales, dim=-2), self.keys)
        value_scales = computed(partial(_scales, dim=-1), self.values)
        key_codes, value_codes = computed(_codes, self.keys, key_scales), computed(_codes, self.values, value_scales)
        return PackedKV(key_codes, key_scales, value_codes, value_scales)

    def first(self, positions: int) -> "KV":
        """Its first positions, as views."""
        return KV(*(of_each(side, lambda t: t[..., :positions, :]) for side in self))

    def split(self, lengths: Sequence[int]) -> list["KV"]:
        """Cuts along the positions; every part gets storage of its own, so that it can be freed alone.

        Raises:
            ValueError: If the lengths do not add up to the positions.
        """
        ends = list(accumulate(lengths))
        if ends[-1:] != [self.positions]:
            raise ValueError(f"{self.positions} positions cannot be cut into {list(lengths)}.")
        return [KV(*(_cut(side, end - n, end) for side in self)) for n, end in zip(lengths, ends, strict=True)]

    def to(self, devices: Sequence[torch.device]) -> "KV":
        """The same KV with each layer on its device; what is there already is not copied."""
        return KV(*(_moved(side, devices) for side in self))

    @classmethod
    def join(cls, parts: Sequence["AnyKV"]) -> "KV":
        """Lays parts one behind the other, in new storage."""
        return cls(_joined([part.keys for part in parts]), _joined([part.values for part in parts]))


class PackedKV(NamedTuple):
    """A KV in 8 bits, for memories that wait to be read; never changed once made.

    A number is a code from -127 to 127 times a scale: for keys one scale per head and channel, since it is channels
    that differ most in size, for values one per head and position (KIVI, arXiv 2402.02750, section 3). Scales have the
    dtype that the KV had, and are rounded to it before the codes are.
    """

    key_codes: Side
    """int8, of the shape of the keys."""
    key_scales: Side
    """The same with one position."""
    value_codes: Side
    """int8, of the shape of the values."""
    value_scales: Side
    """The same with one channel."""

    @property
    def keys(self) -> Side:
        """Keys as in `KV`, computed anew each time."""
        return computed(torch.mul, self.key_codes, self.key_scales)

    @property
    def values(self) -> Side:
        """Values as in `KV`, computed anew each time."""
        return computed(torch.mul, self.value_codes, self.value_scales)

    @property
    def positions(self) -> int:
        """Number of positions."""
        return self.key_codes[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, scales included."""
        return sum(map(_nbytes, self))

    def packed(self) -> "PackedKV":
        """Itself."""
        return self

    def to(self, devices: Sequence[torch.device]) -> "PackedKV":
        """The same with each layer on its device; what is there already is not copied."""
        return PackedKV(*(_moved(part, devices) for part in self))


AnyKV = KV | PackedKV
"""What a memory may be stored as; both have `keys`, `values`, `positions` and `nbytes`."""


class Placed(NamedTuple):
    """A KV and where it stands in a memory."""

    kv: AnyKV
    start: int
    """First position it takes."""
    shift: int = 0
    """How far that is from where its keys were computed: they are re-rotated by as much."""


def _nbytes(side: Side) -> int:
    return side.nbytes if isinstance(side, Tensor) else sum(layer.nbytes for layer in side)


def _cut(side: Side, start: int, end: int) -> Side:
    return of_each(side, lambda t: t[..., start:end, :].clone())


def _moved(side: Side, devices: Sequence[torch.device]) -> Side:
    if isinstance(side, Tensor) and len(set(devices)) == 1:
        return side.to(devices[0])
    return [layer.to(device) for layer, device in zip(side, devices, strict=True)]


def _joined(sides: Sequence[Side]) -> Side:
    whole = [side for side in sides if isinstance(side, Tensor)]
    if len(whole) == len(sides):
        return torch.cat(whole, dim=-2)
    return [torch.cat(layer, dim=-2) for layer in zip(*sides, strict=True)]


def _scales(t: Tensor, dim: int) -> Tensor:
    return (t.abs().amax(dim, keepdim=True) / 127).clamp_min(torch.finfo(t.dtype).tiny)


def _codes(t: Tensor, scales: Tensor) -> Tensor:
    return (t / scales).round_().clamp_(-127, 127).to(torch.int8)
