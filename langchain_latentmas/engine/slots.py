"""The slot cache: rows of different lengths side by side, under unmodified transformers decoders."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, CacheLayerMixin

from .kv import KV, AnyKV, Side, of_each
from .ragged import Ragged, power_of_two

LEAST = 128  # cells of a slot


class Window:
    """Which cells of the slots the next forward pass writes and sees; all layers share one.

    Attributes:
        rows: The slots that take part.
        ragged: How their new positions lie one behind the other.
    """

    def __init__(self, rows: slice, capacity: int, ragged: Ragged) -> None:
        """Takes down where all layers write.

        Args:
            rows: The slots that take part.
            capacity: Cells of a slot.
            ragged: How they lie.
        """
        self.rows, self.ragged, self._capacity = rows, ragged, capacity
        self._targets: dict[tuple[int, torch.device], Tensor] = {}

    def targets(self, heads: int, device: torch.device) -> Tensor:
        """Where each new position goes in the cells of all slots and heads laid end to end.

        Args:
            heads: Heads of keys and values.
            device: Where it is needed.

        Returns:
            [total * heads], the same tensor for every layer that is alike.
        """
        if (heads, device) not in self._targets:
            slots = torch.arange(self.rows.start, self.rows.stop, device=device)
            if self.ragged.owners is not None:
                slots = slots[self.ragged.owners.to(device)]
            elif self.ragged.new > 1:
                slots = slots.repeat_interleave(self.ragged.new)
            first = slots * heads * self._capacity + self.ragged.cells.to(device)
            self._targets[heads, device] = (
                first[:, None] + torch.arange(heads, device=device) * self._capacity
            ).flatten()
        return self._targets[heads, device]

    def padded(self, x: Tensor) -> Tensor:
        """[rows, new, ...] of [total, ...], zeros behind the rows that are shorter, as other decoders take them."""
        if self.ragged.even:
            return x.unflatten(0, (-1, self.ragged.new))
        return pad_sequence(x.split(self.ragged.counts), batch_first=True)

    def real(self, x: Tensor) -> Tensor:
        """[total, ...] of [rows, new, ...]: `padded` undone."""
        if self.ragged.even:
            return x.flatten(0, 1)
        return torch.cat([row[:count] for row, count in zip(x, self.ragged.counts, strict=True)])


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [slots, kv_heads, capacity, head_dim]; a row writes at its own positions."""

    is_compileable = True
    is_sliding = False

    def __init__(self, cache: "SlotCache") -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the slots, of all layers if they are alike, once the model has shown shape, dtype and device."""
        if not self.cache.allocate():
            self.keys, self.values = map(self.cache.new_side, (key_states[0], value_states[0]))
            self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """What `put` does, as transformers calls it: with padding, which is not written.

        Args:
            key_states: [rows, kv_heads, new, head_dim].
            value_states: The same shape, its own head_dim.
            *args: Ignored; transformers passes them to some layers.
            **kwargs: Ignored, likewise.

        Returns:
            As `put`.
        """
        real = self.cache.window.real
        return self.put(real(key_states.transpose(1, 2)), real(value_states.transpose(1, 2)))

    def put(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new keys and values and returns views of all cells in sight.

        Args:
            keys: [total, kv_heads, head_dim].
            values: The same shape, its own head_dim.

        Returns:
            Keys and values [rows, kv_heads, length, head_dim], views of the slots.
        """
        if not self.is_initialized:
            self.lazy_initialization(keys[None].transpose(1, 2), values[None].transpose(1, 2))
        window = self.cache.window
        targets, length = window.targets(keys.shape[1], keys.device), window.ragged.length
        self.keys.view(-1, self.keys.shape[3]).index_copy_(0, targets, keys.flatten(0, 1))
        self.values.view(-1, self.values.shape[3]).index_copy_(0, targets, values.flatten(0, 1))
        return self.keys[window.rows, :, :length], self.values[window.rows, :, :length]

    def get_seq_length(self) -> int:
        """0: positions and masks are always given, so transformers derives neither from the cache."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Cells in sight, and their offset."""
        return self.cache.window.ragged.length, 0

    def get_max_length(self) -> int:
        """Cells of a slot."""
        return self.cache.capacity

    get_max_cache_shape = get_max_length  # its name before transformers 5.20


class SlotCache(Cache):
    """One slot per live row; sizes are powers of two, so that a short batch on a large model stays small.

    Attributes:
        slots: How many there are.
        capacity: Cells of each.
        window: What the next forward pass writes and sees; set before it.
    """

    window: Window

    def __init__(self, layers: int, like: KV | None = None) -> None:
        """Makes an empty cache.

        Args:
            layers: Number of the model's layers that hold keys and values.
            like: A KV of the model; if its layers are stacked, so are those of the slots.
        """
        self.slots, self.capacity = 1, LEAST
        self._like = [side for side in like or () if isinstance(side, Tensor)]
        self._whole: list[Tensor] = []  # keys and values [layers, slots, kv_heads, capacity, head_dim], if stacked
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])

    @property
    def bytes_per_position(self) -> int:
        """Bytes that one position of one row takes over all layers; 0 before the first forward pass."""
        return sum(t.nbytes for t in self._tensors) // (self.slots * self.capacity)

    def clear(self) -> None:
        """Empties the cache as it was when it was made; its layers know it, so it does not go when it is forgotten."""
        self.slots, self.capacity = 1, LEAST
        self._whole = []
        for layer in self.layers:
            layer.keys, layer.values, layer.is_initialized = None, None, False

    def new_side(self, like: Tensor) -> Tensor:
        """Slots for keys or values, of one layer or of all, as in a KV."""
        # Zeros, not empty: a masked cell has weight 0, and 0 times a stray NaN would be NaN.
        return like.new_zeros(*like.shape[:-3], self.slots, like.shape[-3], self.capacity, like.shape[-1])

    def allocate(self) -> bool:
        """Allocates the slots of all layers in one, if it is known that they are alike."""
        if len(self._like) < 2:
            return False
        self._whole = [self.new_side(side) for side in self._like]
        for layer, keys, values in zip(self.layers, *self._whole, strict=True):
            layer.keys, layer.values, layer.is_initialized = keys, values, True
        return True

    def reserve(self, slots: int, capacity: int) -> None:
        """Makes room for `slots` rows of `capacity` cells; what is live stays."""
        self.resize(max(self.slots, power_of_two(slots)), max(self.capacity, power_of_two(capacity)))

    def resize(self, slots: int, capacity: int) -> None:
        """Takes on a number of slots and cells, powers of two; what is beyond them is lost."""
        if (slots, capacity) != (self.slots, self.capacity):
            both = min(slots, self.slots), min(capacity, self.capacity)
            self.slots, self.capacity = slots, capacity
            for side, name in enumerate(("keys", "values")):
                if not self._whole:
                    for layer in self.layers:
                        if layer.is_initialized:
                            setattr(layer, name, self._filled(getattr(layer, name)[: both[0], :, : both[1]]))
                    continue
                kept = self._whole[side][..., : both[0], :, : both[1], :].clone()
                self._whole[side] = kept  # what was there goes before what comes
                for layer in self.layers:
                    delattr(layer, name)
                self._whole[side] = self._filled(kept)
                for layer, own in zip(self.layers, self._whole[side], strict=True):
                    setattr(layer, name, own)

    def blank(self, slot: int) -> None:
        """Zeroes a slot."""
        for t in self._tensors:
            t[..., slot, :, :, :] = 0

    def write(self, slot: int, start: int, kv: AnyKV) -> None:
        """Copies a KV into the cells from `start` on."""
        sides, cells = (kv.keys, kv.values), slice(start, start + kv.positions)
        if not (self._whole or self.allocate()):
            for layer, keys, values in zip(self.layers, *sides, strict=True):
                if not layer.is_initialized:
                    layer.lazy_initialization(keys[None], values[None])
        for mine, new in zip(self._sides, sides, strict=True):
            if isinstance(mine, Tensor) and isinstance(new, Tensor):
                mine[:, slot, :, cells] = new
            else:
                for slots, layer in zip(mine, new, strict=True):
                    slots[slot, :, cells] = layer

    def read(self, slot: int, start: int, end: int) -> KV:
        """Copies the cells [start, end) of a slot out."""
        return KV(*(of_each(side, lambda t: t[..., slot, :, start:end, :].clone()) for side in self._sides))

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` cells of slot `source` over those of `target`."""
        for t in self._tensors:  # none, if no row has written anything yet
            t[..., target, :, :length, :] = t[..., source, :, :length, :]

    @property
    def _sides(self) -> tuple[Side, Side]:
        if self._whole:
            keys, values = self._whole
            return keys, values
        return [layer.keys for layer in self.layers], [layer.values for layer in self.layers]

    @property
    def _tensors(self) -> list[Tensor]:
        return self._whole or [t for layer in self.layers if layer.is_initialized for t in (layer.keys, layer.values)]

    def _filled(self, kept: Tensor) -> Tensor:
        """Slots of the size they have now, with what was in those before."""
        new = self.new_side(kept[..., 0, :, :, :])
        new[..., : kept.shape[-4], :, : kept.shape[-2], :] = kept
        return new
